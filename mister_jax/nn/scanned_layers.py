"""Layers of one kind in a row, compiled once: their parameters are stacked and a scan runs them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.nn.dropout import KeySource, PerExampleRngs

Remat = Literal["none", "full", "dots"]

_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

Constraint = Callable[[Any], Any]
_PLACEMENT: contextvars.ContextVar[tuple[Constraint, Constraint] | None] = contextvars.ContextVar(
    "placement", default=None
)


@contextlib.contextmanager
def layer_sharding_constraints(parameters: Constraint, rows: Constraint) -> Iterator[None]:
    """While a program is traced, where the layers of a `ScannedLayers` compute.

    Where kernels are sharded over the devices that share out the rows, too, the compiler would
    otherwise rather move all activations, or add up products with parts of a kernel, than put a
    layer's kernels together.

    Args:
      parameters: gives a tree of the parameters of one layer a sharding, before it runs.
      rows: gives one to what goes from layer to layer.
    """
    token = _PLACEMENT.set((parameters, rows))
    try:
        yield
    finally:
        _PLACEMENT.reset(token)


class ScannedLayers(nnx.Module):
    """`num_layers` layers, each reading what the one before it gave.

    Every parameter of `layers` has a leading axis L. The layers differ in parameters alone.

    Args:
      make: makes one layer, a module called as `layer(x, *inputs, deterministic=..., rngs=...)`
        that gives an array like x.
      num_layers: L, at least 1.
      remat: what the backward pass computes anew: "none" of it, "full" for all, "dots" for all but
        matrix products with parameters.
      rngs: for the initial parameters.

    Raises:
      ValueError: no layers, or an unknown `remat`.
    """

    def __init__(
        self,
        make: Callable[[nnx.Rngs], nnx.Module],
        num_layers: int,
        *,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        if num_layers < 1:
            raise ValueError(f"{num_layers} layers; at least 1 is needed")
        if remat not in get_args(Remat):
            raise ValueError(f"remat {remat!r}; allowed: {', '.join(get_args(Remat))}")
        self.num_layers = num_layers
        self.remat = remat
        keys = jax.random.split(rngs.params(), num_layers)
        self.layers = nnx.vmap(lambda key: make(nnx.Rngs(key)))(keys)

    def __call__(
        self,
        x: jax.Array,
        *inputs: Any,
        deterministic: bool = True,
        rngs: KeySource | None = None,
        output_hidden_states: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs all layers.

        Args:
          x: what the first layer reads.
          *inputs: what every layer is given besides.
          deterministic: no dropout.
          rngs: source of dropout keys; each layer gets its own.
          output_hidden_states: give what each layer gave, too.

        Returns:
          What the last layer gave, and if `output_hidden_states` that of all layers [L, ...], else None.
        """
        graph, params = nnx.split(self.layers)
        params = nnx.as_pure(params)
        place_params, place_rows = _PLACEMENT.get() or (lambda x: x, lambda x: x)
        key = None if deterministic or rngs is None else rngs.dropout()

        def run(x: jax.Array, scanned: Any) -> tuple[jax.Array, jax.Array | None]:
            layer_params, index = scanned
            layer = nnx.merge(graph, place_params(layer_params))
            options = {"deterministic": deterministic, "rngs": _of_layer(key, index)}
            x = place_rows(layer(place_rows(x), *inputs, **options))
            return x, x if output_hidden_states else None

        if self.remat != "none":
            run = jax.checkpoint(run, policy=_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(run, x, (params, jnp.arange(self.num_layers)))


def _of_layer(key: jax.Array | None, index: jax.Array) -> KeySource | None:
    if key is None:
        return None
    if key.shape:
        return PerExampleRngs(jax.vmap(jax.random.fold_in, (0, None))(key, index))
    return nnx.Rngs(dropout=jax.random.fold_in(key, index))
