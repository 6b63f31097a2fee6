"""Extraction is timed, and compared with PyTorch on the same weights."""

import json

import numpy as np
import pytest

from benchmarks import extraction, measure
from mister_jax.errors import InputError


@pytest.fixture
def few_utterances(monkeypatch):
    monkeypatch.setattr(extraction, "_COUNT", {"text": 5, "speech": 3})
    monkeypatch.setattr(extraction, "_BATCH_SIZES", {"text": (1, 2), "speech": (1, 2)})
    monkeypatch.setattr(extraction, "_NUM_BATCHES", {"text": 2, "speech": 1})


def test_texts_are_as_long_as_those_of_meld():
    words = [len(text.split()) for text in extraction.meld_like_texts(2000)]
    assert np.mean(words) == pytest.approx(8, abs=1)
    assert np.median(words) == pytest.approx(6, abs=1)
    assert max(words) <= 69


def test_texts_come_from_a_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("one\n\n two words \n")
    assert extraction.read_texts(path) == ["one", "two words"]
    path.write_text("\n")
    with pytest.raises(InputError, match="no text; needed: one text per line"):
        extraction.read_texts(path)
    with pytest.raises(InputError, match="cannot be read"):
        extraction.read_texts(tmp_path / "none.txt")


def test_extraction_is_timed_in_utterances_and_tokens(bert_folder, few_utterances):
    texts = ["i am glad", "you are so mad", "today"]
    (row,) = extraction.measure_extraction(str(bert_folder), texts, max_tokens=20, rounds=1)
    assert row["utterances"] == 3
    assert row["tokens"] == 8 + 2 * 3  # with [CLS] and [SEP]
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["median_s"])
    assert row["speedup_of_mister_jax"] == 1


@pytest.mark.parity
def test_features_of_texts_agree_with_pytorch(bert_folder, few_utterances):
    pytest.importorskip("torch")
    texts = ["i am glad", "you are so mad", "today", "we are happy"]
    rows = extraction.measure_extraction(
        str(bert_folder), texts, max_tokens=20, compare=True, rounds=1
    )
    assert [row["library"] for row in rows[1:]] == [
        "torch, batches of 1",
        "torch, batches of 2",
    ]
    assert [row["utterances"] for row in rows] == [4, 2, 4]
    assert rows[0]["largest_difference"] < 1e-5


@pytest.mark.parity
def test_features_of_texts_agree_with_onnx_runtime(bert_folder, few_utterances):
    for name in ("torch", "onnx", "onnxruntime", "onnxscript"):
        pytest.importorskip(name)
    texts = ["i am glad", "you are so mad", "today", "we are happy"]
    options = {"max_tokens": 20, "rounds": 1}
    rows = extraction.measure_extraction(str(bert_folder), texts, onnx=True, **options)
    assert [row["library"] for row in rows[1:]] == [
        "onnxruntime, batches of 1",
        "onnxruntime, batches of 2",
    ]
    assert rows[0]["largest_difference"] < 1e-5
    rows = extraction.measure_extraction(
        str(bert_folder), texts, compare=True, onnx=True, **options
    )
    assert [row["library"].split(",")[0] for row in rows] == [
        "mister_jax",
        *["torch"] * 2,
        *["onnxruntime"] * 2,
    ]


def test_onnx_allows_text_encoders_in_float32(bert_folder):
    with pytest.raises(InputError, match="text encoder, bfloat16; --onnx allows text encoders in"):
        extraction.measure_extraction(str(bert_folder), max_tokens=20, dtype="bfloat16", onnx=True)


def test_missing_libraries_for_onnx_are_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name in ("torch", "onnx") or None)
    with pytest.raises(InputError, match="needs onnxruntime, onnxscript: pip install onnxr"):
        measure.require_onnx()


@pytest.mark.parity
def test_features_of_clips_agree_with_pytorch(tmp_path, few_utterances):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        d_model=16,
        encoder_layers=1,
        encoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        decoder_ffn_dim=16,
        vocab_size=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    transformers.WhisperModel(config).save_pretrained(tmp_path)
    transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    rows = extraction.measure_extraction(str(tmp_path), compare=True, rounds=1)
    assert [row["utterances"] for row in rows] == [3, 3, 1, 2]
    assert all(row["audio_hours_per_second"] > 0 for row in rows)
    # Without trimming, both libraries read 30 s.
    trimmed, padded = rows[:2]
    assert padded["largest_difference"] < 1e-4
    assert trimmed["relative_difference"] > 10 * padded["relative_difference"]


@pytest.mark.parity
def test_encoder_without_a_pytorch_counterpart_is_named(tmp_path, few_utterances):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "hubert"}))

    class SpeechEncoder:
        modality = "speech"

    with pytest.raises(InputError, match="model_type 'hubert'; --torch allows text"):
        extraction._load_torch_encoder(str(tmp_path), "float32", SpeechEncoder())
