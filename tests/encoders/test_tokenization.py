"""Encoding of texts as tokens: special tokens, truncation and errors."""

import dataclasses

import numpy as np
import pytest
from absl import logging

from mister_jax.encoders.bert import BertConfig
from mister_jax.encoders.hf_config import read_config
from mister_jax.encoders.registry import load_processor
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


def test_special_tokens_are_added_at_both_ends(tokenizer, logged):
    words = tokenizer.convert_tokens_to_ids(["i", "am", "glad"])
    first, last = first_and_last(tokenizer)
    long, short = encode_texts(tokenizer, ["i am glad", "glad"], 8)
    assert long.tolist() == [first, *words, last]
    assert short.tolist() == [first, words[-1], last]
    assert long.dtype == np.int32 and not logged


def test_long_texts_are_truncated_and_counted_in_the_log(tokenizer, logged):
    words = tokenizer.convert_tokens_to_ids(["i", "am"])
    first, last = first_and_last(tokenizer)
    truncated, short = encode_texts(tokenizer, ["i am so very glad", "i am"], 4)
    assert truncated.tolist() == short.tolist() == [first, *words, last]
    encode_texts(tokenizer, ["i am so very glad"], 4, where="dataset x, split test")
    assert logged == [
        "1 of 2 texts truncated to 4 tokens",
        "dataset x, split test: 1 of 1 texts truncated to 4 tokens",
    ]


def test_other_texts_do_not_change_the_tokens(tokenizer):
    texts = ["i am glad", "you are so very mad today", "we"]
    batch = encode_texts(tokenizer, texts, 6)
    for text, ids in zip(texts, batch, strict=True):
        (alone,) = encode_texts(tokenizer, [text], 6)
        np.testing.assert_array_equal(alone, ids)


def test_an_empty_list_of_texts_is_allowed(tokenizer):
    assert encode_texts(tokenizer, [], 8) == []


def test_an_empty_text_has_only_special_tokens(tokenizer):
    (ids,) = encode_texts(tokenizer, [""], 8)
    assert ids.tolist() == list(first_and_last(tokenizer))


def test_a_text_without_tokens_is_rejected():
    class EmptyTokenizer:
        sep_token_id = eos_token_id = None

        def __call__(self, texts, **options):
            return {"input_ids": [] if isinstance(texts, str) else [[] for _ in texts]}

    with pytest.raises(InputError, match="text '!': the tokenizer returns no tokens"):
        encode_texts(EmptyTokenizer(), ["!"], 8)


def test_too_few_max_tokens_are_rejected(tokenizer):
    with pytest.raises(InputError, match="max_tokens=2; allowed: at least 3"):
        encode_texts(tokenizer, ["i"], 2)


def test_max_tokens_cannot_exceed_the_positions_of_the_encoder():
    @dataclasses.dataclass
    class Backbone:
        config: object

    config = BertConfig.minilm_l6(num_positions=20)
    check_max_tokens(Backbone(config), 20)
    check_max_tokens(Backbone(None), 10**6)  # Rotary positions are unlimited.
    with pytest.raises(InputError, match="max_tokens=21; allowed: at most 20"):
        check_max_tokens(Backbone(config), 21)


def test_an_empty_text_config_is_ignored(bert_folder):
    hf_config = {**read_config(bert_folder), "text_config": None}
    assert load_processor(bert_folder, None, hf_config=hf_config).get_vocab()
