"""The synthetic speech corpus: its files, its acoustics and its reference scores."""

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

from mister_jax.data import audio
from mister_jax.data.corpora.manifest import reader
from mister_jax.data.dialogue_process import reference_scores
from mister_jax.data.synthetic_speech import process as process_module
from mister_jax.data.synthetic_speech import voice, write_speech_corpus, writer
from mister_jax.data.synthetic_speech.process import class_names, make_spoken_dialogue_process
from mister_jax.data.workers import WorkerCrashError
from mister_jax.errors import InputError

SMALL = {"train": 3, "validation": 1, "test": 2}


def read_rows(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read_tree(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> pathlib.Path:
    """Returns the folder of a corpus of 40 dialogues."""
    folder = tmp_path_factory.mktemp("corpora") / "corpus"
    write_speech_corpus(
        folder, num_dialogues={"train": 40}, missing_share=0.2, uninformative_share=0.2
    )
    return folder


@pytest.fixture(scope="module")
def manifest(corpus) -> list[dict]:
    return read_rows(corpus / "manifest.jsonl")


@pytest.fixture(scope="module")
def truth(corpus) -> list[dict]:
    return read_rows(corpus / "truth.jsonl")


@pytest.fixture(scope="module")
def samples_by_utterance(corpus, manifest) -> dict[str, np.ndarray]:
    """Returns the samples of each utterance with a recording."""
    with_audio = [row for row in manifest if "audio" in row]
    requests = [audio.DecodeRequest(corpus / row["audio"]) for row in with_audio]
    clips = audio.decode_many(requests, num_workers=0)
    return {row["utterance"]: clip.samples for row, clip in zip(with_audio, clips, strict=True)}


def test_same_seed_gives_same_bytes_with_any_number_of_workers(tmp_path):
    one = write_speech_corpus(tmp_path / "one", seed=3, num_dialogues=SMALL).parent
    same = write_speech_corpus(tmp_path / "same", seed=3, num_dialogues=SMALL, num_workers=2).parent
    other = write_speech_corpus(tmp_path / "other", seed=4, num_dialogues=SMALL).parent
    assert read_tree(one) == read_tree(same)
    assert (
        json.loads((one / "arguments.json").read_text()).items()
        >= {
            "seed": 3,
            "num_dialogues": SMALL,
        }.items()
    )
    assert not filecmp.cmp(one / "manifest.jsonl", other / "manifest.jsonl", shallow=False)


def test_dialogue_does_not_depend_on_number_of_dialogues(tmp_path):
    small = write_speech_corpus(tmp_path / "small", num_dialogues={"test": 1}).parent
    large = write_speech_corpus(tmp_path / "large", num_dialogues={"train": 1, "test": 2}).parent
    large_files = read_tree(large)
    for name, content in read_tree(small).items():
        if name.endswith(".wav"):
            assert large_files[name] == content
    assert set(map(str, read_rows(small / "manifest.jsonl"))) < set(
        map(str, read_rows(large / "manifest.jsonl"))
    )


def test_manifest_has_exactly_the_documented_fields(corpus, manifest):
    for row in manifest:
        assert {"dialogue", "utterance", "order", "label", "split"} < set(row)
        assert set(row) <= {"dialogue", "utterance", "order", "audio", "text", "label", "split"}
        assert "audio" in row or "text" in row
        assert re.fullmatch(r"[A-Z][A-Za-z ,;.?]*[.?]", row.get("text", "None."))
    assert len({row["utterance"] for row in manifest}) == len(manifest)
    for _, dialogue in itertools.groupby(manifest, lambda row: row["dialogue"]):
        orders = [row["order"] for row in dialogue]
        assert orders == list(range(len(orders)))
        assert writer.MIN_LENGTH <= len(orders) <= writer.MAX_LENGTH
    files = {str(path.relative_to(corpus)) for path in corpus.rglob("*.wav")}
    assert files == {row["audio"] for row in manifest if "audio" in row}
    assert {path.name for path in corpus.iterdir()} == {
        "manifest.jsonl",
        "truth.jsonl",
        "reference_scores.json",
        "arguments.json",
        "audio",
    }


def test_manifest_reader_reads_corpus(corpus, manifest):
    manifest_corpus = reader.read_manifest(corpus / "manifest.jsonl")
    assert len(manifest_corpus.splits["train"]) == 40
    utterances = [
        turn for dialogue in manifest_corpus.splits["train"] for turn in dialogue.utterances
    ]
    assert [turn.label for turn in utterances] == [row["label"] for row in manifest]
    assert all(
        pathlib.Path(turn.recording.source).exists() for turn in utterances if turn.recording
    )


def test_recordings_are_one_to_three_seconds_at_16_khz(corpus, samples_by_utterance):
    for samples in samples_by_utterance.values():
        assert 1 <= len(samples) / audio.SAMPLE_RATE <= 3
        assert np.abs(samples).max() < 32767
    path = next(corpus.rglob("*.wav"))
    assert path.stat().st_size == 44 + 2 * len(samples_by_utterance[path.stem])


def test_modalities_are_missing_and_uninformative_at_requested_rates(manifest, truth):
    assert [row["utterance"] for row in manifest] == [row["utterance"] for row in truth]
    for row, truth_row in zip(manifest, truth, strict=True):
        assert ("audio" not in row) == (truth_row["missing"] == "speech")
        assert ("text" not in row) == (truth_row["missing"] == "text")
    for field, expected_share in (("missing", 0.1), ("uninformative", 0.2)):
        for modality in ("speech", "text"):
            share = np.mean([truth_row[field] == modality for truth_row in truth])
            assert share == pytest.approx(expected_share, abs=0.05)


def test_uninformative_text_has_only_neutral_words(manifest, truth):
    neutral = process_module._EMOTIONS["neutral"]
    allowed = {*neutral.feelings.split(), *neutral.things.split()}
    num_emotional = 0
    for row, truth_row in zip(manifest, truth, strict=True):
        assert all(word in row.get("text", word) for word in truth_row["words"])
        if truth_row["uninformative"] == "text":
            assert set(truth_row["words"]) <= allowed
        else:
            num_emotional += not set(truth_row["words"]) <= allowed
    assert num_emotional > len(truth) / 3


def test_emotions_persist_at_requested_rate(manifest):
    stays = [
        before["label"] == after["label"]
        for before, after in itertools.pairwise(manifest)
        if before["dialogue"] == after["dialogue"]
    ]
    assert np.mean(stays) == pytest.approx(0.6, abs=0.07)
    assert {row["label"] for row in manifest} == set(class_names(6))


def measure_pitch(samples: np.ndarray) -> float:
    """Returns the geometric mean pitch of the loud frames in Hz, by autocorrelation."""
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(float), 1024)[::512]
    frames = frames[np.std(frames, axis=1) > np.std(samples) / 3]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(1024), 2048)) ** 2
    window = np.fft.irfft(np.abs(np.fft.rfft(np.hanning(1024), 2048)) ** 2)
    correlation = np.fft.irfft(spectrum)[:, 40:280] / window[40:280]  # 400 Hz to 57 Hz.
    return float(np.exp(np.mean(np.log(audio.SAMPLE_RATE / (40 + correlation.argmax(axis=1))))))


def measure_level(samples: np.ndarray) -> float:
    """Returns the level in dB relative to full scale."""
    return 10 * np.log10(np.mean((samples / 32768.0) ** 2))


def measure_tempo(samples: np.ndarray) -> float:
    """Returns syllables per second: the envelope's strongest frequency between 2 and 10 Hz."""
    power = samples[: len(samples) // 160 * 160].reshape(-1, 160).astype(float) ** 2
    envelope = np.sqrt(power.mean(axis=1))
    envelope -= envelope.mean()
    spectrum = np.abs(np.fft.rfft(envelope * np.hanning(len(envelope)), 4096))
    frequency = np.fft.rfftfreq(4096, 0.01)
    return float(frequency[np.argmax(np.where((frequency > 2) & (frequency < 10), spectrum, 0))])


def measure_tilt(samples: np.ndarray) -> float:
    """Returns the slope of the spectrum between 200 Hz and 3.2 kHz in dB per octave."""
    frames = np.lib.stride_tricks.sliding_window_view(samples.astype(float), 1024)[::512]
    power = np.mean(np.abs(np.fft.rfft(frames * np.hanning(1024))) ** 2, axis=0)
    frequency = np.fft.rfftfreq(1024, 1 / audio.SAMPLE_RATE)
    edges = 200 * 2 ** np.arange(0, 4.1, 1 / 3)
    bands = [
        10 * np.log10(power[(frequency >= low) & (frequency < high)].mean())
        for low, high in itertools.pairwise(edges)
    ]
    return float(np.polyfit(np.arange(len(bands)) / 3, bands, 1)[0])


# For each field of `truth.jsonl`: the function that measures it in the samples, and the minimum
# correlation between the stored and the measured values.
MEASUREMENTS = {
    "pitch_hz": (measure_pitch, 0.97),
    "level_db": (measure_level, 0.99),
    "syllables_per_second": (measure_tempo, 0.97),
    "tilt_db_per_octave": (measure_tilt, 0.85),
}


@pytest.fixture(scope="module")
def measured(samples_by_utterance) -> dict[str, np.ndarray]:
    """Returns the measurements [N] of each field of `MEASUREMENTS`."""
    return {
        field: np.array([measure(samples) for samples in samples_by_utterance.values()])
        for field, (measure, _) in MEASUREMENTS.items()
    }


@pytest.mark.parametrize("field", MEASUREMENTS)
def test_speaking_style_is_measurable(samples_by_utterance, truth, measured, field):
    expected = [row[field] for row in truth if row["utterance"] in samples_by_utterance]
    assert np.corrcoef(measured[field], expected)[0, 1] > MEASUREMENTS[field][1]


def to_styles(columns: dict[str, np.ndarray]) -> np.ndarray:
    """Converts physical values to styles [N, 4] in standard deviations from the mean."""
    scales = {
        "pitch_hz": (np.log2, voice.PITCH_OCTAVE),
        "level_db": (np.asarray, voice.LEVEL),
        "syllables_per_second": (np.log2, voice.TEMPO_OCTAVE),
        "tilt_db_per_octave": (np.asarray, voice.TILT),
    }
    return np.stack(
        [
            (scale(columns[field]) - middle) / deviation
            for field, (scale, (middle, deviation)) in scales.items()
        ],
        axis=1,
    )


def compute_scores(manifest: list[dict], style: np.ndarray) -> dict[str, dict[str, float]]:
    """Returns the reference scores of a corpus from its manifest and styles [N, 4]."""
    process = make_spoken_dialogue_process(0, missing_share=0.2, uninformative_share=0.2)
    label = np.array([class_names(6).index(row["label"]) for row in manifest])
    sentences = [re.findall("[a-z]+", row.get("text", "").lower()) for row in manifest]
    counts = np.array([[words.count(word) for word in process.words] for words in sentences])
    columns = [
        label,
        style,
        counts,
        np.array(["audio" in row for row in manifest]),
        np.array(["text" in row for row in manifest]),
    ]
    starts = [index for index, row in enumerate(manifest) if row["order"] == 0]
    bounds = itertools.pairwise([*starts, len(manifest)])
    return reference_scores(
        process, [tuple(column[begin:end] for column in columns) for begin, end in bounds]
    )


def test_written_scores_follow_from_manifest_and_truth(corpus, manifest, truth):
    written = json.loads((corpus / "reference_scores.json").read_text())
    assert set(written) == {"train"}
    style = to_styles({field: np.array([row[field] for row in truth]) for field in MEASUREMENTS})
    recomputed = compute_scores(manifest, style)
    for reference, values in written["train"].items():
        assert values == pytest.approx(recomputed[reference])


def test_measured_styles_nearly_reach_reference_score(corpus, manifest, truth, measured):
    # The measurements are biased, so a linear map from the measured to the true styles is fitted.
    has_audio = np.array(["audio" in row for row in manifest])
    true_style = to_styles(
        {field: np.array([row[field] for row in truth]) for field in MEASUREMENTS}
    )
    inputs = np.column_stack([to_styles(measured), np.ones(has_audio.sum())])
    weights = np.linalg.lstsq(inputs, true_style[has_audio], rcond=None)[0]
    style = np.zeros_like(true_style)
    style[has_audio] = inputs @ weights
    reference_scores_by_input = json.loads((corpus / "reference_scores.json").read_text())["train"]
    reached = compute_scores(manifest, style)
    for reference in ("bayes", "bayes_speech"):
        assert (
            reached[reference]["weighted_f1"]
            > reference_scores_by_input[reference]["weighted_f1"] - 0.05
        )


@pytest.mark.parametrize("seed", range(3))
def test_default_task_rewards_fusion_and_context(seed):
    process = make_spoken_dialogue_process(seed)
    dialogues = [writer._sample_dialogue(process, seed, "train", index)[0] for index in range(200)]
    scores = reference_scores(process, dialogues)
    score = {reference: values["weighted_f1"] for reference, values in scores.items()}
    assert 0.85 < score["bayes"] < 0.92
    assert score["majority"] < score["bayes_utterance"] < score["bayes"] - 0.04
    for modality in ("bayes_speech", "bayes_text"):
        assert 0.55 < score[modality] < 0.75
    assert score["majority"] < 0.2


def test_posterior_equals_enumeration():
    process = make_spoken_dialogue_process(
        1, num_classes=3, uninformative_share=0.2, missing_share=0.5
    )
    features, _, _ = writer._sample_dialogue(process, 1, "test", 0)
    present = np.array([[True, False, True], [True, True, False]])
    _, style, counts, *_ = (values[:3] for values in features)

    def speech_density(step, mean):
        return np.prod(norm.pdf(style[step], mean)) if present[0, step] else 1.0

    def text_density(step, probability):
        return np.prod(probability ** counts[step]) if present[1, step] else 1.0

    def emission(step, emotion):
        mean, probability = process.style_mean[emotion], process.word_probability[emotion]
        neutral_mean, neutral_probability = process.style_mean[0], process.neutral_probability
        return (
            0.6 * speech_density(step, mean) * text_density(step, probability)
            + 0.2 * speech_density(step, neutral_mean) * text_density(step, probability)
            + 0.2 * speech_density(step, mean) * text_density(step, neutral_probability)
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
    np.testing.assert_allclose(process.posterior(style, counts, *present), expected, rtol=1e-6)


@pytest.mark.parametrize("num_classes", range(2, 8))
def test_word_probabilities_add_up_to_one(num_classes):
    process = make_spoken_dialogue_process(0, num_classes=num_classes)
    assert len(set(process.words)) == len(process.words)
    for kind in (process.is_feeling, ~process.is_feeling):
        np.testing.assert_allclose(process.word_probability[:, kind].sum(axis=1), 1)
        np.testing.assert_allclose(process.neutral_probability[kind].sum(), 1)


def raise_disk_full(*_) -> None:
    raise OSError(28, "No space left on device")


def raise_interrupt(*_) -> None:
    raise KeyboardInterrupt


def kill_worker(_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("failure", "error"), [(raise_disk_full, InputError), (raise_interrupt, KeyboardInterrupt)]
)
def test_failure_leaves_no_partial_corpus(tmp_path, monkeypatch, failure, error):
    monkeypatch.setattr(writer, "encode_wav", failure)
    with pytest.raises(error):
        write_speech_corpus(tmp_path / "corpus", num_dialogues=SMALL)
    assert list(tmp_path.iterdir()) == []


def test_worker_crash_keeps_existing_corpus(tmp_path, monkeypatch):
    write_speech_corpus(tmp_path / "corpus", num_dialogues={"test": 1})
    before = read_tree(tmp_path)
    monkeypatch.setattr(writer, "_write_recordings", kill_worker)
    with pytest.raises(WorkerCrashError):
        write_speech_corpus(tmp_path / "corpus", num_dialogues=SMALL, num_workers=1, overwrite=True)
    assert read_tree(tmp_path) == before


def test_existing_corpus_is_replaced_only_with_overwrite(tmp_path):
    folder = tmp_path / "corpus"
    write_speech_corpus(folder, num_dialogues={"test": 2})
    with pytest.raises(InputError, match=r"\(num_dialogues {'test': 2} instead of {'test': 1}\)"):
        write_speech_corpus(folder, num_dialogues={"test": 1})
    (folder / "arguments.json").write_text("cut sh")
    with pytest.raises(InputError, match=r"made with other arguments \(no seed; no num_dialogues"):
        write_speech_corpus(folder, num_dialogues={"test": 2})
    manifest = write_speech_corpus(folder, num_dialogues={"test": 1}, overwrite=True)
    assert {row["dialogue"] for row in read_rows(manifest)} == {"test_0"}
    assert list(tmp_path.iterdir()) == [folder]


def test_corpus_with_same_arguments_is_reused(tmp_path, monkeypatch):
    first = write_speech_corpus(tmp_path / "corpus", num_dialogues={"test": 1})
    monkeypatch.setattr(writer, "_write_recordings", raise_disk_full)
    lines = []
    second = write_speech_corpus(tmp_path / "corpus", num_dialogues={"test": 1}, log=lines.append)
    assert second == first
    assert lines == [
        f"{tmp_path}/corpus: reusing the recordings, which were made with the same arguments"
    ]


def test_leftovers_of_killed_process_are_removed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        pass
    leftover = tmp_path / f".incomplete.corpus.{socket.gethostname()}.{process.pid}.abc"
    (leftover / "corpus" / "audio").mkdir(parents=True)
    write_speech_corpus(tmp_path / "corpus", num_dialogues={"test": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_other_folder_is_never_replaced(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="not a synthetic speech corpus"):
        write_speech_corpus(tmp_path / "mine", num_dialogues=SMALL, overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine", "thesis.txt"]


@pytest.mark.parametrize(
    "invalid",
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
def test_arguments_out_of_range_are_refused(tmp_path, invalid):
    with pytest.raises(ValueError) as caught:
        write_speech_corpus(tmp_path / "corpus", **invalid)
    assert isinstance(caught.value, InputError) == ("num_dialogues" in invalid)
    assert list(tmp_path.iterdir()) == []
