"""Losses, compared with loops in float64, at extreme values and across devices."""

import dataclasses
import functools
import itertools
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mister_jax import MisterE, MisterEOutput, losses
from mister_jax.models import EXPERTS
from mister_jax.tasks.fusion import LossConfig, mister_e_loss

NUM_CLASSES, FUSION_DIM, NUM_EXPERTS = 4, 5, 3
TINY = 1e-300


def softmax(x):
    exponentials = np.exp(x.astype(np.float64) - x.max())
    return exponentials / exponentials.sum()


def numpy_focal(logits, labels, mask, gamma):
    values = []
    for position in np.argwhere(mask):
        p = softmax(logits[tuple(position)])[labels[tuple(position)]]
        values.append(-((1 - p) ** gamma) * np.log(p + TINY))
    return np.mean(values) if values else 0.0


def numpy_supervised_contrastive(representations, labels, mask, temperature):
    valid = representations[mask].astype(np.float64)
    valid /= np.linalg.norm(valid, axis=-1, keepdims=True)
    label, values = labels[mask], []
    for anchor in range(len(valid)):
        others = [other for other in range(len(valid)) if other != anchor]
        positives = [other for other in others if label[other] == label[anchor]]
        if not positives:
            continue
        similarity = valid @ valid[anchor] / temperature
        denominator = np.log(np.sum(np.exp(similarity[others])))
        values.append(np.mean([denominator - similarity[other] for other in positives]))
    return np.mean(values) if values else 0.0


def numpy_expert_agreement(expert_logits, mask, expert_mask, experts):
    pairs = list(itertools.combinations(experts, 2))
    total = 0.0
    for (row, step), (a, b) in itertools.product(np.argwhere(mask), pairs):
        if expert_mask[row, step, a] and expert_mask[row, step, b]:
            p, q = softmax(expert_logits[row, step, a]), softmax(expert_logits[row, step, b])
            total += np.sum(p * np.log(p / q)) + np.sum(q * np.log(q / p))
    return total / len(pairs) / mask.any(1).sum()


def numpy_gate_responsibility(gate, expert_logits, labels, mask, expert_mask, sharpness):
    values = []
    for position in np.argwhere(mask):
        position = tuple(position)
        experts = np.flatnonzero(expert_mask[position])
        p = [softmax(expert_logits[position][expert])[labels[position]] for expert in experts]
        responsibility = np.array(p) ** sharpness
        responsibility /= max(responsibility.sum(), TINY)
        values.append(-np.sum(responsibility * np.log(gate[position][experts])))
    return np.mean(values)


@pytest.fixture(scope="module")
def batch():
    """Eight dialogues: one is empty, one has no labels, and some utterances lack experts."""
    random = np.random.default_rng(0)
    mask = np.arange(6) < np.array([6, 1, 0, 4, 2, 5, 3, 3])[:, None]
    label = np.where(random.random(mask.shape) < 0.9, random.integers(NUM_CLASSES, size=(8, 6)), -1)
    label[7] = -1
    gate = random.random((8, 6, NUM_EXPERTS)).astype(np.float32) + 0.1
    return {
        "gate": gate / gate.sum(-1, keepdims=True),
        "expert_logits": random.normal(size=(8, 6, NUM_EXPERTS, NUM_CLASSES)).astype(np.float32)
        * 2,
        "representations": random.normal(size=(8, 6, FUSION_DIM)).astype(np.float32),
        "expert_mask": random.random((8, 6, NUM_EXPERTS)) < 0.7,
        "label": label.astype(np.int32),
        "mask": mask,
        "labeled": mask & (label >= 0),
    }


def focal_loss(batch, **options):
    return losses.focal(
        batch["expert_logits"][:, :, 0], batch["label"], batch["labeled"], **options
    )


def contrastive_loss(batch, **options):
    return losses.supervised_contrastive(
        batch["representations"], batch["label"], batch["labeled"], **options
    )


def agreement_loss(batch, **options):
    return losses.expert_agreement(
        batch["expert_logits"], batch["labeled"], batch["expert_mask"], **options
    )


def gate_loss(batch, **options):
    return losses.gate_responsibility(
        batch["gate"],
        batch["expert_logits"],
        batch["label"],
        batch["labeled"],
        batch["expert_mask"],
        **options,
    )


ALL_LOSSES = pytest.mark.parametrize(
    "loss", [focal_loss, contrastive_loss, agreement_loss, gate_loss]
)
FLOATS = ("gate", "expert_logits", "representations")
WEIGHTS = losses.LossWeights(gate=0.5)


def run(loss, batch, **options):
    """Computes a loss of a batch in one compiled program."""
    return float(jax.jit(functools.partial(loss, **options))(batch))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(loss, batch):
    floats = {name: batch[name] for name in FLOATS}
    return jax.value_and_grad(lambda floats: loss(batch | floats))(floats)


contrastive_gradient = jax.jit(jax.value_and_grad(losses.supervised_contrastive))


def assert_finite(tree):
    assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
def test_focal_equals_its_definition(batch, gamma):
    expected = numpy_focal(batch["expert_logits"][:, :, 0], batch["label"], batch["labeled"], gamma)
    assert run(focal_loss, batch, gamma=gamma) == pytest.approx(expected, rel=1e-5)


def test_focal_with_gamma_zero_is_the_cross_entropy(batch):
    logits, labels = batch["expert_logits"][:, :, 0], batch["label"]
    labels = np.maximum(labels, 0)
    everywhere = np.ones_like(batch["mask"])
    cross_entropy = jax.jit(optax.losses.softmax_cross_entropy_with_integer_labels)
    expected = np.asarray(cross_entropy(logits, labels)).mean()
    value = jax.jit(functools.partial(losses.focal, gamma=0.0))(logits, labels, everywhere)
    np.testing.assert_allclose(value, expected, rtol=1e-6)


def test_negative_focal_gamma_raises(batch):
    with pytest.raises(ValueError, match=r"gamma -1\.0"):
        focal_loss(batch, gamma=-1.0)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 10.0])
def test_contrastive_equals_its_definition(batch, temperature):
    expected = numpy_supervised_contrastive(
        batch["representations"], batch["label"], batch["labeled"], temperature
    )
    value = run(contrastive_loss, batch, temperature=temperature)
    assert value == pytest.approx(expected, rel=2e-5)


def test_contrastive_ignores_anchors_without_positives():
    representations = np.eye(3, FUSION_DIM, dtype=np.float32)
    label, everywhere = np.array([0, 0, 1]), np.ones(3, bool)
    # All cosines are 0, and each anchor has two candidates, so the loss of the two anchors with a
    # positive is log(2).
    value, _ = contrastive_gradient(representations, label, everywhere)
    np.testing.assert_allclose(value, np.log(2), rtol=1e-6)
    no_positives, gradient = contrastive_gradient(representations, np.arange(3), everywhere)
    assert no_positives == 0
    assert not gradient.any()


def test_contrastive_of_opposite_vectors_is_exact_at_low_temperature():
    opposites, label = np.float32([[1, 0], [-1, 0]]), np.zeros(2, int)
    for temperature in (1.0, 0.01, 0.001):
        # The only candidate is the positive.
        value, gradient = contrastive_gradient(
            opposites, label, np.ones(2, bool), temperature=temperature
        )
        np.testing.assert_allclose(value, 0, atol=1e-6)
        assert_finite(gradient)


def test_contrastive_does_not_depend_on_vector_lengths(batch):
    scaled = batch | {"representations": batch["representations"] * 1000}
    expected = run(contrastive_loss, batch)
    assert run(contrastive_loss, scaled) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("experts", [(0, 1, 2), (0, 2)])
def test_agreement_equals_its_definition(batch, experts):
    expected = numpy_expert_agreement(
        batch["expert_logits"], batch["labeled"], batch["expert_mask"], experts
    )
    assert run(agreement_loss, batch, experts=experts) == pytest.approx(expected, rel=1e-5)


def test_agreement_of_one_expert_is_zero(batch):
    assert agreement_loss(batch, experts=(1,)) == 0


def test_agreement_of_equal_experts_is_zero(batch):
    same = np.repeat(batch["expert_logits"][:, :, :1], NUM_EXPERTS, axis=2)
    assert run(agreement_loss, batch | {"expert_logits": same}) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 5.0])
def test_gate_loss_equals_its_definition(batch, sharpness):
    names = ("gate", "expert_logits", "label", "labeled", "expert_mask")
    expected = numpy_gate_responsibility(*(batch[name] for name in names), sharpness)
    value = run(gate_loss, batch, sharpness=sharpness)
    assert value == pytest.approx(expected, rel=1e-5)


def test_gate_loss_has_gradients_toward_the_responsible_expert_and_none_for_the_logits():
    # The first expert assigns 0.9 to the label, and the second assigns 0.1. The third is missing.
    logits = np.log(np.float32([[0.9, 0.1], [0.1, 0.9], [1.0, 1e-6]]))
    present = np.array([True, True, False])

    def loss(scores, logits, sharpness):
        gate = jax.nn.softmax(jnp.where(present, scores, -1e30))
        return losses.gate_responsibility(
            gate, logits, jnp.array(0), jnp.array(True), present, sharpness=sharpness
        )

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    for sharpness, odds in ((0.0, 1.0), (1.0, 9.0), (2.0, 81.0)):
        optimal_scores = np.float32([np.log(odds), 0, 0])
        for gradient in gradients(optimal_scores, logits, sharpness):
            np.testing.assert_allclose(gradient, 0, atol=1e-6)
    gradient, _ = gradients(np.zeros(3, np.float32), logits, 1.0)
    np.testing.assert_allclose(gradient, [-0.4, 0.4, 0], atol=1e-6)


def test_negative_gate_sharpness_raises(batch):
    with pytest.raises(ValueError, match=r"sharpness -1\.0"):
        gate_loss(batch, sharpness=-1.0)


@ALL_LOSSES
def test_values_outside_the_mask_do_not_change_loss_or_gradient(batch, loss):
    value, gradients = value_and_gradients(loss, batch)
    outside = ~batch["labeled"]
    for garbage in (np.nan, np.inf, 1e30):
        dirty = {name: batch[name].copy() for name in (*FLOATS, "label")}
        for name in FLOATS:
            dirty[name][outside] = garbage
        dirty["label"][outside] = 1000
        dirty_value, dirty_gradients = value_and_gradients(loss, batch | dirty)
        np.testing.assert_allclose(dirty_value, value, rtol=1e-6)
        for name in FLOATS:
            np.testing.assert_allclose(dirty_gradients[name], gradients[name], atol=1e-6)


@ALL_LOSSES
def test_huge_bfloat16_values_have_finite_losses_and_gradients(batch, loss):
    huge = {name: jnp.asarray(np.sign(batch[name]) * 1e4, jnp.bfloat16) for name in FLOATS}
    value, gradients = value_and_gradients(loss, batch | huge)
    assert value.dtype == jnp.float32
    assert_finite((value, gradients))


@ALL_LOSSES
def test_zero_representations_and_equal_logits_have_finite_gradients(batch, loss):
    flat = {name: np.zeros_like(batch[name]) for name in FLOATS}
    assert_finite(value_and_gradients(loss, batch | flat))


@ALL_LOSSES
def test_loss_of_a_batch_without_labels_is_zero(batch, loss):
    unlabeled = batch | {"labeled": np.zeros_like(batch["mask"])}
    value, gradients = value_and_gradients(loss, unlabeled)
    assert value == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


@ALL_LOSSES
@pytest.mark.parametrize("utterances", [1, 500])
def test_short_and_long_dialogues_have_finite_losses(loss, utterances):
    random = np.random.default_rng(0)
    mask = np.ones((1, utterances), bool)
    dialogue = {
        "gate": np.full((1, utterances, NUM_EXPERTS), 1 / NUM_EXPERTS),
        "expert_logits": random.normal(size=(1, utterances, NUM_EXPERTS, NUM_CLASSES)),
        "representations": random.normal(size=(1, utterances, FUSION_DIM)),
        "expert_mask": np.ones((1, utterances, NUM_EXPERTS), bool),
        "label": random.integers(NUM_CLASSES, size=mask.shape),
        "labeled": mask,
    }
    value, gradients = value_and_gradients(loss, dialogue)
    assert_finite((value, gradients))
    assert (value == 0) == (utterances == 1 and loss is contrastive_loss)


@ALL_LOSSES
def test_shares_of_eight_devices_sum_to_the_global_loss_and_gradient(batch, loss):
    expected, expected_gradients = value_and_gradients(loss, batch)
    devices = jax.tree.map(lambda leaf: leaf[:, None], batch)  # one dialogue per device

    def share_and_gradients(dialogue):
        def share(floats):
            return loss(dialogue | floats, axis_name="data")

        return jax.value_and_grad(share)({name: dialogue[name] for name in FLOATS})

    shares, gradients = jax.pmap(share_and_gradients, axis_name="data")(devices)
    np.testing.assert_allclose(shares.sum(), expected, rtol=1e-6)
    for name in FLOATS:
        np.testing.assert_allclose(gradients[name][:, 0], expected_gradients[name], atol=1e-6)


@pytest.fixture(scope="module")
def training(tiny_config, make_batch):
    """Returns parameters, eight dialogues, the loss function, and its value and gradients."""
    config = dataclasses.replace(tiny_config, kernel_sizes=(), fusion_layers=0)
    graphdef, params = nnx.split(MisterE(config, rngs=nnx.Rngs(0)))
    batch = make_batch((5, 1, 4, 2, 5, 3, 1, 2))
    batch["mask"][2] = batch["speech_present"][2] = batch["text_present"][2] = False

    def loss(params, batch, axis_name=None, weights=WEIGHTS):
        output = nnx.merge(graphdef, params)(
            batch["speech"],
            batch["text"],
            batch["mask"],
            speech_present=batch["speech_present"],
            text_present=batch["text_present"],
        )
        return losses.mister_e(output, batch["label"], batch["mask"], weights, axis_name=axis_name)

    value_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return params, batch, loss, value_and_gradients(params, batch)


def assert_summed_shares_equal(summed, expected):
    (total, parts), gradients = summed
    (expected_total, expected_parts), expected_gradients = expected
    assert parts.keys() == expected_parts.keys()
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)
    for name, value in expected_parts.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, expected_gradients
    )


def test_gradients_under_pmap_equal_those_on_one_device(training):
    params, batch, loss, expected = training

    def step(params, batch):
        shares = jax.value_and_grad(loss, has_aux=True)(params, batch, "data")
        return jax.lax.psum(shares, "data")

    devices = jax.tree.map(lambda leaf: leaf[:, None], batch)
    summed = jax.pmap(step, axis_name="data", in_axes=(None, 0))(params, devices)
    assert_summed_shares_equal(jax.tree.map(lambda leaf: leaf[0], summed), expected)


@pytest.mark.parametrize("varying", [True, False])
def test_gradients_under_shard_map_equal_those_on_one_device(training, varying):
    params, batch, loss, expected = training
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(params, batch):
        if varying:  # Each device's copy gets the gradient of the device's share of the loss.
            params = jax.lax.pcast(params, "data", to="varying")
        value, gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, "data")
        if varying:  # JAX sums only the gradients of parameters that the devices share.
            gradients = jax.lax.psum(gradients, "data")
        return jax.lax.psum(value, "data"), gradients

    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    assert_summed_shares_equal(jax.jit(step)(params, batch), expected)


def test_total_is_the_weighted_sum_with_the_released_weights(training):
    *_, ((total, parts), _) = training
    expected = parts["mixture"] + parts["speech"] + parts["text"] + parts["fusion"]
    expected += 2 * parts["contrastive"] + 0.1 * parts["agreement"] + 0.5 * parts["gate"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert all(part > 0 for part in parts.values())
    assert dataclasses.replace(WEIGHTS, gate=0.0) == losses.LossWeights()
    # Every weight has a loss, except "score", because the model predicts no scores.
    assert parts.keys() | {"score"} == {field.name for field in dataclasses.fields(WEIGHTS)}


@pytest.mark.parametrize(
    "left_out",
    [
        ("contrastive", "gate"),
        ("agreement", "speech"),
        ("mixture",),
        [name for name, weight in dataclasses.asdict(WEIGHTS).items() if weight],
    ],
    ids=" ".join,
)
def test_losses_with_weight_zero_are_left_out(training, left_out):
    params, batch, loss, ((total, parts), _) = training
    weights = dataclasses.replace(WEIGHTS, **dict.fromkeys(left_out, 0.0))
    actual, actual_parts = jax.jit(functools.partial(loss, weights=weights))(params, batch)
    expected = total - sum(getattr(WEIGHTS, name) * parts[name] for name in left_out)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    remaining = {name: part for name, part in parts.items() if name not in left_out}
    chex.assert_trees_all_close(actual_parts, remaining, rtol=1e-6)


def test_gate_loss_trains_the_gate_and_through_its_input_the_experts(training):
    params, batch, loss, _ = training
    gradients = jax.jit(jax.grad(lambda params: loss(params, batch)[1]["gate"]))(params)
    for module in ("gate", "speech", "text", "fusion"):
        leaves = jax.tree.leaves(gradients[module])
        assert any(np.abs(leaf).max() > 1e-5 for leaf in leaves), module


def test_unlabeled_utterances_count_in_no_part_of_the_loss(training, tiny_config):
    params, batch, loss, _ = training
    loss = jax.jit(loss)
    for label in (-1, tiny_config.num_classes):
        _, parts = loss(params, batch | {"label": np.full_like(batch["label"], label)})
        assert not any(parts.values())
    last = batch["label"] == tiny_config.num_classes - 1
    assert last.any()
    totals = [
        loss(params, batch | {"label": np.where(last, label, batch["label"])})[0]
        for label in (-1, tiny_config.num_classes)
    ]
    assert totals[0] == totals[1] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.zeros((8, 5, 4))}, r"^labels has shape \(8, 5, 4\); allowed: \(8, 5\)"),
        ({"mask": np.ones((8, 4), bool)}, r"^mask has shape \(8, 4\); allowed: \(8, 5\)"),
        ({"ratings": np.zeros((8, 5))}, r"^ratings has shape \(8, 5\); allowed: \(8, 5, "),
        ({"scores": np.zeros(8)}, r"^scores has shape \(8,\); allowed: \(8, 5\)"),
        ({"temperature": 0.0}, "temperature=0.0; allowed: positive"),
        ({"gamma": -1.0}, "gamma=-1.0, .*; allowed: 0 or more"),
        ({"weights": {"gate": 1.0}}, "weights={'gate': 1.0}; allowed: LossWeights"),
    ],
)
def test_wrong_arguments_raise_an_error_that_names_the_argument(make_batch, changes, message):
    batch = make_batch((5, 1, 4, 2, 5, 3, 1, 2))
    positions = batch["mask"].shape
    fields = {field.name: None for field in dataclasses.fields(MisterEOutput)}
    fields |= {"logits": np.zeros((*positions, NUM_CLASSES)), "experts": EXPERTS}
    output = MisterEOutput(**fields)
    arguments = {"labels": batch["label"], "mask": batch["mask"], **changes}
    with pytest.raises(ValueError, match=message):
        losses.mister_e(output, **arguments)


@pytest.mark.parametrize("experts", [("video",), "speech", None])
def test_an_output_with_wrong_experts_raises(experts):
    fields = {field.name: None for field in dataclasses.fields(MisterEOutput)}
    fields |= {"logits": np.zeros((2, 3, NUM_CLASSES)), "experts": experts}
    labels, mask = np.zeros((2, 3), int), np.ones((2, 3), bool)
    with pytest.raises(
        ValueError, match=r"output\.experts=.*; allowed: a tuple of speech, text, f"
    ):
        losses.mister_e(MisterEOutput(**fields), labels, mask)


def random_output(experts, positions=(3, 4), dtype=np.float32):
    """Makes an output without a model; disabled experts are not present."""
    random = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(random.normal(size=(*positions, *shape)), dtype)

    enabled = np.isin(EXPERTS, experts)
    representation = FUSION_DIM if "fusion" in experts else 0
    return MisterEOutput(
        logits=normal(NUM_CLASSES),
        expert_logits=normal(NUM_EXPERTS, NUM_CLASSES),
        gate=jnp.asarray(
            np.broadcast_to(enabled / enabled.sum(), (*positions, NUM_EXPERTS)), dtype
        ),
        expert_present=jnp.broadcast_to(enabled, (*positions, NUM_EXPERTS)),
        speech_context=normal(0),
        text_context=normal(0),
        speech_repr=normal(representation),
        text_repr=normal(representation),
        speech_present=jnp.ones(positions, bool),
        text_present=jnp.ones(positions, bool),
        experts=experts,
    )


@pytest.mark.parametrize("experts", [("speech", "text"), ("text",), ("text", "fusion"), EXPERTS])
def test_the_losses_are_those_of_the_experts_of_the_output(experts):
    output = random_output(experts)
    labels, mask = (
        np.random.default_rng(1).integers(NUM_CLASSES, size=(3, 4)),
        np.ones((3, 4), bool),
    )
    # Transformations keep the experts, and so does pickling.
    output = jax.jit(jax.vmap(lambda output: output))(pickle.loads(pickle.dumps(output)))
    assert output.experts == experts
    total, parts = losses.mister_e(output, labels, mask, WEIGHTS)
    assert np.isfinite(total)
    expected = {"mixture", *experts}
    expected |= {"contrastive"} if "fusion" in experts else set()
    expected |= {"agreement", "gate"} if len(experts) > 1 else set()
    assert parts.keys() == expected
    if len(experts) > 1:
        agreement = losses.expert_agreement(
            output.expert_logits, mask, experts=tuple(map(EXPERTS.index, experts))
        )
        np.testing.assert_allclose(parts["agreement"], agreement, rtol=1e-5)


@pytest.mark.parametrize("loss", [focal_loss, contrastive_loss, gate_loss])
def test_unlabeled_positions_inside_the_mask_do_not_count(batch, loss):
    everywhere = batch | {"labeled": batch["mask"]}
    value, gradients = value_and_gradients(loss, everywhere)
    expected, expected_gradients = value_and_gradients(loss, batch)
    assert (batch["mask"] != batch["labeled"]).any()
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    chex.assert_trees_all_close(gradients, expected_gradients, atol=1e-6)


@ALL_LOSSES
def test_integer_masks_equal_bool_masks(batch, loss):
    integers = {name: batch[name].astype(np.int32) * 2 for name in ("labeled", "expert_mask")}
    np.testing.assert_allclose(run(loss, batch | integers), run(loss, batch), rtol=1e-6)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_contrastive_temperatures_that_are_not_positive_raise(batch, temperature):
    with pytest.raises(ValueError, match=f"temperature={temperature}; allowed: positive"):
        contrastive_loss(batch, temperature=temperature)


@ALL_LOSSES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_losses_have_the_dtype_of_the_inputs_with_x64(batch, loss, dtype):
    expected, expected_gradients = value_and_gradients(loss, batch)
    with jax.enable_x64(True):
        inputs = batch | {name: jnp.asarray(batch[name], dtype) for name in FLOATS}
        inputs["label"] = batch["label"].astype(np.int64)
        value, gradients = value_and_gradients(loss, inputs)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((value, gradients))} == {dtype}
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name in FLOATS:
        np.testing.assert_allclose(gradients[name], expected_gradients[name], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_training_loss_has_the_dtype_of_the_output_with_x64(dtype):
    with jax.enable_x64(True):
        output = random_output(EXPERTS, dtype=dtype)

        def loss(logits, speech_repr):
            changed = dataclasses.replace(output, expert_logits=logits, speech_repr=speech_repr)
            return losses.mister_e(
                changed,
                jnp.zeros((3, 4), int),
                jnp.ones((3, 4), int),
                WEIGHTS,
                class_weights=[1.0] * NUM_CLASSES,
                logit_adjustment=[0.5] * NUM_CLASSES,
            )

        arguments = output.expert_logits, output.speech_repr
        results = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*arguments)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(results)} == {dtype}


@pytest.mark.parametrize("changes", [{}, {"mixture": "mean"}, {"mixture": "majority", "crf": True}])
def test_the_training_loss_needs_no_implicit_dtype_promotion(make_batch, tiny_config, changes):
    config = dataclasses.replace(tiny_config, **changes)
    batch, key = make_batch((5, 1, 4)), jax.random.key(0)
    with jax.numpy_dtype_promotion("strict"):
        model = nnx.eval_shape(lambda: MisterE(config, rngs=nnx.Rngs(0)))
        total, _ = nnx.eval_shape(lambda model: mister_e_loss(model, batch, key), model)
    assert total.dtype == jnp.float32


@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(weight):
    with pytest.raises(ValueError, match=f"LossWeights.gate={weight}; allowed: finite numbers of"):
        losses.LossWeights(gate=weight)


def test_every_hyperparameter_changes_the_training_loss(make_batch, tiny_config):
    changes = {"target": "ratings", "gamma": 1.0, "temperature": 0.5, "sharpness": 2.0}
    # `FusionTask` computes class weights and logit adjustment from the counts of the classes.
    others = {"class_weights", "logit_adjustment", "weights"}
    assert changes.keys() | others == {field.name for field in dataclasses.fields(LossConfig)}
    config = dataclasses.replace(tiny_config, kernel_sizes=(), fusion_layers=0)
    model = MisterE(config, rngs=nnx.Rngs(0))
    batch = make_batch((5, 1, 4))
    batch["ratings"] = np.random.default_rng(0).random((*batch["mask"].shape, config.num_classes))
    compute = nnx.jit(mister_e_loss, static_argnames=("axis_name", "config"))

    def total(**changes):
        loss_config = LossConfig(weights=WEIGHTS, **changes)
        return float(compute(model, batch, jax.random.key(0), config=loss_config)[0])

    default = total()
    for name, value in changes.items():
        assert total(**{name: value}) != pytest.approx(default, rel=1e-4), name


@pytest.fixture(scope="module")
def extreme(make_batch):
    """Dialogues of 500 utterances, of one utterance, and of four unlabeled utterances."""
    batch = make_batch((500, 1, 4))
    batch["label"][2] = -1
    return batch


def test_huge_bfloat16_outputs_have_finite_gradients(extreme, tiny_config):
    random = np.random.default_rng(0)
    positions, classes = extreme["mask"].shape, tiny_config.num_classes

    def huge(*shape):
        return jnp.asarray(random.choice([-1e4, 1e4], (*positions, *shape)), jnp.bfloat16)

    floats = {"logits": huge(classes), "expert_logits": huge(NUM_EXPERTS, classes)}
    floats |= {"speech_repr": huge(FUSION_DIM), "text_repr": huge(FUSION_DIM)}
    present = np.stack([extreme["speech_present"], extreme["text_present"]], axis=-1)
    other_outputs = {
        "gate": np.full((*positions, NUM_EXPERTS), 1 / NUM_EXPERTS),
        "expert_present": np.concatenate([present, extreme["mask"][..., None]], axis=-1),
        "speech_context": None,
        "text_context": None,
        "speech_present": extreme["speech_present"],
        "text_present": extreme["text_present"],
        "experts": EXPERTS,
    }

    def loss(floats):
        output = MisterEOutput(**floats, **other_outputs)
        return losses.mister_e(output, extreme["label"], extreme["mask"])

    (total, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
    chex.assert_tree_all_finite((total, parts, gradients))
    assert all(part > 0 for part in parts.values())


def test_training_step_with_huge_bfloat16_logits_has_finite_gradients(extreme, tiny_config):
    config = dataclasses.replace(tiny_config, dtype="bfloat16", input_dropout=0.2)
    graph, params = nnx.split(MisterE(config, rngs=nnx.Rngs(0)))

    def scaled(path, value):
        return value * 1e4 if "classifier" in jax.tree_util.keystr(path) else value

    params = jax.tree_util.tree_map_with_path(scaled, params)

    def loss(params):
        return mister_e_loss(nnx.merge(graph, params), extreme, jax.random.key(0))

    (total, parts), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    chex.assert_tree_all_finite((total, parts, gradients))
    assert parts["mixture"] > 1000


@pytest.mark.parametrize("field", ["label", "labeled"])
@pytest.mark.parametrize("loss", [focal_loss, contrastive_loss])
def test_labels_and_masks_of_a_different_shape_raise(batch, loss, field):
    with pytest.raises(AssertionError, match="shape"):
        loss(batch | {field: batch[field][:, :1]})
