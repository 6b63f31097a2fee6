"""Texts of single utterances as tokens, and their batches."""

import numpy as np
import pytest

from mister_jax.data.batching import BatchPlan
from mister_jax.data.padding import pad_tokens
from mister_jax.data.utterances import Utterances, load_tokens, token_batches
from mister_jax.errors import InputError

LENGTHS = (5, 2, 7, 1, 3, 3, 4)


@pytest.fixture(scope="module")
def tokens():
    """Utterances whose tokens are 1, 2, ...; one utterance has no label."""
    return Utterances(
        name="counted",
        split="train",
        class_names=("a", "b"),
        dialogue_ids=tuple("xxyyyzz"),
        utterance_ids=np.array(list("abcdefg")),
        items=tuple(np.arange(1, length + 1, dtype=np.int32) for length in LENGTHS),
        label=np.array([0, 1, -1, 1, 0, 1, 0], np.int32),
        score=np.arange(7, dtype=np.float32),
    )


@pytest.fixture(scope="module")
def plan(tokens):
    return BatchPlan(tokens.sizes, batch_size=4, num_buckets=2, multiple_of=2)


def epoch(tokens, plan, number=0, **options):
    return list(token_batches(tokens, plan, **{"seed": 0, "epoch": number, **options}))


def one_token_per_word(texts):
    return [np.full(len(text.split()), 7, np.int32) for text in texts]


def test_utterances_with_text_are_loaded_in_order(spoken_dir):
    utterances = load_tokens("manifest/spoken", "test", spoken_dir, one_token_per_word)
    # There are six dialogues of four turns; in two of the dialogues, the third turn has no text.
    assert (
        len(utterances.items) == len(utterances.utterance_ids) == len(utterances.label) == 6 * 4 - 2
    )
    assert utterances.dialogue_ids[:7] == ("test0",) * 3 + ("test1",) * 4
    # Each turn has one word more than the previous one.
    np.testing.assert_array_equal(utterances.sizes[:7], [2, 3, 5, 2, 3, 4, 5])
    assert utterances.class_names == ("anger", "joy") and utterances.score is None
    np.testing.assert_array_equal(utterances.offsets, range(6 * 4 - 1))
    assert (utterances.lengths == 1).all()


def test_utterances_without_a_label_are_left_out_of_training(spoken_dir):
    utterances = load_tokens("manifest/spoken", "test", spoken_dir, one_token_per_word)
    assert (utterances.label == -1).sum() == 2
    assert len(utterances.labeled().items) == 6 * 4 - 4
    assert (utterances.labeled().label >= 0).all()


def test_errors_name_missing_datasets_and_splits(spoken_dir):
    with pytest.raises(InputError, match="written"):
        load_tokens("manifest/written", "test", spoken_dir, one_token_per_word)
    with pytest.raises(InputError, match="dev"):
        load_tokens("manifest/spoken", "dev", spoken_dir, one_token_per_word)


def test_take_selects_the_same_rows_of_all_fields(tokens):
    some = tokens.take(np.array([4, 2]))
    assert some.dialogue_ids == ("y", "y")
    assert some.utterance_ids.tolist() == ["e", "c"]
    assert some.sizes.tolist() == [3, 7]
    assert some.label.tolist() == [0, -1] and some.score.tolist() == [4, 2]


def test_padding_is_on_the_right_and_masked():
    ids, mask = pad_tokens([np.array([3, 4]), np.zeros(0, int)], 3)
    np.testing.assert_array_equal(ids, [[3, 4, 0], [0, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 0], [0, 0, 0]])
    assert ids.dtype == np.int32 and mask.dtype == bool


def test_each_utterance_is_in_exactly_one_batch_of_an_epoch(tokens, plan):
    batches = epoch(tokens, plan)
    rows = np.concatenate([batch["row"] for batch in batches])
    np.testing.assert_array_equal(np.sort(rows[rows >= 0]), range(7))
    for batch in batches:
        is_empty = batch["row"] < 0
        assert not batch["mask"][is_empty].any() and (batch["label"][is_empty] == -1).all()
        for row, ids, mask in zip(batch["row"], batch["input_ids"], batch["mask"], strict=True):
            if row >= 0:
                np.testing.assert_array_equal(ids[mask], tokens.items[row])


def test_weights_sum_to_one_over_labeled_rows(tokens, plan):
    for batch in epoch(tokens, plan):
        labeled = batch["label"] >= 0
        assert (batch["weight"][~labeled] == 0).all()
        np.testing.assert_allclose(batch["weight"][labeled], 1 / labeled.sum())


def test_batches_depend_on_seed_and_epoch_only(tokens, plan):
    def rows(*arguments, **options):
        return [batch["row"].tolist() for batch in epoch(tokens, plan, *arguments, **options)]

    assert rows() == rows()
    assert any(rows() != rows(number) for number in (1, 2, 3))
    assert any(rows() != rows(seed=seed) for seed in (1, 2, 3))
    assert rows(shuffle=False) == rows(1, shuffle=False)


def test_a_resumed_epoch_continues_with_the_same_batches(tokens, plan):
    full, rest = epoch(tokens, plan), epoch(tokens, plan, start_step=1)
    assert len(rest) == len(full) - 1
    for batch, expected in zip(rest, full[1:], strict=True):
        np.testing.assert_equal(batch, expected)


def test_the_rows_of_all_processes_form_the_global_batch(tokens, plan):
    per_process = [epoch(tokens, plan, process_index=index, process_count=2) for index in (0, 1)]
    for batch, *parts in zip(epoch(tokens, plan), *per_process, strict=True):
        for name, value in batch.items():
            joined = np.concatenate([part[name] for part in parts])
            np.testing.assert_array_equal(joined, value)
