"""Causal MiSTER-E: no output depends on later utterances, and steps equal the forward pass."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mister_jax import MisterE, MisterEConfig, losses
from mister_jax.configs import fusion
from mister_jax.tasks.config import dataclass_from_config

SIZES = {"num_classes": 4, "speech_dim": 6, "text_dim": 5}


def tiny(**changes):
    sizes = {"context_dim": 8, "fusion_dim": 8, "attention_dim": 6, "attention_window": 5}
    return MisterEConfig.small(**{**SIZES, **sizes, "kernel_sizes": (1, 3), **changes})


def recipe():
    config = fusion.get_config()
    config.model.causal = True
    return dataclass_from_config(MisterEConfig, config.model, "config.model", **SIZES)


CONFIGS = {
    "recipe": recipe,
    "small": lambda: MisterEConfig.small(**SIZES, causal=True),
    "deep": lambda: tiny(causal=True, gru_layers=2, kernel_sizes=(1, 3, 5), attention_dim=3),
    "all_parts": lambda: tiny(causal=True, crf=True, gate_reads_contexts=True, fusion_gru_layers=2),
    "text": lambda: tiny(causal=True, experts=("text",), crf=True),
    "no_context": lambda: tiny(causal=True, kernel_sizes=(), gru_layers=0, mixture="majority"),
}


def make_model(config):
    model = MisterE(config, rngs=nnx.Rngs(0))
    if model.crf is not None:
        transition = np.random.default_rng(1).normal(size=(4, 4))
        model.crf.transition.set_value(transition.astype(np.float32))
    return model


@nnx.jit
def forward(model, batch):
    return model(
        batch["speech"],
        batch["text"],
        batch["mask"],
        speech_present=batch["speech_present"],
        text_present=batch["text_present"],
    )


@nnx.jit
def run_steps(model, batch):
    """Predicts the utterances of a batch, one step at a time."""
    names = ("speech", "text", "speech_present", "text_present")

    def step(state, utterance):
        return model.step(state, *(utterance[name] for name in names))

    utterances = {name: jnp.swapaxes(batch[name], 0, 1) for name in names}
    state = model.initial_state(len(batch["mask"]))
    _, outputs = jax.lax.scan(step, state, utterances)  # T B 1 ...
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf[:, :, 0], 0, 1), outputs)


def assert_equal_in_mask(output, expected, mask):
    def check(value, expected_value):
        values = (np.asarray(array)[mask] for array in (value, expected_value))
        np.testing.assert_allclose(*values, atol=1e-5, rtol=0)

    jax.tree.map(check, output, expected)


def dialogues(make_batch, lengths):
    """Makes dialogues whose first three utterances lack speech; the second also lacks text."""
    batch = make_batch(lengths)
    batch["speech_present"][:, :3] = False
    batch["text_present"][:, 1:2] = False
    batch["speech"][~batch["speech_present"]] = np.nan
    return batch


@pytest.mark.parametrize(
    ("name", "lengths"), [(name, (20, 7, 1)) for name in CONFIGS] + [("all_parts", (500,))]
)
def test_steps_equal_the_forward_pass_of_the_whole_dialogue(make_batch, name, lengths):
    model, batch = make_model(CONFIGS[name]()), dialogues(make_batch, lengths)
    assert_equal_in_mask(run_steps(model, batch), forward(model, batch), batch["mask"])


@pytest.mark.parametrize("causal", [True, False])
def test_later_utterances_change_earlier_outputs_only_if_not_causal(make_batch, causal):
    model = make_model(dataclasses.replace(CONFIGS["all_parts"](), causal=causal))
    batch, other = dialogues(make_batch, (12, 9)), make_batch((12, 12), seed=1)
    changed = {name: values.copy() for name, values in batch.items()}
    for name in batch:
        changed[name][:, 8:] = other[name][:, 8:]
    output, changed_output = forward(model, batch), forward(model, changed)
    earlier = batch["mask"].copy()
    earlier[:, 8:] = False
    if causal:
        assert_equal_in_mask(changed_output, output, earlier)
    else:
        difference = np.abs(changed_output.logits - output.logits)[earlier]
        assert (difference.max(-1) > 1e-5).all()


def test_attention_reaches_back_only_the_window(make_batch):
    config = tiny(causal=True, experts=("fusion",), fusion_layers=1, attention_window=3)
    model, batch = make_model(config), make_batch((9,))
    changed = {name: values.copy() for name, values in batch.items()}
    for name in ("speech", "text"):
        batch[f"{name}_present"][:] = changed[f"{name}_present"][:] = True
        changed[name][:, 0] += 10
    output, changed_output = forward(model, batch), forward(model, changed)
    # The layer has two attentions, each of which reaches back two utterances.
    is_changed = np.abs(changed_output.logits - output.logits).max(-1)[0] > 1e-5
    np.testing.assert_array_equal(is_changed, np.arange(9) <= 4)


def test_gradients_of_a_causal_model_are_finite_without_keys(make_batch):
    @nnx.jit
    def gradients(model, batch):
        def total(model):
            return losses.mister_e(forward(model, batch), batch["label"], batch["mask"])[0]

        return nnx.grad(total)(model)

    model = make_model(tiny(causal=True, crf=True, kernel_sizes=(3,), gru_layers=0))
    batch = dialogues(make_batch, (9, 2, 1))
    for leaf in jax.tree.leaves(gradients(model, batch)):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0


def test_only_causal_models_have_steps_and_need_no_even_sizes():
    with pytest.raises(ValueError, match="causal=False; steps need a causal model"):
        MisterE(tiny(), rngs=nnx.Rngs(0)).initial_state(1)
    assert tiny(causal=True, context_dim=7, fusion_dim=7, fusion_gru_layers=1).context_dim == 7
    with pytest.raises(ValueError, match=r"MisterEConfig\.attention_window=0; allowed: at least 1"):
        tiny(causal=True, attention_window=0)
