"""From texts to tokens: what is added, what is cut, and what has no tokens."""

import dataclasses

import numpy as np
import pytest
from absl import logging

from mister_jax.encoders.bert import BertConfig
from mister_jax.encoders.tokenization import check_max_tokens, encode_texts
from mister_jax.errors import InputError


@pytest.fixture(scope="module", params=["bert", "llama"])
def tokenizer(request, word_tokenizer):
    return word_tokenizer(bert=request.param == "bert")


@pytest.fixture
def logged(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "warning", lambda line, *values: lines.append(line % values))
    return lines


def first_and_last(tokenizer):
    if tokenizer.cls_token_id is None:
        return tokenizer.bos_token_id, tokenizer.eos_token_id
    return tokenizer.cls_token_id, tokenizer.sep_token_id


def test_every_text_has_a_beginning_and_an_end(tokenizer, logged):
    words = tokenizer.convert_tokens_to_ids(["i", "am", "glad"])
    first, last = first_and_last(tokenizer)
    whole, short = encode_texts(tokenizer, ["i am glad", "glad"], 8)
    assert whole.tolist() == [first, *words, last]
    assert short.tolist() == [first, words[-1], last]
    assert whole.dtype == np.int32 and not logged


def test_a_long_text_loses_its_end_and_that_is_counted(tokenizer, logged):
    words = tokenizer.convert_tokens_to_ids(["i", "am"])
    first, last = first_and_last(tokenizer)
    cut, whole = encode_texts(tokenizer, ["i am so very glad", "i am"], 4)
    assert cut.tolist() == whole.tolist() == [first, *words, last]
    encode_texts(tokenizer, ["i am so very glad"], 4, where="dataset x, split test")
    assert logged == [
        "1 of 2 texts truncated to 4 tokens",
        "dataset x, split test: 1 of 1 texts truncated to 4 tokens",
    ]


def test_texts_do_not_change_each_other(tokenizer):
    texts = ["i am glad", "you are so very mad today", "we"]
    together = encode_texts(tokenizer, texts, 6)
    for text, ids in zip(texts, together, strict=True):
        (alone,) = encode_texts(tokenizer, [text], 6)
        np.testing.assert_array_equal(alone, ids)


def test_no_texts_have_no_tokens(tokenizer):
    assert encode_texts(tokenizer, [], 8) == []


def test_an_empty_text_is_what_stands_around_it(tokenizer):
    (ids,) = encode_texts(tokenizer, [""], 8)
    assert ids.tolist() == list(first_and_last(tokenizer))


def test_a_text_without_tokens_is_refused():
    class Mute:
        sep_token_id = eos_token_id = None

        def __call__(self, texts, **options):
            return {"input_ids": [] if isinstance(texts, str) else [[] for _ in texts]}

    with pytest.raises(InputError, match="text '!': the tokenizer returns no tokens"):
        encode_texts(Mute(), ["!"], 8)


def test_there_must_be_room_for_text(tokenizer):
    with pytest.raises(InputError, match="max_tokens=2; allowed: at least 3"):
        encode_texts(tokenizer, ["i"], 2)


def test_an_encoder_has_positions_for_so_many_tokens():
    @dataclasses.dataclass
    class Backbone:
        config: object

    config = BertConfig.minilm_l6(num_positions=20)
    check_max_tokens(Backbone(config), 20)
    check_max_tokens(Backbone(None), 10**6)  # rotations have no end
    with pytest.raises(InputError, match="max_tokens=21; allowed: at most 20"):
        check_max_tokens(Backbone(config), 21)
