"""Random splits by group with about equal classes."""

import collections

import numpy as np
import pytest

from mister_jax.data.schema import SPLITS
from mister_jax.data.splits import random_splits


def split_labels(dialogues, splits):
    counts = {split: collections.Counter() for split in SPLITS}
    for dialogue, labels in dialogues.items():
        counts[splits[dialogue]].update(labels)
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_speakers_with_one_emotion_are_drawn_so_that_every_split_has_all_classes(seed):
    # Every speaker has a single emotion, like most speakers in recordings from talk shows.
    random = np.random.default_rng(seed)
    speakers = {f"s{number}": "abcd"[number % 4] for number in range(28)}
    dialogues, groups = {}, {}
    for speaker, label in speakers.items():
        for number in range(random.integers(2, 30)):
            name = f"{speaker}_{number}"
            dialogues[name], groups[name] = [label], {speaker}
    splits, note = random_splits(dialogues, groups, name="speaker", source="calls", seed=seed)
    for counts in split_labels(dialogues, splits).values():
        assert set(counts) == set("abcd")
    of_speaker = collections.defaultdict(set)
    for name, split in splits.items():
        of_speaker[name.partition("_")[0]].add(split)
    assert all(len(names) == 1 for names in of_speaker.values())
    assert "28 groups that share no speaker" in note
    assert splits == random_splits(dialogues, groups, name="speaker", source="", seed=seed)[0]


def test_unlabeled_dialogues_are_split_by_their_number():
    dialogues = {f"d{number}": [None, None] for number in range(100)}
    splits, _ = random_splits(dialogues, {}, name="speaker", source="calls")
    sizes = collections.Counter(splits.values())
    assert [sizes[split] for split in SPLITS] == [80, 10, 10]
