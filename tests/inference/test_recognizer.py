"""`EmotionRecognizer`: from recordings and texts to emotions."""

import contextlib
import dataclasses
import io
import json
import logging
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

import mister_jax
from mister_jax import data, extraction
from mister_jax.checkpoint import Checkpoints
from mister_jax.console import prediction_table
from mister_jax.data.adaptation import adapt_features
from mister_jax.data.audio import encode_wav
from mister_jax.data.corpora.manifest.reader import read_manifest
from mister_jax.errors import InputError
from mister_jax.evaluation.results import evaluate
from mister_jax.inference.recognizer import summarize_notes
from mister_jax.predictor import Predictor, prediction_rows
from tests.helpers.commands import REPOSITORY
from tests.helpers.predictions import assert_predictions_close, write_call
from tests.helpers.training import write_untrained_workdir


def test_out_of_memory_is_explained_for_loading_encoding_and_predicting(
    workdir, recognizer, dialogues, monkeypatch, out_of_memory
):
    def assert_explained(message, function):
        with pytest.raises(InputError, match=message) as error:
            function()
        assert "\n" not in str(error.value) and "allocating 7 bytes" in str(error.value)

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "restore", out_of_memory)
        message = "run: out of memory with the model's parameters"
        assert_explained(message, lambda: Predictor(workdir))
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict_batch_per_seed", out_of_memory)
        message = "prediction: out of memory with batches on 8 devices .* try devices with more"
        assert_explained(message, lambda: recognizer.predict_dialogues(dialogues))
    with monkeypatch.context() as patch:
        patch.setattr(extraction.ProsodyEncoder, "__call__", out_of_memory)
        message = "out of memory with batches of .* try shorter utterances"
        assert_explained(message, lambda: recognizer.predict_dialogues(dialogues))


def test_raw_dialogues_and_their_features_give_equal_predictions(
    recognizer, workdir, calls_dir, dialogues
):
    features = data.load_features("both", "test", calls_dir)
    expected = list(prediction_rows(recognizer.class_names, Predictor(workdir)(features)))
    predictions = recognizer.predict_dialogues(dialogues)
    assert [len(rows) for rows in predictions] == [len(turns) for turns in dialogues]
    assert_predictions_close([row for rows in predictions for row in rows], expected)


def test_features_are_adapted_to_the_utterances_of_a_call(workdir, calls_dir, dialogues):
    predictor = Predictor(workdir)
    features = data.load_features("both", "test", calls_dir)
    adapted = adapt_features(features, predictor.task.standardizers)
    assert not np.allclose(adapted.speech, features.speech)
    rows = mister_jax.load(workdir, adapt_features=True).predict_dialogues(dialogues)
    actual = [list(row["probabilities"].values()) for dialogue in rows for row in dialogue]
    np.testing.assert_allclose(actual, predictor(adapted)["probabilities"], atol=1e-3)


def test_features_that_cannot_be_adapted_are_refused(workdir):
    with pytest.raises(InputError, match="the model standardizes no features; needed"):
        # The default model reads only text features, which it does not standardize.
        mister_jax.load(adapt_features=True)
    with pytest.raises(InputError, match="a stream has no utterances to adapt to"):
        mister_jax.load(workdir, adapt_features=True).stream()


def test_other_dialogues_and_their_order_do_not_change_predictions(recognizer, dialogues):
    predictions = recognizer.predict_dialogues(dialogues)
    reversed_predictions = recognizer.predict_dialogues(dialogues[::-1])
    for rows, expected in zip(reversed(reversed_predictions), predictions, strict=True):
        assert_predictions_close(rows, expected)
    assert_predictions_close(recognizer.predict(dialogues[0]), predictions[0])


def test_a_file_a_cut_of_a_file_and_samples_give_equal_predictions(recognizer, tmp_path):
    random = np.random.default_rng(0)
    samples = (3000 * random.normal(size=16_000)).astype(np.int16)
    encode_wav(tmp_path / "one.wav", samples)
    encode_wav(tmp_path / "padded.wav", np.concatenate([samples[:8000], samples]))
    inputs = (
        {"audio": samples},
        {"audio": samples.astype(np.float64) / 2**15},
        {"audio": tmp_path / "one.wav"},
        {"audio": str(tmp_path / "padded.wav"), "audio_start": 0.5, "audio_end": 1.5},
    )
    expected, *others = (recognizer.predict([{**speech, "text": "so happy"}]) for speech in inputs)
    for rows in others:
        assert_predictions_close(rows, expected)


def test_experts_without_their_modality_do_not_vote(recognizer, dialogues, tmp_path, caplog):
    audio = dialogues[1][0]["audio"]
    broken = tmp_path / "broken.wav"
    broken.write_bytes(b"no sound")
    with caplog.at_level(logging.WARNING):
        rows = recognizer.predict(
            [
                {"text": "angry today", "audio": audio},
                {"text": "we are glad"},
                {"audio": audio},
                {"audio": tmp_path / "nowhere.wav", "text": "mad"},
                {"audio": broken, "text": None},
                {"audio": np.zeros(16_000, np.int16), "text": "so mad"},
            ]
        )
    voters = [{name for name, vote in row["experts"].items() if vote} for row in rows]
    all_experts = {"speech", "text", "fusion"}
    # The fifth utterance has neither speech nor text, so all experts read only the context.
    assert voters == [
        all_experts,
        {"text", "fusion"},
        {"speech", "fusion"},
        {"text", "fusion"},
        all_experts,
        {"text", "fusion"},
    ]
    for row in rows:
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert all(
            (row["gate"][name] > 0) == (row["experts"][name] is not None) for name in all_experts
        )
    assert "nowhere.wav: no such file; its utterance is predicted without speech" in caplog.text
    notes = [[note.partition(":")[0] for note in row["notes"]] for row in rows]
    assert notes == [[], [], [], ["unusable"], ["unusable", "no input"], ["silent"]]
    assert summarize_notes(rows) == "2 unusable, 1 silent, 1 no input"
    assert "broken.wav" in caplog.text


def test_dialogues_of_one_utterance_and_no_dialogues(recognizer):
    (row,) = recognizer.predict([{"text": "i am glad"}])
    assert set(row) == {"emotion", "probabilities", "gate", "experts", "notes"}
    assert row["experts"]["speech"] is None
    assert recognizer.predict_dialogues([]) == []


@pytest.mark.parametrize(
    ("utterances", "message"),
    [
        ([], "dialogue 1: no utterances"),
        (["hello"], "dialogue 1, utterance 1: str; needed: a dict with audio or text"),
        (
            [{"text": "a"}, {}],
            "utterance 2: audio: missing, and text is also missing; needed: at least one",
        ),
        ([{"txt": "a"}], "'txt': unknown, close to 'text'; allowed: dialogue"),
        ([{"text": 3}], "text: 3; allowed: text"),
        ([{"text": "a\ud800"}], "allowed: text without null or invalid characters"),
        ([{"audio": "a.wav", "audio_start": "soon"}], "audio_start: 'soon'; allowed: a number"),
        ([{"audio": "a.wav", "audio_start": 2, "audio_end": 1}], "audio_end: 1; allowed: more"),
        ([{"audio": "a.wav", "audio_channel": "up"}], "audio_channel: 'up'; allowed: mix"),
        ([{"audio": "a.wav"}] * 2, "2 utterances have the recording 'a.wav', so each needs start"),
        ([{"audio": np.zeros((2, 5))}], r"audio: float64 \[2, 5\]; allowed: a file, or samples"),
        ([{"audio": np.zeros(5, np.int32)}], "audio: int32"),
        ([{"audio": (np.zeros(5), 16_000)}], "audio: tuple; allowed: a file, or samples"),
        ([{"text": " "}, {"text": ""}], "no utterance has speech or text, and the model"),
        ([{"audio": np.full(5, np.nan)}], "audio: samples are not finite"),
        ([{"audio": np.full(5, 3000.0)}], "float samples of up to 3000; allowed: full scale 1"),
        ([{"audio": np.zeros(5), "audio_end": 1}], "audio is an array, but audio_start"),
    ],
)
def test_an_unusable_utterance_is_refused(recognizer, utterances, message):
    with pytest.raises(InputError, match=message):
        recognizer.predict(utterances)


def test_a_model_of_ready_made_features_is_refused(tmp_path):
    splits = data.generate_features(0, {"train": 2}, num_classes=3, speech_dim=4, text_dim=5)
    data.write_features(splits, "made_up", tmp_path / "data")
    workdir = write_untrained_workdir(tmp_path / "run", tmp_path / "data", "made_up")
    with pytest.raises(InputError, match="trained on ready-made features"):
        mister_jax.load(workdir)


def copy_with_encoder(workdir, copy, modality, **changes):
    """Makes a copy of a work directory with changes to the metadata of an encoder."""
    copy.mkdir()
    for path in workdir.iterdir():
        (copy / path.name).symlink_to(path)
    description = json.loads((workdir / "model.json").read_text())
    description["encoders"][modality] |= changes
    (copy / "model.json").unlink()
    (copy / "model.json").write_text(json.dumps(description))
    return copy


def test_a_moved_encoder_is_loaded_from_its_new_path(workdir, bert_folder, tmp_path):
    copy = copy_with_encoder(workdir, tmp_path / "run", "text", name=str(tmp_path / "gone"))
    with pytest.raises(InputError, match="gone"):
        mister_jax.load(copy)
    recognizer = mister_jax.load(copy, text_encoder=str(bert_folder))
    assert recognizer.predict([{"text": "glad"}])[0]["experts"]["text"]
    with pytest.raises(InputError, match="prosody, which has no files"):
        mister_jax.load(copy, speech_encoder=str(bert_folder))
    with pytest.raises(InputError, match=r"adapter=there: .* no adapter; allowed: encoder$"):
        mister_jax.load(copy, text_encoder={"encoder": str(bert_folder), "adapter": "there"})


def test_an_encoder_without_an_expert_is_not_loaded(calls_dir, bert_folder, tmp_path):
    workdir = write_untrained_workdir(tmp_path / "run", calls_dir, "text_alone,text_only")
    recognizer = mister_jax.load(workdir)
    audio = np.arange(9000.0) / 9000
    rows = recognizer.predict([{"text": "glad"}, {"text": "mad", "audio": audio}])
    assert [row["gate"]["text"] for row in rows] == [1, 1]
    with pytest.raises(InputError, match="uses no speech encoder"):
        mister_jax.load(workdir, speech_encoder=str(bert_folder))


def test_utterances_of_one_recording_are_cut_by_time_and_channel(recognizer, tmp_path):
    random = np.random.default_rng(1)
    samples = (3000 * random.normal(size=(32_000, 2))).astype(np.int16)
    encode_wav(tmp_path / "call.wav", samples)
    times = ((0.0, 0.75, "left"), (0.5, 1.25, "right"), ("1.25", "2.0", 0))
    utterances = [
        {"audio": tmp_path / "call.wav", "start": start, "end": end, "audio_channel": channel}
        for start, end, channel in times
    ]
    cuts = [samples[:12_000, 0], samples[8_000:20_000, 1], samples[20_000:, 0]]
    expected = recognizer.predict([{"audio": cut} for cut in cuts])
    assert_predictions_close(recognizer.predict(utterances), expected)


def test_samples_over_full_scale_are_scaled_and_noted(recognizer):
    samples = np.random.default_rng(0).normal(size=8000)
    (row,) = recognizer.predict([{"audio": samples}])
    (note,) = row["notes"]
    assert note.startswith("note: scaled by 0.2") and "over full scale" in note


def test_speech_beyond_a_limit_is_noted(recognizer, workdir, tmp_path):
    samples = (3000 * np.random.default_rng(0).normal(size=48_000)).astype(np.int16)
    (row,) = recognizer.predict([{"audio": samples}], max_seconds=2.0)
    assert row["notes"] == ["capped: 3.0 s, of which 2 s are read"]
    options = {"max_seconds": 1.0}
    copy = copy_with_encoder(workdir, tmp_path / "run", "speech", options=options)
    (row,) = mister_jax.load(copy).predict([{"audio": samples}])
    assert row["notes"] == ["cut by the encoder: 3.0 s, of which it reads 1 s"]


def test_times_that_do_not_fit_a_recording_are_noted(recognizer, tmp_path):
    path = tmp_path / "call.wav"
    encode_wav(path, (3000 * np.random.default_rng(0).normal(size=48_000)).astype(np.int16))
    times = [
        {"start": 10, "end": 13.2},
        {"start": 1, "end": 2},
        {"audio_start": 1, "audio_end": 2},
        {"audio_start": 1, "audio_end": 9},
    ]
    notes = [recognizer.predict([{"audio": path, **it}])[0]["notes"] for it in times]
    assert notes == [
        [],
        [
            "note: all 3.0 s of the recording are read, but start and end are 1.0 s apart; "
            "audio_start and audio_end select a part"
        ],
        [],
        ["note: ends 6.0 s after the recording"],
    ]


def test_a_truncated_text_is_noted_once(recognizer, caplog):
    texts = ["so mad", "glad " * 300, ""]
    rows = recognizer.predict([{"text": text} for text in texts])
    kinds = [[note.partition(":")[0] for note in row["notes"]] for row in rows]
    assert kinds == [[], ["cut by the encoder"], ["no input"]]
    limit = recognizer._encoders["text"].input.max_length
    assert rows[1]["notes"] == [f"cut by the encoder: it reads {limit} tokens of the text"]
    assert "truncated" not in caplog.text


def test_a_file_name_may_begin_with_a_space(recognizer, tmp_path):
    samples = (3000 * np.random.default_rng(0).normal(size=16_000)).astype(np.int16)
    encode_wav(tmp_path / " call.wav", samples)
    with contextlib.chdir(tmp_path):
        (row,) = recognizer.predict([{"audio": " call.wav"}])
    assert row["notes"] == []
    assert_predictions_close([row], recognizer.predict([{"audio": samples}]))


def test_further_columns_do_not_change_predictions(workdir, recognizer, tmp_path):
    plain = {"order": 0, "text": "so mad"}
    further = plain | {"speaker": "x", "duration": 3.5}
    corpora = [
        read_manifest(write_call(tmp_path, [row]), fractions=(0, 0, 1)) for row in (plain, further)
    ]
    assert dict(next(corpora[1].utterances())[1].metadata) == {"speaker": "x", "duration": "3.5"}
    rows = [
        recognizer.predict([{"text": turn.text}])
        for corpus in corpora
        for _, turn in corpus.utterances()
    ]
    direct = recognizer.predict([{"text": "so mad", "speaker": "x", "duration": 3.5}])
    assert rows[0] == rows[1] == direct


def test_further_columns_reach_the_scored_predictions_but_no_model(workdir, calls_dir, tmp_path):
    features = data.load_features("both", "test", calls_dir)
    assert json.loads(features.utterance_metadata[0]) == {"room": "r2"}
    without = dataclasses.replace(features, utterance_metadata=None)
    assert without.fingerprint() == features.fingerprint()
    split = Predictor(workdir).task.batched(features, num_shards=1)
    assert not any("metadata" in name for name in next(split.batches()))
    # A calibration would be stored in the work directory, which other tests share.
    evaluate(workdir, "test", output=tmp_path, calibrate=False, quiet=True)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [row.get("metadata") for row in rows[:4]] == [{"room": "r2"}, None, None, {"room": "r3"}]


def test_the_prediction_table_fits_80_columns(recognizer):
    texts = ["Why would you say such an unbelievably inconsiderate thing to your own brother?"] * 2
    rows = recognizer.predict([{"text": text} for text in texts])
    console = Console(width=80, file=io.StringIO())
    console.print(prediction_table(texts, rows))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    joined = " ".join(" ".join(line.split()) for line in lines)
    assert "unbelievably inconsiderate thing" in joined.replace("  ", " ")
    choice = rows[0]["experts"]["text"]
    assert f"text {choice} {rows[0]['gate']['text']:.0%}" in joined


def test_uncertain_predictions_are_marked_on_request(recognizer):
    utterances = [{"text": "so mad"}, {"text": "glad"}]
    rows = recognizer.predict(utterances)
    assert not any("uncertain" in row for row in rows)
    for limit in (0.0, rows[0]["probabilities"][rows[0]["emotion"]], 1.0):
        marked = recognizer.predict(utterances, min_confidence=limit)
        assert [row.pop("uncertain") for row in marked] == [
            row["probabilities"][row["emotion"]] < limit for row in rows
        ]
        assert marked == rows
        stream = recognizer.stream(min_confidence=limit)
        answer = stream.predict(utterances[0])
        assert answer["uncertain"] == (answer["probabilities"][answer["emotion"]] < limit)
    for limit in (-0.1, 50, float("nan")):
        with pytest.raises(InputError, match=r"min_confidence=.*; allowed: 0 to 1"):
            recognizer.predict(utterances, min_confidence=limit)


def test_importing_the_library_does_not_import_inference():
    assert callable(mister_jax.load) and "load" in mister_jax.__all__
    code = "import sys, mister_jax; print('mister_jax.inference.recognizer' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout == "False\n"
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        _ = mister_jax.laod
