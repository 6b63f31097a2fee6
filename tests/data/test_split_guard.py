"""Training cannot open the test split."""

import pytest

from mister_jax import data
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.split_guard import training_splits_only


def test_training_opens_only_its_splits(tiny_data_dir):
    with training_splits_only():
        for split in ("train", "validation"):
            assert data.load_features("tiny", split, tiny_data_dir).split == split
        with pytest.raises(RuntimeError, match="training opens split 'test'; allowed: train, vali"):
            data.load_features("tiny", "test", tiny_data_dir)
    assert data.load_features("tiny", "test", tiny_data_dir).split == "test"


def test_training_reads_only_the_dialogues_of_its_splits(spoken_dir):
    dataset = DialogueDataset("manifest/spoken", spoken_dir)
    with training_splits_only():
        assert list(dataset.dialogues("train"))
        with pytest.raises(RuntimeError, match="training opens split 'test'"):
            dataset.dialogues("test")
    assert list(dataset.dialogues("test"))


def test_the_guard_ends_with_an_error():
    @training_splits_only()
    def fail():
        raise ValueError

    with pytest.raises(ValueError):
        fail()
    with training_splits_only():
        pass
