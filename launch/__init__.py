"""Command lines of the library: flags in, one call, results out."""

import sys
from collections.abc import Callable

from absl import app, flags

from mister_jax.errors import InputError


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
