"""Layers of one kind in a row, compiled once: their parameters are stacked and a scan runs them."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.nn.dropout import DialogueKeys, KeySource

Remat = Literal["none", "full", "dots"]

_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}

_ROWS: contextvars.ContextVar[jax.sharding.Sharding | None] = contextvars.ContextVar(
    "rows", default=None
)


@contextlib.contextmanager
def rows_sharded(sharding: jax.sharding.Sharding) -> Iterator[None]:
    """While a program is traced, what goes from layer to layer of a `Stack` is so sharded.

    Where kernels are sharded over the devices that share out the rows, too, the compiler would
    otherwise rather move all activations than put a layer's kernels together.
    """
    token = _ROWS.set(sharding)
    try:
        yield
    finally:
        _ROWS.reset(token)


def _as_rows(x: jax.Array) -> jax.Array:
    sharding = _ROWS.get()
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


class Stack(nnx.Module):
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
        collect: bool = False,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs all layers.

        Args:
          x: what the first layer reads.
          *inputs: what every layer is given besides.
          deterministic: no dropout.
          rngs: source of dropout keys; each layer gets its own.
          collect: give what each layer gave, too.

        Returns:
          What the last layer gave, and if `collect` that of all layers [L, ...], else None.
        """
        graph, params = nnx.split(self.layers)
        key = None if deterministic or rngs is None else rngs.dropout()

        def run(x: jax.Array, scanned: Any) -> tuple[jax.Array, jax.Array | None]:
            layer_params, index = scanned
            layer = nnx.merge(graph, layer_params)
            options = {"deterministic": deterministic, "rngs": _of_layer(key, index)}
            x = _as_rows(layer(_as_rows(x), *inputs, **options))
            return x, x if collect else None

        if self.remat != "none":
            run = jax.checkpoint(run, policy=_POLICIES[self.remat], prevent_cse=False)
        return jax.lax.scan(run, x, (params, jnp.arange(self.num_layers)))


def _of_layer(key: jax.Array | None, index: jax.Array) -> KeySource | None:
    if key is None:
        return None
    if key.shape:
        return DialogueKeys(jax.vmap(jax.random.fold_in, (0, None))(key, index))
    return nnx.Rngs(dropout=jax.random.fold_in(key, index))
