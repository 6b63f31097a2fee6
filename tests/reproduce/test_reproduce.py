"""Reproduction of the paper on tiny corpora in their released layouts."""

import dataclasses
import json
import os
import pathlib

import pytest

from mister_jax.errors import InputError
from mister_jax.reproduce import report, runner, stages
from mister_jax.reproduce.runner import RECORD, run_stages
from mister_jax.reproduce.settings import Settings
from mister_jax.reproduce.stages import Stage, make_stages
from tests.data.corpora import write_iemocap, write_meld, write_mosi


def make_settings(folder, corpus, encoders=None, **changes):
    values = {"corpus": corpus, "preset": "small", "partial": True, **(encoders or {})}
    values |= {"workdir": str(folder / "work"), "source": str(folder / "corpus")}
    return Settings(**{**values, **changes})


def reproduce(settings, runner):
    """Runs all stages; returns their record and the report, or None if SIGTERM stopped a stage."""
    settings.check_files()
    try:
        record = run_stages(make_stages(settings), settings, runner)
    except InputError as error:
        pytest.fail(f"{error}\n{runner.results[-1].stderr if runner.results else ''}")
    if record is None:
        return None
    report.write_report(settings, record, dollars_per_hour=3.6)
    return record, pathlib.Path(settings.workdir, report.REPORT).read_text()


def leave_one_training(monkeypatch, recipe):
    """Keeps one recipe, and one of the experts that are trained alone."""
    for other in {*stages.RECIPES} - {recipe}:
        monkeypatch.delitem(stages.RECIPES, other)
    for expert in ("speech", "fusion"):
        monkeypatch.delitem(stages.EXPERT_VARIANTS, expert)


def table_rows(text):
    """Returns the cells of each row of the Markdown tables."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|") and not line.startswith("| ---")
    ]


def test_meld_is_reproduced_after_sigterm(
    tmp_path, command_runner, small_encoders, write_mp4, monkeypatch
):
    leave_one_training(monkeypatch, recipe="paper")
    (tmp_path / "corpus").mkdir()
    write_meld(tmp_path / "corpus", write_mp4)
    # The training run is long, so that SIGTERM arrives before the last epoch.
    _, *options = small_encoders["speech_options"]
    speech_options = (
        *("train.epochs=20", "train.min_save_seconds=0", "data.batch_size=1"),
        *options,
    )
    encoders = {**small_encoders, "speech_options": speech_options}
    settings = make_settings(tmp_path, "meld", encoders, num_seeds=2)
    command_runner.results.clear()
    prepare, train_text, *_ = make_stages(settings)
    for stage in (prepare, train_text):
        assert command_runner(stage.arguments) == 0, command_runner.results[-1].stderr
    command_runner.stop_file = f"{settings.workdir}/speech/checkpoints/latest/*"
    assert reproduce(settings, command_runner) is None
    # Stages that were run by hand are not run again.
    assert len(command_runner.results) == 3
    assert "Run the same command again to resume" in command_runner.results[2].stdout

    record, text = reproduce(settings, command_runner)
    assert "resuming" in command_runner.results[3].stdout
    assert record["stages"]["train speech"]["runs"] == 2
    assert record["stages"]["train speech"]["hardware"] == "1 x cpu"
    assert "prepare" not in record["stages"]
    num_commands = len(command_runner.results)
    assert reproduce(settings, command_runner) == (record, text)
    assert len(command_runner.results) == num_commands

    rows = table_rows(text)
    scores = json.loads(pathlib.Path(settings.workdir, "paper/metrics.json").read_text())["test"]
    mean = 100 * scores["seeds"]["mean"]["weighted_f1"]
    deviation = 100 * scores["seeds"]["deviation"]["weighted_f1"]
    assert rows[1][:2] == ["MiSTER-E", "paper"]
    assert rows[1][3] == f"{mean:.1f} ± {deviation:.1f}"
    assert rows[1][5] == "66.4"
    names = [row[0] for row in rows]
    assert "text alone" in names
    assert {f"{expert} in MiSTER-E" for expert in ("speech", "text", "fusion")} <= {*names}
    assert "The encoders are not those of the preset" in text
    with pytest.raises(InputError, match="created with other settings"):
        run_stages([], dataclasses.replace(settings, num_seeds=3))


@pytest.mark.parametrize(
    ("corpus", "write", "changes"),
    [("iemocap", write_iemocap, {"classes": "four"}), ("mosi", write_mosi, {})],
    ids=("iemocap", "mosi"),
)
def test_a_corpus_is_reproduced(
    tmp_path,
    command_runner,
    small_encoders,
    write_wav,
    monkeypatch,
    corpus,
    write,
    changes,
):
    leave_one_training(monkeypatch, recipe="default")
    write(tmp_path / "corpus", write_wav)
    settings = make_settings(tmp_path, corpus, small_encoders, num_seeds=1, **changes)
    record, text = reproduce(settings, command_runner)
    assert list(record["stages"]) == [stage.name for stage in make_stages(settings)]
    rows = table_rows(text)
    scores = json.loads(pathlib.Path(settings.workdir, "default/metrics.json").read_text())
    score = f"{100 * scores['test']['weighted_f1']:.1f}"
    assert rows[1][:2] == ["MiSTER-E", "default"]
    assert rows[1][3:] == [score, score, "not reported"]
    assert rows[2][:2] == ["text alone", "default"]


def make_stage(name, folder, **changes):
    values = {"arguments": (name,), "is_done": (folder / name).exists, **changes}
    return Stage(name, **values)


def test_the_record_keeps_that_the_corpus_may_be_incomplete(tmp_path):
    settings = make_settings(tmp_path, "mosi")
    assert run_stages([], settings, None)["settings"]["partial"]
    complete = dataclasses.replace(settings, partial=False)
    assert run_stages([], complete, None)["settings"]["partial"]


def test_a_failed_stage_stops_with_its_command(tmp_path, capsys):
    calls = []

    def run(arguments):
        calls.append(arguments)
        (tmp_path / arguments[0]).touch()
        return 2 if arguments[0] == "second" else 0

    stages = [make_stage(name, tmp_path) for name in ("first", "second", "third")]
    settings = make_settings(tmp_path, "mosi")
    message = "stage second failed with exit status 2: mister-jax second"
    with pytest.raises(InputError, match=message):
        run_stages(stages, settings, run)
    assert calls == [("first",), ("second",)]
    assert "stage 2 of 3, second:\n  mister-jax second\n" in capsys.readouterr().out
    (tmp_path / "second").unlink()
    with pytest.raises(InputError, match="second has not written its files"):
        run_stages(stages, settings, lambda _: 0)


@pytest.mark.parametrize("status", [143, -15])
def test_sigterm_stops_without_an_error(tmp_path, status):
    stages = [make_stage("first", tmp_path)]
    assert run_stages(stages, make_settings(tmp_path, "mosi"), lambda _: status) is None
    record = json.loads((tmp_path / "work" / RECORD).read_text())
    assert record["stages"]["first"]["runs"] == 1


def test_features_of_another_encoder_are_rejected(tmp_path):
    settings = make_settings(tmp_path, "mosi")
    (stage,) = (stage for stage in make_stages(settings) if stage.name == "extract text")
    assert not stage.is_done()
    features = tmp_path / "work/data/mosi_small_text/1.0.0"
    for folder, seed in ((features, 0), (tmp_path / "work/text", 1)):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"seed": seed}))
    (features / "dataset_info.json").write_text("{}")
    (features / "metadata.json").write_text(json.dumps({"text": {"config": {"seed": 0}}}))
    with pytest.raises(InputError, match="features come from another text encoder than"):
        stage.is_done()
    (tmp_path / "work/text/config.json").write_text(json.dumps({"seed": 0}))
    assert stage.is_done()


def test_the_report_has_both_recipes_and_the_published_scores(tmp_path):
    settings = make_settings(tmp_path, "meld", preset="llm")
    classes = {"anger": {"f1": 0.5}, "contempt": {"f1": 0.25}}
    for recipe, score in {"paper": 0.6, "default": 0.7}.items():
        summary = {"mean": {"weighted_f1": score}, "deviation": {"weighted_f1": 0.012}}
        seeds = {**summary, "of_each": dict.fromkeys("01234")}
        experts = {"text": {"weighted_f1": 0.4}}
        scores = {"weighted_f1": 0.65, "seeds": seeds, "experts": experts, "per_class": classes}
        folder = tmp_path / "work" / recipe
        folder.mkdir(parents=True)
        metrics = {"validation": scores, "test": scores}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        split = {**summary, "ensemble": {"weighted_f1": 0.3}}
        row = {"validation": split, "test": split, "seeds": [0, 1, 2, 3, 4]}
        for variant in stages.EXPERT_VARIANTS.values():
            folder = tmp_path / "work" / f"{recipe}_experts" / variant
            folder.mkdir(parents=True)
            (folder / "ablation.json").write_text(json.dumps(row))
    rows = {tuple(row[:2]): row[2:] for row in map(list, report.score_rows(settings))}
    assert len(rows) == 10
    assert rows["MiSTER-E", "paper"] == ["60.0 ± 1.2", "60.0 ± 1.2", "65.0", "69.5"]
    assert rows["MiSTER-E", "default"] == ["70.0 ± 1.2", "70.0 ± 1.2", "65.0", "69.5"]
    alone = ["60.0 ± 1.2", "60.0 ± 1.2", "30.0", "not reported"]
    assert rows["fusion alone", "paper"] == alone
    assert rows["text in MiSTER-E", "paper"] == ["", "", "40.0", "not reported"]
    assert report.class_rows(settings) == [
        ("anger", "50.0", "50.0", "62.5"),
        ("contempt", "25.0", "25.0", "not reported"),
    ]
    record = {"stages": {"train text": {"seconds": 7200.0, "hardware": "8 x TPU v5 lite"}}}
    assert report.stage_rows(record, 9.6) == [
        ("train text", "8 x TPU v5 lite", "2 h 0 min", "$19.20"),
        ("total", "", "2 h 0 min", "$19.20"),
    ]


def test_a_process_is_stopped_by_sigterm_and_reports_its_status(monkeypatch):
    def run_with(main):
        monkeypatch.setattr(runner, "_MAIN", main)
        return runner.run_in_process(["an argument", "--b=c"])

    assert (
        run_with("import sys; sys.exit(3 if sys.argv[1:] == ['an argument', '--b=c'] else 0)") == 3
    )
    parent = f"import os, signal; os.kill({os.getpid()}, signal.SIGTERM); "
    assert run_with(f"{parent}signal.pause()") == 143
    saves = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
    assert run_with(f"import sys, signal; {saves}{parent}signal.pause()") == 143
    # If a stage ignores SIGTERM and completes, no further stage runs.
    ignores = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    assert run_with(f"import signal; {ignores}{parent}") == 143
