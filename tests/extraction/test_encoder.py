"""An utterance's features do not depend on the batch, the padding or the devices."""

import types

import jax
import numpy as np
import pytest
from absl import logging

from mister_jax import extraction
from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.clips import LENGTH_STEP
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.padding import pad_clips
from mister_jax.encoders import registry
from mister_jax.errors import InputError
from mister_jax.nn import masked_mean
from mister_jax.parallel import sharding
from mister_jax.parallel.partitioning import CompiledStep
from tests.helpers.utterances import SECONDS, SPEECH, TEXT, make_clips, make_texts


@pytest.mark.parametrize(
    "kind", ["whisper", "prosody", "wavlm", "qwen", "salmonn", "bert", "llama"]
)
def test_features_depend_on_neither_batch_nor_padding(kind, request):
    encoder = request.getfixturevalue(f"{kind}_encoder")
    utterances = make_clips() if encoder.modality == "speech" else make_texts()
    features, present = extraction.encode_utterances(encoder, utterances)
    assert present.all() and len(np.unique(features[:5].round(4), axis=0)) == 5
    small_batches, _ = extraction.encode_utterances(encoder, utterances[:3], budget=1)
    np.testing.assert_allclose(small_batches, features[:3], atol=1e-5)
    reversed_order, _ = extraction.encode_utterances(encoder, utterances[::-1], budget=2)
    np.testing.assert_allclose(reversed_order[::-1], features, atol=1e-5)


@pytest.mark.parametrize("kind", ["whisper", "bert"])
def test_number_of_devices_does_not_change_features(kind, request, monkeypatch):
    one_device = request.getfixturevalue(f"{kind}_encoder")
    monkeypatch.setattr(sharding, "job_devices", jax.devices)
    folder = request.getfixturevalue(f"{kind}_folder")
    all_devices = type(one_device)(str(folder), **one_device.metadata["options"])
    assert (one_device.partitioner.num_shards, all_devices.partitioner.num_shards) == (1, 8)
    utterances = make_clips() if one_device.modality == "speech" else make_texts()
    features, expected = (
        extraction.encode_utterances(encoder, utterances)[0]
        for encoder in (all_devices, one_device)
    )
    np.testing.assert_allclose(features, expected, atol=1e-5)


@pytest.mark.devices
def test_number_of_devices_does_not_change_prosody(prosody_encoder):
    all_devices = extraction.ProsodyEncoder(max_seconds=0.5)
    assert (prosody_encoder.partitioner.num_shards, all_devices.partitioner.num_shards) == (1, 8)
    features, expected = (
        extraction.encode_utterances(encoder, make_clips(), budget=4)[0]
        for encoder in (all_devices, prosody_encoder)
    )
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


def test_whisper_feature_is_mean_over_positions_of_clip(whisper_encoder, whisper_folder):
    clips = make_clips()
    features, _ = extraction.encode_utterances(whisper_encoder, clips)
    module = registry.load_module(whisper_folder)
    for row in (1, 2):
        waveform = clips[row][None].astype(np.float32) / 2**15
        hidden_states, mask = module(waveform, np.array([len(clips[row])]))
        expected = masked_mean(hidden_states, mask)[0]
        np.testing.assert_allclose(features[row], expected, atol=1e-5)


def test_untrimmed_whisper_encodes_padding_of_clip(whisper_folder, whisper_encoder):
    untrimmed = extraction.PretrainedSpeech(str(whisper_folder), max_seconds=SECONDS, trim=False)
    assert untrimmed.input.length_steps == () and whisper_encoder.input.length_steps
    clips = make_clips()[:4]
    features, _ = extraction.encode_utterances(untrimmed, clips)
    module = registry.load_module(whisper_folder, trim=False)
    waveform, lengths = pad_clips(clips, 12_800)
    hidden_states, mask = module(waveform.astype(np.float32) / 2**15, lengths)
    np.testing.assert_allclose(features, masked_mean(hidden_states, mask), atol=1e-5)
    trimmed, _ = extraction.encode_utterances(whisper_encoder, clips)
    assert np.abs(features - trimmed).max() > 1e-2


def test_windows_option_encodes_speech_beyond_fixed_window(whisper_folder):
    encoder = extraction.PretrainedSpeech(str(whisper_folder), windows=True)
    assert encoder.input.max_samples is None
    window_samples = encoder.input.max_length * LENGTH_STEP
    clip = np.tile(make_clips()[2], 40)[: 2 * window_samples + 1000]
    features, _ = extraction.encode_utterances(encoder, [clip, clip[:5000]])
    parts = np.array_split(clip, 3)  # of nearly equal length
    part_features, _ = extraction.encode_utterances(encoder, parts)
    weights = [len(part) for part in parts]
    np.testing.assert_allclose(
        features[0], np.average(part_features, axis=0, weights=weights), atol=1e-5
    )
    short, _ = extraction.encode_utterances(encoder, [clip[:5000]])
    np.testing.assert_allclose(features[1], short[0], atol=1e-5)
    restored = extraction.encoder_from_metadata(encoder.metadata)
    np.testing.assert_allclose(
        extraction.encode_utterances(restored, [clip])[0], features[:1], atol=1e-5
    )
    with pytest.raises(InputError, match="windows; allowed for"):
        extraction.load_encoder("prosody", windows=True)


def test_encoders_without_fixed_window_encode_entire_clip():
    encoder = extraction.ProsodyEncoder()
    short = make_clips()[2]
    clip = np.concatenate([np.tile(short, -(-31 * SAMPLE_RATE // len(short))), short[::-1]])
    truncated = clip[: 30 * SAMPLE_RATE]
    features, truncated_features = extraction.encode_utterances(encoder, [clip, truncated])[0]
    assert np.abs(features - truncated_features).max() > 1e-3
    limited = extraction.ProsodyEncoder(max_seconds=30.0)
    np.testing.assert_allclose(
        extraction.encode_utterances(limited, [clip])[0][0], truncated_features, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["whisper", "prosody"])
def test_edge_case_clips_are_absent_or_finite(kind, request):
    encoder = request.getfixturevalue(f"{kind}_encoder")
    loud = np.where(np.arange(5000) % 100 < 50, 2**15 - 1, -(2**15)).astype(np.int16)
    ten_minutes = np.tile(make_clips()[2], 750)
    clips = [np.zeros(0), np.ones(1), np.zeros(9000), loud, ten_minutes]
    clips = [clip.astype(np.int16) for clip in clips]
    features, present = extraction.encode_utterances(encoder, clips)
    np.testing.assert_array_equal(present, [False, False, False, True, True])
    assert np.isfinite(features).all()
    np.testing.assert_array_equal(features[:3], 0)
    max_samples = encoder.input.max_length * LENGTH_STEP
    truncated, _ = extraction.encode_utterances(encoder, [ten_minutes[:max_samples]])
    np.testing.assert_allclose(features[4], truncated[0], atol=1e-5)


def test_clip_that_is_silent_after_truncation_is_absent(prosody_encoder, heard_dir, monkeypatch):
    late_speech = np.append(np.zeros(9000), make_clips()[0]).astype(np.int16)
    turn = types.SimpleNamespace(
        id="late", audio=late_speech, speech_present=True, label=0, score=None
    )
    dialogues = [types.SimpleNamespace(id="one", utterances=[turn])]
    monkeypatch.setattr(DialogueDataset, "dialogues", lambda *_: iter(dialogues))
    assert not prosody_encoder.input.load(SPEECH, "train", heard_dir).items
    assert not len(prosody_encoder.input.items([late_speech])[0])


def test_truncated_texts_are_logged_with_their_split(bert_folder, spoken_dir, monkeypatch):
    warnings = []
    monkeypatch.setattr(logging, "warning", lambda line, *values: warnings.append(line % values))
    extraction.PretrainedText(str(bert_folder), max_tokens=4).input.load(TEXT, "test", spoken_dir)
    assert warnings[0].startswith(f"dataset {TEXT}, split test: ")
    assert warnings[0].endswith("22 texts truncated to 4 tokens")


def test_empty_texts_are_absent(bert_encoder):
    features, present = extraction.encode_utterances(bert_encoder, ["", "i am", " \n"])
    np.testing.assert_array_equal(present, [False, True, False])
    assert not features[[0, 2]].any() and features[1].any()


def test_only_empty_utterances_are_refused(bert_encoder, prosody_encoder):
    for encoder, utterances in ((bert_encoder, [""]), (prosody_encoder, [np.zeros(9, np.int16)])):
        with pytest.raises(InputError, match=f"no {encoder.modality} in 1 utterances"):
            extraction.encode_utterances(encoder, utterances)
    with pytest.raises(ValueError, match=r"allowed: int16 \[S\]"):
        extraction.encode_utterances(prosody_encoder, [np.zeros(9000)])


def test_out_of_memory_error_suggests_remedies(
    prosody_encoder, bert_encoder, bert_folder, whisper_folder, monkeypatch, out_of_memory
):
    def assert_refused(call, *parts):
        with pytest.raises(InputError, match="out of memory with ") as error:
            call()
        message = str(error.value)
        assert "\n" not in message
        assert all(part in message for part in ("allocating 7 bytes", *parts))
        return message

    monkeypatch.setattr(CompiledStep, "__call__", out_of_memory)
    monkeypatch.setattr(prosody_encoder, "_encode", out_of_memory)
    message = assert_refused(
        lambda: extraction.encode_utterances(bert_encoder, make_texts(), budget=16),
        "extraction: ", "batches of ", " tokens on 8 devices", "smaller --budget or --dtype=bfl",
    )  # fmt: skip
    message = assert_refused(
        lambda: extraction.encode_utterances(prosody_encoder, make_clips()),
        "try a smaller --budget",
    )
    assert "dtype" not in message  # prosody has no such option
    bfloat16_encoder = extraction.PretrainedText(str(bert_folder), max_tokens=12, dtype="bfloat16")
    assert "dtype" not in assert_refused(
        lambda: extraction.encode_utterances(bfloat16_encoder, make_texts())
    )
    monkeypatch.setattr(registry, "load_backbone", out_of_memory)
    for folder, options in (
        (bert_folder, {"max_tokens": 12}),
        (whisper_folder, {"max_seconds": SECONDS}),
    ):
        assert_refused(
            lambda folder=folder, options=options: extraction.load_encoder(str(folder), **options),
            f"{folder}: ", "the encoder's parameters", "--dtype=bfloat16",
        )  # fmt: skip
