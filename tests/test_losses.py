"""The losses against loops in float64, at extremes, and across devices."""

import dataclasses
import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from mister_jax import MisterE, MisterEOutput, losses
from mister_jax.tasks.fusion import mister_e_loss

CLASSES, WIDTH, EXPERTS = 4, 5, 3
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
    """Eight dialogues of unequal length; one empty, one without labels, some experts absent."""
    random = np.random.default_rng(0)
    mask = np.arange(6) < np.array([6, 1, 0, 4, 2, 5, 3, 3])[:, None]
    label = np.where(random.random(mask.shape) < 0.9, random.integers(CLASSES, size=(8, 6)), -1)
    label[7] = -1
    gate = random.random((8, 6, EXPERTS)).astype(np.float32) + 0.1
    return {
        "gate": gate / gate.sum(-1, keepdims=True),
        "expert_logits": random.normal(size=(8, 6, EXPERTS, CLASSES)).astype(np.float32) * 2,
        "representations": random.normal(size=(8, 6, WIDTH)).astype(np.float32),
        "expert_mask": random.random((8, 6, EXPERTS)) < 0.7,
        "label": label.astype(np.int32),
        "mask": mask,
        "labeled": mask & (label >= 0),
    }


def focal_of(batch, **options):
    return losses.focal(
        batch["expert_logits"][:, :, 0], batch["label"], batch["labeled"], **options
    )


def contrastive_of(batch, **options):
    return losses.supervised_contrastive(
        batch["representations"], batch["label"], batch["labeled"], **options
    )


def agreement_of(batch, **options):
    return losses.expert_agreement(
        batch["expert_logits"], batch["labeled"], batch["expert_mask"], **options
    )


def responsibility_of(batch, **options):
    return losses.gate_responsibility(
        batch["gate"],
        batch["expert_logits"],
        batch["label"],
        batch["labeled"],
        batch["expert_mask"],
        **options,
    )


EACH_LOSS = pytest.mark.parametrize(
    "loss", [focal_of, contrastive_of, agreement_of, responsibility_of]
)
FLOATS = ("gate", "expert_logits", "representations")


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(loss, batch):
    floats = {name: batch[name] for name in FLOATS}
    return jax.value_and_grad(lambda floats: loss(batch | floats))(floats)


contrastive_gradient = jax.jit(jax.value_and_grad(losses.supervised_contrastive))


def assert_finite(tree):
    assert all(np.isfinite(leaf.astype(np.float32)).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 3.0])
def test_focal_equals_its_definition(batch, gamma):
    expected = numpy_focal(
        batch["expert_logits"][:, :, 0], batch["label"], batch["labeled"], gamma
    )
    assert float(focal_of(batch, gamma=gamma)) == pytest.approx(expected, rel=1e-5)


def test_focal_without_focus_is_the_cross_entropy(batch):
    logits, labels = batch["expert_logits"][:, :, 0], batch["label"]
    labels = np.maximum(labels, 0)
    everywhere = np.ones_like(batch["mask"])
    expected = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    ours = losses.focal(logits, labels, everywhere, gamma=0.0)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_focal_refuses_negative_gamma(batch):
    with pytest.raises(ValueError, match=r"gamma -1\.0"):
        focal_of(batch, gamma=-1.0)


@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 10.0])
def test_contrastive_equals_its_definition(batch, temperature):
    expected = numpy_supervised_contrastive(
        batch["representations"], batch["label"], batch["labeled"], temperature
    )
    ours = contrastive_of(batch, temperature=temperature)
    assert float(ours) == pytest.approx(expected, rel=2e-5)


def test_contrastive_leaves_out_anchors_without_positives():
    representations = jnp.eye(3, WIDTH)
    label, everywhere = jnp.array([0, 0, 1]), jnp.ones(3, bool)
    # All cosines are 0: each of two anchors has log(2) over its two others.
    ours, _ = contrastive_gradient(representations, label, everywhere)
    np.testing.assert_allclose(ours, np.log(2), rtol=1e-6)
    none, gradient = contrastive_gradient(representations, jnp.arange(3), everywhere)
    assert none == 0
    assert not gradient.any()


def test_contrastive_of_opposites_is_exact_at_low_temperature():
    opposites, label = jnp.array([[1.0, 0.0], [-1.0, 0.0]]), jnp.zeros(2, int)
    for temperature in (1.0, 0.01, 0.001):
        # The only other is the positive.
        ours, gradient = contrastive_gradient(
            opposites, label, jnp.ones(2, bool), temperature=temperature
        )
        np.testing.assert_allclose(ours, 0, atol=1e-6)
        assert_finite(gradient)


def test_contrastive_does_not_hang_on_lengths(batch):
    scaled = batch | {"representations": batch["representations"] * 1000}
    np.testing.assert_allclose(contrastive_of(scaled), contrastive_of(batch), rtol=1e-5)


@pytest.mark.parametrize("experts", [(0, 1, 2), (0, 2)])
def test_agreement_equals_its_definition(batch, experts):
    expected = numpy_expert_agreement(
        batch["expert_logits"], batch["labeled"], batch["expert_mask"], experts
    )
    assert float(agreement_of(batch, experts=experts)) == pytest.approx(expected, rel=1e-5)


def test_agreement_needs_two_experts(batch):
    assert agreement_of(batch, experts=(1,)) == 0


def test_experts_of_one_mind_agree(batch):
    same = np.repeat(batch["expert_logits"][:, :, :1], EXPERTS, axis=2)
    np.testing.assert_allclose(agreement_of(batch | {"expert_logits": same}), 0, atol=1e-7)


@pytest.mark.parametrize("sharpness", [0.0, 1.0, 5.0])
def test_responsibility_equals_its_definition(batch, sharpness):
    names = ("gate", "expert_logits", "label", "labeled", "expert_mask")
    expected = numpy_gate_responsibility(*(batch[name] for name in names), sharpness)
    ours = responsibility_of(batch, sharpness=sharpness)
    assert float(ours) == pytest.approx(expected, rel=1e-5)


def test_responsibility_teaches_the_gate_alone_and_the_responsible_expert():
    # The first expert gives the label 0.9, the second 0.1; the third is missing.
    logits = jnp.log(jnp.array([[0.9, 0.1], [0.1, 0.9], [1.0, 1e-6]]))
    present = jnp.array([True, True, False])

    def loss(scores, logits, sharpness):
        gate = jax.nn.softmax(jnp.where(present, scores, -1e30))
        return losses.gate_responsibility(
            gate, logits, jnp.array(0), jnp.array(True), present, sharpness=sharpness
        )

    for sharpness, odds in ((0.0, 1.0), (1.0, 9.0), (2.0, 81.0)):
        responsible = jnp.array([jnp.log(odds), 0.0, 0.0])
        gradients = jax.grad(loss, argnums=(0, 1))(responsible, logits, sharpness)
        for gradient in gradients:
            np.testing.assert_allclose(gradient, 0, atol=1e-6)
    undecided = jax.grad(loss)(jnp.zeros(3), logits, 1.0)
    np.testing.assert_allclose(undecided, [-0.4, 0.4, 0], atol=1e-6)


def test_responsibility_refuses_negative_sharpness(batch):
    with pytest.raises(ValueError, match=r"sharpness -1\.0"):
        responsibility_of(batch, sharpness=-1.0)


@EACH_LOSS
def test_values_outside_the_mask_reach_neither_loss_nor_gradient(batch, loss):
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


@EACH_LOSS
def test_huge_bfloat16_values_have_finite_losses_and_gradients(batch, loss):
    huge = {name: jnp.asarray(np.sign(batch[name]) * 1e4, jnp.bfloat16) for name in FLOATS}
    value, gradients = value_and_gradients(loss, batch | huge)
    assert value.dtype == jnp.float32
    assert_finite((value, gradients))


@EACH_LOSS
def test_zero_representations_and_equal_logits_have_finite_gradients(batch, loss):
    flat = {name: np.zeros_like(batch[name]) for name in FLOATS}
    assert_finite(value_and_gradients(loss, batch | flat))


@EACH_LOSS
def test_a_batch_without_labels_or_utterances_has_no_loss(batch, loss):
    nothing = batch | {"labeled": np.zeros_like(batch["mask"])}
    value, gradients = value_and_gradients(loss, nothing)
    assert value == 0
    assert not any(leaf.any() for leaf in jax.tree.leaves(gradients))


@EACH_LOSS
@pytest.mark.parametrize("utterances", [1, 500])
def test_short_and_long_dialogues_have_finite_losses(loss, utterances):
    random = np.random.default_rng(0)
    mask = np.ones((1, utterances), bool)
    dialogue = {
        "gate": np.full((1, utterances, EXPERTS), 1 / EXPERTS),
        "expert_logits": random.normal(size=(1, utterances, EXPERTS, CLASSES)),
        "representations": random.normal(size=(1, utterances, WIDTH)),
        "expert_mask": np.ones((1, utterances, EXPERTS), bool),
        "label": random.integers(CLASSES, size=mask.shape),
        "labeled": mask,
    }
    value, gradients = value_and_gradients(loss, dialogue)
    assert_finite((value, gradients))
    assert (value == 0) == (utterances == 1 and loss is contrastive_of)


@EACH_LOSS
def test_shares_of_eight_devices_sum_to_the_loss_and_its_gradient(batch, loss):
    expected, expected_gradients = value_and_gradients(loss, batch)
    devices = jax.tree.map(lambda leaf: leaf[:, None], batch)  # one dialogue each

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
    """Parameters, a batch of eight dialogues, the loss of both, and its value and gradients."""
    config = dataclasses.replace(tiny_config, kernel_sizes=(), fusion_layers=0)
    graphdef, params = nnx.split(MisterE(config, rngs=nnx.Rngs(0)))
    batch = make_batch((5, 1, 4, 2, 5, 3, 1, 2))
    batch["mask"][2] = batch["speech_present"][2] = batch["text_present"][2] = False

    def loss(params, batch, axis_name=None):
        output = nnx.merge(graphdef, params)(
            batch["speech"],
            batch["text"],
            batch["mask"],
            speech_present=batch["speech_present"],
            text_present=batch["text_present"],
        )
        return losses.mister_e(output, batch["label"], batch["mask"], axis_name=axis_name)

    value_and_gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))
    return params, batch, loss, value_and_gradients(params, batch)


def assert_summed_shares_equal(summed, expected):
    (total, parts), gradients = summed
    (expected_total, expected_parts), expected_gradients = expected
    assert parts.keys() == expected_parts.keys()
    np.testing.assert_allclose(total, expected_total, rtol=1e-6)
    for name, value in expected_parts.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-6, err_msg=name)
    for ours, theirs in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_training_under_pmap_equals_training_on_one_device(training):
    params, batch, loss, expected = training

    def step(params, batch):
        shares = jax.value_and_grad(loss, has_aux=True)(params, batch, "data")
        return jax.lax.psum(shares, "data")

    devices = jax.tree.map(lambda leaf: leaf[:, None], batch)
    summed = jax.pmap(step, axis_name="data", in_axes=(None, 0))(params, devices)
    assert_summed_shares_equal(jax.tree.map(lambda leaf: leaf[0], summed), expected)


@pytest.mark.parametrize("copied", [True, False])
def test_training_under_shard_map_equals_training_on_one_device(training, copied):
    params, batch, loss, expected = training
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def step(params, batch):
        if copied:  # Each device's own, so that its gradient is that of its share.
            params = jax.lax.pcast(params, "data", to="varying")
        value, gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, "data")
        # JAX sums the gradients of what all devices share.
        return jax.lax.psum(value, "data"), jax.lax.psum(gradients, "data") if copied else gradients

    step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    assert_summed_shares_equal(jax.jit(step)(params, batch), expected)


def test_the_total_weighs_its_parts_as_released(training):
    *_, ((total, parts), _) = training
    expected = parts["mixture"] + parts["speech"] + parts["text"] + parts["fusion"]
    expected += 2 * parts["contrastive"] + 0.1 * parts["agreement"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert all(part > 0 for part in parts.values())


def test_unlabeled_utterances_count_in_no_part(training):
    params, batch, loss, _ = training
    _, parts = jax.jit(loss)(params, batch | {"label": np.full_like(batch["label"], -1)})
    assert not any(parts.values())


@pytest.fixture(scope="module")
def extreme(make_batch):
    """Dialogues of 500 utterances, of one, and of four without a label."""
    batch = make_batch((500, 1, 4))
    batch["label"][2] = -1
    return batch


def test_huge_bfloat16_outputs_of_all_kinds_of_dialogues_have_finite_gradients(
    extreme, tiny_config
):
    random = np.random.default_rng(0)
    positions, classes = extreme["mask"].shape, tiny_config.num_classes

    def huge(*shape):
        return jnp.asarray(random.choice([-1e4, 1e4], (*positions, *shape)), jnp.bfloat16)

    floats = {"logits": huge(classes), "expert_logits": huge(EXPERTS, classes)}
    floats |= {"speech_repr": huge(WIDTH), "text_repr": huge(WIDTH)}
    present = np.stack([extreme["speech_present"], extreme["text_present"]], axis=-1)
    known = {
        "gate": np.full((*positions, EXPERTS), 1 / EXPERTS),
        "expert_present": np.concatenate([present, extreme["mask"][..., None]], axis=-1),
        "speech_context": None,
        "text_context": None,
        "speech_present": extreme["speech_present"],
        "text_present": extreme["text_present"],
    }

    def loss(floats):
        output = MisterEOutput(**floats, **known)
        return losses.mister_e(output, extreme["label"], extreme["mask"])

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))(floats)
    chex.assert_tree_all_finite(found)
    assert all(part > 0 for part in found[0][1].values())


def test_a_step_with_huge_bfloat16_logits_has_finite_gradients(extreme, tiny_config):
    config = dataclasses.replace(tiny_config, dtype="bfloat16", input_dropout=0.2)
    graph, params = nnx.split(MisterE(config, rngs=nnx.Rngs(0)))

    def scaled(path, value):
        return value * 1e4 if "classifier" in jax.tree_util.keystr(path) else value

    params = jax.tree_util.tree_map_with_path(scaled, params)

    def loss(params):
        return mister_e_loss(nnx.merge(graph, params), extreme, jax.random.key(0))

    found = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    chex.assert_tree_all_finite(found)
    assert found[0][1]["mixture"] > 1000


@pytest.mark.parametrize("field", ["label", "labeled"])
@pytest.mark.parametrize("loss", [focal_of, contrastive_of])
def test_labels_and_masks_of_other_positions_are_refused(batch, loss, field):
    with pytest.raises(AssertionError, match="shape"):
        loss(batch | {field: batch[field][:, :1]})
