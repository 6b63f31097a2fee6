"""MiSTER-E: masks, missing modalities, mixtures, dropout and configs."""

import dataclasses
import functools
import itertools
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from scipy.special import softmax

from mister_jax import MisterE, MisterEConfig, losses
from mister_jax.models import EXPERTS, Gate
from mister_jax.models.config import Mixture
from mister_jax.models.mister_e import drop_modalities
from mister_jax.nn import PerExampleRngs

LENGTH = 5
MIXTURES = get_args(Mixture)
GARBAGE = (np.nan, np.inf, 1e30)
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(EXPERTS, size)]
# Only linear layers, which compile fast, for tests in which the other layers do not matter.
SHALLOW = {"gru_layers": 0, "kernel_sizes": (), "fusion_layers": 0}
DROPOUT_RATES = [
    field.name for field in dataclasses.fields(MisterEConfig) if field.name.endswith("_dropout")
]
VARIANTS = [
    {},
    {"experts": ("speech",)},
    {"experts": ("text", "fusion")},
    {"gru_layers": 0},
    {"kernel_sizes": ()},
    {"experts": ("fusion",), "fusion_gru_layers": 1},
    {"crf": True, **SHALLOW},
    {"causal": True, "crf": True, "kernel_sizes": (3,), "gru_layers": 0},
    {"gate_reads_contexts": True, **SHALLOW},
    {"gate_reads_contexts": True, "experts": ("text", "fusion"), **SHALLOW},
    *(
        {"experts": subset, "mixture": mixture, **SHALLOW}
        for subset in SUBSETS
        for mixture in MIXTURES
    ),
]


def variant_id(variant):
    return ",".join(f"{name}={value}" for name, value in variant.items()) or "all"


def make_model(config, **changes):
    return MisterE(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


def forward(model, batch):
    return model(
        batch["speech"],
        batch["text"],
        batch["mask"],
        speech_present=batch["speech_present"],
        text_present=batch["text_present"],
    )


# The losses are compiled separately, so that models with different layers share the program.
compiled_forward = nnx.jit(forward)
compiled_losses = jax.jit(losses.mister_e, static_argnames="weights")
WEIGHTS = losses.LossWeights(gate=1.0)


def output_and_losses(model, batch):
    output = compiled_forward(model, batch)
    return output, compiled_losses(output, batch["label"], batch["mask"], WEIGHTS)


@nnx.jit
def loss_and_gradients(model, batch):
    def total(model):
        return losses.mister_e(forward(model, batch), batch["label"], batch["mask"], WEIGHTS)[0]

    return nnx.value_and_grad(total)(model)


@nnx.jit
def train(model, batch, keys):
    return model(batch["speech"], batch["text"], batch["mask"], deterministic=False, rngs=keys)


def with_garbage(batch, garbage):
    """Fills the vectors of missing speech and text with garbage."""
    filled = {
        name: np.where(batch[f"{name}_present"][..., None], batch[name], np.float32(garbage))
        for name in ("speech", "text")
    }
    return batch | filled


def assert_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def put_into_batch(dialogue, make_batch):
    """Puts a dialogue [1, T] into row 1 of two batches [3, 4 T], one of them otherwise empty."""
    full = make_batch((4 * LENGTH, LENGTH, 3), seed=9)
    for name, values in dialogue.items():
        full[name][1] = 0
        full[name][1, :LENGTH] = values[0]
    otherwise_empty = {name: values.copy() for name, values in full.items()}
    for name in ("mask", "speech_present", "text_present"):
        otherwise_empty[name][[0, 2]] = False
    return full, otherwise_empty


def dialogues(make_batch):
    """Makes a dialogue with every combination of missing modalities, and one without speech."""
    dialogue = make_batch((LENGTH,), seed=1)
    all_combinations = {
        "speech_present": np.array([[True, False, True, True, False]]),
        "text_present": np.array([[True, True, False, True, False]]),
    }
    no_speech = {"speech_present": np.zeros((1, LENGTH), bool), "text_present": dialogue["mask"]}
    return dialogue | all_combinations, dialogue | no_speech


def assert_close(tree, expected):
    def check(value, expected_value):
        np.testing.assert_allclose(value, expected_value, atol=1e-5, rtol=1e-5)

    jax.tree.map(check, tree, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=variant_id)
def test_padding_and_other_dialogues_do_not_change_predictions_or_losses(
    tiny_config, make_batch, variant
):
    model = make_model(tiny_config, **variant)
    for dialogue in dialogues(make_batch):
        output, parts = output_and_losses(model, dialogue)
        assert_finite((output, parts))
        for garbage in GARBAGE:
            full, otherwise_empty = (
                with_garbage(batch, garbage) for batch in put_into_batch(dialogue, make_batch)
            )
            full_output, _ = output_and_losses(model, full)
            assert_close(jax.tree.map(lambda leaf: leaf[1:2, :LENGTH], full_output), output)
            assert_close(output_and_losses(model, otherwise_empty)[1], parts)


def test_padding_does_not_change_gradients(tiny_config, make_batch):
    model = make_model(tiny_config)
    for dialogue in dialogues(make_batch):
        expected = loss_and_gradients(model, dialogue)
        assert_finite(expected)
        _, otherwise_empty = put_into_batch(dialogue, make_batch)
        for garbage in GARBAGE:
            assert_close(
                loss_and_gradients(model, with_garbage(otherwise_empty, garbage)), expected
            )


def test_vectors_of_a_missing_modality_are_not_read(tiny_config, make_batch):
    model = make_model(tiny_config)
    for dialogue in dialogues(make_batch):
        expected = loss_and_gradients(model, dialogue)
        assert_close(loss_and_gradients(model, with_garbage(dialogue, np.nan)), expected)


@pytest.mark.parametrize("missing", ["speech", "text"])
def test_a_modality_that_is_none_is_missing_everywhere(tiny_config, make_batch, missing):
    model = nnx.jit(make_model(tiny_config, **SHALLOW))
    batch = make_batch((LENGTH, 2))
    vectors = {name: batch[name] for name in ("speech", "text")}
    absent = {f"{missing}_present": np.zeros_like(batch["mask"])}
    expected = model(**vectors, mask=batch["mask"], **absent)
    assert_close(model(**(vectors | {missing: None}), mask=batch["mask"]), expected)
    # Flags and masks can be integers.
    absent = {name: flags.astype(int) for name, flags in absent.items()}
    assert_close(model(**vectors, mask=batch["mask"].astype(int), **absent), expected)
    with pytest.raises(ValueError, match="speech and text are None; needed: the vectors of at"):
        model(None, None, batch["mask"])


@pytest.mark.parametrize("mixture", MIXTURES)
def test_missing_experts_have_no_weight_and_weights_sum_to_one(tiny_config, make_batch, mixture):
    dialogue, _ = dialogues(make_batch)
    model = make_model(tiny_config, mixture=mixture, **SHALLOW)
    output, _ = output_and_losses(model, dialogue)
    np.testing.assert_allclose(output.gate.sum(-1), 1, atol=1e-6)
    both, text_alone, speech_alone, _, neither = np.asarray(output.gate[0])
    assert (both > 0).all()
    np.testing.assert_array_equal(text_alone > 0, [False, True, True])
    np.testing.assert_array_equal(speech_alone > 0, [True, False, True])
    assert (neither > 0).all()
    present = np.asarray(output.expert_present[0])
    np.testing.assert_array_equal(present[:4], np.asarray(output.gate[0, :4]) > 0)


def test_an_utterance_with_neither_modality_has_finite_predictions(tiny_config, make_batch):
    dialogue, _ = dialogues(make_batch)
    nothing = dict.fromkeys(("speech_present", "text_present"), np.zeros((1, LENGTH), bool))
    batch = with_garbage(dialogue | nothing, np.nan)
    model = make_model(tiny_config)
    assert_finite((output_and_losses(model, batch), loss_and_gradients(model, batch)))


def test_disabled_experts_have_no_weight_and_no_parameters(tiny_config, make_batch):
    model = make_model(tiny_config, experts=("text", "fusion"))
    assert model.speech is None
    output, (_, parts) = output_and_losses(model, dialogues(make_batch)[0])
    assert not output.gate[..., 0].any()
    assert not output.expert_logits[:, :, 0].any()
    assert output.speech_context.shape[-1] == 0
    assert parts.keys() == {"mixture", "text", "fusion", "contrastive", "agreement", "gate"}


@pytest.mark.parametrize("layers", [0, 1])
def test_cross_modal_expert_depends_on_utterance_order_only_with_a_gru(
    tiny_config, make_batch, layers
):
    model = make_model(tiny_config, experts=("fusion",), fusion_gru_layers=layers)
    batch = make_batch((LENGTH,))
    backwards = {name: values[:, ::-1] for name, values in batch.items()}
    logits, reversed_logits = (compiled_forward(model, x).logits for x in (batch, backwards))
    assert np.allclose(reversed_logits[:, ::-1], logits, atol=1e-5) == (layers == 0)


def test_crf_changes_the_mixture_but_not_the_expert_logits(tiny_config, make_batch):
    plain, model = (make_model(tiny_config, crf=crf, **SHALLOW) for crf in (False, True))
    batch, _ = dialogues(make_batch)
    expected, _ = output_and_losses(plain, batch)
    initial, _ = output_and_losses(model, batch)
    mask = batch["mask"]
    np.testing.assert_allclose(
        softmax(initial.logits, -1)[mask], softmax(expected.logits, -1)[mask], atol=1e-6
    )
    # With an identity transition, all utterances of a dialogue have the same emotion.
    model.crf.transition.set_value(1e4 * np.eye(tiny_config.num_classes, dtype=np.float32))
    constant, _ = output_and_losses(model, batch)
    np.testing.assert_array_equal(constant.expert_logits, expected.expert_logits)
    sums = np.where(mask[..., None], expected.logits, 0).sum(1)
    for logits, summed, valid in zip(np.asarray(constant.logits), sums, mask, strict=True):
        assert (logits[valid].argmax(-1) == summed.argmax()).all()


def test_mean_mixture_weights_present_experts_equally(tiny_config, make_batch):
    model = make_model(tiny_config, mixture="mean", **SHALLOW)
    output, _ = output_and_losses(model, dialogues(make_batch)[0])
    logits = np.asarray(output.expert_logits[0])
    for step, experts in enumerate(([0, 1, 2], [1, 2], [0, 2])):
        expected = logits[step, experts].mean(0)
        np.testing.assert_allclose(output.logits[0, step], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("votes", "step", "winner"),
    [
        ((1, 1, 2), 0, 1),
        ((0, 1, 2), 0, 2),
        ((0, 1, 1), 0, 1),
        ((3, 3, 3), 0, 3),
        ((0, 1, 2), 1, 2),  # no speech at this step
        ((0, 1, 1), 2, 1),  # no text at this step
    ],
)
def test_majority_counts_votes_and_the_fusion_expert_decides_ties(
    tiny_config, make_batch, votes, step, winner
):
    model = make_model(tiny_config, mixture="majority", **SHALLOW)
    for expert, vote in zip((model.speech, model.text, model.fusion), votes, strict=True):
        classifier = expert.classifier
        classifier.kernel.set_value(np.zeros(classifier.kernel.shape, np.float32))
        classifier.bias.set_value(10 * np.eye(tiny_config.num_classes, dtype=np.float32)[vote])
    output, _ = output_and_losses(model, dialogues(make_batch)[0])
    assert int(output.logits[0, step].argmax()) == winner


def test_higher_temperature_makes_gate_weights_more_even(tiny_config):
    random = np.random.default_rng(0)
    logits = random.normal(size=(1, 4, 3, tiny_config.num_classes)).astype(np.float32)
    present = np.array([[[True, True, True]] * 3 + [[True, False, True]]])

    @functools.partial(jax.jit, static_argnums=0)
    def gate_weights(temperature):
        config = dataclasses.replace(tiny_config, gate_temperature=temperature)
        return Gate(config, rngs=nnx.Rngs(0))(logits, present)

    even = present / present.sum(-1, keepdims=True)
    np.testing.assert_allclose(gate_weights(100.0), even, atol=0.02)
    assert np.abs(gate_weights(0.05) - even).max() > 0.1


def test_gate_that_reads_contexts_distinguishes_equal_logits(tiny_config):
    logits = np.zeros((1, 2, 3, tiny_config.num_classes), np.float32)
    present = np.array([[[True, True, True], [True, False, True]]])
    random = np.random.default_rng(0)
    contexts = random.normal(size=(3, 1, 2, tiny_config.context_dim)).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="reads_contexts")
    def gate_weights(*contexts, reads_contexts):
        config = dataclasses.replace(tiny_config, gate_reads_contexts=reads_contexts)
        return Gate(config, rngs=nnx.Rngs(0))(logits, present, *contexts)

    speech, *texts = contexts
    without, with_contexts = (
        [np.asarray(gate_weights(speech, text, reads_contexts=reads)) for text in texts]
        for reads in (False, True)
    )
    np.testing.assert_array_equal(*without)
    first, second = with_contexts
    assert np.abs(first - second)[0, 0].max() > 0.01
    np.testing.assert_array_equal(first[0, 1], second[0, 1])  # The text is missing.
    with pytest.raises(ValueError, match="needs both contexts"):
        gate_weights(speech, reads_contexts=True)


def test_bfloat16_is_close_to_float32_and_its_logits_are_float32(tiny_config, make_batch):
    dialogue, _ = dialogues(make_batch)
    half, full = (
        output_and_losses(make_model(tiny_config, dtype=dtype), dialogue)[0]
        for dtype in ("bfloat16", "float32")
    )
    assert half.text_repr.dtype == jnp.bfloat16
    for name in ("logits", "expert_logits", "gate"):
        assert getattr(half, name).dtype == jnp.float32
        np.testing.assert_allclose(getattr(half, name), getattr(full, name), atol=0.1)


def test_modality_dropout_hides_each_modality_independently_at_its_rate():
    random = np.random.default_rng(0)
    speech, text = random.random((2, 40, 200)) < 0.8
    for make_rngs in (
        lambda: PerExampleRngs.from_batch_key(jax.random.key(0), 40),
        lambda: nnx.Rngs(dropout=0),
    ):
        drop = jax.jit(lambda make=make_rngs: drop_modalities(speech, text, 0.3, make()))
        kept_speech, kept_text = map(np.asarray, drop())
        for kept, present in ((kept_speech, speech), (kept_text, text)):
            assert not (kept & ~present).any()
            assert abs((present & ~kept).sum() / present.sum() - 0.3) < 0.03
        both = speech & text
        assert abs((both & ~kept_speech & ~kept_text).sum() / both.sum() - 0.09) < 0.02


def test_modality_dropout_is_applied_in_training_only(tiny_config, make_batch):
    model = make_model(tiny_config, modality_dropout=0.9, **SHALLOW)
    batch = make_batch((30,))
    output = train(model, batch, jax.random.split(jax.random.key(0), 1))
    assert not output.speech_present.all()
    assert not output.text_present.all()
    arguments = (batch["speech"], batch["text"], batch["mask"])
    assert jax.jit(model)(*arguments).speech_present.all()
    with pytest.raises(ValueError, match="modality dropout needs rngs"):
        model(*arguments, deterministic=False)


def test_position_in_batch_and_padding_do_not_change_dropout(tiny_config, make_batch):
    rates = dict.fromkeys(DROPOUT_RATES, 0.3)
    model = make_model(tiny_config, **rates, kernel_sizes=(1,), gru_layers=2)
    batch, keys = make_batch((5, 5, 5)), jax.random.split(jax.random.key(0), 3)
    output = train(model, batch, keys)
    order = np.array([2, 0, 1])
    permuted = train(model, {name: values[order] for name, values in batch.items()}, keys[order])
    assert_close(permuted, jax.tree.map(lambda leaf: leaf[order], output))
    assert not np.allclose(train(model, batch, keys[order]).logits, output.logits)
    longer = {
        name: np.pad(values, [(0, 0), (0, 15)] + [(0, 0)] * (values.ndim - 2))
        for name, values in batch.items()
    }
    padded = train(model, longer, keys)
    assert_close(jax.tree.map(lambda leaf: leaf[:, :5], padded), output)


def test_default_config_has_the_released_number_of_parameters():
    model = nnx.eval_shape(lambda: MisterE(MisterEConfig.paper(), rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == 88_730_609
    # The released code has two consecutive projections each for query, key, value and output, and
    # a key bias, which has no effect.
    config = model.config
    num_attentions, attention_dim = 4 * config.fusion_layers, config.attention_dim
    additional = 4 * attention_dim * (attention_dim + 1) + attention_dim
    assert count + num_attentions * additional == 89_661_809


def test_small_config_accepts_changes():
    config = MisterEConfig.small(context_dim=64, num_classes=7)
    assert (config.context_dim, config.num_classes, config.gru_layers) == (64, 7, 1)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_classes", 0),
        ("speech_dim", 0),
        ("text_dim", -1),
        ("context_dim", 7),
        ("fusion_dim", 0),
        ("attention_dim", 0),
        ("attention_heads", 0),
        ("gate_dim", 0),
        ("gru_layers", -1),
        ("fusion_layers", -1),
        ("fusion_gru_layers", -1),
        ("gate_temperature", 0.0),
        ("gate_temperature", np.nan),
        ("modality_dropout", 1.0),
        ("mixture", "median"),
        ("experts", ()),
        ("experts", ("speech", "speech")),
        ("experts", ("video",)),
        ("dtype", "float64"),
        ("param_dtype", "int8"),
    ],
)
def test_invalid_values_raise_an_error_that_names_the_field(field, value):
    with pytest.raises(ValueError, match=rf"MisterEConfig\.{field}="):
        MisterEConfig(**{field: value})


def test_fusion_gru_needs_an_even_fusion_dim():
    with pytest.raises(ValueError, match=r"MisterEConfig\.fusion_dim=7; allowed: even"):
        MisterEConfig(fusion_dim=7, fusion_gru_layers=1)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mask", (3,)),
        ("speech", (2, 3, 5)),
        ("speech", (2, 4, 6)),
        ("text", (1, 3, 5)),
        ("speech_present", (2, 4)),
        ("text_present", (3,)),
    ],
)
def test_wrong_shapes_raise_an_error_that_names_the_array(tiny_config, make_batch, name, shape):
    batch = make_batch((3, 2)) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=f"^{name} has shape {re.escape(str(shape))}"):
        forward(make_model(tiny_config), batch)


@pytest.mark.parametrize(
    "variant", [{"gate_reads_contexts": True, "crf": True}, {"experts": ("fusion",)}], ids=str
)
def test_rows_can_be_sharded_over_explicit_axes(tiny_config, make_batch, variant):
    model = make_model(tiny_config, **variant)
    batch = make_batch((5, 1, 3, 0))
    expected = loss_and_gradients(model, batch)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:4])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
        assert_close(loss_and_gradients(model, sharded), expected)


def test_model_works_in_flax_linen(tiny_config, make_batch):
    batch = make_batch((LENGTH,))
    arguments = (batch["speech"], batch["text"], batch["mask"])
    config = dataclasses.replace(tiny_config, **SHALLOW)
    linen = nnx.bridge.ToLinen(MisterE, args=(config,))
    variables = jax.jit(linen.init)(jax.random.key(0), *arguments)
    model = make_model(config)
    nnx.update(model, nnx.State(variables["params"]))
    assert_close(jax.jit(linen.apply)(variables, *arguments), jax.jit(model)(*arguments))
