"""A table of synonyms maps the labels of published models to common names."""

import pathlib

import pytest

from mister_jax.data.labels import EMOTION_SYNONYMS, emotion_name


@pytest.mark.parametrize(
    ("label", "name"),
    [("ang", "anger"), ("Happy", "joy"), (" SAD ", "sadness"), ("Neutral", "neutral")],
)
def test_synonyms_are_aligned(label, name):
    assert emotion_name(label) == name


def test_unknown_labels_stay_as_they_are():
    assert emotion_name("Remorse") == "Remorse"


def test_every_synonym_has_one_name():
    names = [*EMOTION_SYNONYMS, *(it for others in EMOTION_SYNONYMS.values() for it in others)]
    assert len(names) == len(set(names))


def test_documentation_lists_the_synonyms():
    text = (pathlib.Path(__file__).parents[2] / "docs" / "sharing.md").read_text()
    for name, others in EMOTION_SYNONYMS.items():
        assert f"| {name} | {', '.join(others)} |" in text
