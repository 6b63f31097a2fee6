"""Keeps training from opening the test split.

The functions in `training.loop` and `training.runs` that load data run under
`training_splits_only`. All functions that read a split of a dataset, in `data.storage` and
`data.folds`, call `check_split_allowed` first.
"""

import contextlib
import contextvars
from collections.abc import Iterator

TRAINING_SPLITS = ("train", "validation")

_is_training = contextvars.ContextVar("is_training", default=False)


@contextlib.contextmanager
def training_splits_only() -> Iterator[None]:
    """Makes `check_split_allowed` refuse splits outside `TRAINING_SPLITS` in this context.

    This function can also be used as a decorator.
    """
    token = _is_training.set(True)
    try:
        yield
    finally:
        _is_training.reset(token)


@contextlib.contextmanager
def all_splits_allowed() -> Iterator[None]:
    """Lifts `training_splits_only`, for code that pools all splits and then makes new splits."""
    token = _is_training.set(False)
    try:
        yield
    finally:
        _is_training.reset(token)


def check_split_allowed(split: str) -> None:
    """Raises RuntimeError if training opens a split outside `TRAINING_SPLITS`.

    Args:
        split: Name of the split that is about to be opened.
    """
    if _is_training.get() and split not in TRAINING_SPLITS:
        raise RuntimeError(f"training opens split {split!r}; allowed: {', '.join(TRAINING_SPLITS)}")
