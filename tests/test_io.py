"""What a run writes of itself, on a bucket as on a disk."""

import json
import os

import pytest
from etils.epath import backend

from mister_jax.errors import InputError
from mister_jax.io import read_json, read_json_lines, write_json
from mister_jax.training.curves import plot_training_curves
from mister_jax.training.metric_writer import MetricWriter


class Bucket(backend._OsPathBackend):
    """A folder that stands for `gs://`; a file of it is written in one go, or appended to."""

    def __init__(self, root):
        self.root = root

    def _local(self, path):
        return os.fspath(path).replace("gs:/", str(self.root), 1)

    def open(self, path, mode):
        return super().open(self._local(path), mode)

    def exists(self, path):
        return super().exists(self._local(path))

    def replace(self, path, dst):
        super().replace(self._local(path), self._local(dst))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder that `gs://bucket` stands for."""
    monkeypatch.setattr(backend, "tf_backend", Bucket(tmp_path))
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def test_metrics_events_and_pictures_go_to_a_bucket(bucket):
    workdir = "gs://bucket"
    scores = {"validation/weighted_f1": 0.5, "validation/macro_f1": 0.4, "validation/accuracy": 0.6}
    for start in (0, 1):  # the second run has lost step 2
        writer = MetricWriter(workdir, start)
        for step in (start + 1, start + 2):
            writer(step, {"train/loss": 1 / step, **scores})
        writer.close()
    lines = [json.loads(line) for line in (bucket / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    events = list(bucket.glob("events.out.tfevents*"))
    assert events and all(b"train/loss" in path.read_bytes() for path in events)
    plot_training_curves(f"{workdir}/metrics.jsonl", f"{workdir}/curves.png")
    assert (bucket / "curves.png").read_bytes().startswith(b"\x89PNG")
    write_json(f"{workdir}/metrics.json", {"test": scores})
    assert json.loads((bucket / "metrics.json").read_text()) == {"test": scores}
    assert not list(bucket.glob("*.tmp"))


def test_a_line_that_was_cut_short_goes_with_the_next_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut = '{"step": 2, "na\N{LATIN SMALL LETTER E WITH ACUTE}'.encode()[:-1]
    for end in (cut, b'{"step": 2, "loss": {}', b"{}", b"\x00\x00"):
        path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + end)
        MetricWriter(tmp_path, 3).close()
        assert read_json_lines(path) == [{"step": 1, "loss": 0.5}]


def test_json_lines_end_at_line_feeds_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"name": "a\u2028b"}\r\n\n{"name": "c"}')
    assert read_json_lines(path) == [{"name": "a\u2028b"}, {"name": "c"}]


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"[1]", b'{"a": "\xff"}'])
@pytest.mark.parametrize("read", [read_json, read_json_lines])
def test_json_that_cannot_be_read_is_named(tmp_path, read, content):
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
