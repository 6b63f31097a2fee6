"""Reading of JSON files, and errors for damaged files."""

import pytest

from mister_jax.errors import InputError
from mister_jax.io import read_json, read_json_lines


def test_json_lines_are_split_at_line_feeds_only(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a\u2028b"}\r\n\n{"name": "c"}')
    assert read_json_lines(path) == [{"name": "a\u2028b"}, {"name": "c"}]


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"[1]", b'{"a": "\xff"}'])
@pytest.mark.parametrize("read", [read_json, read_json_lines])
def test_missing_or_damaged_json_raises_a_one_line_error(tmp_path, read, content):
    path = tmp_path / "some.json"
    if content is not None:
        path.write_bytes(content)
    if read is read_json_lines and content == b"":
        assert read(path) == []
        return
    with pytest.raises(
        InputError, match=r"some.json: (no such file|.*damaged).*; needed: "
    ) as error:
        read(path)
    assert "\n" not in str(error.value)
