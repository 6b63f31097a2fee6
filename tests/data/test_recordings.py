"""The synthetic corpus of recordings: what it writes, what can be heard, and its best scores."""

import filecmp
import itertools
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import norm

from mister_jax.data import audio, recordings
from mister_jax.data.manifest import reader
from mister_jax.data.recordings import spoken_process, write_recordings
from mister_jax.data.synthetic import reference_scores
from mister_jax.data.workers import WorkerCrash
from mister_jax.errors import InputError

SMALL = {"train": 3, "validation": 1, "test": 2}


def rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    """A folder of 40 dialogues."""
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    write_recordings(
        folder, num_dialogues={"train": 40}, missing_share=0.2, uninformative_share=0.2
    )
    return folder


@pytest.fixture(scope="module")
def manifest(corpus) -> list[dict]:
    return rows(corpus / "manifest.jsonl")


@pytest.fixture(scope="module")
def truth(corpus) -> list[dict]:
    return rows(corpus / "truth.jsonl")


@pytest.fixture(scope="module")
def sounds(corpus, manifest) -> dict[str, np.ndarray]:
    """Utterance -> samples."""
    heard = [row for row in manifest if "audio" in row]
    requests = [audio.Request(corpus / row["audio"]) for row in heard]
    clips = audio.decode_many(requests, num_workers=0)
    return {row["utterance"]: clip.samples for row, clip in zip(heard, clips, strict=True)}


def test_the_same_seed_gives_the_same_bytes_with_any_number_of_workers(tmp_path):
    one = write_recordings(tmp_path / "one", seed=3, num_dialogues=SMALL).parent
    same = write_recordings(tmp_path / "same", seed=3, num_dialogues=SMALL, num_workers=2).parent
    other = write_recordings(tmp_path / "other", seed=4, num_dialogues=SMALL).parent
    assert tree(one) == tree(same)
    assert (
        json.loads((one / "arguments.json").read_text()).items()
        >= {
            "seed": 3,
            "num_dialogues": SMALL,
        }.items()
    )
    assert not filecmp.cmp(one / "manifest.jsonl", other / "manifest.jsonl", shallow=False)


def test_a_dialogue_does_not_depend_on_how_many_others_there_are(tmp_path):
    small = write_recordings(tmp_path / "small", num_dialogues={"test": 1}).parent
    large = write_recordings(tmp_path / "large", num_dialogues={"train": 1, "test": 2}).parent
    theirs = tree(large)
    for name, content in tree(small).items():
        if name.endswith(".wav"):
            assert theirs[name] == content
    assert set(map(str, rows(small / "manifest.jsonl"))) < set(
        map(str, rows(large / "manifest.jsonl"))
    )


def test_the_manifest_has_the_named_fields_and_nothing_else(corpus, manifest):
    for row in manifest:
        assert {"dialogue", "utterance", "order", "label", "split"} < set(row)
        assert set(row) <= {"dialogue", "utterance", "order", "audio", "text", "label", "split"}
        assert "audio" in row or "text" in row
        assert re.fullmatch(r"[A-Z][A-Za-z ,;.?]*[.?]", row.get("text", "None."))
    assert len({row["utterance"] for row in manifest}) == len(manifest)
    for _, dialogue in itertools.groupby(manifest, lambda row: row["dialogue"]):
        orders = [row["order"] for row in dialogue]
        assert orders == list(range(len(orders)))
        assert recordings.MIN_LENGTH <= len(orders) <= recordings.MAX_LENGTH
    files = {str(path.relative_to(corpus)) for path in corpus.rglob("*.wav")}
    assert files == {row["audio"] for row in manifest if "audio" in row}
    assert {path.name for path in corpus.iterdir()} == {
        "manifest.jsonl",
        "truth.jsonl",
        "reference_scores.json",
        "arguments.json",
        "audio",
    }


def test_the_manifest_reader_takes_it(corpus, manifest):
    read = reader.read(corpus / "manifest.jsonl")
    assert len(read.splits["train"]) == 40
    utterances = [turn for dialogue in read.splits["train"] for turn in dialogue.utterances]
    assert [turn.label for turn in utterances] == [row["label"] for row in manifest]
    assert all(pathlib.Path(turn.recording.path).exists() for turn in utterances if turn.recording)


def test_every_recording_is_one_to_three_seconds_at_16_khz(corpus, sounds):
    for samples in sounds.values():
        assert 1 <= len(samples) / audio.SAMPLE_RATE <= 3
        assert np.abs(samples).max() < 32767
    path = next(corpus.rglob("*.wav"))
    assert path.stat().st_size == 44 + 2 * len(sounds[path.stem])


def test_modalities_are_missing_and_uninformative_as_often_as_asked(manifest, truth):
    assert [row["utterance"] for row in manifest] == [row["utterance"] for row in truth]
    for row, told in zip(manifest, truth, strict=True):
        assert ("audio" not in row) == (told["missing"] == "speech")
        assert ("text" not in row) == (told["missing"] == "text")
    for field, each in (("missing", 0.1), ("uninformative", 0.2)):
        for modality in ("speech", "text"):
            share = np.mean([told[field] == modality for told in truth])
            assert share == pytest.approx(each, abs=0.05)


def test_uninformative_text_has_neutral_words_only(manifest, truth):
    neutral = recordings._EMOTIONS["neutral"]
    allowed = {*neutral.feelings.split(), *neutral.things.split()}
    telling = 0
    for row, told in zip(manifest, truth, strict=True):
        assert all(word in row.get("text", word) for word in told["words"])
        if told["uninformative"] == "text":
            assert set(told["words"]) <= allowed
        else:
            telling += not set(told["words"]) <= allowed
    assert telling > len(truth) / 3


def test_emotions_last(manifest):
    stays = [
        before["label"] == after["label"]
        for before, after in itertools.pairwise(manifest)
        if before["dialogue"] == after["dialogue"]
    ]
    assert np.mean(stays) == pytest.approx(0.6, abs=0.07)
    assert {row["label"] for row in manifest} == set(recordings.class_names(6))


def heard_pitch(samples: np.ndarray) -> float:
    """Geometric mean in Hz of the pitch of frames, by autocorrelation."""
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(float), 1024)[::512]
    frames = frames[np.std(frames, axis=1) > np.std(samples) / 3]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(1024), 2048)) ** 2
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(1024), 2048)) ** 2)
    correlation = np.fft.irfft(spectrum)[:, 40:280] / window[40:280]  # 400 Hz to 57 Hz.
    return float(np.exp(np.mean(np.log(audio.SAMPLE_RATE / (40 + correlation.argmax(axis=1))))))


def heard_level(samples: np.ndarray) -> float:
    """dB of full scale."""
    return 10 * np.log10(np.mean((samples / 32768.0) ** 2))


def heard_tempo(samples: np.ndarray) -> float:
    """Syllables a second: the strongest frequency of the envelope from 2 to 10 Hz."""
    power = samples[: len(samples) // 160 * 160].reshape(-1, 160).astype(float) ** 2
    envelope = np.sqrt(power.mean(axis=1))
    envelope -= envelope.mean()
    spectrum = np.abs(np.fft.rfft(envelope * np.hanning(len(envelope)), 4096))
    frequency = np.fft.rfftfreq(4096, 0.01)
    return float(frequency[np.argmax(np.where((frequency > 2) & (frequency < 10), spectrum, 0))])


def heard_tilt(samples: np.ndarray) -> float:
    """dB an octave: the slope of the spectrum between 200 Hz and 3 kHz."""
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(float), 1024)[::512]
    power = np.mean(np.abs(np.fft.rfft(frames * np.hanning(1024))) ** 2, axis=0)
    frequency = np.fft.rfftfreq(1024, 1 / audio.SAMPLE_RATE)
    edges = 200 * 2 ** np.arange(0, 4.1, 1 / 3)
    bands = [
        10 * np.log10(power[(frequency >= low) & (frequency < high)].mean())
        for low, high in itertools.pairwise(edges)
    ]
    return float(np.polyfit(np.arange(len(bands)) / 3, bands, 1)[0])


HEARD = {
    "pitch_hz": (heard_pitch, 0.97),
    "level_db": (heard_level, 0.99),
    "syllables_per_second": (heard_tempo, 0.97),
    "tilt_db_per_octave": (heard_tilt, 0.85),
}


@pytest.fixture(scope="module")
def heard(sounds) -> dict[str, np.ndarray]:
    """Field of the truth -> what is heard of it, [N]."""
    return {
        field: np.array([hear(samples) for samples in sounds.values()])
        for field, (hear, _) in HEARD.items()
    }


@pytest.mark.parametrize("field", HEARD)
def test_the_way_of_speaking_can_be_heard(sounds, truth, heard, field):
    spoken = [told[field] for told in truth if told["utterance"] in sounds]
    assert np.corrcoef(heard[field], spoken)[0, 1] > HEARD[field][1]


def manners(columns: dict[str, np.ndarray]) -> np.ndarray:
    """[N, 4] in standard deviations, from physical values."""
    scales = {
        "pitch_hz": (np.log2, recordings._OCTAVE_OF_PITCH),
        "level_db": (np.asarray, recordings._LEVEL),
        "syllables_per_second": (np.log2, recordings._OCTAVE_OF_TEMPO),
        "tilt_db_per_octave": (np.asarray, recordings._TILT),
    }
    return np.stack(
        [
            (scale(columns[field]) - middle) / deviation
            for field, (scale, (middle, deviation)) in scales.items()
        ],
        axis=1,
    )


def scores_of(manifest: list[dict], manner: np.ndarray) -> dict[str, dict[str, float]]:
    """The reference scores of a corpus, from the manifest and ways of speaking [N, 4]."""
    process = spoken_process(0, missing_share=0.2, uninformative_share=0.2)
    label = np.array([recordings.class_names(6).index(row["label"]) for row in manifest])
    found = [re.findall("[a-z]+", row.get("text", "").lower()) for row in manifest]
    counts = np.array([[words.count(word) for word in process.words] for words in found])
    columns = [
        label,
        manner,
        counts,
        np.array(["audio" in row for row in manifest]),
        np.array(["text" in row for row in manifest]),
    ]
    starts = [index for index, row in enumerate(manifest) if row["order"] == 0]
    bounds = itertools.pairwise([*starts, len(manifest)])
    return reference_scores(
        process, [tuple(column[begin:end] for column in columns) for begin, end in bounds]
    )


def test_the_written_scores_follow_from_manifest_and_truth(corpus, manifest, truth):
    written = json.loads((corpus / "reference_scores.json").read_text())
    assert set(written) == {"train"}
    manner = manners({field: np.array([told[field] for told in truth]) for field in HEARD})
    again = scores_of(manifest, manner)
    for reference, values in written["train"].items():
        assert values == pytest.approx(again[reference])


def test_one_who_hears_and_reads_comes_near_the_best_score(corpus, manifest, truth, sounds, heard):
    # What is heard of tilt and pitch is off by a constant factor, learned here from the truth.
    has_sound = np.array(["audio" in row for row in manifest])
    spoken = manners({field: np.array([told[field] for told in truth]) for field in HEARD})
    inputs = np.column_stack([manners(heard), np.ones(len(sounds))])
    weights = np.linalg.lstsq(inputs, spoken[has_sound], rcond=None)[0]
    manner = np.zeros_like(spoken)
    manner[has_sound] = inputs @ weights
    best = json.loads((corpus / "reference_scores.json").read_text())["train"]
    reached = scores_of(manifest, manner)
    for reference in ("bayes", "bayes_speech"):
        assert reached[reference]["weighted_f1"] > best[reference]["weighted_f1"] - 0.05


@pytest.mark.parametrize("seed", range(3))
def test_the_default_task_rewards_fusion_and_context(seed):
    process = spoken_process(seed)
    dialogues = [recordings._Dialogue.sample(process, seed, "train", at) for at in range(200)]
    scores = reference_scores(process, [dialogue.features for dialogue in dialogues])
    score = {reference: values["weighted_f1"] for reference, values in scores.items()}
    assert 0.85 < score["bayes"] < 0.92
    assert score["majority"] < score["bayes_utterance"] < score["bayes"] - 0.04
    for modality in ("bayes_speech", "bayes_text"):
        assert 0.55 < score[modality] < 0.75
    assert score["majority"] < 0.2


def test_the_posterior_is_that_of_enumeration():
    process = spoken_process(1, num_classes=3, uninformative_share=0.2, missing_share=0.5)
    dialogue = recordings._Dialogue.sample(process, 1, "test", 0)
    present = np.array([[True, False, True], [True, True, False]])
    _, manner, counts, *_ = (values[:3] for values in dialogue.features)

    def spoken(step, mean):
        return np.prod(norm.pdf(manner[step], mean)) if present[0, step] else 1.0

    def said(step, probability):
        return np.prod(probability ** counts[step]) if present[1, step] else 1.0

    def emission(step, emotion):
        mean, probability = process.manner_mean[emotion], process.word_probability[emotion]
        silent_mean, silent_probability = process.manner_mean[0], process.neutral_probability
        return (
            0.6 * spoken(step, mean) * said(step, probability)
            + 0.2 * spoken(step, silent_mean) * said(step, probability)
            + 0.2 * spoken(step, mean) * said(step, silent_probability)
        )

    expected = np.zeros((3, 3))
    for path in itertools.product(range(3), repeat=3):
        weight = process.initial[path[0]]
        for before, after in itertools.pairwise(path):
            weight *= process.transition[before, after]
        for step, emotion in enumerate(path):
            weight *= emission(step, emotion)
        expected[np.arange(3), path] += weight
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(process.posterior(manner, counts, *present), expected, rtol=1e-6)


@pytest.mark.parametrize("num_classes", range(2, 8))
def test_words_have_probabilities(num_classes):
    process = spoken_process(0, num_classes=num_classes)
    assert len(set(process.words)) == len(process.words)
    for kind in (process.is_feeling, ~process.is_feeling):
        np.testing.assert_allclose(process.word_probability[:, kind].sum(axis=1), 1)
        np.testing.assert_allclose(process.neutral_probability[kind].sum(), 1)


def fail(*_) -> None:
    raise OSError(28, "No space left on device")


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def kill_the_worker(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(("failure", "error"), [(fail, InputError), (interrupt, KeyboardInterrupt)])
def test_a_failure_leaves_nothing_half_written(tmp_path, monkeypatch, failure, error):
    monkeypatch.setattr(recordings, "encode_wav", failure)
    with pytest.raises(error):
        write_recordings(tmp_path / "corpus", num_dialogues=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_dead_worker_leaves_what_was_there(tmp_path, monkeypatch):
    write_recordings(tmp_path / "corpus", num_dialogues={"test": 1})
    before = tree(tmp_path)
    monkeypatch.setattr(recordings, "_write_sound", kill_the_worker)
    with pytest.raises(WorkerCrash):
        write_recordings(tmp_path / "corpus", num_dialogues=SMALL, num_workers=1, overwrite=True)
    assert tree(tmp_path) == before


def test_a_corpus_is_replaced_only_when_asked(tmp_path):
    folder = tmp_path / "corpus"
    write_recordings(folder, num_dialogues={"test": 2})
    with pytest.raises(InputError, match=r"\(num_dialogues {'test': 2} in place of {'test': 1}\)"):
        write_recordings(folder, num_dialogues={"test": 1})
    (folder / "arguments.json").write_text("cut sh")
    with pytest.raises(InputError, match=r"other arguments exist \(no seed; no num_dialogues"):
        write_recordings(folder, num_dialogues={"test": 2})
    manifest = write_recordings(folder, num_dialogues={"test": 1}, overwrite=True)
    assert {row["dialogue"] for row in rows(manifest)} == {"test_0"}
    assert list(tmp_path.iterdir()) == [folder]


def test_a_corpus_of_the_same_arguments_is_used_again(tmp_path, monkeypatch):
    made = write_recordings(tmp_path / "corpus", num_dialogues={"test": 1})
    monkeypatch.setattr(recordings, "_write_sound", fail)
    told = []
    again = write_recordings(tmp_path / "corpus", num_dialogues={"test": 1}, tell=told.append)
    assert again == made
    assert told == [f"{tmp_path}/corpus: recordings of the same arguments were there and are used"]


def test_what_a_killed_process_left_is_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    left = tmp_path / f".incomplete.corpus.{socket.gethostname()}.{process.pid}.abc"
    (left / "corpus" / "audio").mkdir(parents=True)
    write_recordings(tmp_path / "corpus", num_dialogues={"test": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_another_folder_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a synthetic corpus"):
        write_recordings(tmp_path / "mine", num_dialogues=SMALL, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_dialogues": {}},
        {"num_dialogues": {"train": 0}},
        {"num_dialogues": {"train": 2, "test": -1}},
        {"num_dialogues": {"dev": 2}},
        {"num_classes": 1},
        {"num_classes": 8},
        {"stay_probability": 1.0},
        {"uninformative_share": 0.6},
        {"missing_share": -0.1},
        {"num_workers": -1},
    ],
)
def test_arguments_out_of_range_are_refused(tmp_path, wrong):
    with pytest.raises(ValueError) as caught:
        write_recordings(tmp_path / "corpus", **wrong)
    assert isinstance(caught.value, InputError) == ("num_dialogues" in wrong)
    assert list(tmp_path.iterdir()) == []
