"""Dialogue datasets are written atomically, and do not depend on workers or Beam."""

import functools
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest

from mister_jax.data import BatchPlan, DialogueFeatures, batches, load_features, write_features
from mister_jax.data.audio import encode_wav
from mister_jax.data.corpus_report import RECORDING_ISSUES
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.inspection import inspect_dataset
from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus
from mister_jax.errors import InputError

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="session")
def manifest(tmp_path_factory, write_wav):
    """Twelve dialogues of three turns. The second turn has no speech, and the third has no text."""
    root = tmp_path_factory.mktemp("corpus")
    rows = []
    for dialogue in range(12):
        for turn in range(3):
            row = {"dialogue": f"d{dialogue}", "utterance": turn, "order": turn}
            row["label"] = ("joy", "anger")[(dialogue + turn) % 2]
            if turn != 1:
                row["audio"] = f"{dialogue}_{turn}.wav"
                write_wav(root / row["audio"], 0.1 + 0.01 * dialogue)
            if turn != 2:
                row["text"] = f"Turn {turn}."
            rows.append(row)
    path = root / "small.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def contents(name, data_dir):
    dataset = DialogueDataset(name, data_dir)
    return {
        split: [
            (dialogue.id, turn.id, turn.audio.tobytes(), turn.text, turn.label)
            for dialogue in dataset.dialogues(split)
            for turn in dialogue.utterances
        ]
        for split in dataset.splits
    }


@pytest.mark.parametrize("way", ["workers", "beam"])
def test_the_dataset_does_not_depend_on_how_recordings_are_decoded(manifest, tmp_path, way):
    if way == "beam":
        pytest.importorskip("apache_beam")
    decodings = {
        "plain": DecodingOptions(0),
        way: DecodingOptions(num_workers=2, beam=way == "beam"),
    }
    reports = {
        folder: prepare_corpus(
            PrepareOptions("manifest", manifest, tmp_path / folder, decoding=decoding)
        )
        for folder, decoding in decodings.items()
    }
    plain, other = (contents("manifest/small", tmp_path / folder) for folder in decodings)
    assert plain == other
    assert sum(map(len, plain.values())) == 36
    for field in ("splits", "missing", "capped"):
        assert reports["plain"][field] == reports[way][field]


def test_the_report_is_written_to_the_dataset(manifest, tmp_path):
    report = prepare_corpus(
        PrepareOptions("manifest", manifest, tmp_path, decoding=DecodingOptions(0))
    )
    directory = tmp_path / "manifest/small/1.0.0"
    assert json.loads((directory / "report.json").read_text()) == report
    split = report["splits"]["train"]
    assert split["without_speech"] == split["without_text"] == split["dialogues"]
    assert 0 < split["hours"] * 3600 < 2 * 0.25 * split["dialogues"]


def test_the_report_lists_recordings_with_issues(tmp_path):
    tone = np.rint(8000 * np.sin(np.arange(32_000) / 4)).astype(np.int16)
    sounds = {
        "plain": tone,
        "silent": np.zeros_like(tone),
        "opposite": np.stack([tone, -tone], axis=1),
        "longer": np.tile(tone, 2),
    }
    rows = []
    for name, samples in sounds.items():
        encode_wav(tmp_path / f"{name}.wav", samples)
        row = {"dialogue": "d", "utterance": name, "order": len(rows), "audio": f"{name}.wav"}
        times = {"start": 3 * len(rows), "end": 3 * len(rows) + 2}
        rows.append(row | times | {"label": "joy", "mood": name})
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row | {"split": "train"}) + "\n" for row in rows))
    decoding = DecodingOptions(0, max_seconds=3)
    report = prepare_corpus(PrepareOptions("manifest", path, tmp_path / "data", decoding=decoding))
    listed = {
        kind: [entry["utterance"] for entry in report[kind]]
        for kind in ("missing", *RECORDING_ISSUES)
    }
    assert listed == {
        "missing": [],
        "capped": ["d/longer"],
        "damaged": [],
        "silent": ["d/silent"],
        "length_mismatch": ["d/longer"],
        "past_end": [],
        "fast_text": [],
        "changed": ["d/opposite"],
    }
    assert report["length_mismatch"][0]["annotated_seconds"] == 2
    assert report["changed"][0]["changed"] == ["channels cancel out: only channel 0 is used"]
    note = (
        "1 recordings changed, for example d/opposite: channels cancel out: only channel 0 is used"
    )
    assert report["notes"][-1] == note
    (dialogue,) = DialogueDataset("manifest/m", tmp_path / "data").dialogues("train")
    assert [turn.metadata for turn in dialogue.utterances] == [{"mood": name} for name in sounds]
    np.testing.assert_array_equal(dialogue.utterances[2].audio, tone)


def test_an_existing_dataset_is_replaced_only_with_overwrite(manifest, tmp_path):
    preparation = PrepareOptions("manifest", manifest, tmp_path, decoding=DecodingOptions(0))
    prepare_corpus(preparation)
    with pytest.raises(InputError, match="dataset exists; allowed: --overwrite"):
        prepare_corpus(preparation)
    prepare_corpus(
        PrepareOptions("manifest", manifest, tmp_path, decoding=DecodingOptions(0), overwrite=True)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["manifest"]


def test_a_corpus_with_mostly_missing_recordings_is_rejected(tmp_path):
    path = tmp_path / "gone.jsonl"
    rows = [
        {"dialogue": "d", "utterance": turn, "order": turn, "audio": f"{turn}.wav", "label": "joy"}
        for turn in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(
        InputError, match=r"3 of 3 recordings are missing or empty, for example .*--partial"
    ):
        prepare_corpus(PrepareOptions("manifest", path, tmp_path / "data"))
    assert not (tmp_path / "data").exists()
    report = prepare_corpus(
        PrepareOptions(
            "manifest", path, tmp_path / "data", decoding=DecodingOptions(0), partial=True
        )
    )
    assert len(report["missing"]) == 3


@pytest.mark.parametrize("content", [b"", b"no sound", None])
def test_more_than_one_in_ten_unusable_recordings_are_rejected(tmp_path, write_wav, content):
    rows = []
    for turn in range(10):
        write_wav(tmp_path / f"{turn}.wav", 0.1)
        rows.append({"dialogue": "d", "utterance": turn, "order": turn, "audio": f"{turn}.wav"})
    path = tmp_path / "m.jsonl"
    path.write_text("".join(json.dumps(row | {"label": "joy"}) + "\n" for row in rows))

    def damage(turn):
        (tmp_path / f"{turn}.wav").unlink()
        if content is not None:
            (tmp_path / f"{turn}.wav").write_bytes(content)

    damage(3)
    prepare = functools.partial(PrepareOptions, "manifest", path, decoding=DecodingOptions(0))
    report = prepare_corpus(prepare(tmp_path / "one"))
    assert [entry["utterance"] for entry in report["missing"]] == ["d/3"]
    damage(7)
    with pytest.raises(InputError, match=r"m: train: 2 of 10 recordings .*3\.wav.*; --partial"):
        prepare_corpus(prepare(tmp_path / "two"))
    assert not list(tmp_path.glob("two/*"))
    assert len(prepare_corpus(prepare(tmp_path / "two", partial=True))["missing"]) == 2


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf")])
def test_max_seconds_must_be_positive(seconds):
    with pytest.raises(InputError, match=r"max_seconds=.*; allowed: finite, more than 0"):
        DecodingOptions(max_seconds=seconds)


def test_a_manifest_whose_file_name_is_no_dataset_name_needs_a_name(tmp_path):
    path = tmp_path / "2024 Gespräche.jsonl"
    path.write_text(json.dumps({"dialogue": 1, "utterance": 1, "order": 1, "text": "a"}) + "\n")
    with pytest.raises(InputError, match=r"Gespräche\.jsonl: dataset name .*; --name=NAME sets"):
        prepare_corpus(PrepareOptions("manifest", path, tmp_path))


def test_a_killed_preparation_leaves_no_dataset_and_the_next_one_recovers(manifest, tmp_path):
    code = (
        "import time\n"
        "from mister_jax.data import audio, builder\n"
        "from mister_jax.data.prepare import DecodingOptions, PrepareOptions, prepare_corpus\n"
        "decode = audio.decode_many\n"
        "def slow(*args, **options):\n"
        "    for clip in decode(*args, **options):\n"
        "        print('decoded', flush=True, file=__import__('sys').__stdout__)\n"
        "        time.sleep(60)\n"
        "        yield clip\n"
        "audio.decode_many = slow\n"
        f"prepare_corpus(PrepareOptions('manifest', {str(manifest)!r}, {str(tmp_path)!r},"
        " decoding=DecodingOptions(0)))\n"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout.readline() == "decoded\n"
        process.send_signal(signal.SIGKILL)
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".incomplete.manifest.small.")
    with pytest.raises(InputError, match="no dataset 'manifest/small'"):
        DialogueDataset("manifest/small", tmp_path)
    prepare_corpus(PrepareOptions("manifest", manifest, tmp_path, decoding=DecodingOptions(0)))
    assert [path.name for path in tmp_path.iterdir()] == ["manifest"]


def test_the_files_of_a_running_preparation_are_kept(manifest, tmp_path):
    running = (
        tmp_path / f".incomplete.manifest.small.1.0.0.{socket.gethostname()}.{os.getpid()}.abc"
    )
    running.mkdir()
    prepare_corpus(PrepareOptions("manifest", manifest, tmp_path, decoding=DecodingOptions(0)))
    assert running.exists()


def test_features_of_a_dialogue_dataset_can_be_batched(manifest, tmp_path):
    prepare_corpus(PrepareOptions("manifest", manifest, tmp_path, decoding=DecodingOptions(0)))
    dataset = DialogueDataset("manifest/small", tmp_path)
    dialogues = list(dataset.dialogues("train"))
    turns = [turn for dialogue in dialogues for turn in dialogue.utterances]

    def vectors(values):
        return np.array(values, np.float32)[:, None]

    features = DialogueFeatures(
        name="small",
        split="train",
        class_names=dataset.class_names,
        dialogue_ids=tuple(dialogue.id for dialogue in dialogues),
        lengths=np.array([len(dialogue.utterances) for dialogue in dialogues]),
        utterance_ids=np.array([turn.id for turn in turns]),
        speech=vectors([len(turn.audio) for turn in turns]),
        text=vectors([len(turn.text) for turn in turns]),
        speech_present=np.array([turn.speech_present for turn in turns]),
        text_present=np.array([turn.text_present for turn in turns]),
        label=np.array([turn.label for turn in turns], np.int32),
    )
    write_features({"train": features}, "small_features", tmp_path)
    loaded = load_features("small_features", "train", tmp_path)
    (batch,) = batches(loaded, BatchPlan(loaded.lengths, 16), seed=0, epoch=0, shuffle=False)
    assert batch["mask"].sum() == len(turns)
    # The second turn of each dialogue has no speech, and the third has no text.
    np.testing.assert_array_equal(batch["speech_present"][batch["row"] >= 0][:, 1], False)
    np.testing.assert_array_equal(batch["text_present"][batch["row"] >= 0][:, 2], False)


def test_an_inspection_counts_classes_lengths_and_seconds(manifest, tmp_path):
    prepare_corpus(PrepareOptions("manifest", manifest, tmp_path, decoding=DecodingOptions(0)))
    inspection = inspect_dataset("manifest/small", tmp_path)
    assert sum(sum(counts.values()) for counts in inspection.class_counts.values()) == 36
    assert len(inspection.seconds["train"]) == 2 * len(inspection.lengths["train"])
    assert inspection.first_dialogue[0].endswith("Turn 0.") and "0." in inspection.first_dialogue[0]


def test_tfds_sorts_in_small_buckets():
    from tensorflow_datasets.core import shuffle

    from mister_jax.data import builder, prepare

    keys = builder.evenly_spaced_keys(5000)
    buckets = {shuffle.get_bucket_number(key, shuffle.BUCKETS_NUMBER) for key in keys}
    assert len(buckets) == shuffle.BUCKETS_NUMBER
    assert keys == sorted(keys)
    default = shuffle.MAX_MEM_BUFFER_SIZE
    with prepare._limit_sort_memory():
        assert default > shuffle.MAX_MEM_BUFFER_SIZE
    assert default == shuffle.MAX_MEM_BUFFER_SIZE


def test_impossible_options_are_rejected(manifest, tmp_path):
    for preparation, message in [
        (
            PrepareOptions("tv"),
            "corpus 'tv'; allowed: iemocap, meld, mosi, mosei, emorynlp, manifest, transcripts, "
            "folder, emobox, synthetic",
        ),
        (
            PrepareOptions("meld", config="video", data_dir=tmp_path),
            "config 'video' of meld; allowed",
        ),
        (PrepareOptions("mosi", data_dir=tmp_path), "--source is needed with --corpus=mosi"),
        (PrepareOptions("manifest", data_dir=tmp_path), "--source is needed"),
        (PrepareOptions("manifest", manifest, tmp_path, "six"), "manifest has no configs"),
        (
            PrepareOptions("manifest", manifest, tmp_path, labels=("calm",)),
            "label: 'joy'; allowed: calm",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            prepare_corpus(preparation)


def test_existing_synthetic_recordings_are_reused(tmp_path):
    def prepare(**changes):
        num_dialogues = {"train": 1, "test": 1}
        return prepare_corpus(
            PrepareOptions(
                "synthetic",
                None,
                tmp_path,
                num_dialogues=num_dialogues,
                decoding=DecodingOptions(0),
                **changes,
            )
        )

    first = prepare()
    assert first["notes"] == []
    expected = contents("manifest/synthetic", tmp_path)
    # Simulates a process that was killed before it wrote the dataset.
    shutil.rmtree(tmp_path / "manifest")
    with pytest.raises(InputError, match=r"made with other arguments \(seed 0 instead"):
        prepare(seed=1)
    (note,) = prepare()["notes"]
    assert note.endswith(
        "synthetic_recordings: reusing the recordings, which were made with the same arguments"
    )
    assert contents("manifest/synthetic", tmp_path) == expected
    with pytest.raises(InputError, match="--overwrite, or another --name"):
        prepare()
    assert prepare(seed=1, overwrite=True)["notes"] == []
