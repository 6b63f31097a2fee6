"""One-line errors for devices that run out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from mister_jax.errors import InputError


@contextlib.contextmanager
def explain_oom(where: str, work: str, hint: str) -> Iterator[None]:
    """Converts XLA's out-of-memory errors to `InputError`.

    Args:
      where: Start of the error message, such as the work directory.
      work: Description of the work that needed the memory.
      hint: Suggestion to the user, as a noun phrase.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{where}: out of memory with {work} ({reason}); try {hint}") from error
