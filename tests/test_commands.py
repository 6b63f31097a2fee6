"""The commands as they are typed: prepare, train, evaluate; and what they say of bad input."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[1]


def run(name, *flags):
    return subprocess.run(
        [sys.executable, "-m", f"launch.{name}", *flags],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "1", "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_from_features_to_scores(tmp_path):
    small = ("--config.model.context_width=8", "--config.model.fusion_width=8")
    where = f"--config.data.data_dir={tmp_path}"
    prepared = run("prepare", "--corpus=synthetic_features", f"--data_dir={tmp_path}")
    assert prepared.returncode == 0, prepared.stderr
    trained = run(
        "train", "--config=configs/fusion.py:synthetic_features,no_kl", f"--workdir={tmp_path}/run",
        where, *small, "--config.train.epochs=1", "--config.data.num_buckets=1",
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "epoch 1/1: validation weighted F1" in trained.stdout
    scored = run("evaluate", f"--workdir={tmp_path}/run", "--split=test")
    assert scored.returncode == 0, scored.stderr
    assert "bayes" in scored.stdout and "written to" in scored.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert 0 < metrics["test"]["weighted_f1"] <= 1


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("train", "--workdir=DIR"), "--config is needed"),
        (("train", "--config=configs/fusion.py:x"), "--workdir is needed"),
        (("train", "--config=configs/fusion.py:x,fast", "--workdir=DIR"), "unknown variant 'fast'"),
        (("evaluate", "--split=test"), "--workdir is needed"),
        (("evaluate", "--workdir=DIR"), "config.json: no such file"),
    ],
)
def test_bad_input_ends_with_one_line(tmp_path, command, message):
    name, *flags = command
    ended = run(name, *(flag.replace("DIR", str(tmp_path / "run")) for flag in flags))
    assert ended.returncode not in (0, -11)
    last = ended.stderr.strip().splitlines()[-1]
    assert message in last
    assert "Traceback" not in ended.stderr
    assert not (tmp_path / "run").exists()
