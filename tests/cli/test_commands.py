"""Commands as a user types them, and the errors of invalid commands."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest

from mister_jax import data, errors
from mister_jax.cli.main import SUBCOMMANDS, main
from mister_jax.configs import text_encoder
from tests.helpers.commands import REPOSITORY, run_commands
from tests.helpers.training import write_untrained_workdir


def test_scripts_take_features_to_scores(tmp_path):
    scripts = (
        "prepare --corpus=synthetic_features --data_dir=DIR --num_dialogues=20,5,6",
        "train --config=configs/fusion.py:synthetic_features,contrastive --workdir=DIR/run "
        "--config.data.data_dir=DIR --config.data.num_buckets=1 --config.model.context_dim=8 "
        "--config.model.fusion_dim=8 --config.model.gru_layers=0 --config.model.fusion_layers=0 "
        "--config.train.epochs=1 --evaluate=validation",
        "evaluate --workdir=DIR/run --split=test",
    )
    results = run_commands([f"launch.{script}" for script in scripts], tmp_path)
    for result in results:
        assert result.status == 0, result.stderr
    _, trained, evaluated = results
    assert "epoch 1/1: validation weighted F1" in trained.stdout
    assert "bayes" in evaluated.stdout and "written to" in evaluated.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert set(metrics) == {"validation", "test"}
    assert 0 < metrics["test"]["weighted_f1"] <= 1
    table = trained.stdout.partition("epoch 1/1")[2].partition("\n")[2]
    assert "precision" in table and f"{metrics['validation']['weighted_f1']:.3f}" in table
    assert "Brier score" in evaluated.stdout and " -> " in evaluated.stdout
    assert json.loads((tmp_path / "run" / "calibration.json").read_text())["temperature"] > 0


# Subcommand -> its flags -> a part of the error. DIR stands for a folder with:
#   data/     the datasets x and no_test, whose features were not computed by an encoder
#   empty/    nothing
#   ready/    a work directory of MiSTER-E for x
#   encoder/  the config of an encoder's training run
#   old/      a work directory written before model.json had a "format"
#   *.py      configs that cannot be used
WRONG_USES = {
    "": {
        "tran --workdir=DIR": "unknown subcommand 'tran'; allowed: prepare, extract, train",
    },
    "prepare": {
        "--corpus=tv": "--corpus=tv; allowed: iemocap, meld",
        "--corpus=iemocap --data_dir=DIR": "--source is needed with --corpus=iemocap. IEMOC",
        "--corpus=mosi --source=DIR/nowhere --data_dir=DIR": "no such folder; needed: a",
        "--inspect=meld/text --data_dir=DIR/empty": "no dataset 'meld/text'; available: none",
    },
    "extract": {
        "--output=x": "one of --workdir, --encoder, or --speech with --text is needed",
        "--workdir=DIR": "--output is needed: a name for the feature dataset",
        "--workdir=DIR --dataset=d --output=x --output=y": "--output=x and --output=y; allowed: on",
        "--encoder=prosody --dataset=d --output=DIR/My-x.csv": (
            "'My-x' cannot be the name of the feature dataset; add --output=NAME"
        ),
        "--dataset=x --output=DIR/x.xlsx": "unknown file type; allowed: .npz, .csv, .parquet",
        "--dataset=nowhere --output=DIR/x.csv --data_dir=DIR": "no dataset 'nowhere'; available: ",
        "--output=x --workdir=DIR --adapter=DIR": "--adapter: allowed only with --encoder",
        "--workdir=DIR --output=x --dataset=d --max_seconds=1 --trim=false --prompt=hello": (
            "--max_seconds, --trim, --prompt: allowed only with --encoder; a fine-tuned encoder"
        ),
        "--speech=a --text=b --output=x --budget=5": "--budget: not allowed with --speech and --t",
        "--encoder=prosody --output=x --dataset=d --max_tokens=5 --dtype=bfloat16": (
            "prosody: max_tokens, dtype; allowed for an encoder of this kind (prosody): max_seconds"
        ),
        "--encoder=prosody --output=x --dataset=d --max_seconds=nan": "max_seconds=nan; all",
        "--encoder=prosody --output=x --dataset=d --max_seconds=inf": "max_seconds=inf; all",
        "--encoder=DIR/empty --output=x --dataset=meld/text": "config.json: cannot be read",
    },
    "train": {
        "": "--config is needed: a packaged config, such as fusion:mosi_features, or the path",
        "configs/fusion.py:x": "argument 'configs/fusion.py:x'; allowed: flags, --name=value",
        "--config=configs/fusion.py:x": "--workdir is needed",
        "--config=fuson:x": "--config=fuson: no packaged config with this name; allowed: demo, fu",
        "--config=fusion.py:x": "'fusion.py'; needed: the path of a Python file",
        "--config=fusion.py:x --config.seed=1": (
            "error: --config: No such file or directory: 'fusion.py'; needed: the path of a Python "
            "file"
        ),
        "--config=configs/fusion.py:x,fast --workdir=DIR/run": "unknown variant 'fast'; allowed",
        "--config=DIR/empty.py --workdir=DIR/run": "empty.py: the file defines no function get_con",
        "--config=DIR/error.py --workdir=DIR/run": "error.py: line 2: ValueError: wrong\n",
        "--config=DIR/syntax.py --workdir=DIR/run": "syntax.py: line 1: SyntaxError: ",
        "--config=DIR/error2.py --workdir=DIR/run": "error2.py: line 2: SyntaxError: wrong\n",
        "--config=DIR/dict.py --epochs=3": "error: Unknown command line flag 'epochs'",
        "--config=fusion.py --epochs=3": "error: Unknown command line flag 'epochs'",
        "--config=DIR/dict.py --workdir=DIR/run": "config: a dict; needed: an ml_collections.Conf",
        "--config=demo:x": "TypeError: get_config() takes 0 positional arguments but 1 was given",
        (
            "--config=configs/fusion.py:no_test --config.data.data_dir=DIR/data --workdir=DIR/run"
            " --evaluate=test"
        ): "no split 'test'; allowed: train, validation",
        "--config=configs/fusion.py:x --workdri=DIR": "'workdri'. Did you mean: workdir",
        "--config=fusion:x --data_dir=DIR": "'data_dir'. Did you mean: --config.data.data_dir",
        "--config=configs/fusion.py:x --config.data.batchsize=8": (
            "error: --config.data.batchsize: no such field; did you mean batch_size?"
        ),
        "--config=configs/fusion.py:x --config.model.wide=3 --workdir=DIR/new": (
            "--config.model.wide: no such field; allowed: attention_dim, attention_dropout, "
        ),
        "--config=configs/fusion.py:x,paper --config.optimizer.beta_1=3 --workdir=DIR/new": (
            "--config.optimizer.beta_1: no such field; allowed: average_decay, b1, b2, "
        ),
        "--config=configs/fusion.py:x --config.train.epochs=few": (
            "--config.train.epochs=few: allowed: integers"
        ),
        "--config=configs/fusion.py:x --config.model.crf=maybe": (
            "--config.model.crf=maybe: allowed: true, false"
        ),
        "--config=configs/fusion.py:x --workdir=DIR/run --config.data.data_dir=DIR/nowhere": (
            "DIR/nowhere: no dataset 'x'; available: none"
        ),
        "--config=configs/text_encoder.py:meld,bert --workdir=DIR/run": (
            "encoder 'bert'; allowed:"
        ),
        "--config=configs/fusion.py:x --workdir=DIR/run --evaluate=tset,test": (
            "--evaluate=tset; allowed: train, validation, test"
        ),
        "--config=fusion:x --config.data.data_dir=DIR/data --workdir=DIR/old": (
            "DIR/old: written by an older version of mister_jax; train it again"
        ),
    },
    "evaluate": {
        "": "--workdir is needed: a directory that `mister-jax train` has written",
        "--workdir=DIR": "config.json: no such file; the workdir must be a directory that",
        "--workdir=DIR/old": "DIR/old: written by an older version of mister_jax; train it again",
        "--workdir=DIR/ready --drop_speech=half": "--drop_speech=half; allowed: numbers",
        "--workdir=DIR/ready --drop_as_zeros": "--drop_as_zeros requires --drop_speech",
        "--workdir=DIR/ready --report --data_dir=DIR/empty": "no dataset 'x'; available: none",
        "--workdir=DIR/ready --report=maybe": "--report=maybe",
        "--workdir=DIR/ready --nocalibrate --fit_calibration=bias": "cannot be used with --nocal",
        "--workdir=DIR/ready --drop_text=0.5 --fit_calibration=bias": "requires --report",
    },
    "compare": {
        "": "two runs are needed, such as `mister-jax compare RUN_A RUN_B`",
        "DIR/ready": "two runs are needed, such as",
        "DIR/nowhere DIR/ready": "DIR/nowhere: no such folder; needed: a work directory",
        "DIR/ready DIR/ready --split=train": (
            "DIR/ready: split 'train' is not evaluated; run `mister-jax evaluate --workdir=DIR/"
        ),
        "DIR/ready DIR/empty --splt=test": "'splt'. Did you mean: split",
    },
    "sweep": {
        "--config=fusion:x": "--workdir is needed",
        "--config=fusion:x --workdir=DIR/run": "--grid is needed, such as --grid=optimizer.learn",
        "--config=fusion:x --workdir=DIR/run --grid=optimizer.rate=1": (
            "--grid=optimizer.rate: no such field 'rate'; allowed: average_decay, b1, "
        ),
        "--config=fusion:x --workdir=DIR/run --grid=model.context_dim=7,8": (
            "context_dim=7: config.model: MisterEConfig.context_dim=7; allowed: even numbers"
        ),
        "--config=fusion:x --workdir=DIR/run --grid=seed=0,1": "--grid=seed: cannot be varied",
        "--config=fusion:x --workdir=DIR/run --config.data.data_dir=DIR --grid=loss.gamma=0,1": (
            "no dataset 'x'; available: "
        ),
        "--config=fusion:x --workdir=DIR/run --grid=model.gate_dim=7 --num_seeds=0": (
            "--num_seeds=0: 0 is not a positive integer"
        ),
    },
    "predict": {
        "--model=DIR/nowhere --text=hello": "DIR/nowhere: no such folder; allowed: a dir",
        "--text_model=DIR/empty --text=a": "DIR/empty/config.json: cannot be read",
        "--text_model=DIR/empty --model=DIR/ready --text=a": "--model: cannot be used with --text",
        "--text_model=DIR/empty --follow": "--follow: cannot be used with --text_model or --sp",
        "--text_model=DIR/empty --map_labels=joy --text=a": "--map_labels=joy; needed: LABEL=EMOT",
        "--text_weight=2 --text=a": "--text_weight: needs --text_model or --speech_model",
        "--model=DIR/ready": "needed: one of --recording, --manifest, --corpus with",
        "--model=DIR/old --text=hello": "DIR/old: written by an older version of mister_jax",
        "--model=DIR/encoder --text=hello": "the work directory of an encoder; needed: a Mi",
        "--model=DIR/ready --text=hello": "ready-made features, so recordings and texts",
        "--model=DIR/ready --text=a --text_encoder=adapter=DIR/x --text_encoder=DIR/y": (
            "--text_encoder=DIR/x, DIR/y: DIR/ready uses no text encoder; omit this option"
        ),
        "--model=DIR/ready --text=a --text=b --audio=c.wav": (
            "--audio flags: 1, --text flags: 2; needed: as many of each"
        ),
        "--model=DIR/ready --text=a --audio_channel=left": "--audio_channel: needs --audio",
        "--model=DIR/ready --manifest=DIR/my.jsonl --split=test": "--split: needs --corpus",
        "--model=DIR/ready --manifest=DIR/my.jsonl": "no such file; needed: a manifest",
        "--model=DIR/ready --corpus=meld --source=DIR": "no train_sent_emo.csv; needed: MELD",
        "--model=DIR/ready --text=a --output=DIR/old/model.json/out.jsonl": (
            "cannot write to DIR/old/model.json (Not a directory)"
        ),
        "--model=DIR/ready --text=a --output=DIR/dir.csv": "dir.csv: is a folder; needed: a file",
    },
    "export": {
        "": "--model is needed: a work directory or an exported folder",
        "--model=DIR": "--output is needed: a folder that does not exist yet",
        "--model=DIR/ready --output=DIR/new --adapter": "--adapter: cannot be used with DIR/ready",
        "--model=DIR/encoder --output=DIR/new --format=stablehlo": "--format: cannot be used with",
        "--model=DIR/encoder --output=DIR/empty": "DIR/empty: exists; allowed: another --out",
        "--model=DIR/encoder --output=DIR/empty --overwrite": "DIR/empty: not a model; --overwr",
        "--model=DIR/old --output=DIR/new": "DIR/old: written by an older version of mister_jax",
    },
    "benchmark": {
        "--encoder=bert": "--encoder=bert needs one of --aot, --random, --throughput",
    },
}
WRONG_COMMANDS = {
    f"{subcommand} {flags}".strip(): message
    for subcommand, uses in WRONG_USES.items()
    for flags, message in uses.items()
}
HELP_COMMANDS = [
    "extract --helpfull",
    *(f"{prefix}{name} --help" for name in SUBCOMMANDS for prefix in ("", "launch.")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that DIR stands for."""
    folder = tmp_path_factory.mktemp("commands")
    splits = data.generate_features(
        0, {"train": 2, "test": 1}, num_classes=2, speech_dim=3, text_dim=3
    )
    data.write_features(splits, "x", folder / "data")
    without_test = {"train": splits["train"], "validation": splits["test"]}
    data.write_features(
        {name: dataclasses.replace(it, split=name) for name, it in without_test.items()},
        "no_test",
        folder / "data",
    )
    (folder / "empty").mkdir()
    (folder / "dir.csv").mkdir()
    (folder / "empty.py").write_text("")
    (folder / "error.py").write_text("def get_config():\n    raise ValueError('wrong')\n")
    (folder / "error2.py").write_text("def get_config():\n    raise SyntaxError('wrong')\n")
    (folder / "syntax.py").write_text("def get_config()\n")
    (folder / "dict.py").write_text("def get_config():\n    return {'a': 1}\n")
    (folder / "encoder").mkdir()
    (folder / "encoder" / "config.json").write_text(text_encoder.get_config().to_json_best_effort())
    write_untrained_workdir(folder / "ready", folder / "data", "x")
    (folder / "old").mkdir()
    (folder / "old" / "config.json").write_text((folder / "ready" / "config.json").read_text())
    description = json.loads((folder / "ready" / "model.json").read_text())
    del description["format"]
    (folder / "old" / "model.json").write_text(json.dumps(description))
    return folder


@pytest.fixture(scope="module")
def results(folder):
    """The `CommandResult` of each command."""
    commands = [*WRONG_COMMANDS, *HELP_COMMANDS]
    return dict(zip(commands, run_commands(commands, folder), strict=True))


@pytest.mark.parametrize("command", WRONG_COMMANDS)
def test_wrong_use_exits_with_a_one_line_error(folder, results, command):
    status, _, stderr = results[command]
    assert WRONG_COMMANDS[command].replace("DIR", str(folder)) in stderr
    assert (status, stderr.count("\n"), stderr[:7]) == (2, 1, "error: ")
    assert not (folder / "run").exists()


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_each_script_runs_its_subcommand(results, name):
    from_script, from_command = results[f"launch.{name} --help"], results[f"{name} --help"]
    assert from_script == from_command
    assert (from_script.status, from_script.stderr) == (0, "")
    assert from_script.stdout not in {
        results[f"{other} --help"].stdout for other in SUBCOMMANDS if other != name
    }


def test_help_describes_flags(results):
    for flag in ("--help", "--helpfull"):
        stdout = results[f"extract {flag}"].stdout
        assert "--encoder: pretrained encoder: prosody, minilm, a folder" in stdout


def run_main(monkeypatch, capsys, *arguments):
    """Runs `mister-jax` in this process up to its exit; returns the status and stderr."""
    monkeypatch.setattr(sys, "argv", ["mister-jax", *arguments])
    with pytest.raises(SystemExit) as error:
        main()
    return error.value.code, capsys.readouterr().err


@pytest.mark.parametrize(("subcommand", "extra"), [("train", "train"), ("predict", "predict")])
def test_a_missing_extra_is_named_in_one_line(monkeypatch, capsys, tmp_path, subcommand, extra):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(errors.EXTRAS, extra, ("numpy", "no_such_package"))
    assert run_main(monkeypatch, capsys, subcommand, "--workdir=run") == (
        2,
        f"error: mister-jax {subcommand} needs no_such_package; install it with pip install "
        f'"mister_jax[{extra}]"\n',
    )


def test_an_unavailable_platform_exits_with_a_one_line_error():
    script = (
        "import types, jax; from mister_jax.cli import app; "
        "app.run(types.SimpleNamespace(main=jax.devices))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "JAX_PLATFORMS": "cuda"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 2
    assert process.stderr.startswith("error: no devices for JAX_PLATFORMS=cuda")
    assert process.stderr.count("\n") == 1
