"""The GRU: scan, gradient and masks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax.nn import GRU, PerExampleRngs, gru_scan, run_grus

LENGTHS = (7, 3, 5)
MASK = np.arange(7) < np.array(LENGTHS)[:, None]


def make_gru(*sizes, seed=0, **options):
    return nnx.jit(lambda: GRU(*sizes, **options, rngs=nnx.Rngs(seed)))()


def inputs(in_dim, seed=0):
    return np.random.default_rng(seed).normal(size=(*MASK.shape, in_dim)).astype(np.float32)


def scan_arguments(groups=2, hidden_dim=4, seed=0):
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.normal(size=shape).astype(np.float32)

    steps, batch = MASK.shape[::-1]
    mask = np.broadcast_to(MASK.T[:, None], (steps, groups, batch))
    return (
        normal(steps, groups, batch, 3 * hidden_dim),
        mask,
        normal(groups, hidden_dim, 3 * hidden_dim),
        normal(groups, hidden_dim),
    )


def plain_scan(gates, mask, kernel, bias_n):
    """Computes `gru_scan` directly from the equations; JAX differentiates this function."""

    def step(state, inputs):
        gate, valid = inputs
        gate_r, gate_z, gate_n = jnp.split(gate, 3, axis=-1)
        from_r, from_z, from_n = jnp.split(jnp.einsum("gbi,gio->gbo", state, kernel), 3, axis=-1)
        reset, update = jax.nn.sigmoid(gate_r + from_r), jax.nn.sigmoid(gate_z + from_z)
        new = jnp.tanh(gate_n + reset * (from_n + bias_n[:, None]))
        state = jnp.where(valid[..., None], (1 - update) * new + update * state, state)
        return state, state

    start = jnp.zeros((*gates.shape[1:3], kernel.shape[1]))
    return jax.lax.scan(step, start, (gates, mask))[1]


def numpy_gru(gru, x, length):
    """Computes the outputs of one unpadded dialogue step by step in float64."""
    x = x[:length].astype(np.float64)
    for layer in gru.layers:
        names = ("input_kernel", "recurrent_kernel", "input_bias", "recurrent_bias")
        from_input, from_state, input_bias, state_bias = (
            np.asarray(getattr(layer, name)[...], np.float64) for name in names
        )
        directions, hidden_dim = from_state.shape[:2]
        outputs = np.zeros((directions, length, hidden_dim))
        for direction in range(directions):
            state = np.zeros(hidden_dim)
            for t in reversed(range(length)) if direction else range(length):
                i = np.split(x[t] @ from_input[:, direction] + input_bias[direction], 3)
                s = np.split(state @ from_state[direction] + state_bias[direction], 3)
                reset, update = (1 / (1 + np.exp(-i[gate] - s[gate])) for gate in (0, 1))
                new = np.tanh(i[2] + reset * s[2])
                state = outputs[direction, t] = (1 - update) * new + update * state
        x = np.concatenate(outputs, axis=-1)
    return x


@jax.jit
def value_and_gradients(gru, x):
    """Returns outputs, and gradients of their weighted sum with respect to parameters and x."""
    graphdef, params = gru

    def total(params, x):
        outputs = nnx.merge(graphdef, params)(x, MASK)
        return (jnp.where(MASK[..., None], outputs, 0) * weights(outputs.shape[1:])).sum(), outputs

    (_, outputs), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, x)
    return outputs, gradients


def weights(shape):
    return np.cos(np.arange(np.prod(shape), dtype=np.float32)).reshape(shape)


@nnx.jit
def run(gru, x):
    return gru(x, MASK)


def test_gru_scan_equals_the_equations():
    arguments = scan_arguments()
    states, expected = (jax.jit(scan)(*arguments) for scan in (gru_scan, plain_scan))
    np.testing.assert_allclose(states, expected, atol=1e-6)


def test_gradient_of_gru_scan_equals_automatic_differentiation():
    gates, mask, kernel, bias_n = scan_arguments()

    def gradient(scan):
        def total(gates, kernel, bias_n):
            states = scan(gates, mask, kernel, bias_n)
            return (states * jnp.sin(jnp.arange(states.size).reshape(states.shape))).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(gates, kernel, bias_n)

    for value, expected in zip(gradient(gru_scan), gradient(plain_scan), strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-5)


def test_gru_scan_and_its_gradient_work_under_vmap():
    first, second = scan_arguments(seed=1), scan_arguments(seed=2)
    stacked = [np.stack(pair) for pair in zip(first, second, strict=True)]

    def gradient(gates, mask, kernel, bias_n):
        return jax.grad(lambda k: (gru_scan(gates, mask, k, bias_n) ** 2).sum())(kernel)

    for function in (gru_scan, gradient):
        results, alone = jax.jit(jax.vmap(function))(*stacked), jax.jit(function)
        for index, arguments in enumerate((first, second)):
            np.testing.assert_allclose(results[index], alone(*arguments), atol=1e-5)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_layers_and_directions_equal_a_step_by_step_gru(bidirectional):
    gru = make_gru(3, 4, 2, bidirectional=bidirectional)
    x = inputs(3)
    outputs = run(gru, x)
    assert outputs.shape == (*MASK.shape, 8 if bidirectional else 4)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(outputs[row, :length], numpy_gru(gru, x[row], length), atol=1e-6)
    assert not np.asarray(outputs)[~MASK].any()


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padding_does_not_change_outputs_or_gradients(garbage):
    gru = make_gru(3, 4, 2)
    clean = np.where(MASK[..., None], inputs(3), 0)
    dirty = np.where(MASK[..., None], clean, garbage)
    results = (value_and_gradients(nnx.split(gru), x) for x in (dirty, clean))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *results)


def test_bfloat16_is_close_to_float32():
    full, half = (make_gru(3, 4, 2, dtype=dtype) for dtype in (None, "bfloat16"))
    outputs = run(half, inputs(3))
    assert outputs.dtype == jnp.bfloat16
    np.testing.assert_allclose(outputs.astype(jnp.float32), run(full, inputs(3)), atol=0.03)


def test_run_grus_equals_each_gru_alone():
    speech, text = make_gru(3, 4, 2), make_gru(5, 4, 2, seed=1)
    outputs = nnx.jit(run_grus)((speech, text), (inputs(3), inputs(5)), MASK)
    np.testing.assert_allclose(outputs[0], run(speech, inputs(3)), atol=1e-6)
    np.testing.assert_allclose(outputs[1], run(text, inputs(5)), atol=1e-6)


def test_run_grus_refuses_grus_of_different_shapes():
    grus = GRU(3, 4, 2, rngs=nnx.Rngs(0)), GRU(3, 4, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="same depth and hidden size"):
        run_grus(grus, (inputs(3), inputs(3)), MASK)
    with pytest.raises(ValueError, match="2 GRUs, 1 inputs"):
        run_grus(grus[:1] * 2, (inputs(3),), MASK)


def test_dropout_is_applied_between_layers_only():
    @nnx.jit
    def train(gru, x):
        keys = PerExampleRngs.from_batch_key(jax.random.key(0), len(LENGTHS))
        return gru(x, MASK, deterministic=False, rngs=keys)

    for layers, changes in ((1, False), (2, True)):
        gru = GRU(3, 4, layers, dropout=0.5, rngs=nnx.Rngs(0))
        dropped = train(gru, inputs(3))
        changed = np.asarray(dropped) != np.asarray(run(gru, inputs(3)))
        assert changed.any() == changes


@pytest.mark.parametrize("sizes", [(0, 4, 1), (3, 0, 1), (3, 4, 0)])
def test_sizes_below_one_raise(sizes):
    with pytest.raises(ValueError, match="at least 1"):
        GRU(*sizes, rngs=nnx.Rngs(0))


@pytest.mark.parity
def test_three_layers_equal_pytorch_on_packed_sequences():
    import torch

    num_layers, in_dim, hidden_dim = 3, 6, 4
    torch.manual_seed(0)
    reference = torch.nn.GRU(in_dim, hidden_dim, num_layers, bidirectional=True, batch_first=True)
    gru = GRU(in_dim, hidden_dim, num_layers, rngs=nnx.Rngs(0))

    def both_directions(kind, layer, read=torch.Tensor.detach):
        names = (f"{kind}_l{layer}{end}" for end in ("", "_reverse"))
        return np.stack([read(getattr(reference, name)).numpy() for name in names])

    def in_our_layout(layer, read=torch.Tensor.detach):
        return {
            "input_kernel": both_directions("weight_ih", layer, read).transpose(2, 0, 1),
            "recurrent_kernel": both_directions("weight_hh", layer, read).transpose(0, 2, 1),
            "input_bias": both_directions("bias_ih", layer, read),
            "recurrent_bias": both_directions("bias_hh", layer, read),
        }

    for index, layer in enumerate(gru.layers):
        for name, value in in_our_layout(index).items():
            getattr(layer, name).set_value(jnp.asarray(value))

    x = torch.tensor(inputs(in_dim), requires_grad=True)
    packed = torch.nn.utils.rnn.pack_padded_sequence(
        x, torch.tensor(LENGTHS), batch_first=True, enforce_sorted=False
    )
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(reference(packed)[0], batch_first=True)
    (expected * torch.tensor(weights((MASK.shape[1], 2 * hidden_dim)))).sum().backward()

    outputs, (gradients, x_gradient) = value_and_gradients(nnx.split(gru), inputs(in_dim))
    np.testing.assert_allclose(outputs, expected.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(x_gradient, x.grad.numpy(), atol=1e-4)
    for index in range(num_layers):
        for name, value in in_our_layout(index, lambda parameter: parameter.grad).items():
            gradient = gradients["layers"][index][name][...]
            np.testing.assert_allclose(gradient, value, atol=1e-4, err_msg=f"layer {index} {name}")


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_steps_of_a_unidirectional_gru_equal_its_scan(dtype):
    gru = make_gru(5, 4, 2, bidirectional=False, dtype=dtype)
    x = inputs(5)
    expected = jax.jit(gru)(x, np.ones_like(MASK)).astype(np.float32)
    state = gru.initial_state(len(x))
    step = nnx.jit(lambda gru, state, x: gru.step(state, x))
    for position in range(x.shape[1]):
        state, output = step(gru, state, x[:, position])
        assert output.dtype == dtype
        np.testing.assert_allclose(output.astype(np.float32), expected[:, position], atol=1e-5)
    with pytest.raises(ValueError, match="steps need a GRU with one direction"):
        GRU(5, 4, rngs=nnx.Rngs(0)).initial_state(1)


def test_run_grus_refuses_grus_of_different_dtypes():
    grus = (
        GRU(3, 4, rngs=nnx.Rngs(0)),
        GRU(3, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)),
    )
    with pytest.raises(ValueError, match="dtypes bfloat16, float32; allowed: one dtype"):
        run_grus(grus, (inputs(3), inputs(3)), MASK)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("param_dtype", ["float32", "float64"])
def test_a_gru_runs_in_float64_with_x64(dtype, param_dtype):
    with jax.enable_x64(True):
        gru = make_gru(3, 4, bidirectional=False, dtype=dtype, param_dtype=param_dtype)
        outputs, gradients = nnx.jit(nnx.value_and_grad(lambda gru: gru(inputs(3), MASK).sum()))(
            gru
        )
        assert outputs.dtype == dtype
        assert {leaf.dtype.name for leaf in jax.tree.leaves(gradients)} == {param_dtype}
        state, output = gru.step(gru.initial_state(len(LENGTHS)), inputs(3)[:, 0])
        assert output.dtype == state[0].dtype == dtype
