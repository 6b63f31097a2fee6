"""Scan over layers with stacked parameters, so that XLA compiles only one layer."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.nn.dropout import KeySource, fold_in, rngs_from_key
from mister_jax.nn.rngs import make_rngs

Remat = Literal["none", "full", "dots", "mlp"]

SAVED_WITH_MLP = "mlp"
"""Checkpoint name (`jax.ad_checkpoint`) of the activations that `remat="mlp"` saves."""

_REMAT_POLICIES: dict[str, Any] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names(SAVED_WITH_MLP),
}

Constraint = Callable[[Any], Any]
_CONSTRAINTS: contextvars.ContextVar[tuple[Constraint, Constraint] | None] = contextvars.ContextVar(
    "layer_sharding_constraints", default=None
)


@contextlib.contextmanager
def layer_sharding_constraints(parameters: Constraint, activations: Constraint) -> Iterator[None]:
    """Applies sharding constraints in all `ScannedLayers` traced in this context.

    The constraints matter if the batch and the kernels are sharded over the same devices. Without
    constraints, XLA may move all activations or sum partial products, instead of gathering one
    layer's kernels at a time.

    Args:
      parameters: Function that constrains the parameters of a layer before it runs.
      activations: Function that constrains the input and the output of each layer.
    """
    token = _CONSTRAINTS.set((parameters, activations))
    try:
        yield
    finally:
        _CONSTRAINTS.reset(token)


class ScannedLayers(nnx.Module):
    """Sequence of `num_layers` layers that differ only in their parameters.

    Attributes:
      layers: One layer whose parameters are stacked along a leading axis L.

    Args:
      make_layer: Function that creates one layer from its `rngs`. The layer is called as
        `layer(x, *inputs, deterministic=..., rngs=...)` and returns an array like x.
      num_layers: Number of layers L, at least 1.
      remat: Activations that the backward pass recomputes: "none"; "full", all activations; "dots",
        all except the results of matrix products with parameters; "mlp", all except those that
        the layer marks with the name `SAVED_WITH_MLP` (the wide activations of a decoder's MLP).
      rngs: RNGs for parameter initialization.

    Raises:
      ValueError: `num_layers` is below 1, or `remat` is unknown.
    """

    def __init__(
        self,
        make_layer: Callable[[nnx.Rngs], nnx.Module],
        num_layers: int,
        *,
        remat: Remat = "none",
        rngs: nnx.Rngs,
    ):
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers}; allowed: at least 1")
        if remat not in get_args(Remat):
            raise ValueError(f"remat={remat!r}; allowed: {', '.join(get_args(Remat))}")
        self.num_layers = num_layers
        self.remat = remat
        keys = jax.random.split(rngs.params(), num_layers)
        self.layers = nnx.vmap(lambda key: make_layer(make_rngs(key)))(keys)

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
          x: Input of the first layer.
          *inputs: Further inputs that every layer receives.
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys; each layer gets a different key.
          output_hidden_states: Whether to return the outputs of all layers.

        Returns:
          Output of the last layer, and the outputs of all layers [L, ...] if
          `output_hidden_states`, else None.
        """
        graph, params = nnx.split(self.layers)
        params = nnx.as_pure(params)
        constrain_params, constrain_activations = _CONSTRAINTS.get() or (lambda x: x, lambda x: x)
        key = None if deterministic or rngs is None else rngs.dropout()

        def run_layer(x: jax.Array, scanned: Any) -> tuple[jax.Array, jax.Array | None]:
            layer_params, index = scanned
            layer = nnx.merge(graph, constrain_params(layer_params))
            layer_rngs = None if key is None else rngs_from_key(fold_in(key, index))
            options = {"deterministic": deterministic, "rngs": layer_rngs}
            x = constrain_activations(layer(constrain_activations(x), *inputs, **options))
            return x, x if output_hidden_states else None

        if self.remat != "none":
            policy = _REMAT_POLICIES[self.remat]
            run_layer = jax.checkpoint(run_layer, policy=policy, prevent_cse=False)
        return jax.lax.scan(run_layer, x, (params, jnp.arange(self.num_layers)))
