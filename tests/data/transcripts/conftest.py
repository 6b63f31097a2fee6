"""Fixtures for transcripts that the tests write."""

import pytest

from mister_jax.data.transcripts.reader import read_transcript


@pytest.fixture
def read(tmp_path):
    """Function that writes a file and reads it with `read_transcript`."""

    def write_and_read(name, content, encoding="utf-8", **options):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode(encoding))
        return read_transcript(path, **options)

    return write_and_read


@pytest.fixture
def times():
    """Function that returns the start, end and text of each segment."""

    def get(transcript):
        return [(segment.start, segment.end, segment.text) for segment in transcript.segments]

    return get
