"""Importing this module turns compiler optimizations on for prosody.

Tests turn optimizations off, because most programs run for a shorter time than the optimizations
would take. Without optimizations, extracting prosody takes four times as long.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest

from mister_jax.extraction import speech
from mister_jax.parallel import partitioning

_create = speech.ProsodyEncoder.__init__


def _options(platform: str) -> dict[str, Any]:
    options = _fast_compiler_options(platform)
    return {**options, "xla_backend_optimization_level": 1} if platform == "cpu" else options


@functools.wraps(_create)
def _create_with_optimizations(self: speech.ProsodyEncoder, **arguments: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partitioning, "fast_compiler_options", _options)
        _create(self, **arguments)


_fast_compiler_options = partitioning.fast_compiler_options
speech.ProsodyEncoder.__init__ = _create_with_optimizations  # type: ignore[method-assign]
