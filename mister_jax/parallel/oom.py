"""Clear errors when the devices run out of memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from mister_jax.errors import InputError


@contextlib.contextmanager
def explain_oom(where: str, work: str, hint: str) -> Iterator[None]:
    """Turns XLA's out-of-memory error into an `InputError`.

    Args:
      where: Text that the error message starts with, such as the work directory.
      work: What was running.
      hint: What the user can try, as a noun phrase.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = str(error).partition("\n")[0][:200]
        raise InputError(f"{where}: out of memory with {work} ({reason}); try {hint}") from error
