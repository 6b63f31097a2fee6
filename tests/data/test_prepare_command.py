"""`python -m launch.prepare`, as a user runs it."""

import os
import pathlib
import subprocess
import sys

import pytest

from mister_jax.data import load

ROOT = pathlib.Path(__file__).parents[2]


def prepare(*flags: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "launch.prepare", *flags],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--corpus=tv",
            "error: --corpus=tv; allowed: iemocap, meld, mosi, manifest, synthetic, features",
        ),
        ("--corpus=features", "error: --source goes with --corpus=features, which needs it"),
    ],
)
def test_a_wrong_flag_is_one_line_and_status_2(tmp_path, flag, message):
    done = prepare(flag, f"--data_dir={tmp_path}")
    assert done.returncode == 2
    assert done.stderr.startswith(message)
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_it_tells_what_it_wrote_and_where(tmp_path):
    done = prepare("--corpus=synthetic_features", "--name=made_up", f"--data_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    assert f"written to {tmp_path}/made_up/1.0.0" in done.stdout
    for split in ("train", "validation", "test"):
        assert str(len(load("made_up", split, tmp_path).label)) in done.stdout
