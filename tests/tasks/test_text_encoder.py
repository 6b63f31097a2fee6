"""Text encoders, tuned as a user tunes them: LoRA, int8, whole, stopped, spread over devices."""

import json
import os
import shutil
import signal

import jax
import numpy as np
import pytest
from flax import nnx
from mister_jax.configs import text_encoder

import mister_jax.training.loop as train_module
from mister_jax import extraction
from mister_jax.convert.safetensors import Checkpoint, save
from mister_jax.encoders import registry
from mister_jax.errors import InputError
from mister_jax.evaluation.missing_modality import missing_modality_study
from mister_jax.evaluation.results import evaluate
from mister_jax.optim import OptimizerConfig, make_optimizer
from mister_jax.parallel.partitioning import CompiledStep, JitPartitioner, PmapPartitioner
from mister_jax.parallel.sharding import data_mesh
from mister_jax.predictor import Predictor
from mister_jax.tasks.text_encoder import TextEncoderTask
from mister_jax.training.loop import train
from mister_jax.training.steps import initial_state, make_train_step
from tests.helpers.training import assert_same_bits, read_latest_checkpoint, read_metric_records

pytestmark = pytest.mark.devices


def tiny(folder, data_dir, kind="llama_3_2_1b", **changes):
    """A quick experiment; a decoder is tuned by LoRA, BERT ("minilm_l6") whole."""
    config = text_encoder.get_config(f"manifest/spoken,{kind}")
    config.data.update({"data_dir": str(data_dir), "num_buckets": 1, "batch_size": 16})
    config.encoder.options.update(
        {"name": str(folder), "max_tokens": 12, "dtype": "float32", "param_dtype": "float32"}
    )
    config.encoder.options.remat = "none"
    config.head.update({"feature_dim": 12, "dropout": 0.2})
    config.optimizer.update({"learning_rate": 2e-2, "warmup_fraction": 0.0})
    config.train.update({"epochs": 10, "log_every": 2})
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def tuned(llama_folder, spoken_dir, tmp_path_factory):
    """The work directory of a Llama tuned by LoRA."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    assert train(tiny(llama_folder, spoken_dir), workdir, quiet=True).finished
    return workdir


def scores(workdir):
    found = (row.get("validation/weighted_f1") for row in read_metric_records(workdir))
    return [score for score in found if score is not None]


def test_low_rank_paths_and_head_learn(tuned):
    found = scores(tuned)
    assert max(found) > max(0.95, found[1])


def test_a_checkpoint_holds_what_was_trained_alone(tuned):
    arrays, _ = read_latest_checkpoint(tuned)
    trained = {name for name in arrays if name.startswith("['params']")}
    assert any("lora_a" in name for name in trained)
    assert all("lora_" in name or "['head']" in name for name in trained)
    assert not any("frozen" in name or "embedding" in name for name in arrays)
    assert "lora_b" in (tuned / "parameters.txt").read_text()
    assert "embedding" not in (tuned / "parameters.txt").read_text()


def test_stopped_and_started_again_it_ends_with_the_same_bits(
    llama_folder, spoken_dir, tuned, tmp_path, monkeypatch
):
    original = train_module._Loop._record

    def record(loop, unread, done, writer):
        if done == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        original(loop, unread, done, writer)

    config = tiny(llama_folder, spoken_dir)
    monkeypatch.setattr(train_module._Loop, "_record", record)
    progress = train(config, tmp_path, quiet=True)
    assert not progress.finished and progress.epoch == 0  # in the middle of the first epoch
    monkeypatch.undo()
    assert train(config, tmp_path, quiet=True).finished
    assert_same_bits(read_latest_checkpoint(tmp_path), read_latest_checkpoint(tuned))
    assert scores(tmp_path) == scores(tuned)


def test_a_backbone_trained_whole_learns_and_changes(bert_folder, spoken_dir, tmp_path):
    changes = {"optimizer.learning_rate": 1e-2}
    train(tiny(bert_folder, spoken_dir, "minilm_l6", **changes), tmp_path, quiet=True)
    found = scores(tmp_path)
    assert max(found) > max(0.95, found[0])
    predictor = Predictor(tmp_path)
    assert not jax.tree.leaves(predictor.params[0]["frozen"])
    ours = predictor.params[0]["trained"]["backbone"]
    theirs = nnx.as_pure(nnx.state(registry.load_module(bert_folder), nnx.Param))
    changed = jax.tree.map(
        lambda one, other: (np.asarray(one) != np.asarray(other)).any(), ours, theirs
    )
    assert changed["token_embedding"]["embedding"]
    assert changed["layers"]["layers"]["attention"]["query"]["kernel"]
    assert changed["layers"]["layers"]["mlp_norm"]["scale"]


@pytest.fixture(scope="module")
def evaluated(tuned, tmp_path_factory):
    output = tmp_path_factory.mktemp("evaluated")
    for split in ("validation", "test"):
        evaluate(tuned, split, output=output, quiet=True)
    return output


def test_evaluation_scores_what_has_text_and_a_label(tuned, evaluated):
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert set(metrics) == {"validation", "test"}
    assert metrics["validation"]["weighted_f1"] == pytest.approx(max(scores(tuned)))
    lines = (evaluated / "predictions.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "test"]
    assert len(rows) == 6 * 4 - 2  # two have no text
    assert sum(row["label"] is None for row in rows) == 2
    assert metrics["test"]["utterances"] == 20
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert (evaluated / "confusion.png").exists()


def test_an_encoder_has_no_modalities_to_miss(tuned):
    with pytest.raises(InputError, match="a training of an encoder; needed: one of MiSTER-E"):
        missing_modality_study(tuned, "test", drop_text=[0.5], quiet=True)


@pytest.fixture(scope="module")
def task(llama_folder, spoken_dir):
    """Dropout is on: devices and parts must agree on what is dropped, too."""
    return TextEncoderTask.from_data(tiny(llama_folder, spoken_dir))


@pytest.fixture(scope="module")
def batch(task):
    """Sixteen utterances; some rows are empty, and one part of four devices is."""
    split = task.split("train", num_shards=16, shuffle=True)
    batch = next(iter(split.batches()))
    for name, fill in {"input_ids": 0, "mask": False, "weight": 0, "label": -1, "row": -1}.items():
        batch[name][12:] = fill
        batch[name][3] = fill
    batch["weight"] = np.where(batch["weight"] > 0, 1 / (batch["weight"] > 0).sum(), 0)
    batch["weight"] = batch["weight"].astype(np.float32)
    return batch


def test_utterances_without_a_label_or_text_are_left_out(task):
    assert len(task.features("train").items) == 36 * 4 - 12
    split = task.split("train", num_shards=8, shuffle=True)
    batches = list(split.batches())
    assert sum((batch["row"] >= 0).sum() for batch in batches) == 36 * 4 - 24
    assert all((batch["label"][batch["row"] >= 0] >= 0).all() for batch in batches)
    assert all(len(batch["row"]) % 8 == 0 for batch in batches)
    assert {(len(batch["row"]), batch["mask"].shape[1]) for batch in batches} == set(split.shapes)


def two_steps(spread, task, batch, accumulation=1):
    """The trained arrays and the metrics after two steps."""
    transformation = make_optimizer(OptimizerConfig(learning_rate=1e-2, eps=1e-4), 10)
    graph, state = initial_state(
        task,
        transformation,
        seed=0,
        trainable=task.trainable,
        make=lambda key: task.load(key, spread),
    )
    before = jax.device_get(state["frozen"])
    step = spread.compile_step(make_train_step(task, graph, transformation, accumulation))
    placed, rows = spread.put_state(state), spread.put_batch(batch)
    if getattr(spread, "rules", ()):
        # Each device of the mesh holds a part of its own, and no more.
        (kernel,) = (
            leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(placed["frozen"])
            if jax.tree_util.keystr(path).endswith("['attention']['query']['kernel']")
            and "tower" not in jax.tree_util.keystr(path)
        )
        parts = {str(shard.index): shard.data.size for shard in kernel.addressable_shards}
        assert len(parts) == spread.mesh.size
        assert set(parts.values()) == {kernel.size // spread.mesh.size}
    with jax.default_matmul_precision("highest"):
        for _ in range(2):
            placed, metrics = step(placed, rows)
    after = jax.device_get(spread.get_state(placed))
    jax.tree.map(np.testing.assert_array_equal, after["frozen"], before)
    return after["params"], jax.device_get(metrics)


def assert_alike(ours, theirs):
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], abs=1e-6)
    for (path, value), other in zip(
        jax.tree_util.tree_leaves_with_path(ours[0]), jax.tree.leaves(theirs[0]), strict=True
    ):
        np.testing.assert_allclose(value, other, atol=1e-5, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def alone(task, batch):
    return two_steps(JitPartitioner(data_mesh(devices=jax.devices()[:1])), task, batch)


@pytest.mark.parametrize(
    ("kind", "count", "model_parallelism", "accumulation"),
    [
        ("data", 1, 1, 4),
        ("data", 2, 1, 1),
        ("fsdp", 2, 1, 1),
        ("fsdp", 8, 1, 2),
        ("tensor", 2, 2, 1),
        ("both", 8, 2, 1),
        ("pmap", 8, 1, 2),
    ],
)
def test_devices_and_parts_do_not_change_a_step(
    task, batch, alone, kind, count, model_parallelism, accumulation
):
    devices = jax.devices()[:count]
    if kind == "pmap":
        spread = PmapPartitioner(devices)
    else:
        rules = () if kind == "data" else task.sharding_rules
        spread = JitPartitioner(data_mesh(model_parallelism, devices), rules)
    assert_alike(two_steps(spread, task, batch, accumulation), alone)


def test_a_base_of_int8_trains_much_like_one_of_floats(llama_folder, spoken_dir, batch, alone):
    config = tiny(llama_folder, spoken_dir, **{"encoder.options.quantize": True})
    task = TextEncoderTask.from_data(config)
    _, metrics = two_steps(JitPartitioner(data_mesh(2), task.sharding_rules), task, batch)
    assert metrics["loss"] == pytest.approx(alone[1]["loss"], rel=0.05)
    assert metrics["loss"] != alone[1]["loss"]
    made = nnx.eval_shape(lambda: task.init(jax.random.key(0)))
    loaded = task.load(jax.random.key(0), JitPartitioner(data_mesh(), task.sharding_rules))
    assert nnx.graphdef(made) == nnx.graphdef(loaded)
    assert loaded.backbone.layers.layers.attention.query.kernel.dtype == np.int8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder.options.max_tokens": 2}, "max_tokens=2; allowed: at least 3"),
        ({"encoder.options.max_tokens": 21}, "max_tokens=21; allowed: at most 20"),
        ({"encoder.options.name": ""}, "an empty name; allowed: a folder"),
        ({"encoder.options.dtype": "int8"}, "dtype='int8'; allowed: float32, bfloat16"),
        ({"encoder.options.remat": "some"}, "remat 'some'; allowed: none, full, dots"),
        ({"encoder.options.quantize": True}, "one of the two"),
        ({"encoder.options.full": False, "encoder.lora.rank": 0}, "rank=0"),
        (
            {"encoder.options.full": False, "encoder.lora.targets": ("wise",)},
            r"LoRA targets \['wise'\]: no such layers; allowed are .*'query'",
        ),
        ({"head.pooling": "max"}, "'max'; allowed: statistics, mean, last"),
        ({"loss.gamma": -1.0}, "gamma=-1.0"),
        ({"data.batch_size": 0}, "batch_size 0"),
        ({"train.accumulation": 0}, "accumulation"),
        ({"data.name": "manifest/written"}, "no dataset 'manifest/written'"),
    ],
)
def test_a_config_that_cannot_be_used_says_so(bert_folder, spoken_dir, tmp_path, changes, message):
    config = tiny(bert_folder, spoken_dir, "minilm_l6", **changes)
    with pytest.raises(InputError, match=message) as error:
        train(config, tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def other_weights(folder, llama_folder):
    save(folder, Checkpoint.open(llama_folder))


def lost_shard(folder, _):
    save(folder, Checkpoint.open(folder), max_shard_size=3000)
    next(folder.glob("model-00002-*")).unlink()


def cut_short(folder, _):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def other_tokenizer(folder, _):
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] |= {f"word{number}": number for number in range(99, 120)}
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_weights, "another architecture: .* missing: embeddings.* surplus"),
        (lost_shard, "1 of .* shards missing"),
        (cut_short, "truncated"),
        (other_tokenizer, "does not belong to the model: .* up to 119; allowed: below"),
    ],
)
def test_a_backbone_that_cannot_be_used_is_named(
    bert_folder, llama_folder, spoken_dir, tmp_path, damage, message
):
    folder = shutil.copytree(bert_folder, tmp_path / "copy")
    damage(folder, llama_folder)
    with pytest.raises(InputError, match=f"{folder}.*{message}") as error:
        train(tiny(folder, spoken_dir, "minilm_l6"), tmp_path / "run", quiet=True)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_speech_encoder_is_refused(whisper_folder, spoken_dir, tmp_path):
    message = f"{whisper_folder}: model_type 'whisper' encodes speech; allowed for text: bert, ro"
    with pytest.raises(InputError, match=message):
        train(tiny(whisper_folder, spoken_dir, "minilm_l6"), tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match=message):
        extraction.PretrainedText(str(whisper_folder))


def test_a_dataset_without_labels_in_a_split_is_named(task, monkeypatch):
    utterances = task.features("validation")
    monkeypatch.setattr(task, "features", lambda _: utterances.take(np.arange(0)))
    with pytest.raises(InputError, match="spoken, split validation: no utterance"):
        task.split("validation", num_shards=1, shuffle=False)


def test_a_lack_of_memory_for_the_backbone_is_said(tuned, monkeypatch, out_of_memory):
    monkeypatch.setattr(registry, "load_backbone", out_of_memory)
    with pytest.raises(InputError, match=f"{tuned}: out of memory with the model's") as error:
        Predictor(tuned)
    assert "more of them" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("place", ["compile", "__call__"])
def test_a_lack_of_memory_names_the_batch_and_the_remedies(
    llama_folder, spoken_dir, tmp_path, monkeypatch, out_of_memory, place
):
    monkeypatch.setattr(CompiledStep, "compile", lambda *_: None)
    monkeypatch.setattr(CompiledStep, place, out_of_memory)
    with pytest.raises(
        InputError, match="out of memory with batches of up to 16 x 7 on 8"
    ) as error:
        train(tiny(llama_folder, spoken_dir), tmp_path, quiet=True)
    message = str(error.value)
    for part in ("batch_size", "accumulation", "remat", "allocating 7 bytes", str(tmp_path)):
        assert part in message
    assert "\n" not in message
