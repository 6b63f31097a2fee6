"""Encoders are loaded by name, options and metadata."""

import json

import numpy as np
import pytest
from flax import nnx

from mister_jax import extraction
from mister_jax.data.padding import pad_clips
from mister_jax.encoders import speech as speech_encoders
from mister_jax.errors import InputError
from mister_jax.nn import masked_mean
from tests.helpers.utterances import SECONDS, make_clips, make_texts


def test_encoder_is_restored_from_its_metadata(whisper_encoder, prosody_encoder, bert_encoder):
    for encoder in (whisper_encoder, prosody_encoder, bert_encoder):
        metadata = json.loads(json.dumps({"dataset": "any", "budget": 1, **encoder.metadata}))
        restored = extraction.encoder_from_metadata(metadata)
        assert type(restored) is type(encoder) and restored.modality == encoder.modality
        utterances = make_texts()[:2] if encoder is bert_encoder else make_clips()[:2]
        features, expected = (
            extraction.encode_utterances(each, utterances)[0] for each in (restored, encoder)
        )
        np.testing.assert_allclose(features, expected, atol=1e-6)


def test_metadata_of_unknown_or_changed_encoder_is_refused(
    whisper_encoder, prosody_encoder, tmp_path
):
    with pytest.raises(InputError, match="kind None, whose encoder is unknown"):
        extraction.encoder_from_metadata({"sha256": "features from elsewhere"})
    with pytest.raises(InputError, match=r"the encoder has changed .* \(features\)"):
        extraction.encoder_from_metadata(prosody_encoder.metadata | {"features": ["others"]})
    with pytest.raises(InputError, match="no such folder"):
        extraction.encoder_from_metadata(
            whisper_encoder.metadata | {"name": str(tmp_path / "gone")}
        )


def test_invalid_encoders_are_refused(whisper_folder, bert_folder, tmp_path):
    with pytest.raises(InputError, match=r"max_seconds=1; allowed: 0\.1 to 0\.8, the encoder"):
        extraction.load_encoder(str(whisper_folder), max_seconds=1.0)
    for seconds in (0.01, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"max_seconds={seconds:g}; allowed: 0.1 to 3600"):
            extraction.load_encoder("prosody", max_seconds=seconds)
        with pytest.raises(InputError, match=f"max_seconds={seconds:g}; allowed: 0.1 to"):
            extraction.PretrainedSpeech(str(whisper_folder), max_seconds=seconds)
    with pytest.raises(InputError, match=r"prompt 'well'; allowed: none"):
        extraction.load_encoder(str(whisper_folder), max_seconds=SECONDS, prompt="well")
    with pytest.raises(InputError, match="encodes text; allowed for speech: "):
        extraction.PretrainedSpeech(str(bert_folder))
    with pytest.raises(InputError, match=r"config\.json"):
        extraction.TunedEncoder(tmp_path)


def test_unsupported_options_are_refused(whisper_folder, bert_folder):
    def assert_refused(message, name, **options):
        with pytest.raises(InputError, match=message) as error:
            extraction.load_encoder(str(name), **options)
        assert "\n" not in str(error.value)

    message = r"max_seconds, trim; allowed for an encoder of this kind \(text\): max_tokens, "
    assert_refused(f"{bert_folder}: {message}", bert_folder, max_seconds=1.0, trim=False)
    assert_refused(
        "max_tokens; allowed for .*speech.*: max_seconds, ", whisper_folder, max_tokens=9
    )
    assert_refused("prosody: dtype; allowed for .*: max_seconds$", "prosody", dtype="bfloat16")
    assert_refused("allowed: all three", whisper_folder, max_seconds=SECONDS, beats="beats")


def test_salmonn_is_loaded_from_released_files(salmonn_options, tmp_path, monkeypatch):
    options = {name: value for name, value in salmonn_options.items() if name != "name"}
    encoder = extraction.load_encoder(salmonn_options["name"], max_seconds=1.0, **options)
    features, present = extraction.encode_utterances(encoder, make_clips()[:3])
    assert present.all() and np.isfinite(features).all()
    monkeypatch.chdir(tmp_path)
    # The encoder is restored from new paths of all its parts.
    new_paths = {part: tmp_path / part for part in ("encoder", *options)}
    for part, path in new_paths.items():
        path.symlink_to(salmonn_options["name" if part == "encoder" else part])
    old_metadata = json.loads(
        json.dumps(encoder.metadata).replace(salmonn_options["name"], "/gone")
    )
    old_metadata["options"].update(dict.fromkeys(options, "/gone"))
    restored = extraction.encoder_from_metadata(
        extraction.with_new_paths(
            old_metadata, {part: str(path) for part, path in new_paths.items()}
        )
    )
    np.testing.assert_allclose(
        extraction.encode_utterances(restored, make_clips()[:3])[0], features, atol=1e-5
    )
    files = speech_encoders.SpeechFiles(**salmonn_options)
    backbone_config = speech_encoders.read_backbone_config(files)
    paths = speech_encoders.trainable_paths(backbone_config)
    assert (paths["lora"].rank, paths["lora"].alpha) == (2, 32.0)
    module = speech_encoders.load_speech_encoder(files, backbone_config, **paths)
    waveform, lengths = pad_clips(make_clips()[:3], 16_000)
    pooled = nnx.jit(lambda module, *inputs: masked_mean(*module(*inputs)))
    expected = pooled(module, waveform.astype(np.float32) / 2**15, lengths)
    np.testing.assert_allclose(features, expected, atol=1e-4)
    with pytest.raises(InputError, match="trim=False; allowed only for Whisper"):
        extraction.load_encoder(salmonn_options["name"], max_seconds=1.0, trim=False, **options)
