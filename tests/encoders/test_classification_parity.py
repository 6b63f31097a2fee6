"""Classification checkpoints give the logits of transformers."""

import numpy as np
import pytest

from mister_jax.encoders.classification import load_classifier
from tests.encoders.test_transformers import CLIP, IDS, MASK, torch_model

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

CLASSES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "distilbert": "DistilBert",
    "llama": "Llama",
    "qwen2": "Qwen2",
    "wav2vec2": "Wav2Vec2",
    "hubert": "Hubert",
    "wavlm": "WavLM",
}
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer"}
FIELDS = [
    *((model_type, {}) for model_type in CLASSES),
    *(("wav2vec2", it) for it in (STABLE, {"use_weighted_layer_sum": False})),
    *((it, STABLE) for it in ("hubert", "wavlm")),
]


@pytest.mark.parametrize(("model_type", "fields"), FIELDS)
def test_logits_equal_transformers(model_type, fields, tmp_path):
    import torch
    import transformers

    class_name = f"{CLASSES[model_type]}ForSequenceClassification"
    names = {0: "joy", 1: "anger", 2: "sadness"}
    model = torch_model(model_type, class_name, **fields, num_labels=3, id2label=names).eval()
    model.save_pretrained(tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)
    extractor.save_pretrained(tmp_path)
    classifier = load_classifier(tmp_path)
    assert classifier.class_names == ("joy", "anger", "sadness")
    with torch.no_grad():
        if classifier.modality == "text":
            expected = model(torch.tensor(IDS), attention_mask=torch.tensor(MASK)).logits
            actual = classifier.logits(IDS, MASK)
        else:
            features = extractor(CLIP[0], sampling_rate=16_000, return_tensors="pt")
            expected = model(features["input_values"]).logits
            # Padding does not change the result.
            padded = np.pad(CLIP, ((0, 0), (0, 300)), constant_values=1)
            actual = classifier.logits(padded, np.array([CLIP.shape[1]]))
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("trim", [False, True])
def test_logits_of_whisper_equal_transformers(weighted, trim, tmp_path):
    import torch
    import transformers

    names = {0: "joy", 1: "anger", 2: "sadness"}
    model = torch_model(
        "whisper",
        "WhisperForAudioClassification",
        use_weighted_layer_sum=weighted,
        num_labels=3,
        id2label=names,
    )
    model.save_pretrained(tmp_path)
    # The window of the tiny model is 1 s.
    extractor = transformers.WhisperFeatureExtractor(model.config.num_mel_bins, chunk_length=1)
    features = extractor(list(CLIP), sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        expected = model(features["input_features"]).logits.numpy()
    classifier = load_classifier(tmp_path, trim=trim)
    assert classifier.class_names == ("joy", "anger", "sadness")
    length = np.array([CLIP.shape[1]])
    np.testing.assert_allclose(classifier.logits(CLIP, length), expected, atol=1e-5)
    padded = np.pad(CLIP, ((0, 0), (0, 300)), constant_values=1)
    np.testing.assert_allclose(classifier.logits(padded, length), expected, atol=1e-5)
