"""Classification checkpoints: heads, padding and errors, without PyTorch."""

import jax
import numpy as np
import pytest

from mister_jax.encoders.classification import load_classifier, placeholder_names
from mister_jax.errors import InputError
from tests.helpers.classifiers import write_text_classifier


def test_head_of_bert_is_applied_to_the_first_token(bert_folder, tmp_path):
    folder, tensors = write_text_classifier(bert_folder, tmp_path / "bert")
    classifier = load_classifier(folder)
    assert classifier.class_names == ("joy", "anger", "sadness")
    tokens = np.array([[2, 5, 3, 0]])
    mask = tokens > 0
    first = np.asarray(jax.jit(classifier.module)(tokens, mask))[:, 0]
    pooled = np.tanh(
        first @ tensors["bert.pooler.dense.weight"].T + tensors["bert.pooler.dense.bias"]
    )
    expected = pooled @ tensors["classifier.weight"].T + tensors["classifier.bias"]
    logits = jax.jit(classifier.logits)
    np.testing.assert_allclose(logits(tokens, mask), expected, atol=1e-5)
    on_left = np.array([[0, 0, 2, 5, 3]])
    np.testing.assert_allclose(logits(on_left, on_left > 0), expected, atol=1e-5)
    probabilities = np.asarray(jax.jit(classifier.probabilities)(tokens, mask))
    np.testing.assert_allclose(probabilities.sum(), 1, atol=1e-6)


def test_multi_label_probabilities_are_sigmoids(bert_folder, tmp_path):
    folder, _ = write_text_classifier(
        bert_folder, tmp_path / "bert", problem_type="multi_label_classification"
    )
    classifier = load_classifier(folder)
    tokens = np.array([[2, 5, 3]])
    logits = np.asarray(jax.jit(classifier.logits)(tokens, tokens > 0))
    probabilities = jax.jit(classifier.probabilities)(tokens, tokens > 0)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-logits)), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": False}, "no classification head"),
        ({"num_classes": 1}, "a regression model; needed: a classifier"),
        ({"problem_type": "regression"}, "a regression model; needed: a classifier"),
        ({"num_classes": 2}, "id2label has 3 entries and 3 different names; needed: 2"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'; allowed"),
    ],
)
def test_unusable_checkpoint_is_a_one_line_error(bert_folder, tmp_path, options, message):
    folder, _ = write_text_classifier(bert_folder, tmp_path / "bert", **options)
    with pytest.raises(InputError, match=message) as error:
        load_classifier(folder)
    assert "\n" not in str(error.value)


def test_placeholder_names_are_found():
    assert placeholder_names(("LABEL_0", "joy", "LABEL_12")) == ["LABEL_0", "LABEL_12"]
