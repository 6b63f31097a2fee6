"""Layers that several encoders share."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mister_jax.encoders.layers import gelu


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 2**-8)])
def test_gelu_is_exact_to_the_precision_of_its_type(dtype, tolerance):
    x = jnp.linspace(-6, 6, 1001, dtype=dtype)
    expected = jax.nn.gelu(x.astype(jnp.float32), approximate=False)
    actual = gelu(x)
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, rtol=tolerance, atol=1e-6)
