"""Detection of texts that are too long for their duration."""

import pytest

from mister_jax.data.timing import is_too_fast, max_characters_per_second


@pytest.mark.parametrize(
    ("text", "seconds", "is_fast"),
    [
        ("a" * 40, 1.0, False),
        ("a" * 41, 1.0, True),
        # Mandarin, Japanese and Korean at a fluent speed, and at four times that speed.
        ("我们今天要去北京", 1.0, False),
        ("我们今天要去北京" * 4, 1.0, True),
        ("きょうはとてもいいてんきです", 1.5, False),
        ("きょうはとてもいいてんきです" * 4, 1.5, True),
        ("오늘 날씨가 정말 좋네요", 1.5, False),
        ("오늘 날씨가 정말 좋네요" * 4, 1.5, True),
        ("", 0.0, False),
        ("a", 0.0, True),
    ],
)
def test_fast_texts_depend_on_the_script(text, seconds, is_fast):
    assert is_too_fast(text, seconds) == is_fast


def test_the_limit_of_a_mixed_text_lies_between():
    assert max_characters_per_second("OK") == 40
    assert 13 < max_characters_per_second("好") < max_characters_per_second("OK, 好") < 40
