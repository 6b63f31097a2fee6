"""Counts the floating-point operations of a traced program."""

from __future__ import annotations

import math
from typing import Any

from jax.extend import core


def program_flops(jaxpr: Any) -> float:
    """Counts the operations in a program's matrix products and convolutions.

    A multiply-add counts as two operations. Other operations are not counted. A scan's body is
    counted once per iteration, whereas XLA's cost analysis counts it only once. Recomputation in
    the backward pass is counted too. Of several branches, only the most expensive branch counts.

    Args:
      jaxpr: Jaxpr of the program.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            contracted_axes = params["dimension_numbers"][0][0]
            shape = equation.invars[0].aval.shape
            terms = math.prod(shape[axis] for axis in contracted_axes)
            total += 2.0 * equation.outvars[0].aval.size * terms
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            out_channels = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * equation.outvars[0].aval.size * kernel.size / out_channels
        elif name == "cond":
            total += max(program_flops(branch.jaxpr) for branch in params["branches"])
        else:
            inner = sum(map(program_flops, core.jaxprs_in_params(params)))
            total += inner * (params["length"] if name == "scan" else 1)
    return total
