"""Command lines of the library: flags in, one call, results out."""

import os
import platform
import sys
from collections.abc import Callable

# A step on CPU takes and frees gigabytes. By default glibc hands each piece back to the system,
# and the kernel clears it page by page when it is taken again. Kept, in huge pages, a training
# step of the released model takes 1.72 s in place of 2.03 s (2 cores, 8 dialogues of 64).
# glibc reads this only when a process starts.
_GLIBC_TUNABLES = ":".join(
    (
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.mmap_threshold=34359738368",
        "glibc.malloc.trim_threshold=68719476736",
        "glibc.malloc.arena_max=1",
    )
)
_is_command = sys.argv[0] == "-m"  # so it reads while `python -m launch.NAME` looks for NAME
if _is_command and platform.libc_ver()[0] == "glibc" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = _GLIBC_TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

from absl import app, flags  # noqa: E402

from mister_jax.errors import InputError  # noqa: E402


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` after its flags are parsed.

    Its result, if any, is the exit status. A flag that cannot be read and an `InputError` end the
    program with one line on stderr and exit status 2. Other exceptions are errors of the program
    and keep their traceback.
    """

    def guarded(arguments: list[str]) -> int:
        try:
            if len(arguments) > 1:
                raise InputError(f"argument {arguments[1]!r}; allowed: flags, --name=value")
            return main() or 0
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    app.run(guarded, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
    try:
        return flags.FLAGS(arguments)
    except (flags.Error, AttributeError, ValueError, TypeError, KeyError, OSError) as error:
        # A config file raises its errors while flags are parsed, wrapped in a report with their
        # traceback. The error that was raised first says what is wrong.
        first: BaseException = error
        while first.__cause__ or first.__context__:
            first = first.__cause__ or first.__context__  # type: ignore[assignment]
        told = first if isinstance(first, InputError) else error
        reason = told.args[0] if isinstance(told, KeyError) else told
        message = " ".join(str(reason).partition("Traceback")[0].split())
        print(f"error: {message or type(told).__name__}", file=sys.stderr)
        sys.exit(2)
