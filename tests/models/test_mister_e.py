"""MiSTER-E: what a dialogue's predictions depend on, and what they do not."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax import MisterE, MisterEConfig, losses
from mister_jax.models import EXPERTS, Gate
from mister_jax.models.mister_e import MIXTURES, drop_modalities
from mister_jax.nn import PerExampleRngs

LENGTH = 5
GARBAGE = (np.nan, np.inf, 1e30)
SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(EXPERTS, size)]
# No layer but the Linears: quick to compile, for what does not hang on the other layers.
SHALLOW = {"gru_layers": 0, "kernel_sizes": (), "fusion_layers": 0}
FIELDS = [field.name for field in dataclasses.fields(MisterEConfig)]
VARIANTS = [
    {},
    {"experts": ("speech",)},
    {"experts": ("text", "fusion")},
    {"gru_layers": 0},
    {"kernel_sizes": ()},
    {"experts": ("fusion",), "fusion_gru_layers": 1},
    {"crf": True, **SHALLOW},
    {"gate_reads_contexts": True, **SHALLOW},
    {"gate_reads_contexts": True, "experts": ("text", "fusion"), **SHALLOW},
    *(
        {"experts": subset, "mixture": mixture, **SHALLOW}
        for subset in SUBSETS
        for mixture in MIXTURES
    ),
]


def name_of(variant):
    return ",".join(f"{name}={value}" for name, value in variant.items()) or "all"


def model_of(config, **changes):
    return MisterE(dataclasses.replace(config, **changes), rngs=nnx.Rngs(0))


def forward(model, batch):
    return model(
        batch["speech"],
        batch["text"],
        batch["mask"],
        speech_present=batch["speech_present"],
        text_present=batch["text_present"],
    )


# Apart from each other, so that models which differ in their layers alone share the losses.
compiled_forward = nnx.jit(forward)
compiled_losses = jax.jit(losses.mister_e, static_argnames="experts")


def output_and_losses(model, batch):
    output = compiled_forward(model, batch)
    experts = model.config.experts
    return output, compiled_losses(output, batch["label"], batch["mask"], experts=experts)


@nnx.jit
def loss_and_gradients(model, batch):
    def total(model):
        return losses.mister_e(forward(model, batch), batch["label"], batch["mask"])[0]

    return nnx.value_and_grad(total)(model)


@nnx.jit
def train(model, batch, keys):
    return model(batch["speech"], batch["text"], batch["mask"], deterministic=False, rngs=keys)


def with_garbage(batch, garbage):
    """The batch with anything where there is no speech or no text."""
    changed = {
        name: np.where(batch[f"{name}_present"][..., None], batch[name], np.float32(garbage))
        for name in ("speech", "text")
    }
    return batch | changed


def assert_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


def among_others(dialogue, make_batch):
    """The dialogue [1, T] as the middle row of a batch [3, 4 T]; the batch with this row alone."""
    crowd = make_batch((4 * LENGTH, LENGTH, 3), seed=9)
    for name, values in dialogue.items():
        crowd[name][1] = 0
        crowd[name][1, :LENGTH] = values[0]
    alone = {name: values.copy() for name, values in crowd.items()}
    for name in ("mask", "speech_present", "text_present"):
        alone[name][[0, 2]] = False
    return crowd, alone


def dialogues(make_batch):
    """One whose utterances have both, either or neither of speech and text; one without speech."""
    dialogue = make_batch((LENGTH,), seed=1)
    every_case = {
        "speech_present": np.array([[True, False, True, True, False]]),
        "text_present": np.array([[True, True, False, True, False]]),
    }
    no_speech = {"speech_present": np.zeros((1, LENGTH), bool), "text_present": dialogue["mask"]}
    return dialogue | every_case, dialogue | no_speech


def assert_close(ours, expected):
    def check(value, wanted):
        np.testing.assert_allclose(value, wanted, atol=1e-5, rtol=1e-5)

    jax.tree.map(check, ours, expected)


@pytest.mark.parametrize("variant", VARIANTS, ids=name_of)
def test_neither_padding_nor_other_dialogues_change_predictions_or_losses(
    tiny_config, make_batch, variant
):
    model = model_of(tiny_config, **variant)
    for dialogue in dialogues(make_batch):
        output, parts = output_and_losses(model, dialogue)
        assert_finite((output, parts))
        for garbage in GARBAGE:
            crowd, alone = (
                with_garbage(batch, garbage) for batch in among_others(dialogue, make_batch)
            )
            in_crowd, _ = output_and_losses(model, crowd)
            assert_close(jax.tree.map(lambda leaf: leaf[1:2, :LENGTH], in_crowd), output)
            assert_close(output_and_losses(model, alone)[1], parts)


def test_padding_does_not_change_gradients(tiny_config, make_batch):
    model = model_of(tiny_config)
    for dialogue in dialogues(make_batch):
        expected = loss_and_gradients(model, dialogue)
        assert_finite(expected)
        _, alone = among_others(dialogue, make_batch)
        for garbage in GARBAGE:
            assert_close(loss_and_gradients(model, with_garbage(alone, garbage)), expected)


def test_vectors_of_a_missing_modality_are_not_read(tiny_config, make_batch):
    model = model_of(tiny_config)
    for dialogue in dialogues(make_batch):
        expected = loss_and_gradients(model, dialogue)
        assert_close(loss_and_gradients(model, with_garbage(dialogue, np.nan)), expected)


@pytest.mark.parametrize("mixture", MIXTURES)
def test_an_absent_expert_has_no_weight_and_all_weights_sum_to_one(
    tiny_config, make_batch, mixture
):
    dialogue, _ = dialogues(make_batch)
    model = model_of(tiny_config, mixture=mixture, **SHALLOW)
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
    model = model_of(tiny_config)
    assert_finite((output_and_losses(model, batch), loss_and_gradients(model, batch)))


def test_experts_out_of_use_have_no_weight_and_no_parameters(tiny_config, make_batch):
    model = model_of(tiny_config, experts=("text", "fusion"))
    assert model.speech is None
    output, (_, parts) = output_and_losses(model, dialogues(make_batch)[0])
    assert not output.gate[..., 0].any()
    assert not output.expert_logits[:, :, 0].any()
    assert output.speech_context.shape[-1] == 0
    assert parts.keys() == {"mixture", "text", "fusion", "contrastive", "agreement", "gate"}


@pytest.mark.parametrize("layers", [0, 1])
def test_the_cross_modal_expert_knows_the_order_by_its_gru_alone(tiny_config, make_batch, layers):
    model = model_of(tiny_config, experts=("fusion",), fusion_gru_layers=layers)
    batch = make_batch((LENGTH,))
    backwards = {name: values[:, ::-1] for name, values in batch.items()}
    logits, turned = (compiled_forward(model, each).logits for each in (batch, backwards))
    assert np.allclose(turned[:, ::-1], logits, atol=1e-5) == (layers == 0)


def test_the_crf_reads_the_mixture_and_leaves_the_votes(tiny_config, make_batch):
    plain, model = (model_of(tiny_config, crf=crf, **SHALLOW) for crf in (False, True))
    batch, _ = dialogues(make_batch)
    expected, _ = output_and_losses(plain, batch)
    even, _ = output_and_losses(model, batch)
    mask = batch["mask"]
    np.testing.assert_allclose(
        jax.nn.softmax(even.logits)[mask], jax.nn.softmax(expected.logits)[mask], atol=1e-6
    )
    # Emotions that never change: one for all utterances of a dialogue.
    model.crf.transition[...] = 1e4 * jnp.eye(tiny_config.num_classes)
    lasting, _ = output_and_losses(model, batch)
    np.testing.assert_array_equal(lasting.expert_logits, expected.expert_logits)
    for logits, summed, valid in zip(
        lasting.logits,
        jnp.where(mask[..., None], expected.logits, 0).sum(1),
        mask,
        strict=True,
    ):
        assert (logits[valid].argmax(-1) == summed.argmax()).all()


def test_mean_mixture_weighs_present_experts_evenly(tiny_config, make_batch):
    model = model_of(tiny_config, mixture="mean", **SHALLOW)
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
        ((0, 1, 1), 2, 1),  # no text
    ],
)
def test_majority_counts_votes_and_the_fusion_expert_decides_ties(
    tiny_config, make_batch, votes, step, winner
):
    model = model_of(tiny_config, mixture="majority", **SHALLOW)
    for expert, vote in zip((model.speech, model.text, model.fusion), votes, strict=True):
        classifier = expert.classifier
        classifier.kernel.set_value(jnp.zeros_like(classifier.kernel[...]))
        classifier.bias.set_value(10.0 * jax.nn.one_hot(vote, tiny_config.num_classes))
    output, _ = output_and_losses(model, dialogues(make_batch)[0])
    assert int(output.logits[0, step].argmax()) == winner


def test_a_higher_temperature_evens_the_gate(tiny_config):
    logits = jax.random.normal(jax.random.key(0), (1, 4, 3, tiny_config.num_classes))
    present = jnp.array([[[True, True, True]] * 3 + [[True, False, True]]])
    cold, hot = (
        Gate(dataclasses.replace(tiny_config, gate_temperature=temperature), rngs=nnx.Rngs(0))(
            logits, present
        )
        for temperature in (0.05, 100.0)
    )
    even = present / present.sum(-1, keepdims=True)
    np.testing.assert_allclose(hot, even, atol=0.02)
    assert jnp.abs(cold - even).max() > 0.1


def test_a_gate_that_reads_contexts_tells_apart_equal_votes(tiny_config):
    gates = {
        reads: Gate(dataclasses.replace(tiny_config, gate_reads_contexts=reads), rngs=nnx.Rngs(0))
        for reads in (False, True)
    }
    votes = jnp.zeros((1, 2, 3, tiny_config.num_classes))
    present = jnp.array([[[True, True, True], [True, False, True]]])
    shape = (1, 2, tiny_config.context_dim)
    speech, *texts = jax.random.normal(jax.random.key(0), (3, *shape))
    weights = {
        reads: [gate(votes, present, speech, text) for text in texts]
        for reads, gate in gates.items()
    }
    np.testing.assert_array_equal(*weights[False])
    one, other = weights[True]
    assert jnp.abs(one - other)[0, 0].max() > 0.01
    np.testing.assert_array_equal(one[0, 1], other[0, 1])  # whose text is missing
    with pytest.raises(ValueError, match="needs both contexts"):
        gates[True](votes, present, speech)


def test_bfloat16_is_close_to_float32_and_its_logits_are_float32(tiny_config, make_batch):
    dialogue, _ = dialogues(make_batch)
    half, full = (
        output_and_losses(model_of(tiny_config, dtype=dtype), dialogue)[0]
        for dtype in ("bfloat16", "float32")
    )
    assert half.text_repr.dtype == jnp.bfloat16
    for name in ("logits", "expert_logits", "gate"):
        assert getattr(half, name).dtype == jnp.float32
        np.testing.assert_allclose(getattr(half, name), getattr(full, name), atol=0.1)


def test_modality_dropout_takes_each_modality_by_itself_at_its_rate():
    random = np.random.default_rng(0)
    speech, text = jnp.asarray(random.random((2, 40, 200)) < 0.8)
    for rngs in (PerExampleRngs.from_batch_key(jax.random.key(0), 40), nnx.Rngs(dropout=0)):
        kept_speech, kept_text = drop_modalities(speech, text, 0.3, rngs)
        for kept, had in ((kept_speech, speech), (kept_text, text)):
            assert not (kept & ~had).any()
            assert abs((had & ~kept).sum() / had.sum() - 0.3) < 0.03
        both = speech & text
        assert abs((both & ~kept_speech & ~kept_text).sum() / both.sum() - 0.09) < 0.02


def test_modality_dropout_acts_in_training_only(tiny_config, make_batch):
    model = model_of(tiny_config, modality_dropout=0.9, **SHALLOW)
    batch = make_batch((30,))
    output = train(model, batch, jax.random.split(jax.random.key(0), 1))
    assert not output.speech_present.all()
    assert not output.text_present.all()
    arguments = (batch["speech"], batch["text"], batch["mask"])
    assert model(*arguments).speech_present.all()
    with pytest.raises(ValueError, match="modality dropout needs rngs"):
        model(*arguments, deterministic=False)


def test_dropout_of_a_dialogue_depends_neither_on_its_place_nor_on_padding(tiny_config, make_batch):
    rates = dict.fromkeys((name for name in FIELDS if name.endswith("_dropout")), 0.3)
    model = model_of(tiny_config, **rates, kernel_sizes=(1,), gru_layers=2)
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


def test_released_sizes_have_the_released_parameters():
    model = nnx.eval_shape(lambda: MisterE(MisterEConfig.paper(), rngs=nnx.Rngs(0)))
    count = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    assert count == 88_730_609
    # The released code projects twice in a row, on the way in (q, k, v) and on the way out.
    config = model.config
    attentions, width = 4 * config.fusion_layers, config.attention_dim
    added = 4 * width * (width + 1) + width  # and a bias of the keys, which has no effect
    assert count + attentions * added == 89_661_809


def test_small_takes_changes():
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
        ("modality_dropout", 1.0),
        ("mixture", "median"),
        ("experts", ()),
        ("experts", ("speech", "speech")),
        ("experts", ("video",)),
    ],
)
def test_values_that_make_no_model_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"MisterEConfig\.{field}="):
        MisterEConfig(**{field: value})


def test_a_gru_over_an_odd_fusion_width_is_refused():
    with pytest.raises(ValueError, match=r"MisterEConfig\.fusion_dim=7: must be even"):
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
def test_shapes_that_do_not_fit_are_refused_by_name(tiny_config, make_batch, name, shape):
    batch = make_batch((3, 2)) | {name: np.zeros(shape, np.float32)}
    with pytest.raises(ValueError, match=f"^{name} has shape {re.escape(str(shape))}"):
        forward(model_of(tiny_config), batch)


def test_linen_users_can_use_the_model(tiny_config, make_batch):
    batch = make_batch((LENGTH,))
    arguments = (batch["speech"], batch["text"], batch["mask"])
    config = dataclasses.replace(tiny_config, **SHALLOW)
    linen = nnx.bridge.ToLinen(MisterE, args=(config,))
    variables = linen.init(jax.random.key(0), *arguments)
    model = model_of(config)
    nnx.update(model, nnx.State(variables["params"]))
    assert_close(linen.apply(variables, *arguments), model(*arguments))
