"""Parses a subcommand's flags, runs the subcommand, and prints user errors on one line."""

from __future__ import annotations

import errno
import importlib.util
import io
import logging
import os
import pathlib
import re
import sys
import traceback
from types import ModuleType
from typing import Any

from absl import app, flags
from absl import logging as absl_logging

from mister_jax.errors import InputError, MissingExtraError
from mister_jax.io import flatten

STOPPED_BY_SIGTERM = 128 + 15
"""Exit status of a command that SIGTERM has stopped early, following the shell convention."""
_STOPPED_BY_CTRL_C = 128 + 2
_STOPPED_BY_SIGPIPE = 128 + 13

# The text of an exception with several arguments is a tuple: these characters precede the message.
_PUNCTUATION = " ('"

# Maps messages about invalid flag values to clearer messages.
_CONVERSION_ERRORS = {
    "invalid literal for int()": "allowed: integers",
    "could not convert string to float": "allowed: numbers",
    "Non-boolean argument to boolean flag": "allowed: true, false",
}


# Errors about paths that cannot be written.
_UNWRITABLE_DEVICE = (errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_UNWRITABLE = (
    *_UNWRITABLE_DEVICE,
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
)


def run(module: ModuleType) -> None:
    """Parses the command line and runs `main` in a subcommand's module.

    If the module has `TAKES_ARGUMENTS = True`, `main` takes the list of all arguments that are not
    flags. Otherwise, `main` takes no arguments.

    The exit status is the result of `main`, or 0 for None. After invalid flags, an `InputError`, a
    missing extra, an unwritable path or a missing JAX platform, the command prints one line to
    stderr and exits with status 2. After Ctrl-C, the status is 130. If the process that reads a
    pipe has exited, the status is 141. Other exceptions are bugs and keep their traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        # If the terminal's encoding lacks a character, print an escape sequence instead.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    names = (argument.lstrip("-").partition("=")[0] for argument in sys.argv if argument[:1] == "-")
    if not {"h", "help", "helpshort", "helpfull"}.isdisjoint(names):
        print(_help(module))
        sys.exit(0)
    app.run(lambda arguments: _run_main(module, arguments), flags_parser=_parse_flags)


def required_config(flag: flags.FlagHolder) -> Any:
    """Returns the `ConfigDict` of a `--config` flag.

    Raises:
      InputError: The flag is not set, its file does not exist, or the config has an unknown field.
    """
    if not flag.value:
        raise InputError(
            f"--{flag.name} is needed: a packaged config, such as fusion:mosi_features, or the "
            "path of a Python file"
        )
    from mister_jax.tasks.config import check_sections

    try:
        # If the file does not exist, ml_collections raises an error on the first use of the config.
        getattr(flag.value, "to_dict", None)
    except OSError as error:
        raise InputError(_missing_config(flag.name, str(error))) from error
    check_sections(flag.value)
    return flag.value


def required_workdir(flag: flags.FlagHolder, meaning: str) -> str:
    """Returns the value of a flag that names a required directory.

    Raises:
      InputError: The flag is not set. The message ends with `meaning`.
    """
    if not flag.value:
        raise InputError(f"--{flag.name} is needed: {meaning}")
    return flag.value


def _run_main(module: ModuleType, arguments: list[str]) -> int:
    # By default, absl prints the time, the process and the line of code with each warning.
    absl_logging.get_absl_handler().setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    # At level INFO, JAX logs each kind of device that is missing.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
    try:
        if getattr(module, "TAKES_ARGUMENTS", False):
            return module.main(arguments[1:]) or 0
        if len(arguments) > 1:
            raise InputError(f"argument {arguments[1]!r}; allowed: flags, --name=value")
        status = module.main() or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # At exit, Python flushes standard output, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _STOPPED_BY_SIGPIPE
    except (InputError, MissingExtraError) as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (_UNWRITABLE if error.filename else _UNWRITABLE_DEVICE):
            raise
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror}; choose a path that can be written"
    except ValueError as error:  # Orbax converts errors of the file system.
        if os.strerror(errno.ENOSPC) not in str(error):
            raise
        message = f"{os.strerror(errno.ENOSPC)}; free some space, or choose another path"
    except (AssertionError, RuntimeError) as error:
        # An error raised in xla_bridge.py means that JAX could not initialize a platform in
        # JAX_PLATFORMS. Any other error is a bug.
        if not traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
            raise
        platforms = os.environ.get("JAX_PLATFORMS", "")
        reason = " ".join(str(error).split()) or "no device found"
        message = f"no devices for JAX_PLATFORMS={platforms} ({reason}); allowed: cpu, or unset it"
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr)
        return _STOPPED_BY_CTRL_C
    print(f"error: {message}", file=sys.stderr)
    return 2


def _help(module: ModuleType) -> str:
    """Returns a subcommand's docstring and flags, and the flags of modules such as `cluster`."""
    names = [module.__name__]
    for declaring in (module, *vars(module).values()):
        is_shared = isinstance(declaring, ModuleType) and declaring.__name__ not in names
        if is_shared and flags.FLAGS.get_key_flags_for_module(declaring.__name__):
            names.append(declaring.__name__)
    sections = [flags.FLAGS.module_help(name) for name in names]
    return "\n\n".join([(module.__doc__ or "").strip(), *(text.strip("\n") for text in sections)])


def _parse_flags(arguments: list[str]) -> list[str]:
    try:
        arguments = _resolve_packaged_configs(arguments)
        # config_flags reads overrides such as --config.seed=1 from sys.argv.
        sys.argv = arguments
        return flags.FLAGS(arguments)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Exception as error:  # A config file can raise any type.
        print(f"error: {_describe_flag_error(error, arguments)}", file=sys.stderr)
        sys.exit(2)


def _resolve_packaged_configs(arguments: list[str]) -> list[str]:
    """Replaces a packaged config's name, such as fusion in --config=fusion:meld, with its path."""
    if not _has_config_file_flag():
        return arguments
    resolved: list[str] = []
    for argument in arguments:
        follows_flag = bool(resolved) and resolved[-1] in ("--config", "-config")
        match = re.fullmatch(
            r"(--?config=)?(\w+)(:.*)?" if follows_flag else r"(--?config=)(\w+)(:.*)?", argument
        )
        if match:
            prefix, name, rest = (group or "" for group in match.groups())
            argument = f"{prefix}{_packaged_config_path(name)}{rest}"
        resolved.append(argument)
    return resolved


def _has_config_file_flag() -> bool:
    """Returns whether --config is a config file. Other subcommands use this flag differently."""
    return "config" in flags.FLAGS and (
        type(flags.FLAGS["config"]).__module__.startswith("ml_collections")
    )


def _packaged_config_path(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec("mister_jax.configs")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    paths = {
        path.stem: path
        for folder in folders
        for path in sorted(pathlib.Path(folder).glob("[!_]*.py"))
    }
    if name not in paths:
        raise InputError(
            f"--config={name}: no packaged config with this name; allowed: {', '.join(paths)}, or "
            "the path of a Python file"
        )
    return paths[name]


def _describe_flag_error(error: BaseException, arguments: list[str]) -> str:
    """Describes in one line why flags could not be parsed.

    If a config file raises an error, ml_collections wraps this error in other errors whose messages
    contain tracebacks. The root cause describes the problem.
    """
    chain = [error]
    while cause := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(cause)
    root_cause = chain[-1]
    for link in chain[::-1]:
        if location := _location_in_config(link, arguments):
            return f"{location}: {type(link).__name__}: {' '.join(str(link).split())}"
    if not isinstance(root_cause, InputError):
        # ml_collections also wraps its error about an unknown field.
        root_cause = next((link for link in chain[::-1] if "Did you mean" in str(link)), error)
    reason = root_cause.args[0] if isinstance(root_cause, KeyError) else root_cause
    before, _, python_traceback = str(reason).partition("Traceback")
    message = " ".join(before.split()) or type(root_cause).__name__
    if "Error whilst parsing config file" in message:
        message += "".join(f" {line}" for line in python_traceback.strip().splitlines()[-1:])
    for python_message, allowed in _CONVERSION_ERRORS.items():
        before, is_found, _ = message.partition(python_message)
        if is_found:
            message = f"{before.rstrip(_PUNCTUATION)} {allowed}"
    if "failure to load" in message and "[Errno" in message:
        # The command line overrides a field of a config whose file is missing.
        names = (argument.partition("=")[0] for argument in arguments if argument.startswith("-"))
        flag = next(name.lstrip("-").partition(".")[0] for name in names if "." in name)
        return _missing_config(flag, message)
    if "has no attribute 'get_config'" in message:
        # The message of ml_collections does not name the file.
        path = next((it for it in arguments if it.lstrip("-").startswith("config=")), "--config")
        return f"{path}: the file defines no function get_config, which returns the ConfigDict"
    override = _find_override(message, arguments)
    if override and isinstance(chain[-1], KeyError):
        similar = re.search(r'Did you mean "(.*?)"', message)
        hint = f"; did you mean {similar.group(1)}?" if similar else ""
        message = f"no such field{hint or _allowed_fields(override, arguments)}"
    unknown_flag = re.match(r"Unknown command line flag '(\w+)'", message)
    if unknown_flag:
        message += _field_with_name(unknown_flag.group(1), arguments)
    return f"{override}: {message}" if override else message


def _location_in_config(error: BaseException, arguments: list[str]) -> str:
    """Returns the file and line of a user's config file that raised an error, or ""."""
    if isinstance(error, InputError):
        return ""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    for filename, line in reversed(frames):
        path = os.path.relpath(filename)
        if any(path in argument or filename in argument for argument in arguments):
            return f"{path}: line {line}"
    return ""


def _missing_config(flag: str, message: str) -> str:
    """Converts ml_collections' message about an unreadable config file to a one-line error."""
    reason = " ".join(message.rpartition("[Errno")[2].partition("]")[2].split())
    return f"--{flag}: {reason}; needed: the path of a Python file from the current folder"


def _find_override(message: str, arguments: list[str]) -> str:
    """Returns the argument, such as --config.model.widht, that sets an unknown field."""
    # The message of ml_collections is: 'widht' Did you mean "width" instead of "widht"?
    field = message.partition(" Did you mean")[0].strip("'\"")
    names = [argument.partition("=")[0] for argument in arguments]
    return next((name for name in names if "." in name and field in name.split(".")), "")


def _allowed_fields(override: str, arguments: list[str]) -> str:
    """Lists the fields of the config section in which an override sets an unknown field."""
    from ml_collections import ConfigDict

    flag, *path = override.lstrip("-").split(".")
    section = _load_config(flag, arguments)
    for name in path[:-1]:
        section = section and section.get(name)
    return f"; allowed: {', '.join(section)}" if isinstance(section, ConfigDict) else ""


def _field_with_name(name: str, arguments: list[str]) -> str:
    """Returns a hint at the config field with the name of an unknown flag, such as data_dir."""
    from ml_collections import ConfigDict

    config = _load_config("config", arguments) if _has_config_file_flag() else None
    fields = flatten(config.to_dict()) if isinstance(config, ConfigDict) else {}
    paths = [path for path in fields if path.rpartition(".")[2] == name]
    return f". Did you mean: --config.{paths[0]}" if len(paths) == 1 else ""


def _load_config(flag: str, arguments: list[str]) -> Any:
    """Loads the config file of a flag, without the overrides of its fields; None without a file."""
    from ml_collections import config_flags

    values = flags.FlagValues()
    config_flags.DEFINE_config_file(flag, flag_values=values)
    original_argv = sys.argv
    sys.argv = ["", *(arg for arg in arguments if arg.lstrip("-").startswith(f"{flag}="))]
    try:
        values(sys.argv)
    finally:
        sys.argv = original_argv
    return values[flag].value
