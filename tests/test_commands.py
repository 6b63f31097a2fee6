"""The commands as they are typed: prepare, train, evaluate; and what they say of bad input."""

import json
import os
import subprocess
import sys

import pytest
from mister_jax.configs import text_encoder

from mister_jax import data
from tests.commands import REPOSITORY, run_all
from tests.test_predict import untrained


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
    small = ("--config.model.context_dim=8", "--config.model.fusion_dim=8")
    where = f"--config.data.data_dir={tmp_path}"
    prepared = run(
        "prepare", "--corpus=synthetic_features", f"--data_dir={tmp_path}",
        "--num_dialogues=20,5,6",
    )  # fmt: skip
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


# What is typed, where DIR is a folder with an empty one in it, and what is said of it.
WRONG_USES = {
    "train": "--config is needed: a file, such as configs/fusion.py:mosi_features",
    "train configs/fusion.py:x": "argument 'configs/fusion.py:x'; allowed: flags, --name=value",
    "train --config=configs/fusion.py:x": "--workdir is needed",
    "train --config=fusion.py:x": "'fusion.py'; needed: a Python file, its path from the current",
    "train --config=fusion.py:x --config.seed=1": "error: --config: No such file or directory: "
    "'fusion.py'; needed: a Python file, its path from the current",
    "train --config=configs/fusion.py:x,fast --workdir=DIR/run": "unknown variant 'fast'; allowed",
    "train --config=configs/fusion.py:x --workdri=DIR": "'workdri'. Did you mean: workdir",
    "train --config=configs/fusion.py:x --config.data.batchsize=8": (
        "error: --config.data.batchsize: 'batchsize' Did you mean \"batch_size\" instead"
    ),
    "train --config=configs/fusion.py:x --config.train.epochs=few": "--config.train.epochs=few",
    "train --config=configs/fusion.py:x --workdir=DIR/run --config.data.data_dir=DIR/nowhere": (
        "DIR/nowhere: no dataset 'x'; there are: none"
    ),
    "train --config=configs/text_encoder.py:meld,bert --workdir=DIR/run": (
        "encoder 'bert'; allowed are"
    ),
    "evaluate": "--workdir is needed: a directory that training has made",
    "evaluate --workdir=DIR": "config.json: no such file; the workdir must be one that training",
    "evaluate --workdir=DIR/ready --drop_speech=half": "--drop_speech=half; allowed are numbers",
    "evaluate --workdir=DIR/ready --drop_as_zeros": "--drop_as_zeros goes with --drop_speech",
    "evaluate --workdir=DIR/ready --report --data_dir=DIR/empty": "no dataset 'x'; there are: none",
    "evaluate --workdir=DIR/ready --report=maybe": "--report=maybe",
    "train --config=configs/fusion.py:x --config.model.wide=3 --workdir=DIR/new": (
        "--config.model.wide: no such field; allowed: attention_dropout, attention_heads, "
    ),
    "train --config=configs/fusion.py:x,paper --config.optimizer.beta_1=3 --workdir=DIR/new": (
        "--config.optimizer.beta_1: no such field; allowed: average_decay, b1, b2, "
    ),
    "predict --text=hello": "--workdir is needed",
    "predict --workdir=DIR/ready": "one of --manifest, --corpus with --source, or --audio and",
    "predict --workdir=DIR/stage1 --text=hello": "a training of an encoder; needed: one of MiSTER",
    "predict --workdir=DIR/ready --text=hello": "ready-made features, so recordings and texts",
    "predict --workdir=DIR/ready --text=a --text_encoder=adapter=DIR/x --text_encoder=DIR/y": (
        "--text_encoder=DIR/x, DIR/y: DIR/ready uses no text encoder; leave it out"
    ),
    "predict --workdir=DIR/ready --text=a --text=b --audio=c.wav": (
        "1 of --audio and 2 of --text; needed: as many of both"
    ),
    "predict --workdir=DIR/ready --manifest=DIR/my.jsonl": "no such file; needed: a manifest",
    "predict --workdir=DIR/ready --corpus=meld --source=DIR": "no train_sent_emo.csv; needed: MELD",
    "predict --workdir=DIR/ready --text=a --output=DIR/no/out.jsonl": "needed: a file in an existing folder",
    "extract --workdir=DIR": "--output is needed: a name for the dataset of features",
    "extract --workdir=DIR --output=x --dataset=d --max_seconds=1 --trim=false --prompt=hello": (
        "--max_seconds, --trim, --prompt: with --encoder alone; a tuned one is used as it was"
    ),
    "extract --encoder=prosody --output=x --dataset=d --max_tokens=5 --dtype=bfloat16": (
        "prosody: max_tokens, dtype; allowed for an encoder of this kind (prosody): max_seconds"
    ),
    "extract --speech=a --text=b --output=x --budget=5": "--budget: not with --speech and --text",
    "extract --encoder=prosody --output=x --dataset=d --max_seconds=nan": "max_seconds=nan; all",
    "extract --encoder=prosody --output=x --dataset=d --max_seconds=inf": "max_seconds=inf; all",
    "extract --output=x": "one of --workdir, --encoder, or --speech with --text is needed",
    "extract --output=x --workdir=DIR --adapter=DIR": "--adapter: with --encoder alone",
    "extract --output=x --encoder=DIR/empty --dataset=meld/text": "config.json: cannot be read",
    "export": "--workdir is needed: a directory that training has made",
    "export --workdir=DIR": "--output is needed: a folder that is not there yet",
    "export --workdir=DIR/ready --output=DIR/new": "a training of MiSTER-E; needed: one of an",
    "export --workdir=DIR/stage1 --output=DIR/empty": "DIR/empty: exists; allowed: another --out",
    "export --workdir=DIR/stage1 --output=DIR/empty --overwrite": "DIR/empty: holds no model; allo",
    "prepare --corpus=tv": "--corpus=tv; allowed: iemocap, meld",
    "prepare --corpus=iemocap --data_dir=DIR": "--source is needed with --corpus=iemocap. IEMOC",
    "prepare --corpus=mosi --source=DIR/nowhere --data_dir=DIR": "no such folder; needed: the",
    "prepare --inspect=meld/text --data_dir=DIR/empty": "no dataset 'meld/text'; there are: none",
    "benchmark --encoder=bert": "--encoder=bert needs one of --aot, --random, --throughput",
}

HELP = "extract --helpfull"


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Folder, and of each wrong use its exit status and what it said."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "empty").mkdir()
    (folder / "stage1").mkdir()
    (folder / "stage1" / "config.json").write_text(text_encoder.get_config().to_json_best_effort())
    splits = data.generate_features(0, {"train": 2, "test": 1}, num_classes=2, speech_dim=3, text_dim=3)
    data.write_features(splits, "x", folder / "data")
    untrained(folder / "ready", folder / "data", "x")
    uses = [*WRONG_USES, HELP]
    return folder, dict(zip(uses, run_all(uses, folder), strict=True))


@pytest.mark.parametrize("use", WRONG_USES)
def test_a_wrong_use_ends_with_one_line(ended, use):
    folder, results = ended
    status, _, said = results[use]
    assert WRONG_USES[use].replace("DIR", str(folder)) in said
    assert (status, said.count("\n"), said[:7]) == (2, 1, "error: ")
    assert not (folder / "run").exists()


def test_help_that_was_asked_for_is_no_failure(ended):
    status, told, said = ended[1][HELP]
    assert (status, said) == (0, "")
    assert "--encoder: an encoder as released" in told


def test_a_platform_that_is_not_there_is_one_line():
    script = "import jax, launch; launch.run(jax.devices)"
    environment = {**os.environ, "JAX_PLATFORMS": "cuda"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=REPOSITORY, env=environment, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: no devices of JAX_PLATFORMS=cuda")
    assert done.stderr.count("\n") == 1


def test_a_package_that_is_missing_is_one_line(tmp_path):
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError('No module named pen')")
    done = subprocess.run(
        [sys.executable, "-m", "launch.evaluate", "--workdir=run", "--report"],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: No module named pen; `source .venv/bin/activate` where launch/demo.sh has been, or "
        "`pip install --editable .`\n"
    )
