"""The task of MiSTER-E: standardization of the features."""

import dataclasses
import functools

import chex
import jax
import numpy as np
import pytest
from flax import nnx

from mister_jax import data
from mister_jax.configs import fusion
from mister_jax.data.standardizer import why_standardize
from mister_jax.errors import InputError
from mister_jax.tasks.fusion import FusionTask
from tests.helpers.training import SMALL_MODEL

SPLITS = data.generate_features(
    num_dialogues={"train": 6, "validation": 2, "test": 2}, speech_dim=5, text_dim=4
)


def with_uneven_speech(features):
    """Returns features whose speech dimensions differ in mean and scale; dimension 0 is constant.

    Absent speech has huge values.
    """
    scale, shift = np.float32([0, 1e-3, 1, 30, 500]), np.float32([7, 1e-3, -9, 4, 1e4])
    speech = features.speech * scale + shift
    return dataclasses.replace(
        features, speech=np.where(features.speech_present[:, None], speech, np.float32(1e9))
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    data.write_features(
        {name: with_uneven_speech(split) for name, split in SPLITS.items()}, "uneven", folder
    )
    config = fusion.get_config("uneven")
    config.data.data_dir = str(folder)
    config.data.num_buckets = 1
    config.model.update(SMALL_MODEL)
    return config


@pytest.fixture(scope="module")
def task(config):
    changed = config.copy_and_resolve_references()
    changed.data.standardize = "speech"
    return FusionTask.from_data(changed)


def test_present_training_speech_has_mean_0_and_deviation_1(task):
    train = task.features("train")
    scaled = task.standardizers["speech"](train.speech[train.speech_present])
    np.testing.assert_allclose(scaled.mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(scaled.std(0)[1:], 1, rtol=1e-3)
    assert (scaled[:, 0] == 0).all()  # This dimension is constant in training.


def test_the_model_reads_standardized_speech_and_unchanged_text(task, config):
    (batch,) = task.split("test", num_shards=1, shuffle=False).batches()
    model = nnx.jit(task.init)(jax.random.key(0))
    unscaled_config = config.copy_and_resolve_references()
    unscaled_config.data.standardize = "none"
    unscaled_task = FusionTask.from_data(unscaled_config)
    scaled_batch = {**batch, "speech": task.standardizers["speech"](batch["speech"])}

    @functools.partial(nnx.jit, static_argnums=0)
    def outputs(task, model, batch):
        probabilities = task.predict(model, batch)["probabilities"]
        cross_entropy = task.eval_sums(model, batch)["cross_entropy"]
        loss = task.loss(model, batch, jax.random.key(1), None)[0]
        return probabilities, cross_entropy, loss

    actual = outputs(task, model, batch)
    chex.assert_trees_all_close(actual, outputs(unscaled_task, model, scaled_batch), rtol=1e-5)
    unscaled = outputs(unscaled_task, model, batch)
    assert np.abs(unscaled[0] - actual[0]).max() > 0.1


def test_a_work_directory_keeps_the_standardizers(task, config):
    restored = FusionTask.restore(config, task.description())
    standardizer, expected = restored.standardizers["speech"], task.standardizers["speech"]
    np.testing.assert_array_equal(standardizer.mean, expected.mean)
    np.testing.assert_array_equal(standardizer.deviation, expected.deviation)
    assert standardizer.mean.dtype == np.float32


def test_modalities_of_uneven_scale_are_standardized_by_default(task, config):
    automatic = FusionTask.from_data(config)
    assert list(automatic.standardizers) == ["speech"]
    np.testing.assert_array_equal(
        automatic.standardizers["speech"].deviation, task.standardizers["speech"].deviation
    )
    (note,) = automatic.notes
    assert note.startswith("standardizing speech, whose dimensions differ ")
    assert FusionTask.restore(config, automatic.description()).notes == automatic.notes


def test_a_class_without_training_utterances_gives_a_warning(config):
    train = data.load_features(config.data.name, "train", config.data.data_dir)
    rare = int(train.label.max())
    changed = dataclasses.replace(train, label=np.where(train.label == rare, -1, train.label))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mister_jax.tasks.fusion.load_features", lambda *_: changed)
        notes = FusionTask.from_data(config).notes
    name = train.class_names[rare]
    assert notes[-1] == f"WARNING: no training utterance has the class {name}"


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        ([0.1, 0.2, 0.3, 0.1], ""),
        ([0.1, 1, 0.2, 3], "differ "),
        ([1] * 40 + [200], "times the median"),
        ([50, 40, 60, 70], "values are around 5"),
        ([1e-4, 2e-4, 1e-4, 2e-4], "values are around 0.000"),
        ([0, 0, 1, 1], ""),
        ([0, 0], ""),
    ],
)
def test_uneven_scales_are_a_reason_to_standardize(scales, reason):
    vectors = np.random.default_rng(0).normal(size=(4000, len(scales))) * scales
    assert reason in why_standardize(vectors) and bool(reason) == bool(why_standardize(vectors))
    assert why_standardize(vectors[:0]) == ""


def test_unusable_standardize_options_are_refused(config):
    for standardize, message in (
        ("speech", "no utterance of dataset"),
        ("video", "allowed: auto, none, or some of speech, text"),
    ):
        changed = config.copy_and_resolve_references()
        changed.data.standardize = standardize
        silent = {
            name: dataclasses.replace(split, speech_present=np.zeros_like(split.speech_present))
            for name, split in SPLITS.items()
        }
        data.write_features(silent, "silent", config.data.data_dir, overwrite=True)
        changed.data.name = "silent"
        with pytest.raises(InputError, match=message):
            FusionTask.from_data(changed)


@pytest.mark.parametrize(
    ("option", "value"), [("gamma", -1), ("temperature", 0), ("sharpness", -1)]
)
def test_unusable_loss_options_are_refused(config, option, value):
    changed = config.copy_and_resolve_references()
    changed.loss[option] = value
    with pytest.raises(InputError, match=rf"{option}={value}\b.*allowed"):
        FusionTask.from_data(changed)
