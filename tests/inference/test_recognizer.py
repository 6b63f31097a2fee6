"""From recordings and texts to emotions: a `System` and `python -m launch.predict`."""

import csv
import dataclasses
import io
import json
import logging
import os
import pathlib
import subprocess
import sys

import numpy as np
import optax
import pytest
from mister_jax.configs import fusion
from rich.console import Console

import mister_jax
from mister_jax import data, extraction
from mister_jax.checkpoint import BEST, Checkpoints
from mister_jax.console import prediction_table
from mister_jax.data.audio import encode_wav
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.corpora.manifest import reader
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from mister_jax.errors import InputError
from mister_jax.evaluation.results import evaluate
from mister_jax.inference.recognizer import summarize_notes
from mister_jax.io import read_json
from mister_jax.predictor import Predictor, prediction_rows
from mister_jax.tasks.fusion import FusionTask
from mister_jax.training.steps import initial_state
from mister_jax.workdir import read_config, write_description
from tests.conftest import FILLERS

ROOT = pathlib.Path(__file__).parents[1]


def untrained(workdir, data_dir, dataset):
    """A workdir as a training leaves it, whose best parameters are the initial ones."""
    config = fusion.get_config(dataset)
    config.data.data_dir = str(data_dir)
    config.model.update({"context_dim": 8, "fusion_dim": 8, "fusion_layers": 1, "attention_dim": 6})
    task = FusionTask.from_data(config)
    state = initial_state(task, optax.sgd(0.1), seed=3)[1]
    write_description(workdir, config, task, state["params"], {})
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(BEST, 1, state["params"], {"epoch": 1, "weighted_f1": 0.5})
    return workdir


@pytest.fixture(scope="module")
def spoken(tmp_path_factory, bert_folder):
    """A folder of datasets: `manifest/calls`, and its features `both`."""
    root = tmp_path_factory.mktemp("calls")
    random = np.random.default_rng(0)
    rows = []
    for dialogue, (split, length) in enumerate(
        (("train", 2), ("validation", 1), ("test", 3), ("test", 1), ("test", 5))
    ):
        for turn in range(length):
            row = {"dialogue": dialogue, "utterance": turn, "order": turn, "split": split}
            row["label"] = ("calm", "angry")[turn % 2]
            if turn == 0:
                row["room"] = f"r{dialogue}"
            if turn != 2:
                row["audio"] = f"{dialogue}_{turn}.wav"
                samples = 3000 * random.normal(size=3200 + 800 * turn)
                encode_wav(root / row["audio"], samples.astype(np.int16))
            if turn != 1:
                row["text"] = " ".join(random.choice(FILLERS, 1 + turn))
            rows.append(row)
    manifest = root / "calls.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    where = {"data_dir": root / "data", "quiet": True}
    prepare_corpus(PrepareOptions("manifest", manifest, root / "data", decoding=DecodingOptions(0)))
    text = extraction.PretrainedText(str(bert_folder), max_tokens=20)
    extraction.extract_features(text, "manifest/calls", "text_alone", **where)
    extraction.extract_features(extraction.ProsodyEncoder(), "manifest/calls", "speech_alone", **where)
    extraction.merge_features("speech_alone", "text_alone", "both", root / "data")
    return root / "data"


@pytest.fixture(scope="module")
def workdir(spoken, tmp_path_factory):
    return untrained(tmp_path_factory.mktemp("system") / "run", spoken, "both")


@pytest.fixture(scope="module")
def system(workdir):
    return mister_jax.load(workdir)


@pytest.fixture(scope="module")
def dialogues(spoken):
    """The test dialogues as a user has them."""
    return [
        [
            ({"text": turn.text} if turn.text_present else {})
            | ({"audio": turn.audio} if turn.speech_present else {})
            for turn in dialogue.utterances
        ]
        for dialogue in DialogueDataset("manifest/calls", spoken).dialogues("test")
    ]


def test_a_lack_of_memory_is_said_of_loading_and_of_predicting(
    workdir, system, dialogues, monkeypatch, out_of_memory
):
    def refused(message, call):
        with pytest.raises(InputError, match=message) as error:
            call()
        assert "\n" not in str(error.value) and "allocating 7 bytes" in str(error.value)

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "restore", out_of_memory)
        refused("run: out of memory with the model's parameters", lambda: Predictor(workdir))
    with monkeypatch.context() as patched:
        patched.setattr(system._predictor, "_predict", out_of_memory)
        refused(
            "prediction: out of memory with batches on 8 devices .* try devices with more",
            lambda: system.predict_dialogues(dialogues),
        )
    with monkeypatch.context() as patched:
        patched.setattr(extraction.ProsodyEncoder, "__call__", out_of_memory)
        refused(
            "out of memory with batches of .* try shorter utterances",
            lambda: system.predict_dialogues(dialogues),
        )


def assert_close(found, expected, *, tolerance=1e-5):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours["predicted"], ours["experts"]) == (theirs["predicted"], theirs["experts"])
        for field in ("probabilities", "gate"):
            assert ours[field] == pytest.approx(theirs[field], abs=tolerance)


def test_raw_dialogues_give_what_their_extracted_features_give(system, workdir, spoken, dialogues):
    predictor = Predictor(workdir)
    expected = prediction_rows(system.class_names, predictor(data.load_features("both", "test", spoken)))
    found = system.predict_dialogues(dialogues)
    assert [len(rows) for rows in found] == [len(turns) for turns in dialogues]
    assert_close([row for rows in found for row in rows], list(expected))


def test_a_dialogue_alone_is_as_among_others_whatever_their_order(system, dialogues):
    together = system.predict_dialogues(dialogues)
    backwards = system.predict_dialogues(dialogues[::-1])
    for one, other in zip(together, reversed(backwards), strict=True):
        assert_close(one, other)
    assert_close(system.predict(dialogues[0]), together[0])


def test_files_cuts_and_samples_are_one(system, tmp_path):
    random = np.random.default_rng(0)
    samples = (3000 * random.normal(size=16_000)).astype(np.int16)
    encode_wav(tmp_path / "one.wav", samples)
    encode_wav(tmp_path / "padded.wav", np.concatenate([samples[:8000], samples]))
    cut = {"audio": str(tmp_path / "padded.wav"), "audio_start": 0.5, "audio_end": 1.5}
    rows = [
        system.predict([{**sound, "text": "so happy"}])
        for sound in (
            {"audio": samples},
            {"audio": samples.astype(np.float64) / 2**15},
            {"audio": tmp_path / "one.wav"},
            cut,
        )
    ]
    for other in rows[1:]:
        assert_close(other, rows[0])


def test_what_is_missing_has_no_vote(system, dialogues, tmp_path, caplog):
    sound = dialogues[1][0]["audio"]
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    with caplog.at_level(logging.WARNING):
        rows = system.predict(
            [
                {"text": "angry today", "audio": sound},
                {"text": "we are glad"},
                {"audio": sound},
                {"audio": tmp_path / "nowhere.wav", "text": "mad"},
                {"audio": broken, "text": None},
                {"audio": np.zeros(16_000, np.int16), "text": "so mad"},
            ]
        )
    voted = [{name for name, vote in row["experts"].items() if vote} for row in rows]
    both = {"speech", "text", "fusion"}
    # Where nothing is there, the rest of the dialogue is all that speaks.
    assert voted == [
        both, {"text", "fusion"}, {"speech", "fusion"}, {"text", "fusion"}, both, {"text", "fusion"}
    ]  # fmt: skip
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert all((row["gate"][name] > 0) == (row["experts"][name] is not None) for name in both)
    assert "nowhere.wav: no such file; its utterance is predicted without speech" in caplog.text
    notes = [[note.partition(":")[0] for note in row["notes"]] for row in rows]
    assert notes == [[], [], [], ["unusable"], ["unusable"], ["silent"]]
    assert summarize_notes(rows) == "2 unusable, 1 silent"
    assert "broken.wav" in caplog.text


def test_one_utterance_and_none(system):
    (row,) = system.predict([{"text": "i am glad"}])
    assert set(row) == {"predicted", "probabilities", "gate", "experts", "notes"}
    assert row["experts"]["speech"] is None
    assert system.predict_dialogues([]) == []


@pytest.mark.parametrize(
    ("utterances", "message"),
    [
        ([], "dialogue 1: no utterances"),
        (["hello"], "dialogue 1, utterance 1: str; needed: a dict with audio or text"),
        (
            [{"text": "a"}, {}],
            "utterance 2: audio: missing, and text too; needed: one of them",
        ),
        ([{"txt": "a"}], "'txt': unknown, close to 'text'; allowed: dialogue"),
        ([{"text": 3}], "text: 3; allowed: text"),
        ([{"text": "a\ud800"}], "allowed: text without null or broken characters"),
        ([{"audio": "a.wav", "audio_start": "soon"}], "audio_start: 'soon'; allowed: a number"),
        ([{"audio": "a.wav", "audio_start": 2, "audio_end": 1}], "audio_end: 1; allowed: more"),
        ([{"audio": "a.wav", "audio_channel": "up"}], "audio_channel: 'up'; allowed: mix"),
        ([{"audio": "a.wav"}] * 2, "2 utterances name the recording 'a.wav', so each needs start"),
        ([{"audio": np.zeros((2, 5))}], r"audio: float64 \[2, 5\]; allowed: a file, or samples"),
        ([{"audio": np.zeros(5, np.int32)}], "audio: int32"),
        ([{"audio": np.full(5, np.nan)}], "audio: samples are not finite"),
        ([{"audio": np.full(5, 3000.0)}], "float samples of up to 3000, as of integers; allowed"),
        ([{"audio": np.zeros(5), "audio_end": 1}], "audio is an array; allowed with audio_start"),
    ],
)
def test_an_utterance_that_cannot_be_used_is_named(system, utterances, message):
    with pytest.raises(InputError, match=message):
        system.predict(utterances)


def test_ready_made_features_tell_of_no_encoder(data_dir_of_features, tmp_path):
    run = untrained(tmp_path / "run", data_dir_of_features, "made_up")
    with pytest.raises(InputError, match="trained on ready-made features"):
        mister_jax.load(run)


@pytest.fixture(scope="module")
def data_dir_of_features(tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    splits = data.generate_features(0, {"train": 2}, num_classes=3, speech_dim=4, text_dim=5)
    data.write_features(splits, "made_up", folder)
    return folder


def test_an_encoder_that_moved_is_found_where_the_user_says(workdir, bert_folder, tmp_path):
    described = json.loads((workdir / "model.json").read_text())
    assert described["encoders"].keys() == {"speech", "text"}
    moved = tmp_path / "run"
    moved.mkdir()
    for path in workdir.iterdir():
        (moved / path.name).symlink_to(path)
    (moved / "model.json").unlink()
    described["encoders"]["text"]["name"] = str(tmp_path / "gone")
    (moved / "model.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="gone"):
        mister_jax.load(moved)
    system = mister_jax.load(moved, text_encoder=str(bert_folder))
    assert system.predict([{"text": "glad"}])[0]["experts"]["text"]
    with pytest.raises(InputError, match="prosody, which has no files"):
        mister_jax.load(moved, speech_encoder=str(bert_folder))
    with pytest.raises(InputError, match=r"adapter=there: .* no adapter; allowed: encoder$"):
        mister_jax.load(moved, text_encoder={"encoder": str(bert_folder), "adapter": "there"})


def test_an_encoder_the_model_does_not_use_is_not_loaded(spoken, bert_folder, tmp_path):
    run = untrained(tmp_path / "run", spoken, "text_alone,text_only")
    system = mister_jax.load(run)
    rows = system.predict([{"text": "glad"}, {"text": "mad", "audio": np.arange(9000.0) / 9000}])
    assert [row["gate"]["text"] for row in rows] == [1, 1]
    with pytest.raises(InputError, match="uses no speech encoder"):
        mister_jax.load(run, speech_encoder=str(bert_folder))


def predict(workdir, bert_folder, *flags):
    """Runs the command on a work directory."""
    return subprocess.run(
        [
            sys.executable, "-m", "launch.predict", f"--workdir={workdir}",
            f"--text_encoder={bert_folder}", *flags,
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


def test_the_command_writes_what_the_system_gives(
    system, workdir, spoken, dialogues, bert_folder, tmp_path
):
    output = tmp_path / "out.jsonl"
    manifest = spoken.parent / "calls.jsonl"
    done = predict(workdir, bert_folder, f"--manifest={manifest}", f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert f"written to {output}: utterances 12, dialogues 5" in done.stdout
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["utterance"] for row in rows[:4]] == ["0", "1", "0", "0"]
    assert rows[0]["audio"] == str(spoken.parent / "0_0.wav") and rows[0]["text"]
    assert (rows[0]["start"], rows[0]["end"], rows[0]["notes"]) == (None, None, [])
    assert [row["label"] for row in rows[:2]] == ["calm", "angry"]
    expected = [row for found in system.predict_dialogues(dialogues) for row in found]
    assert_close(rows[3:], expected)


def call(tmp_path, rows):
    """Writes a manifest of one dialogue with further columns."""
    path = tmp_path / "call.jsonl"
    rows = [{"dialogue": "c", "utterance": n, **row} for n, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_utterances_of_one_recording_are_cut_channel_by_channel(system, tmp_path):
    random = np.random.default_rng(1)
    samples = (3000 * random.normal(size=(32_000, 2))).astype(np.int16)
    encode_wav(tmp_path / "call.wav", samples)
    times = ((0.0, 0.75, "left"), (0.5, 1.25, "right"), ("1.25", "2.0", 0))
    utterances = [
        {"audio": tmp_path / "call.wav", "start": start, "end": end, "audio_channel": channel}
        for start, end, channel in times
    ]
    cuts = [samples[:12_000, 0], samples[8_000:20_000, 1], samples[20_000:, 0]]
    expected = system.predict([{"audio": cut} for cut in cuts])
    assert_close(system.predict(utterances), expected)


def test_levels_are_scaled_and_noted(system):
    samples = np.random.default_rng(0).normal(size=8000)
    (row,) = system.predict([{"audio": samples}])
    (note,) = row["notes"]
    assert note.startswith("note: scaled by 0.2") and "over full scale" in note


def test_speech_beyond_the_limit_is_noted(system, monkeypatch):
    samples = (3000 * np.random.default_rng(0).normal(size=48_000)).astype(np.int16)
    (row,) = system.predict([{"audio": samples}], max_seconds=2.0)
    assert row["notes"] == ["capped: 3.0 s, of which 2 s are read"]
    monkeypatch.setattr(system._encoders["speech"].input, "max_samples", 16_000)
    (row,) = system.predict([{"audio": samples}])
    assert row["notes"] == ["cut by the encoder: 3.0 s, of which it reads 1 s"]


def test_no_usable_recording_is_status_1_with_the_output_written(workdir, bert_folder, tmp_path):
    rows = [{"start": n, "audio": f"{n}.wav", "duration": n, "speaker": "x"} for n in range(2)]
    output = tmp_path / "out.csv"
    done = predict(workdir, bert_folder, f"--manifest={call(tmp_path, rows)}", f"--output={output}")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: none of 2 recordings could be used"
    assert "recordings: 2, of these 2 unusable" in done.stdout
    with output.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["utterance"], second["start"]) == ("0", "1.0")
    assert (second["metadata.duration"], second["metadata.speaker"]) == ("1", "x")
    assert second["predicted"] in ("angry", "calm")
    assert float(second[f"probabilities.{second['predicted']}"]) >= 0.5
    assert second["notes"].startswith("unusable: ") and "no such file" in second["notes"]


def test_further_columns_do_not_change_predictions(workdir, system, tmp_path):
    plain = {"order": 0, "text": "so mad"}
    further = plain | {"speaker": "x", "duration": 3.5}
    corpora = [reader.read(call(tmp_path, [row]), shares=(0, 0, 1)) for row in (plain, further)]
    assert dict(next(corpora[1].utterances())[1].metadata) == {"speaker": "x", "duration": "3.5"}
    rows = [
        system.predict([{"text": turn.text}])
        for corpus in corpora
        for _, turn in corpus.utterances()
    ]
    direct = system.predict([{"text": "so mad", "speaker": "x", "duration": 3.5}])
    assert rows[0] == rows[1] == direct


def test_further_columns_travel_to_scored_predictions_and_to_no_model(workdir, spoken, tmp_path):
    features = data.load_features("both", "test", spoken)
    assert json.loads(features.utterance_metadata[0]) == {"room": "r2"}
    without = dataclasses.replace(features, utterance_metadata=None)
    assert without.fingerprint() == features.fingerprint()
    batches = FusionTask.restore(read_config(workdir), read_json(workdir / "model.json")).batched(
        features, num_shards=1
    )
    assert not any("metadata" in name for name in next(batches.batches()))
    evaluate(workdir, "test", output=tmp_path, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row.get("metadata") for row in rows[:4]] == [{"room": "r2"}, None, None, {"room": "r3"}]


def test_the_table_reads_well_at_80_columns(system):
    texts = ["Why would you say such an unbelievably inconsiderate thing to your own brother?"] * 2
    rows = system.predict([{"text": text} for text in texts])
    console = Console(width=80, file=io.StringIO())
    console.print(prediction_table(texts, rows))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    joined = " ".join(" ".join(line.split()) for line in lines)
    assert "unbelievably inconsiderate thing" in joined.replace("  ", " ")
    choice = rows[0]["experts"]["text"]
    assert f"text {choice} {rows[0]['gate']['text']:.0%}" in joined


def test_importing_the_library_does_not_import_what_predicts():
    assert callable(mister_jax.load) and "load" in mister_jax.__all__
    code = "import sys, mister_jax; print('mister_jax.inference.recognizer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = mister_jax.laod
