"""Name rules: which tensors of a checkpoint or an adapter belong to the backbone."""

import numpy as np
import pytest
from absl import logging

from mister_jax.convert.key_table import NameRules, split_checkpoint
from mister_jax.convert.params import log_ignored
from mister_jax.convert.safetensors import Checkpoint
from mister_jax.encoders import bert, decoder, qwen2_audio, wavlm, whisper

RULES = NameRules(
    prefixes=("", "body."),
    renamed={r"\.gamma$": ".weight"},
    unused=(r"^pooler\.",),
    heads=(r"^classifier\.",),
)


def split(names, rules=RULES, expected=("norm.weight", "out.weight"), root=""):
    """Splits a checkpoint with the named tensors; returns its prefix and the names in each part."""
    checkpoint = Checkpoint("model.safetensors", {name: np.zeros(2) for name in names})
    parts = split_checkpoint(checkpoint, rules, expected, root=root)
    return parts.prefix, sorted(parts.backbone), sorted(parts.unused), sorted(parts.head)


def test_a_bare_model_is_split_by_names():
    names = ["norm.gamma", "out.weight", "pooler.bias", "classifier.bias", "other.bias"]
    assert split(names) == (
        "",
        ["norm.weight", "other.bias", "out.weight"],
        ["pooler.bias"],
        ["classifier.bias"],
    )


def test_tensors_without_the_backbone_prefix_are_the_head():
    names = ["body.norm.gamma", "body.out.weight", "body.pooler.bias", "body.other", "any.bias"]
    assert split(names) == (
        "body.",
        ["body.norm.weight", "body.other", "body.out.weight"],
        ["body.pooler.bias"],
        ["any.bias"],
    )


def test_without_a_backbone_no_tensor_is_a_head():
    names = ["trunk.norm.weight", "any.bias"]
    assert split(names) == ("", sorted(names), [], [])


def test_a_root_precedes_all_names():
    names = ["root.body.norm.gamma", "root.classifier.weight"]
    assert split(names, root="root.") == (
        "root.body.",
        ["root.body.norm.weight"],
        [],
        ["root.classifier.weight"],
    )


@pytest.mark.parametrize(
    ("rules", "name", "expected"),
    [
        (
            qwen2_audio.NAME_RULES,
            "model.language_model.norm.weight",
            "language_model.model.norm.weight",
        ),
        (qwen2_audio.NAME_RULES, "language_model.norm.weight", "language_model.model.norm.weight"),
        (
            qwen2_audio.NAME_RULES,
            "language_model.model.norm.weight",
            "language_model.model.norm.weight",
        ),
        (decoder.NAME_RULES, "transformer.norm.weight", "norm.weight"),
        (bert.NAME_RULES, "roberta.norm.weight", "norm.weight"),
        (wavlm.NAME_RULES, "hubert.norm.weight", "norm.weight"),
        (whisper.NAME_RULES, "model.norm.weight", "norm.weight"),
    ],
)
def test_each_architecture_recognizes_its_prefixes(rules, name, expected):
    prefix, backbone, _, head = split([name, "lm_head.weight"], rules, [expected])
    assert (backbone, head) == ([prefix + expected], ["lm_head.weight"])


def test_an_ignored_head_is_logged_once(monkeypatch):
    lines = []
    monkeypatch.setattr(logging, "info", lambda text, *values: lines.append(text % values))
    for _ in range(2):
        log_ignored("a/model.safetensors", ("score.0.bias", "score.1.bias"), "the head")
    log_ignored("a/model.safetensors", (), "the head")
    assert lines == ["a/model.safetensors: ignored the head (2 tensors): score.{0,1}.bias"]
