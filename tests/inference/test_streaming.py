"""Live dialogues: `EmotionRecognizer.stream` and `mister-jax predict --follow`."""

import io
import json
import logging
import subprocess
import sys

import numpy as np
import pytest

import mister_jax
from mister_jax.calibration import Calibration
from mister_jax.errors import InputError
from mister_jax.inference.follow import follow
from tests.helpers.commands import REPOSITORY, run_command
from tests.helpers.predictions import assert_predictions_close
from tests.helpers.training import ALL_LAYERS, write_untrained_workdir


@pytest.fixture(scope="module")
def causal_workdir(calls_dir, tmp_path_factory):
    """A work directory of an untrained causal MiSTER-E of two seeds."""
    folder = tmp_path_factory.mktemp("causal") / "run"
    changes = {"causal": True, "attention_window": 3, **ALL_LAYERS}
    return write_untrained_workdir(folder, calls_dir, "both", num_seeds=2, **changes)


@pytest.fixture(scope="module")
def causal_recognizer(causal_workdir):
    return mister_jax.load(causal_workdir)


def answers_to(recognizer, *lines, **options):
    """Returns the answers to lines. A line is bytes, or a value that is converted to JSON."""
    encoded = [
        line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines
    ]
    output = io.StringIO()
    follow(recognizer, encoded, output, **options)
    return [json.loads(line) for line in output.getvalue().splitlines()]


def without_ids(answer):
    return {name: value for name, value in answer.items() if name not in ("dialogue", "utterance")}


def test_a_stream_of_a_causal_model_predicts_as_from_the_whole_dialogue(
    causal_recognizer, dialogues
):
    stream = causal_recognizer.stream()
    assert stream.is_exact
    for dialogue in dialogues:
        rows = [stream.predict(utterance) for utterance in dialogue]
        assert_predictions_close(rows, causal_recognizer.predict(dialogue))
        assert stream.num_utterances == len(dialogue)
        stream.reset()


def test_a_stream_is_calibrated(causal_recognizer, monkeypatch):
    (uncalibrated,) = causal_recognizer.predict([{"text": "so mad"}])
    monkeypatch.setattr(causal_recognizer._predictor, "calibration", Calibration(0.1))
    expected = causal_recognizer.predict([{"text": "so mad"}])
    assert expected[0]["probabilities"] != uncalibrated["probabilities"]
    assert_predictions_close([causal_recognizer.stream().predict({"text": "so mad"})], expected)


def test_all_utterances_of_a_stream_run_one_program(causal_recognizer):
    program = causal_recognizer._predictor._programs.predict_step.function
    stream = causal_recognizer.stream()
    stream.predict({"text": "glad"})
    num_programs = program._cache_size()
    for utterance in ({"audio": np.arange(9000.0) / 9000}, {"text": "mad"}):
        stream.predict(utterance)
        stream.reset()
        stream.predict(utterance)
    assert program._cache_size() == num_programs


def test_an_unusable_utterance_does_not_change_a_stream(causal_recognizer):
    streams = [causal_recognizer.stream() for _ in range(2)]
    rows = [stream.predict({"text": "so mad"}) for stream in streams]
    with pytest.raises(InputError, match="utterance: text: 3; allowed: text"):
        streams[1].predict({"text": 3})
    rows = [stream.predict({"text": "glad"}) for stream in streams]
    assert rows[0] == rows[1]


def test_a_stream_of_another_model_reads_a_window_and_warns_once(recognizer, dialogues, caplog):
    recognizer._warned_of_window = False
    with caplog.at_level(logging.WARNING):
        streams = [recognizer.stream(window=3) for _ in range(2)]
    assert [it.message for it in caplog.records if "not causal" in it.message] == [
        "the model is not causal, so a stream reads the last 3 utterances again for each "
        "prediction; for exact live predictions, train a model with --config.model.causal=True"
    ]
    stream, dialogue = streams[0], dialogues[-1]
    assert not stream.is_exact
    rows = [stream.predict(utterance) for utterance in dialogue]
    expected = [
        recognizer.predict(dialogue[max(0, stop - 3) : stop])[-1]
        for stop in range(1, len(dialogue) + 1)
    ]
    assert_predictions_close(rows, expected)
    stream.reset()
    assert_predictions_close([stream.predict(dialogue[0])], expected[:1])
    with pytest.raises(InputError, match="window=0; allowed: at least 1"):
        recognizer.stream(window=0)


def test_followed_dialogues_are_separate_and_ids_are_repeated(causal_recognizer, dialogues):
    dialogue = [{"text": text} for text in ("so mad", "glad", "we are happy", "mad")]
    lines = []
    for index, utterance in enumerate(dialogue):
        lines += [
            {"dialogue": 7, "utterance": f"a{index}", **utterance},
            {"dialogue": "b", **utterance},
            utterance,
        ]
    answers = answers_to(causal_recognizer, *lines)
    assert [answer.get("dialogue") for answer in answers[:3]] == [7, "b", None]
    assert answers[3]["utterance"] == "a1" and "utterance" not in answers[4]
    expected = causal_recognizer.predict(dialogue)
    for number in range(3):
        assert_predictions_close(list(map(without_ids, answers[number::3])), expected)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": \n', "not JSON: Expecting value"),
        (b"\n", "not JSON: an empty line"),
        (b"null\n", "null; needed: a JSON object"),
        (b'{"text": "\xff"}\n', "not JSON: 'utf-8' codec"),
        (b"[" * 100_000 + b"\n", "not JSON: "),
        ([1], "[1]; needed: a JSON object with text or audio"),
        ({}, "utterance: audio: missing, and text is also missing"),
        ({"text": 3}, "utterance: text: 3; allowed: text"),
        ({"txt": "mad"}, "'txt': unknown, close to 'text'"),
        ({"text": "mad", "audio": "nowhere.wav"}, "audio: 'nowhere.wav': no such file"),
        ({"audio": "a" * 5000}, "no such file"),
        ({"audio": [0.1, 0.2]}, "audio: [0.1, 0.2]; allowed: text"),
        ({"text": "mad", "dialogue": 1.5}, "dialogue: 1.5; allowed: text"),
        ({"text": "mad", "utterance": [1]}, "utterance: [1]; allowed: text"),
    ],
)
def test_an_unusable_line_is_answered_by_an_error_and_its_number(causal_recognizer, line, message):
    first, error, last = answers_to(causal_recognizer, {"text": "glad"}, line, {"text": "mad"})
    assert error.keys() == {"error", "line"} and error["line"] == 2
    assert message in error["error"] and "\n" not in error["error"]
    assert [first, last] == answers_to(causal_recognizer, {"text": "glad"}, {"text": "mad"})


def test_the_dialogue_that_has_been_silent_longest_is_dropped(causal_recognizer, caplog):
    lines = [{"dialogue": name, "text": text} for name, text in zip("abac", "wxyz", strict=True)]
    with caplog.at_level(logging.WARNING):
        *_, b, a = answers_to(
            causal_recognizer,
            *lines,
            {"dialogue": "b", "text": "mad"},
            {"dialogue": "a", "text": "mad"},
            max_dialogues=2,
        )
    assert 'dialogue "b" is dropped, because 2 others were updated later' in caplog.text
    (alone,) = answers_to(causal_recognizer, {"text": "mad"})
    assert without_ids(b) == without_ids(alone)  # "b" was dropped and starts over.
    assert without_ids(a) == without_ids(alone)  # Then "a" was dropped to make room for "b".


def test_each_line_is_answered_before_the_next_is_read(causal_recognizer):
    output = io.StringIO()

    def lines():
        for number in range(3):
            assert output.getvalue().count("\n") == number
            yield b'{"text": "glad"}\n'

    follow(causal_recognizer, lines(), output)


def test_the_command_writes_only_answers_to_standard_output(workdir):
    lines = ['{"text": "so mad", "dialogue": "d"}', "no json", '{"text": "glad"}']
    # A new process also shows whether libraries print when they are imported.
    command = [sys.executable, "-m", "launch.predict", f"--model={workdir}", "--follow"]
    result = subprocess.run(
        command, input="\n".join(lines), cwd=REPOSITORY, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    first, error, last = map(json.loads, result.stdout.splitlines())
    assert first["dialogue"] == "d" and last["emotion"] in ("angry", "calm")
    assert error["line"] == 2
    assert "the model is not causal" in result.stderr


def test_the_command_refuses_flags_that_following_does_not_use(workdir):
    result = run_command(["predict", f"--model={workdir}", "--follow", "--text=mad"])
    assert (result.status, result.stdout) == (2, "")
    assert result.stderr == "error: --text: cannot be used with --follow\n"
