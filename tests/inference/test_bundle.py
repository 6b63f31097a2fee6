"""Bundles: exported models that can be moved, shared and loaded again."""

import dataclasses
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from huggingface_hub import ModelCard, constants

import mister_jax
from mister_jax import EmotionRecognizer, bundle, data, extraction
from mister_jax.calibration import Calibration, write_calibration
from mister_jax.encoders import hub
from mister_jax.errors import InputError
from mister_jax.inference.export import export_model
from mister_jax.io import hash_file, write_json
from mister_jax.predictor import Predictor
from tests.helpers.commands import REPOSITORY
from tests.helpers.encoder_workdirs import write_text_workdir
from tests.helpers.training import write_untrained_workdir

SCORES = {
    "test": {
        "utterances": 3,
        "weighted_f1": 0.5,
        "macro_f1": 0.4,
        "accuracy": 0.6,
        "uar": 0.5,
        "majority": {
            "weighted_f1": 0.1,
            "macro_f1": 0.2,
            "accuracy": 0.3,
            "uar": 0.5,
        },
        "confusion": [[1, 1], [0, 1]],
        "per_class": {
            "angry": {"recall": 0.5, "precision": 1.0},
            "calm": {"recall": 1.0, "precision": 0.5},
        },
    }
}


TEXTS = ["i am so happy", "you are mad", "we are glad today"]


@pytest.fixture(scope="module")
def bundle_folder(workdir, tmp_path_factory):
    """A bundle of a recognizer whose run has evaluation scores."""
    run = shutil.copytree(workdir, tmp_path_factory.mktemp("evaluated") / "run")
    (of_test,) = SCORES.values()
    # The card shows neither scores on another dataset nor scores of adapted features.
    others = {"other/test": of_test, "validation": {**of_test, "adapted_features": True}}
    write_json(run / "metrics.json", SCORES | others)
    folder = run.parent / "bundle"
    export_model(run, folder)
    return folder


@pytest.fixture
def folder(bundle_folder, tmp_path):
    """A bundle that the test may change."""
    return shutil.copytree(bundle_folder, tmp_path / "bundle")


def make_run(root, calls_dir, encoder):
    """Writes a run in `root` whose text features come from an encoder."""
    data_dir = shutil.copytree(calls_dir, root / "data")
    extraction.extract_features(encoder, "manifest/calls", "mine", data_dir, quiet=True)
    extraction.merge_features("speech_alone", "mine", "with_mine", data_dir)
    return write_untrained_workdir(root / "run", data_dir, "with_mine")


def pretrained(root, bert_folder):
    return extraction.PretrainedText(
        str(shutil.copytree(bert_folder, root / "bert")), max_tokens=20
    )


def tuned_with_lora(root, bert_folder):
    base = shutil.copytree(bert_folder, root / "bert")
    write_text_workdir(root / "tuned", base, "minilm_lora")
    return extraction.TunedEncoder(root / "tuned")


def tuned_fully(root, bert_folder):
    base = shutil.copytree(bert_folder, root / "bert")
    write_text_workdir(root / "tuned", base, "minilm_l6")
    return extraction.TunedEncoder(root / "tuned")


@pytest.mark.parametrize("make_encoder", [pretrained, tuned_with_lora, tuned_fully])
def test_a_moved_bundle_gives_the_same_bits_without_the_run_its_data_and_encoders(
    make_encoder, calls_dir, bert_folder, dialogues, tmp_path
):
    private = tmp_path / "private"
    private.mkdir()
    run = make_run(private, calls_dir, make_encoder(private, bert_folder))
    expected = mister_jax.load(run).predict_dialogues(dialogues)
    features = mister_jax.data.load_features("with_mine", "test", private / "data")
    expected_arrays = Predictor(run)(features)
    export_model(run, tmp_path / "bundle")
    shutil.rmtree(private)
    moved = shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    assert not [file for file in moved.rglob("*.json") if str(tmp_path) in file.read_text()]
    assert EmotionRecognizer.from_pretrained(moved).predict_dialogues(dialogues) == expected
    arrays = Predictor(moved)(features)
    for name, values in expected_arrays.items():
        np.testing.assert_array_equal(arrays[name], values)
    has_base_weights = any(moved.glob("encoders/text*/**/name/model.safetensors"))
    assert has_base_weights == (make_encoder is tuned_with_lora)


def test_a_moved_bundle_loads_an_encoder_whose_checkpoint_is_a_file(
    calls_dir, salmonn_options, tmp_path
):
    private = tmp_path / "private"
    private.mkdir()
    checkpoint = shutil.copy(
        f"{salmonn_options['name']}/model.safetensors", private / "v1.safetensors"
    )
    options = {**salmonn_options, "name": str(checkpoint), "max_seconds": 0.5}
    encoder = extraction.load_encoder(**options)
    splits = {
        name: dataclasses.replace(
            data.load_features("speech_alone", name, calls_dir),
            metadata={"speech": encoder.metadata},
        )
        for name in ("train", "validation", "test")
    }
    data.write_features(splits, "with_salmonn", private / "data")
    run = write_untrained_workdir(private / "run", private / "data", "with_salmonn")
    export_model(run, tmp_path / "bundle")
    shutil.rmtree(private)
    moved = shutil.move(tmp_path / "bundle", tmp_path / "elsewhere")
    metadata = Predictor(moved).task.encoders["speech"]
    assert metadata["name"] == str(moved / "encoders" / "speech_encoder" / "v1.safetensors")
    # This function refuses an encoder that has changed.
    assert extraction.encoder_from_metadata(metadata).modality == "speech"


@pytest.mark.parametrize("make_encoder", [pretrained, tuned_with_lora])
def test_a_project_that_has_moved_finds_its_data_and_encoders(
    make_encoder, calls_dir, bert_folder, dialogues, tmp_path
):
    project = tmp_path / "project"
    project.mkdir()
    run = make_run(project, calls_dir, make_encoder(project, bert_folder))
    expected = mister_jax.load(run).predict_dialogues(dialogues)
    moved = shutil.move(project, tmp_path / "elsewhere" / "project")
    assert mister_jax.load(moved / "run").predict_dialogues(dialogues) == expected
    predictor = Predictor(moved / "run")
    assert predictor.data_dir == str(moved / "data")
    # The dataset's metadata also has the encoder's new path, which a new training run needs.
    metadata = predictor.task.features("test").metadata["text"]
    assert metadata["name"].startswith(f"{moved}/")


def test_a_recognizer_saves_itself_and_a_loaded_bundle_too(
    recognizer, bundle_folder, dialogues, tmp_path
):
    recognizer.save_pretrained(tmp_path / "first")
    loaded = EmotionRecognizer.from_pretrained(tmp_path / "first")
    loaded.save_pretrained(tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    again = EmotionRecognizer.from_pretrained(tmp_path / "second")
    assert again.predict_dialogues(dialogues) == recognizer.predict_dialogues(dialogues)


def test_a_bundle_of_several_seeds_averages_them(calls_dir, tmp_path):
    run = write_untrained_workdir(tmp_path / "run", calls_dir, "both", num_seeds=2)
    export_model(run, tmp_path / "bundle")
    features = mister_jax.data.load_features("both", "test", calls_dir)
    expected, actual = Predictor(run)(features), Predictor(tmp_path / "bundle")(features)
    for name, values in expected.items():
        np.testing.assert_array_equal(actual[name], values)


@pytest.mark.parametrize("bias", [None, (0.5, -0.5)])
def test_a_bundle_holds_the_calibration(workdir, calls_dir, tmp_path, bias):
    run = shutil.copytree(workdir, tmp_path / "run")
    write_calibration(run, Calibration(2.0, bias), Predictor(run).progress)
    export_model(run, tmp_path / "bundle")
    shutil.rmtree(run)
    features = mister_jax.data.load_features("both", "test", calls_dir)
    predictor = Predictor(tmp_path / "bundle")
    assert predictor.calibration == Calibration(2.0, bias)
    uncalibrated = Predictor(workdir)(features)
    for calibrate in (False, True):
        actual = Predictor(tmp_path / "bundle", calibrate=calibrate)(features)
        for name, values in uncalibrated.items():
            if calibrate and name == "probabilities":
                values = predictor.calibration(values)
            np.testing.assert_array_equal(actual[name], values)


def test_a_damaged_calibration_of_a_bundle_is_explained_in_one_line(folder):
    content = json.loads((folder / "config.json").read_text())
    for damaged in (3, {"temperature": -1, "bias": None}, {"temperature": 1, "bias": [0, 0, 0]}):
        write_json(folder / "config.json", content | {"calibration": damaged})
        with pytest.raises(InputError, match=r"config.json: (damaged )?calibration") as error:
            Predictor(folder)
        assert "\n" not in str(error.value)


def test_loading_a_bundle_needs_neither_orbax_nor_tensorflow(bundle_folder):
    script = f"""
import sys
from mister_jax import load
load({str(bundle_folder)!r}).predict([{{"text": "i am so happy"}}])
loaded = [name for name in ("orbax.checkpoint", "tensorflow", "matplotlib") if name in sys.modules]
assert not loaded, loaded
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=REPOSITORY)


def test_the_model_card_has_the_metadata_of_the_hub(bundle_folder):
    card = ModelCard.load(bundle_folder / "README.md")
    assert card.data.library_name == "mister_jax" and card.data.datasets == ["manifest/calls"]
    assert {it.dataset_split for it in card.data.eval_results} == {*SCORES}
    assert {(it.metric_type, it.metric_value) for it in card.data.eval_results} == {
        ("weighted_f1", 0.5),
        ("macro_f1", 0.4),
        ("accuracy", 0.6),
        ("uar", 0.5),
    }
    assert "| angry | 1 | 1 | 0.50 | 1.00 |" in card.text and "epoch 1" in card.text


def test_a_bundle_is_loaded_from_the_cache_of_the_hub(
    bundle_folder, dialogues, recognizer, tmp_path, monkeypatch
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--someone--calls"
    shutil.copytree(bundle_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for options in ({}, {"revision": commit}):
        loaded = EmotionRecognizer.from_pretrained("someone/calls", **options)
        assert loaded.predict(dialogues[0]) == recognizer.predict(dialogues[0])
    with pytest.raises(InputError, match=r"^someone/nothing: no such folder, and it cannot be"):
        EmotionRecognizer.from_pretrained("someone/nothing")


def change_weights(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def edit_config(folder, change):
    content = json.loads((folder / "config.json").read_text())
    change(content)
    write_json(folder / "config.json", content)


def leave_bundle(content):
    content["model"]["encoders"]["text"]["name"] = "./../secret"


def rename_class(content):
    content["model"]["class_names"].append("new")


def widen_model(content):
    content["model"]["model"]["context_dim"] = 16


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda it: (it / "model.safetensors").unlink(), "incomplete: no model.safetensors"),
        (change_weights, "model.safetensors: has changed since the bundle was written"),
        (
            lambda it: edit_config(it, lambda content: content.update(format=2)),
            "bundle format 2, written by mister_jax 0.1.0; this version reads format 1",
        ),
        (
            lambda it: edit_config(it, rename_class),
            "3 class names for a model of 2 classes; needed: as many",
        ),
        (lambda it: edit_config(it, widen_model), r"\d+ parameters do not match config.json, for"),
        (
            lambda it: edit_config(it, lambda content: content.pop("model")),
            "config.json: damaged .KeyError",
        ),
        (
            lambda it: edit_config(it, lambda content: content.update(files=[1])),
            "config.json: damaged .AttributeError",
        ),
        (lambda it: edit_config(it, leave_bundle), "./../secret is outside the bundle"),
        (lambda it: (it / "config.json").write_text("{"), "config.json: damaged"),
    ],
)
def test_damaged_bundles_are_explained_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        EmotionRecognizer.from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_an_encoder_that_has_changed_is_an_error(folder):
    (encoder_folder,) = folder.glob("encoders/text*")
    vocabulary = next(encoder_folder.glob("*token*.json"))
    vocabulary.write_text(vocabulary.read_text() + " ")
    name = vocabulary.relative_to(folder).as_posix()
    edit_config(folder, lambda content: content["files"].update({name: hash_file(vocabulary)}))
    with pytest.raises(InputError, match="the encoder has changed since the features were"):
        EmotionRecognizer.from_pretrained(folder)


def test_a_bundle_is_not_written_into_its_model_or_changed_on_the_way(folder):
    with pytest.raises(InputError, match="inside the folder of the model; needed: another folder"):
        export_model(folder, folder / "copy")
    with pytest.raises(InputError, match="a bundle, which is copied without changes"):
        export_model(folder, folder.parent / "copy", include_encoders=True)
    assert not (folder.parent / "copy").exists() and not (folder / "copy").exists()


def test_models_that_are_no_bundles_are_explained(bert_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "download", lambda name, patterns: bert_folder)
    with pytest.raises(InputError, match="model someone/bert: not a model of mister_jax"):
        EmotionRecognizer.from_pretrained("someone/bert")
    with pytest.raises(InputError, match="model nowhere: no such folder; allowed: a directory"):
        EmotionRecognizer.from_pretrained("nowhere")


def test_an_encoder_on_the_hub_is_stored_by_commit_or_copied(
    calls_dir, bert_folder, dialogues, tmp_path, monkeypatch
):
    snapshot = shutil.copytree(bert_folder, tmp_path / "snapshots" / "0123abcd")
    names = []

    def download(name, patterns):
        names.append(name)
        return snapshot

    monkeypatch.setattr(hub, "download", download)
    run = make_run(tmp_path, calls_dir, extraction.PretrainedText("someone/bert", max_tokens=20))
    export_model(run, tmp_path / "by_name")
    config = json.loads((tmp_path / "by_name" / "config.json").read_text())
    assert config["model"]["encoders"]["text"]["name"] == "someone/bert@0123abcd"
    assert not (tmp_path / "by_name" / "encoders").exists()
    expected = EmotionRecognizer.from_pretrained(tmp_path / "by_name").predict(dialogues[0])
    # Even if the current folder is the folder to replace, the encoder's name is not a path in it.
    monkeypatch.chdir(tmp_path / "by_name")
    export_model(run, tmp_path / "by_name", overwrite=True)
    monkeypatch.chdir(tmp_path)
    export_model(run, tmp_path / "copied", include_encoders=True)
    names.clear()
    assert EmotionRecognizer.from_pretrained(tmp_path / "copied").predict(dialogues[0]) == expected
    assert not names


def test_an_export_does_not_replace_the_encoder_that_it_copies(calls_dir, bert_folder, tmp_path):
    run = make_run(tmp_path, calls_dir, pretrained(tmp_path, bert_folder))
    with pytest.raises(InputError, match=r"bert: holds .*bert, which the model needs"):
        export_model(run, tmp_path / "bert", overwrite=True)
    assert (tmp_path / "bert" / "model.safetensors").exists()


def test_an_existing_bundle_is_replaced_only_on_request(workdir, tmp_path):
    export_model(workdir, tmp_path / "bundle")
    with pytest.raises(InputError, match="bundle: exists; allowed: another --output"):
        export_model(workdir, tmp_path / "bundle")
    (tmp_path / "bundle" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="bundle: not a model"):
        export_model(workdir, tmp_path / "bundle", overwrite=True)
    (tmp_path / "bundle" / "model.safetensors").touch()
    export_model(workdir, tmp_path / "bundle", overwrite=True)
    bundle.read_bundle(tmp_path / "bundle")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
