"""Fine-tuning of speech encoders: frozen, LoRA, all parameters, augmentation, speech LLMs."""

import json
import os
import signal
import types

import jax
import numpy as np
import pytest
from flax import nnx

from mister_jax import data, extraction
from mister_jax.configs import speech_encoder
from mister_jax.data.clips import LENGTH_STEP
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.errors import InputError
from mister_jax.evaluation.results import evaluate
from mister_jax.nn import PerExampleRngs
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import data_mesh
from mister_jax.predictor import Predictor
from mister_jax.tasks.base import split_params
from mister_jax.tasks.speech_encoder import SpeechEncoderTask
from mister_jax.training.loop import train
from mister_jax.training.steps import make_train_step
from tests.helpers.tiny_encoders import WAVLM_CONFIG, save_encoder
from tests.helpers.training import (
    assert_same_bits,
    assert_same_steps,
    initial_encoder_state,
    one_device_partitioner,
    read_latest_checkpoint,
    read_validation_scores,
    take_two_steps,
)


def make_config(folder, data_dir, **changes):
    """Returns the config of a quick training run."""
    config = speech_encoder.get_config("manifest/heard,whisper_tiny")
    config.data.update({"data_dir": str(data_dir), "num_buckets": 1, "batch_size": 8})
    config.encoder.options.update({"name": str(folder), "max_seconds": 0.8, "crop_seconds": 0.5})
    config.encoder.lora.update({"rank": 2, "alpha": 4.0})
    config.head.update({"feature_dim": 12, "dropout": 0.2})
    config.optimizer.update({"learning_rate": 1e-2, "warmup_fraction": 0.0})
    config.train.update({"epochs": 8, "log_every": 2})
    config.update_from_flattened_dict(changes)
    return config


def make_augmented_config(folder, data_dir, **changes):
    augmentation = {f"encoder.options.{name}": True for name in ("gain", "noise", "speed")}
    return make_config(folder, data_dir, **augmentation, **changes)


@pytest.fixture(scope="module")
def whisper_workdir(whisper_folder, heard_dir, tmp_path_factory):
    """The work directory of a Whisper that was trained with all parameters and augmentation."""
    workdir = tmp_path_factory.mktemp("whisper") / "run"
    config = make_augmented_config(whisper_folder, heard_dir)
    assert train(config, workdir, quiet=True).finished
    return workdir


def test_an_encoder_learns_the_emotion(whisper_workdir):
    assert max(read_validation_scores(whisper_workdir)) > 0.9


def test_a_training_stopped_by_sigterm_resumes_to_the_same_bits(
    whisper_folder, heard_dir, whisper_workdir, tmp_path
):
    def terminate(step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    config = make_augmented_config(whisper_folder, heard_dir)
    assert not train(config, tmp_path, quiet=True, on_step=terminate).finished
    assert train(config, tmp_path, quiet=True).finished
    assert_same_bits(read_latest_checkpoint(tmp_path), read_latest_checkpoint(whisper_workdir))


def test_evaluation_and_extraction_read_the_same_speech(whisper_workdir, heard_dir):
    scores = evaluate(whisper_workdir, "validation", quiet=True)
    assert scores["weighted_f1"] == pytest.approx(max(read_validation_scores(whisper_workdir)))
    assert scores["utterances"] == 6 * 3 - 4
    encoder = extraction.TunedEncoder(whisper_workdir)
    assert encoder.modality == "speech" and encoder.input.max_length == 8
    extraction.extract_features(encoder, "manifest/heard", "tuned_speech", heard_dir, quiet=True)
    features = data.load_features("tuned_speech", "validation", heard_dir)
    predictor = Predictor(whisper_workdir)
    clips = predictor.task.features("validation")
    np.testing.assert_array_equal(
        features.utterance_ids[features.speech_present], clips.utterance_ids
    )
    expected = predictor(clips, quiet=True)["feature"]
    np.testing.assert_allclose(features.speech[features.speech_present], expected, atol=1e-5)
    restored = extraction.encoder_from_metadata(json.loads(json.dumps(features.metadata["speech"])))
    first_features, _ = extraction.encode_utterances(restored, clips.items[:3])
    np.testing.assert_allclose(first_features, expected[:3], atol=1e-5)


@pytest.fixture(scope="module")
def task(whisper_folder, heard_dir):
    return SpeechEncoderTask.from_data(make_config(whisper_folder, heard_dir))


@pytest.fixture(scope="module")
def batch(task):
    split = task.split("train", num_shards=16, shuffle=True)
    return next(iter(split.batches()))


def first_position(clip, crop):
    """Returns the position in a clip at which a crop starts."""
    return next(
        start
        for start in range(len(clip) - len(crop) + 1)
        if np.array_equal(clip[start : start + len(crop)], crop)
    )


def test_only_training_crops_at_random(task):
    training = task.split("train", num_shards=1, shuffle=True)
    validation = task.split("validation", num_shards=1, shuffle=False)
    assert max(length for _, length in training.shapes) * LENGTH_STEP == 8000
    assert max(length for _, length in validation.shapes) * LENGTH_STEP > 8000
    clips = task.features("train").labeled().items
    longest = int(np.argmax([len(clip) for clip in clips]))
    starts = set()
    for epoch in range(4):
        for batch in training.batches(epoch):
            for row in np.flatnonzero(batch["row"] == longest):
                crop = batch["waveform"][row, : batch["lengths"][row]]
                starts.add(first_position(clips[longest], crop))
    assert len(starts) > 1
    first, second = (next(iter(validation.batches(epoch))) for epoch in range(2))
    np.testing.assert_array_equal(first["waveform"], second["waveform"])


def test_only_training_reads_a_clip_that_starts_with_silence(task, monkeypatch):
    late = np.append(np.zeros(13_000), np.arange(1000)).astype(np.int16)
    turn = types.SimpleNamespace(id="late", audio=late, speech_present=True, label=0, score=None)
    dialogues = [types.SimpleNamespace(id="one", utterances=[turn])]
    monkeypatch.setattr(DialogueDataset, "dialogues", lambda *_: iter(dialogues))
    assert not task.features("train").items
    assert task.split("train", num_shards=1, shuffle=True).steps == 1
    with pytest.raises(InputError, match="no labeled utterance can be read"):
        task.split("validation", num_shards=1, shuffle=False)


def abstract_model(task):
    return nnx.eval_shape(lambda: task.init(jax.random.key(0)))


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"full": True}, {"backbone", "head"}),
        ({"full": False, "tower": "frozen"}, {"head"}),
        ({"full": False, "tower": "lora"}, {"lora", "head"}),
        ({"full": False, "tower": "full"}, {"backbone", "head"}),
    ],
)
def test_options_choose_the_trained_parameters(whisper_folder, heard_dir, changes, kinds):
    changes = {f"encoder.options.{name}": value for name, value in changes.items()}
    task = SpeechEncoderTask.from_data(make_config(whisper_folder, heard_dir, **changes))
    _, params, frozen = split_params(abstract_model(task), task.trainable)

    def kind(path):
        name = jax.tree_util.keystr(path)
        return "head" if "head'" in name else "lora" if "lora_" in name else "backbone"

    assert {kind(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)} == kinds
    assert bool(jax.tree.leaves(frozen)) == ("backbone" not in kinds)


def training_gradient(task, batch):
    """Returns the gradient of the loss of a batch."""
    loaded = task.load(jax.random.key(0), one_device_partitioner())
    graph, params, frozen = split_params(loaded, task.trainable)

    @jax.jit
    def gradient(params, frozen, batch):
        def loss(params):
            model = nnx.merge(graph, params, frozen)
            return task.loss(model, batch, jax.random.key(0), None)[0]

        return jax.grad(loss)(params)

    return gradient(params, frozen, batch)


def check_weight_decay_skips_positions(task, batch):
    """Checks that a training step changes every kernel, but no position embeddings."""
    optimizer = make_optimizer(
        OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=0.5), 10
    )
    partitioner = one_device_partitioner()
    template, state = initial_encoder_state(task, optimizer, partitioner)
    initial_params = jax.device_get(state["params"])
    step = partitioner.compile_step(make_train_step(task, template, optimizer))
    state, _ = step(partitioner.put_state(state), partitioner.put_batch(batch))
    has_changed = {
        jax.tree_util.keystr(path): not np.array_equal(value, initial_value)
        for (path, value), initial_value in zip(
            jax.tree_util.tree_leaves_with_path(state["params"]),
            jax.tree.leaves(initial_params),
            strict=True,
        )
        if value.ndim > 1
    }
    for ending, expected in (("['positions']", False), ("['kernel']", True)):
        assert {has_changed[name] for name in has_changed if name.endswith(ending)} == {expected}


def test_weight_decay_skips_the_positions_of_whisper(whisper_folder, heard_dir, batch):
    config = make_config(whisper_folder, heard_dir, **{"encoder.options.full": True})
    check_weight_decay_skips_positions(SpeechEncoderTask.from_data(config), batch)


def test_weight_decay_skips_the_positions_of_a_speech_llm(make_llm_task, batch):
    check_weight_decay_skips_positions(make_llm_task(tower="full"), batch)


def test_each_augmentation_changes_only_training(whisper_folder, heard_dir, batch):
    def loss_and_features(*augmentations):
        changes = {f"encoder.options.{name}": True for name in augmentations}
        task = SpeechEncoderTask.from_data(make_config(whisper_folder, heard_dir, **changes))
        model = task.load(jax.random.key(0), one_device_partitioner())

        @nnx.jit
        def compute(model, batch):
            loss, _ = task.loss(model, batch, jax.random.key(0), None)
            return loss, task.apply(model, batch).feature

        return compute(model, batch)

    plain_loss, plain_features = loss_and_features()
    for name in ("gain", "noise", "speed", "mask_spectrogram"):
        loss, features = loss_and_features(name)
        assert np.isfinite(loss) and loss != plain_loss, name
        np.testing.assert_allclose(features, plain_features, atol=1e-6)


def test_augmentation_does_not_depend_on_batch_or_padding(whisper_folder, heard_dir, batch):
    changes = {"encoder.options.mask_spectrogram": True}
    task = SpeechEncoderTask.from_data(make_augmented_config(whisper_folder, heard_dir, **changes))
    model = task.load(jax.random.key(0), one_device_partitioner())

    @nnx.jit
    def logits(model, batch):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), batch["row"])
        augmented = task.augment(batch, keys)
        options = {"deterministic": False, "rngs": PerExampleRngs(keys)}
        return task.apply(model, augmented, **options).logits

    row = int(np.argmin(batch["lengths"]))
    row_batch = {name: value[row : row + 1] for name, value in batch.items()}
    length = -(-int(batch["lengths"][row]) // LENGTH_STEP) * LENGTH_STEP
    row_batch["waveform"] = row_batch["waveform"][:, :length]
    np.testing.assert_allclose(logits(model, row_batch)[0], logits(model, batch)[row], atol=1e-4)


def test_accumulation_does_not_change_a_step(task, batch):
    def step(accumulation):
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-4), 10)
        partitioner = one_device_partitioner()
        template, state = initial_encoder_state(task, optimizer, partitioner)
        train_step = make_train_step(task, template, optimizer, accumulation)
        state, metrics = partitioner.compile_step(train_step)(
            partitioner.put_state(state), partitioner.put_batch(batch)
        )
        return jax.device_get((state["params"], metrics))

    assert_same_steps(step(4), step(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.options.max_seconds": 1.0}, "max_seconds=1; allowed: 0.1 to 0.8, the"),
        ({"encoder.options.crop_seconds": 0.01}, "crop_seconds=0.01; allowed: 0.1 to"),
        ({"encoder.options.max_seconds": float("nan")}, "options: max_seconds=nan; allowed: 0.1"),
        ({"encoder.options.crop_seconds": float("inf")}, "options: crop_seconds=inf; allowed: 0.1"),
        ({"encoder.options.tower": "high"}, "tower 'high'; allowed: frozen, lora, full"),
        ({"encoder.options.prompt": "Well?"}, "prompt 'Well.'; allowed: none, it is not an LLM"),
        ({"encoder.options.vicuna": "here"}, r"allowed: all three \(SALMONN\), or none"),
        (
            {"encoder.options.full": False, "encoder.lora.targets": ("wise",)},
            r"LoRA targets \['wise'\]: no such layers",
        ),
        ({"encoder.options.quantize": True}, "quantize freezes them; choose one"),
        ({"data.name": "manifest/written"}, "no dataset 'manifest/written'"),
    ],
)
def test_an_unusable_config_is_refused(whisper_folder, heard_dir, tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as error:
        train(make_config(whisper_folder, heard_dir, **changes), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_text_encoder_is_refused(bert_folder, heard_dir):
    with pytest.raises(InputError, match="'bert' encodes text; allowed for speech: whis"):
        SpeechEncoderTask.from_data(make_config(bert_folder, heard_dir))


def test_waveform_encoders_are_trained(heard_dir, batch, tmp_path):
    save_encoder(tmp_path, WAVLM_CONFIG)
    changes = {"encoder.options.full": False}
    task = SpeechEncoderTask.from_data(make_config(tmp_path, heard_dir, **changes))
    gradient = training_gradient(task, batch)["backbone"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(InputError, match="model_type 'wavlm' has no spectrogram"):
        changes = {"encoder.options.mask_spectrogram": True}
        SpeechEncoderTask.from_data(make_config(tmp_path, heard_dir, **changes))


@pytest.fixture(scope="module", params=["qwen2_audio_7b", "salmonn_7b"])
def make_llm_task(request, qwen_folder, salmonn_options, heard_dir):
    """Returns a function that makes the task of a speech LLM with the given options."""
    options = {"name": str(qwen_folder)} if "qwen" in request.param else dict(salmonn_options)

    def make(**changes):
        config = speech_encoder.get_config(f"manifest/heard,{request.param}")
        config.data.update({"data_dir": str(heard_dir), "num_buckets": 1, "batch_size": 8})
        dtypes = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}
        seconds = {"max_seconds": 0.8, "crop_seconds": 0.5}
        config.encoder.options.update({**options, **dtypes, **seconds, **changes})
        config.encoder.lora.update({"rank": 2, "alpha": 8.0})
        config.head.update({"feature_dim": 12, "dropout": 0.0})
        return SpeechEncoderTask.from_data(config)

    return make


def test_lora_trains_the_decoder_of_a_speech_llm(make_llm_task, batch):
    task = make_llm_task(mask_spectrogram=True)
    leaves = jax.tree_util.tree_leaves_with_path(training_gradient(task, batch))
    assert all(np.isfinite(leaf).all() for _, leaf in leaves)
    trained = {jax.tree_util.keystr(path) for path, leaf in leaves if np.asarray(leaf).any()}
    assert any("lora_" in path and "decoder" in path for path in trained)
    assert all("lora_" in path or "['head']" in path for path in trained)


@pytest.mark.parametrize("make_llm_task", ["qwen2_audio_7b"], indirect=True)
def test_devices_do_not_change_a_step_of_a_speech_llm(make_llm_task, batch):
    task = make_llm_task()
    one_device_steps = take_two_steps(one_device_partitioner(), task, batch)
    for count, model_parallelism in ((2, 1), (2, 2), (8, 2)):  # FSDP, tensor parallel, both
        mesh = data_mesh(model_parallelism, jax.devices()[:count])
        partitioner = JitPartitioner(mesh, task.sharding_rules)
        assert_same_steps(take_two_steps(partitioner, task, batch), one_device_steps)


def test_the_audio_tower_of_a_speech_llm_is_trained_on_request(make_llm_task):
    def trained_outside_decoder(**options):
        task = make_llm_task(**options)
        _, params, _ = split_params(abstract_model(task), task.trainable)
        names = map(jax.tree_util.keystr, dict(jax.tree_util.tree_leaves_with_path(params)))
        return {name for name in names if "['head']" not in name and "decoder" not in name}

    assert not trained_outside_decoder()
    full = trained_outside_decoder(tower="full")
    assert any("strided_convolution" in name for name in full)
    if make_llm_task().options.files.is_salmonn:
        assert any("qformer" in name for name in full)
        with pytest.raises(InputError, match="SALMONN does not support full=True or tower=lora"):
            make_llm_task(tower="lora")
    else:
        lora = trained_outside_decoder(tower="lora")
        assert lora and all("lora_" in name for name in lora)


def test_a_speech_llm_pools_over_audio_or_all_positions(make_llm_task):
    for pool_prompt in (False, True):
        task = make_llm_task(pool_prompt=pool_prompt)
        assert abstract_model(task).backbone.pool_over_prompt == pool_prompt
