"""`mister-jax predict` writes the predictions of an `EmotionRecognizer`."""

import csv
import json
import shutil

import pytest

from mister_jax.calibration import Calibration, write_calibration
from mister_jax.data.audio import encode_wav
from mister_jax.data.corpora.mosi import VIDEOS
from mister_jax.predictor import Predictor
from tests.data.corpora import MOSI, write_mosi
from tests.helpers.commands import run_command
from tests.helpers.predictions import assert_predictions_close, write_call
from tests.helpers.speech import synthesize_speech


@pytest.fixture
def predict(workdir, bert_folder):
    """Returns a function that runs the command on the work directory."""

    def run(*flags):
        return run_command(
            ["predict", f"--model={workdir}", f"--text_encoder={bert_folder}", *flags]
        )

    return run


def test_the_output_has_the_inputs_and_predictions(
    predict, recognizer, calls_dir, dialogues, tmp_path
):
    output = tmp_path / "out.jsonl"
    folder = calls_dir.parent
    result = predict(f"--manifest={folder / 'calls.jsonl'}", f"--output={output}")
    assert result.status == 0, result.stderr
    assert f"written to {output}: utterances 12, dialogues 5" in result.stdout
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["utterance"] for row in rows[:4]] == ["0", "1", "0", "0"]
    assert rows[0]["audio"] == str(folder / "0_0.wav") and rows[0]["text"]
    assert (rows[0]["start"], rows[0]["end"], rows[0]["notes"]) == (None, None, [])
    assert [row["label"] for row in rows[:2]] == ["calm", "angry"]
    predictions = recognizer.predict_dialogues(dialogues)
    # The first three rows are those of the training and the validation dialogue, which `dialogues`
    # does not contain.
    assert_predictions_close(rows[3:], [row for dialogue in predictions for row in dialogue])


def test_one_split_of_a_corpus_with_scores_is_predicted(predict, tmp_path):
    def write_wav(path, seconds):
        path.parent.mkdir(parents=True, exist_ok=True)
        encode_wav(path, synthesize_speech(seconds))

    write_mosi(tmp_path / "CMU-MOSI", write_wav)
    output = tmp_path / "out.jsonl"
    source = f"--source={tmp_path / 'CMU-MOSI'}"
    result = predict("--corpus=mosi", source, "--split=test", f"--output={output}")
    assert result.status == 0, result.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert {row["dialogue"] for row in rows} == {video for video in MOSI if VIDEOS[video] == "test"}


def test_predictions_below_the_minimum_confidence_are_uncertain(
    workdir, bert_folder, recognizer, tmp_path
):
    run = shutil.copytree(workdir, tmp_path / "run")
    write_calibration(run, Calibration(0.25), Predictor(run).progress)
    texts = ["so mad", "glad", "we are happy"]
    expected = recognizer.predict([{"text": text} for text in texts])
    confidence = [row["probabilities"][row["emotion"]] for row in expected]
    limit = (min(confidence) + max(confidence)) / 2
    flags = [f"--model={run}", f"--text_encoder={bert_folder}", f"--min_confidence={limit}"]
    flags += [f"--text={text}" for text in texts]
    output = tmp_path / "out.jsonl"
    result = run_command(["predict", *flags, "--nocalibrate", f"--output={output}"])
    assert result.status == 0, result.stderr
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert_predictions_close(rows, expected)
    assert [row["uncertain"] for row in rows] == [value < limit for value in confidence]
    marked = rows[confidence.index(min(confidence))]
    assert f"{marked['emotion']}? " in result.stdout and "?: uncertain" in result.stdout
    result = run_command(["predict", *flags, f"--output={output}"])
    assert result.status == 0, result.stderr
    calibrated = [json.loads(line) for line in output.read_text().splitlines()]
    for row, before in zip(calibrated, expected, strict=True):
        assert row["probabilities"][row["emotion"]] > before["probabilities"][before["emotion"]]
        assert row["experts"] == before["experts"] and row["emotion"] == before["emotion"]
        is_uncertain = row["probabilities"][row["emotion"]] < limit
        assert row["uncertain"] == is_uncertain
    result = run_command(["predict", "--min_confidence=50", "--text=glad"])
    assert result.status == 2 and "min_confidence=50" in result.stderr


def test_without_a_usable_recording_the_output_is_written_and_the_status_is_1(predict, tmp_path):
    rows = [{"start": n, "audio": f"{n}.wav", "duration": n, "speaker": "x"} for n in range(2)]
    output = tmp_path / "out.csv"
    result = predict(f"--manifest={write_call(tmp_path, rows)}", f"--output={output}")
    assert result.status == 1
    assert result.stderr.splitlines()[-1] == "error: none of 2 recordings could be used"
    assert "recordings: 2, of these 2 unusable" in result.stdout
    with output.open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["utterance"], second["start"]) == ("0", "1.0")
    assert (second["metadata.duration"], second["metadata.speaker"]) == ("1", "x")
    assert second["emotion"] in ("angry", "calm")
    assert float(second[f"probabilities.{second['emotion']}"]) >= 0.5
    assert second["notes"].startswith("unusable: ") and "no such file" in second["notes"]
