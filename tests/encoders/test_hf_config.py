"""Reading of config.json and of the feature extractor's files."""

import json

import pytest

from mister_jax.encoders.hf_config import read_config
from mister_jax.errors import InputError

WAV2VEC2 = {"feature_extractor_type": "Wav2Vec2FeatureExtractor"}
WITHOUT_DO_NORMALIZE = {"feature_size": 1, "sampling_rate": 16_000}


@pytest.mark.parametrize(
    ("processor", "preprocessor", "expected"),
    [
        (None, None, None),
        (None, {"do_normalize": False}, False),
        (None, WITHOUT_DO_NORMALIZE, True),  # The default of transformers.
        ({"feature_extractor": {"do_normalize": False}}, None, False),
        ({"audio_processor": {"do_normalize": False}}, None, False),
        ({"feature_extractor": {"do_normalize": False}}, {"do_normalize": True}, False),
        ({"processor_class": "Wav2Vec2Processor"}, {"do_normalize": False}, False),
        ({"feature_extractor": None}, {"do_normalize": False}, False),
        (
            None,
            {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "do_normalize": False},
            False,
        ),
        (None, {"feature_extractor_type": "WhisperFeatureExtractor", "do_normalize": True}, None),
    ],
)
def test_do_normalize_is_read_from_either_file(tmp_path, processor, preprocessor, expected):
    files = {"processor_config": processor, "preprocessor_config": preprocessor}
    for name, fields in (files | {"config": {"model_type": "new"}}).items():
        if fields is not None:
            (tmp_path / f"{name}.json").write_text(json.dumps(fields))
    assert read_config(tmp_path).get("do_normalize") is expected


def test_a_damaged_feature_extractor_is_rejected(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "wavlm"}')
    (tmp_path / "processor_config.json").write_text('{"feature_extractor": []}')
    with pytest.raises(InputError, match=r"processor_config\.json: feature_extractor=\[\]"):
        read_config(tmp_path)
