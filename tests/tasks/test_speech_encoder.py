"""Speech encoders, tuned as a user tunes them: frozen, LoRA, whole, augmented, stopped, asked."""

import json
import os
import signal
import types

import jax
import numpy as np
import pytest
from flax import nnx
from mister_jax.configs import speech_encoder

import mister_jax.training.loop as train_module
from mister_jax import data, extraction
from mister_jax.data.clips import UNIT
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.encoders import registry
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
from mister_jax.training.steps import initial_state, make_train_step
from tests.helpers.training import assert_same_bits, read_latest_checkpoint, read_metric_records
from tests.tasks.test_text_encoder import assert_alike, two_steps


def tiny(folder, data_dir, **changes):
    """A quick experiment."""
    config = speech_encoder.get_config("manifest/heard,whisper_tiny")
    config.data.update({"data_dir": str(data_dir), "num_buckets": 1, "batch_size": 8})
    config.encoder.options.update({"name": str(folder), "max_seconds": 0.8, "crop_seconds": 0.5})
    config.encoder.lora.update({"rank": 2, "alpha": 4.0})
    config.head.update({"feature_dim": 12, "dropout": 0.2})
    config.optimizer.update({"learning_rate": 1e-2, "warmup_fraction": 0.0})
    config.train.update({"epochs": 8, "log_every": 2})
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def tuned(whisper_folder, heard_dir, tmp_path_factory):
    """The work directory of a Whisper tuned whole, its clips augmented."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    assert train(augmenting(whisper_folder, heard_dir), workdir, quiet=True).finished
    return workdir


def augmenting(folder, data_dir):
    changes = {f"encoder.options.{name}": True for name in ("gain", "noise", "speed")}
    return tiny(folder, data_dir, **changes)


def scores(workdir):
    found = (row.get("validation/weighted_f1") for row in read_metric_records(workdir))
    return [score for score in found if score is not None]


def test_an_encoder_learns_what_tells_the_emotion(tuned):
    assert max(scores(tuned)) > 0.9


def test_stopped_and_started_again_it_ends_with_the_same_bits(
    whisper_folder, heard_dir, tuned, tmp_path, monkeypatch
):
    original = train_module._Loop._record

    def record(loop, unread, done, writer):
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        original(loop, unread, done, writer)

    config = augmenting(whisper_folder, heard_dir)
    monkeypatch.setattr(train_module._Loop, "_record", record)
    assert not train(config, tmp_path, quiet=True).finished
    monkeypatch.undo()
    assert train(config, tmp_path, quiet=True).finished
    assert_same_bits(read_latest_checkpoint(tmp_path), read_latest_checkpoint(tuned))


def test_evaluation_and_extraction_agree_on_what_is_heard(tuned, heard_dir):
    found = evaluate(tuned, "validation", quiet=True)
    assert found["weighted_f1"] == pytest.approx(max(scores(tuned)))
    assert found["utterances"] == 6 * 3 - 4
    encoder = extraction.TunedEncoder(tuned)
    assert encoder.modality == "speech" and encoder.input.longest == 8
    extraction.extract_features(encoder, "manifest/heard", "tuned_speech", heard_dir, quiet=True)
    features = data.load_features("tuned_speech", "validation", heard_dir)
    predictor = Predictor(tuned)
    clips = predictor.task.features("validation")
    np.testing.assert_array_equal(
        features.utterance_ids[features.speech_present], clips.utterance_ids
    )
    expected = predictor(clips, quiet=True)["feature"]
    np.testing.assert_allclose(features.speech[features.speech_present], expected, atol=1e-5)
    again = extraction.encoder_from_metadata(json.loads(json.dumps(features.metadata["speech"])))
    some, _ = extraction.encode_utterances(again, clips.items[:3])
    np.testing.assert_allclose(some, expected[:3], atol=1e-5)


@pytest.fixture(scope="module")
def task(whisper_folder, heard_dir):
    return SpeechEncoderTask.from_data(tiny(whisper_folder, heard_dir))


@pytest.fixture(scope="module")
def batch(task):
    split = task.split("train", num_shards=16, shuffle=True)
    return next(iter(split.batches()))


def test_crops_are_of_training_alone(task):
    training = task.split("train", num_shards=1, shuffle=True)
    validation = task.split("validation", num_shards=1, shuffle=False)
    assert max(length for _, length in training.shapes) * UNIT == 8000
    assert max(length for _, length in validation.shapes) * UNIT > 8000
    clips = task.features("train").labeled().items
    places = set()
    for epoch in range(4):
        for batch in training.batches(epoch):
            for row, waveform, length in zip(
                batch["row"], batch["waveform"], batch["lengths"], strict=True
            ):
                if row == np.argmax([len(clip) for clip in clips]):
                    whole = clips[row]
                    starts = [
                        start
                        for start in range(len(whole) - length + 1)
                        if np.array_equal(whole[start : start + length], waveform[:length])
                    ]
                    places.add(starts[0])
    assert len(places) > 1
    first, second = (next(iter(validation.batches(epoch))) for epoch in range(2))
    np.testing.assert_array_equal(first["waveform"], second["waveform"])


def test_a_clip_that_is_silent_until_the_cut_is_of_training_alone(task, monkeypatch):
    late = np.append(np.zeros(13_000), np.arange(1000)).astype(np.int16)
    turn = types.SimpleNamespace(id="late", audio=late, speech_present=True, label=0, score=None)
    dialogues = [types.SimpleNamespace(id="one", utterances=[turn])]
    monkeypatch.setattr(DialogueDataset, "dialogues", lambda *_: iter(dialogues))
    assert not task.features("train").items
    assert task.split("train", num_shards=1, shuffle=True).steps == 1
    with pytest.raises(InputError, match="no utterance with a label can be read"):
        task.split("validation", num_shards=1, shuffle=False)


def make(task, key=0):
    return task.init(jax.random.key(key))


@pytest.mark.parametrize(
    ("changes", "kinds"),
    [
        ({"full": True}, {"backbone", "head"}),
        ({"full": False, "tower": "frozen"}, {"head"}),
        ({"full": False, "tower": "lora"}, {"lora", "head"}),
        ({"full": False, "tower": "full"}, {"backbone", "head"}),
    ],
)
def test_what_is_trained_is_chosen(whisper_folder, heard_dir, changes, kinds):
    changes = {f"encoder.options.{name}": value for name, value in changes.items()}
    task = SpeechEncoderTask.from_data(tiny(whisper_folder, heard_dir, **changes))
    shapes = nnx.eval_shape(lambda: make(task))
    _, params, frozen = split_params(shapes, task.trainable)

    def kind(path):
        name = jax.tree_util.keystr(path)
        return "head" if "head'" in name else "lora" if "lora_" in name else "backbone"

    found = {kind(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert found == kinds
    assert bool(jax.tree.leaves(frozen)) == ("backbone" not in kinds)


def one_device():
    return JitPartitioner(data_mesh(devices=jax.devices()[:1]))


def gradient_of(task, batch):
    """Of the loss of a batch in training."""
    loaded = task.load(jax.random.key(0), one_device())
    graph, params, frozen = split_params(loaded, task.trainable)

    @jax.jit
    def gradient(params, frozen, batch):
        def loss(params):
            model = nnx.merge(graph, params, frozen)
            return task.loss(model, batch, jax.random.key(0), None)[0]

        return jax.grad(loss)(params)

    return gradient(params, frozen, batch)


def test_a_table_of_positions_does_not_decay(whisper_folder, heard_dir, batch, llm):
    tasks = [
        SpeechEncoderTask.from_data(
            tiny(whisper_folder, heard_dir, **{"encoder.options.full": True})
        ),
        llm(tower="full"),
    ]
    for task in tasks:
        transformation = make_optimizer(
            OptimizerConfig(name="adamw", learning_rate=1e-2, weight_decay=0.5), 10
        )
        spread = one_device()
        graph, state = initial_state(
            task,
            transformation,
            seed=0,
            trainable=task.trainable,
            make=lambda key, task=task: task.load(key, one_device()),
        )
        before = jax.device_get(state["params"])
        program = spread.compile_step(make_train_step(task, graph, transformation))
        after, _ = program(spread.put_state(state), spread.put_batch(batch))
        kept = [
            jax.tree_util.keystr(path)
            for (path, new), old in zip(
                jax.tree_util.tree_leaves_with_path(after["params"]),
                jax.tree.leaves(before),
                strict=True,
            )
            if new.ndim > 1 and np.array_equal(new, old)
        ]
        assert [name for name in kept if name.endswith("['positions']")]
        assert not [name for name in kept if name.endswith("['kernel']")]


def test_each_augmentation_changes_training_and_nothing_else(whisper_folder, heard_dir, batch):
    def found(*names):
        changes = {f"encoder.options.{name}": True for name in names}
        task = SpeechEncoderTask.from_data(tiny(whisper_folder, heard_dir, **changes))
        model = task.load(jax.random.key(0), one_device())

        @nnx.jit
        def both(model, batch):
            loss, _ = task.loss(model, batch, jax.random.key(0), None)
            return loss, task.read(model, batch).feature

        return both(model, batch)

    plain, features = found()
    for name in ("gain", "noise", "speed", "mask_spectrogram"):
        changed, same = found(name)
        assert np.isfinite(changed) and changed != plain, name
        np.testing.assert_allclose(same, features, atol=1e-6)


def test_augmentation_of_an_utterance_depends_on_neither_batch_nor_padding(
    whisper_folder, heard_dir, batch
):
    changes = {"encoder.options.mask_spectrogram": True}
    config = augmenting(whisper_folder, heard_dir)
    config.update_from_flattened_dict(changes)
    task = SpeechEncoderTask.from_data(config)
    model = task.load(jax.random.key(0), one_device())

    @nnx.jit
    def logits(model, batch):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), batch["row"])
        given = task.augmented(batch, keys)
        options = {"deterministic": False, "rngs": PerExampleRngs(keys)}
        return task.read(model, given, **options).logits

    row = int(np.argmin(batch["lengths"]))
    alone = {name: value[row : row + 1] for name, value in batch.items()}
    length = -(-int(batch["lengths"][row]) // UNIT) * UNIT
    alone["waveform"] = alone["waveform"][:, :length]
    np.testing.assert_allclose(logits(model, alone)[0], logits(model, batch)[row], atol=1e-4)


def test_the_loss_is_divided_once(whisper_folder, heard_dir, task, batch):
    """Cut into parts, a batch gives the same step as whole."""

    def step(accumulation):
        transformation = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-4), 10)
        spread = one_device()
        graph, state = initial_state(
            task,
            transformation,
            seed=0,
            trainable=task.trainable,
            make=lambda key: task.load(key, spread),
        )
        program = spread.compile_step(make_train_step(task, graph, transformation, accumulation))
        after, metrics = program(spread.put_state(state), spread.put_batch(batch))
        return jax.device_get((after["params"], metrics))

    (params, metrics), (others, parts) = step(1), step(4)
    assert metrics["loss"] == pytest.approx(parts["loss"], abs=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), params, others)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.options.max_seconds": 1.0}, "max_seconds=1; allowed: 0.1 to 0.8, as the"),
        ({"encoder.options.crop_seconds": 0.01}, "crop_seconds=0.01; allowed: 0.1 to"),
        ({"encoder.options.max_seconds": float("nan")}, "options: max_seconds=nan; allowed: 0.1"),
        ({"encoder.options.crop_seconds": float("inf")}, "options: crop_seconds=inf; allowed: 0.1"),
        ({"encoder.options.tower": "high"}, "tower 'high'; allowed: frozen, lora, full"),
        ({"encoder.options.prompt": "Well?"}, "prompt 'Well.'; allowed: none, it is no LLM"),
        ({"encoder.options.vicuna": "here"}, r"allowed: all of them \(SALMONN\), or none"),
        (
            {"encoder.options.full": False, "encoder.lora.targets": ("wise",)},
            r"LoRA targets \['wise'\]: no such layers",
        ),
        ({"encoder.options.quantize": True}, "one of the two"),
        ({"data.name": "manifest/written"}, "no dataset 'manifest/written'"),
    ],
)
def test_a_config_that_cannot_be_used_says_so(
    whisper_folder, heard_dir, tmp_path, changes, message
):
    with pytest.raises(InputError, match=message) as error:
        train(tiny(whisper_folder, heard_dir, **changes), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_text_encoder_is_refused(bert_folder, heard_dir):
    with pytest.raises(InputError, match="'bert' encodes text; allowed for speech: whis"):
        SpeechEncoderTask.from_data(tiny(bert_folder, heard_dir))


WAVLM = {
    "model_type": "wavlm",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_kernel": [20, 20],
    "conv_stride": [16, 20],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_proj_dropout": 0.1,
}


def test_encoders_of_the_waveform_are_tuned_too(heard_dir, batch, tmp_path):
    registry.save_pretrained(registry.create_module(WAVLM, rngs=nnx.Rngs(0)), WAVLM, tmp_path)
    changes = {"encoder.options.full": False}
    task = SpeechEncoderTask.from_data(tiny(tmp_path, heard_dir, **changes))
    gradient = gradient_of(task, batch)["backbone"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(InputError, match="model_type 'wavlm' has no spectrogram"):
        changes = {"encoder.options.mask_spectrogram": True}
        SpeechEncoderTask.from_data(tiny(tmp_path, heard_dir, **changes))


@pytest.fixture(scope="module", params=["qwen2_audio_7b", "salmonn_7b"])
def llm(request, qwen_folder, salmonn_options, heard_dir):
    """Function of options that makes the task of a speech LLM."""
    options = {"name": str(qwen_folder)} if "qwen" in request.param else dict(salmonn_options)

    def make(**changes):
        config = speech_encoder.get_config(f"manifest/heard,{request.param}")
        config.data.update({"data_dir": str(heard_dir), "num_buckets": 1, "batch_size": 8})
        types = {"dtype": "float32", "param_dtype": "float32", "remat": "none"}
        seconds = {"max_seconds": 0.8, "crop_seconds": 0.5}
        config.encoder.options.update({**options, **types, **seconds, **changes})
        config.encoder.lora.update({"rank": 2, "alpha": 8.0})
        config.head.update({"feature_dim": 12, "dropout": 0.0})
        return SpeechEncoderTask.from_data(config)

    return make


def test_an_llm_is_tuned_by_its_low_rank_paths(llm, batch):
    task = llm(mask_spectrogram=True)
    leaves = jax.tree_util.tree_leaves_with_path(gradient_of(task, batch))
    assert all(np.isfinite(leaf).all() for _, leaf in leaves)
    moved = {jax.tree_util.keystr(path) for path, leaf in leaves if np.asarray(leaf).any()}
    assert any("lora_" in path and "decoder" in path for path in moved)
    assert all("lora_" in path or "['head']" in path for path in moved)


@pytest.mark.parametrize("llm", ["qwen2_audio_7b"], indirect=True)
def test_devices_do_not_change_a_step_of_an_llm(llm, batch):
    task = llm()
    alone = two_steps(one_device(), task, batch)
    for count, model_parallelism in ((2, 1), (2, 2), (8, 2)):  # FSDP, tensor parallel, both
        mesh = data_mesh(model_parallelism, jax.devices()[:count])
        assert_alike(two_steps(JitPartitioner(mesh, task.sharding_rules), task, batch), alone)


def test_what_an_llm_hears_through_is_trained_where_asked(llm):
    def trained(**changes):
        task = llm(**changes)
        shapes = nnx.eval_shape(lambda: make(task))
        _, params, _ = split_params(shapes, task.trainable)
        names = map(jax.tree_util.keystr, dict(jax.tree_util.tree_leaves_with_path(params)))
        return {name for name in names if "['head']" not in name and "decoder" not in name}

    assert not trained()
    full = trained(tower="full")
    assert any("strided_convolution" in name for name in full)
    if llm().options.files.is_salmonn:
        assert any("qformer" in name for name in full)
        with pytest.raises(InputError, match="not for SALMONN; allowed: tower=frozen, full"):
            llm(tower="lora")
    else:
        assert trained(tower="lora") and all("lora_" in name for name in trained(tower="lora"))


def test_an_llm_pools_over_audio_or_all_positions(llm):
    for pool_prompt in (False, True):
        task = llm(pool_prompt=pool_prompt)
        assert nnx.eval_shape(lambda task=task: make(task)).backbone.pool_over_prompt == pool_prompt
