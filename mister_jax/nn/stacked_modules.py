"""Modules with the same structure that run as one batched computation, compiled only once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mister_jax.nn.dropout import KeySource, rngs_from_key
from mister_jax.nn.rngs import make_rngs


class StackedModules(nnx.Module):
    """M modules that differ only in their parameters, each applied to separate inputs.

    The call is vectorized over the modules, so their matrix products are batched. For layers that
    are applied one after the other, use `ScannedLayers`.

    Attributes:
      stack: One module whose parameters are stacked along a leading axis M.

    Args:
      make_module: Function that creates one module from its `rngs`. The module is called as
        `module(*inputs, deterministic=..., rngs=...)`. `StackedModules.initial_state` and
        `StackedModules.step` call the module's methods with the same names.
      num_modules: Number of modules M.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, make_module: Callable[[nnx.Rngs], Any], num_modules: int, *, rngs: nnx.Rngs):
        self.num_modules = num_modules
        keys = jax.random.split(rngs.params(), num_modules)
        self.stack = nnx.vmap(lambda key: make_module(make_rngs(key)))(keys)

    def __call__(
        self, *inputs: jax.Array, deterministic: bool = True, rngs: KeySource | None = None
    ) -> Any:
        """Applies each module to its inputs.

        Args:
          *inputs: Arguments of the modules, [M, ...].
          deterministic: Whether to disable dropout.
          rngs: Source of dropout keys; each module gets a different key.

        Returns:
          Outputs of the modules, [M, ...].
        """
        graph, params = nnx.split(self.stack)
        keys = None
        if not deterministic and rngs is not None:
            keys = jnp.stack([rngs.dropout() for _ in range(self.num_modules)])

        def apply_one(params: Any, keys: jax.Array | None, *inputs: jax.Array) -> Any:
            module_rngs = None if keys is None else rngs_from_key(keys)
            module = nnx.merge(graph, params)
            return module(*inputs, deterministic=deterministic, rngs=module_rngs)

        return jax.vmap(apply_one)(nnx.as_pure(params), keys, *inputs)

    def initial_state(self, batch_size: int) -> Any:
        """Returns the states of all modules before the first `step`, [M, ...]."""
        state = self.stack.initial_state(batch_size)
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (self.num_modules, *leaf.shape)), state
        )

    def step(self, state: Any, *inputs: jax.Array) -> tuple[Any, Any]:
        """Applies the `step` of each module to its state and its inputs.

        Args:
          state: States of the modules, [M, ...].
          *inputs: Arguments of the modules, [M, ...].

        Returns:
          The new states and the outputs of the modules, [M, ...].
        """
        graph, params = nnx.split(self.stack)

        def step_one(params: Any, state: Any, *inputs: jax.Array) -> tuple[Any, Any]:
            return nnx.merge(graph, params).step(state, *inputs)

        return jax.vmap(step_one)(nnx.as_pure(params), state, *inputs)
