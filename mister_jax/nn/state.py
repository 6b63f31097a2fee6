"""Splitting a module's state into trained and frozen parameters."""

from __future__ import annotations

from typing import Any

from flax import nnx


def split_params(model: nnx.Module, trainable: Any) -> tuple[Any, Any, Any]:
    """Splits a module into its graph definition, trained parameters and other arrays.

    `nnx.merge` of the three gives the module back.

    Args:
      model: Module; may hold shapes instead of arrays.
      trainable: NNX filter of the trained parameters.
    """
    graph, state = nnx.split(model)
    params, frozen = nnx.split_state(state, trainable, ...)
    return graph, nnx.as_pure(params), nnx.as_pure(frozen)
