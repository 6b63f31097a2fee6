"""`mister-jax predict` writes the predictions of an `EmotionRecognizer`."""

import csv
import json

import pytest

from tests.helpers.commands import run_script
from tests.helpers.predictions import assert_predictions_close, write_call


@pytest.fixture
def predict(workdir, bert_folder):
    """Returns a function that runs the command on the work directory."""

    def run(*flags):
        return run_script("predict", f"--model={workdir}", f"--text_encoder={bert_folder}", *flags)

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
    # The first two dialogues are those of training and validation.
    assert_predictions_close(rows[3:], [row for dialogue in predictions for row in dialogue])


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
