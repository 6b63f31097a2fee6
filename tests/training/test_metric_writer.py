"""Tests that metrics survive interruptions and can be written to a bucket."""

import json
import os

import pytest
from etils.epath import backend

from mister_jax.data.lazy import tf
from mister_jax.io import read_json_lines, write_json
from mister_jax.training.curves import plot_training_curves
from mister_jax.training.metric_writer import MetricWriter


class FolderAsBucket(backend._OsPathBackend):
    """An epath backend that stores `gs://` paths in a local folder."""

    def __init__(self, root):
        self.root = root

    def local(self, path):
        return os.fspath(path).replace("gs:/", str(self.root), 1)

    def open(self, path, mode):
        return super().open(self.local(path), mode)

    def exists(self, path):
        return super().exists(self.local(path))

    def replace(self, path, dst):
        super().replace(self.local(path), self.local(dst))


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """Returns the folder that stores `gs://bucket`."""
    folders = FolderAsBucket(tmp_path)
    monkeypatch.setattr(backend, "tf_backend", folders)
    file_writer = tf.compat.v1.summary.FileWriter
    monkeypatch.setattr(
        tf.compat.v1.summary,
        "FileWriter",
        lambda logdir, **options: file_writer(folders.local(logdir), **options),
    )
    (tmp_path / "bucket").mkdir()
    return tmp_path / "bucket"


def read_events(path):
    """Returns the step of each event, with "start" or the value of train/loss."""
    events = []
    for record in tf.data.TFRecordDataset(os.fspath(path)).as_numpy_iterator():
        event = tf.compat.v1.Event.FromString(record)
        if event.HasField("session_log"):
            assert event.session_log.status == tf.compat.v1.SessionLog.START
            events.append((event.step, "start"))
        losses = [it.simple_value for it in event.summary.value if it.tag == "train/loss"]
        events += [(event.step, loss) for loss in losses]
    return events


def test_metrics_tensorboard_events_and_curves_are_written_to_a_bucket(bucket):
    workdir = "gs://bucket"
    scores = {"validation/weighted_f1": 0.5, "validation/macro_f1": 0.4, "validation/accuracy": 0.6}
    for checkpoint_step in (0, 1):  # The second run repeats step 2.
        writer = MetricWriter(workdir, checkpoint_step)
        for step in (checkpoint_step + 1, checkpoint_step + 2):
            writer(step, {"train/loss": 1 / step, **scores})
        writer.close()
    lines = [json.loads(line) for line in (bucket / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    files = sorted(bucket.glob("events.out.tfevents*"), key=lambda path: path.suffix)
    events = [read_events(path) for path in files]
    # In earlier files, TensorBoard hides the steps from the start of a later session onward.
    assert events == [
        [(1, "start"), (1, 1.0), (2, 0.5)],
        [(2, "start"), (2, 0.5), (3, pytest.approx(1 / 3))],
    ]
    plot_training_curves(f"{workdir}/metrics.jsonl", f"{workdir}/curves.png")
    assert (bucket / "curves.png").read_bytes().startswith(b"\x89PNG")
    write_json(f"{workdir}/metrics.json", {"test": scores})
    assert json.loads((bucket / "metrics.json").read_text()) == {"test": scores}
    assert not list(bucket.glob("*.tmp"))


def test_a_truncated_line_is_removed_by_the_next_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_inside_character = '{"step": 2, "na\N{LATIN SMALL LETTER E WITH ACUTE}'.encode()[:-1]
    for end in (cut_inside_character, b'{"step": 2, "loss": {}', b"{}", b"\x00\x00"):
        path.write_bytes(b'{"step": 1, "loss": 0.5}\n' + end)
        MetricWriter(tmp_path, 3).close()
        assert read_json_lines(path) == [{"step": 1, "loss": 0.5}]
