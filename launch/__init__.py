"""Command lines of the library: flags in, one call, results out."""

import contextlib
import logging
import os
import pathlib
import sys
import traceback
import types
from collections.abc import Callable
from typing import Any

_is_command = sys.argv[0] == "-m"  # so it reads while `python -m launch.NAME` looks for NAME


def _keep_programs() -> None:
    """Keeps what is compiled, the small programs, too, so that a second start begins at once.

    Not where there is no home, or one that cannot be written: JAX would complain at each program.
    """
    with contextlib.suppress(OSError, RuntimeError):
        cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        (cache / "mister_jax").mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache / "mister_jax"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


if _is_command:
    _keep_programs()


def _tell(
    kind: type[BaseException], error: BaseException, trace: types.TracebackType | None
) -> None:
    """Says in one line that a package is not installed; leaves all else to Python."""
    if isinstance(error, ModuleNotFoundError):
        reason = " ".join(str(error).split())
        print(
            f"error: {reason}; `source .venv/bin/activate` where launch/demo.sh has been, or "
            "`pip install --editable .`",
            file=sys.stderr,
        )
    else:
        sys.__excepthook__(kind, error, trace)


if _is_command:
    sys.excepthook = _tell

from absl import app, flags  # noqa: E402

from mister_jax.errors import InputError  # noqa: E402

TERMINATED = 128 + 15
"""Exit status after SIGTERM, by the convention of shells: the work is not finished."""
_INTERRUPTED = 128 + 2  # likewise after Ctrl-C


def given_config(flag: flags.FlagHolder) -> Any:
    """The `ConfigDict` that a flag names.

    Raises:
      InputError: none was named, or its file is not there.
    """
    if not flag.value:
        raise InputError(
            f"--{flag.name} is needed: a file, such as configs/fusion.py:mosi_features"
        )
    try:
        flag.value.to_dict()
    except OSError as error:  # What ml_collections raises for a file that does not exist.
        raise InputError(_missing_config(flag.name, str(error))) from error
    return flag.value


def _missing_config(flag: str, message: str) -> str:
    """Returns the error for a config file that cannot be opened, from ml_collections' message."""
    reason = " ".join(message.rpartition("[Errno")[2].partition("]")[2].split())
    return f"--{flag}: {reason}; needed: a Python file, its path from the current folder"


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` after its flags are parsed.

    Its result, if any, is the exit status. A flag that cannot be read, an `InputError`, a place
    that cannot be written and a JAX platform that is not there end the program with one line on
    stderr and exit status 2, Ctrl-C with status 130. Other exceptions are errors of the program and
    keep their traceback.
    """

    def guarded(arguments: list[str]) -> int:
        # JAX tries each kind of device and tells of those that are not there. Where one should be
        # there, it warns.
        logging.getLogger("jax._src.xla_bridge").setLevel(logging.WARNING)
        try:
            if len(arguments) > 1:
                raise InputError(f"argument {arguments[1]!r}; allowed: flags, --name=value")
            return main() or 0
        except InputError as error:
            told = str(error)
        except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
            told = f"{error.filename}: {error.strerror}; needed: a place that can be written"
        except (AssertionError, RuntimeError) as error:
            # Where JAX starts the platforms that it is told to use.
            if not traceback.extract_tb(error.__traceback__)[-1].filename.endswith("xla_bridge.py"):
                raise
            platforms = os.environ.get("JAX_PLATFORMS", "")
            reason = " ".join(str(error).split()) or "none is there"
            told = f"no devices of JAX_PLATFORMS={platforms} ({reason}); allowed: cpu, or unset it"
        except KeyboardInterrupt:
            print("stopped by Ctrl-C", file=sys.stderr)
            return _INTERRUPTED
        print(f"error: {told}", file=sys.stderr)
        return 2

    app.run(guarded, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, ValueError, TypeError, KeyError, OSError) as error:
        # A config file raises its errors while flags are parsed, wrapped in a report with their
        # traceback. The error that was raised first says what is wrong.
        chain: list[BaseException] = [error]
        while chain[-1].__cause__ or chain[-1].__context__:
            chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
        told = chain[-1]
        if not isinstance(told, InputError):
            # A wrong name in a config is wrapped, too, and loses its line break.
            told = next((known for known in chain[::-1] if "Did you mean" in str(known)), error)
        reason = told.args[0] if isinstance(told, KeyError) else told
        message = " ".join(str(reason).partition("Traceback")[0].split())
        message = message or type(told).__name__
        place = _place_of(message, arguments)
        if "failure to load" in message and "[Errno" in message:
            # An override of a config whose file is missing.
            names = (given.partition("=")[0] for given in arguments if given.startswith("-"))
            flag = next(name.lstrip("-").partition(".")[0] for name in names if "." in name)
            place, message = "", _missing_config(flag, message)
        if place and isinstance(chain[-1], KeyError) and "Did you mean" not in message:
            message = f"no such field{_allowed_at(place, arguments)}"
        print(f"error: {place and place + ': '}{message}", file=sys.stderr)
        sys.exit(2)
    except SystemExit:
        # After absl has printed what was asked for, as a failure.
        if any(argument.lstrip("-").startswith("help") for argument in arguments):
            sys.exit(0)
        raise


def _place_of(message: str, arguments: list[str]) -> str:
    """The argument that sets what a config does not have, where the message tells its name alone.

    `message` is as of ml_collections: 'widht' Did you mean "width" instead of "widht"?
    """
    name = message.partition(" Did you mean")[0]
    places = [given.partition("=")[0] for given in arguments if "." in given.partition("=")[0]]
    found = [place for place in places if name.strip("'\"") in place.split(".")]
    return found[0] if found else ""


def _allowed_at(place: str, arguments: list[str]) -> str:
    """What a config has where an argument such as --config.model.NAME sets something."""
    from ml_collections import ConfigDict, config_flags  # Not every command needs it.

    flag, *parts = place.lstrip("-").split(".")
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(flag, flag_values=values)
    kept, sys.argv = sys.argv, ["", *(a for a in arguments if a.lstrip("-").startswith(f"{flag}="))]
    try:
        values(sys.argv)  # The flag's parser looks for what is set in sys.argv.
    finally:
        sys.argv = kept
    config = values[flag].value
    for part in parts[:-1]:
        config = config and config.get(part)
    return f"; allowed: {', '.join(config)}" if isinstance(config, ConfigDict) else ""
