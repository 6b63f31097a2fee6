"""Command lines of the library: flags in, one call, results out."""

import sys
from collections.abc import Callable

from absl import app

from mister_jax.errors import InputError


def run(main: Callable[[], int | None]) -> None:
    """Runs a script's `main` after its flags are parsed.

    Its result, if any, is the exit status. An `InputError` ends the program with one line on stderr
    and exit status 2. Other exceptions are errors of the program and keep their traceback.
    """

    def guarded(arguments: list[str]) -> int:
        try:
            if len(arguments) > 1:
                raise InputError(f"argument {arguments[1]!r}; allowed: flags, --name=value")
            return main() or 0
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2

    app.run(guarded)
