"""Evaluates a work directory on a split and writes the scores, predictions and report."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from mister_jax import metrics, multi_seed
from mister_jax.calibration import CALIBRATION_FILE
from mister_jax.data import DialogueFeatures
from mister_jax.data.adaptation import adapt_or_warn
from mister_jax.errors import InputError
from mister_jax.evaluation import figures
from mister_jax.evaluation.calibration import (
    CALIBRATION_SPLIT,
    fit_on_validation,
    has_changed,
    summarize_calibration,
    warn_if_worse,
)
from mister_jax.evaluation.confidence_intervals import score_intervals
from mister_jax.evaluation.missing_modality import study_for_report, write_study
from mister_jax.evaluation.report import Experiment, read_utterance_texts, write_report
from mister_jax.evaluation.scores import score_predictions
from mister_jax.evaluation.split_predictions import SplitPredictions
from mister_jax.io import read_json, read_json_lines, write_json, write_text
from mister_jax.predictor import Predictions, Predictor, prediction_rows
from mister_jax.tasks.fusion import FusionTask
from mister_jax.workdir import read_config


def evaluate(
    workdir: epath.PathLike,
    split: str,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    output: epath.PathLike | None = None,
    report: bool = False,
    calibrate: bool = True,
    fit_calibration: str | None = None,
    adapt_features: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores a split and writes `metrics.json`, `predictions.jsonl` and `confusion.png`.

    The files contain the results for all evaluated splits. New results replace earlier results for
    the same split. In `metrics.json`, a split of a dataset other than the training dataset is named
    "DATASET/SPLIT".

    The first evaluation of a MiSTER-E model fits a temperature on the validation split of the
    training dataset and writes it to `calibration.json` in the work directory, unless `calibrate`
    is False. Predictions and later evaluations read this file. A model that was trained on the
    validation split is not calibrated.

    Args:
      workdir: Work directory of a training run.
      split: Split of the dataset.
      dataset: Dataset to score; by default the training dataset. It must have the same classes and
        feature sizes as the training dataset.
      data_dir: Directory of the dataset; by default the directory used in training.
      output: Folder of the files; the work directory by default.
      report: Whether to write `report.html` for this split, with a missing-modality study.
      calibrate: Whether to calibrate the probabilities.
      fit_calibration: Kind of calibration to fit: "temperature", or "bias" (one temperature, and a
        bias per class). It replaces an existing calibration. By default, a temperature is fitted
        only if the best parameters have no calibration yet.
      adapt_features: Whether to adapt the split's features to the model; see
        `data.adaptation.adapt_features`.
      quiet: Whether to hide progress.

    Returns:
      The split's scores as in `metrics.json`: the result of `score_predictions`, "dataset",
      "checkpoint" (with the "epoch" of the parameters), "adapted_features", and "seeds" if there
      are several seeds. If there are labels, "intervals" is the result of `score_intervals`, and
      "calibration" is the result of `summarize_calibration`. The scores of single seeds are not
      calibrated.

    Raises:
      InputError: The work directory, the dataset, or existing results in the folder cannot be used,
        or an option does not apply to the model.
    """
    predictor = Predictor(workdir, data_dir, calibrate=calibrate)
    features = predictor.task.features(split, dataset)
    if isinstance(predictor.task, FusionTask):
        features = adapt_or_warn(features, predictor.task.standardizers, adapt_features)
    elif adapt_features:
        raise InputError("adapt_features: needs a model of MiSTER-E; encoders read no features")
    output = epath.Path(workdir if output is None else output)
    train_dataset = read_config(workdir).data.name
    key = split if features.name == train_dataset else f"{features.name}/{split}"
    if key == split and not adapt_features and has_changed(predictor, features):
        logging.warning(
            "dataset %s: the split %s has changed since the training", features.name, split
        )
    metrics_path, predictions_path = output / "metrics.json", output / "predictions.jsonl"
    metrics_by_split = read_json(metrics_path) if metrics_path.exists() else {}
    other_rows = [
        row
        for row in (read_json_lines(predictions_path) if predictions_path.exists() else [])
        if (row.get("dataset", train_dataset), row.get("split")) != (features.name, split)
    ]
    if features.score is not None and metrics.positive_class(features.class_names) is None:
        logging.warning(
            "dataset %s: sentiment is not evaluated, because this needs two classes such as "
            "negative and positive; the classes are %s",
            features.name,
            ", ".join(features.class_names),
        )
    per_seed = predictor.predict_per_seed(features, quiet=quiet)
    if fit_calibration or calibrate:
        is_validation = key == CALIBRATION_SPLIT and not adapt_features
        validation = per_seed if is_validation else None
        _fit_calibration(predictor, validation, fit_calibration, quiet=quiet)
    predictions = predictor.combine_seeds(per_seed)
    scores = score_predictions(features, predictions)
    if len(per_seed) > 1:
        seed_scores = [score_predictions(features, of_seed) for of_seed in per_seed]
        scores["seeds"] = multi_seed.summarize_seeds(predictor.seeds, seed_scores)
    if (features.label >= 0).any():
        scores["intervals"] = score_intervals(SplitPredictions.from_features(features, predictions))
        is_calibrated = calibrate and predictor.calibration is not None
        scores["calibration"] = summarize_calibration(
            predictor,
            SplitPredictions.from_features(features, multi_seed.ensemble(per_seed)),
            SplitPredictions.from_features(features, predictions) if is_calibrated else None,
        )
        warn_if_worse(features, scores["calibration"])
    else:
        logging.warning(
            "dataset %s, split %s: no utterance has a label, so the scores are 0 without meaning; "
            "predictions.jsonl contains the predictions",
            features.name,
            split,
        )
    scores |= {
        "dataset": features.name,
        "checkpoint": {"epoch": predictor.progress["epoch"]},
        "adapted_features": adapt_features,
    }
    study = study_for_report(predictor, features, output, quiet=quiet) if report else None
    if jax.process_index() == 0:
        output.mkdir(parents=True, exist_ok=True)
        metrics_by_split = {**metrics_by_split, key: scores}
        write_json(metrics_path, metrics_by_split)
        rows = itertools.chain(other_rows, _labeled_rows(features, predictions))
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(predictions_path, lines)
        figures.plot_confusion(
            {
                f"{name}, weighted F1 {value['weighted_f1']:.3f}": np.array(value["confusion"])
                for name, value in metrics_by_split.items()
            },
            features.class_names,
            output / "confusion.png",
        )
        if report:
            if study is not None:
                write_study(study, output)
            experiment = Experiment.from_workdir(workdir, scores["checkpoint"])
            texts = read_utterance_texts(features, predictor.data_dir)
            write_report(output, features, predictions, scores, experiment, texts, study)
    return scores


def _fit_calibration(
    predictor: Predictor,
    validation: Sequence[Predictions] | None,
    kind: str | None,
    *,
    quiet: bool,
) -> None:
    """Fits the calibration if `kind` is given, or if a MiSTER-E model has no calibration yet.

    `validation` contains each seed's predictions for the validation split, if already computed.
    """
    if kind not in (None, "temperature", "bias"):
        raise InputError(f"fit_calibration={kind!r}; allowed: 'temperature', 'bias'")
    is_fusion = isinstance(predictor.task, FusionTask)
    if kind is None and (predictor.calibration is not None or not is_fusion):
        return
    if not is_fusion:
        raise InputError(
            f"{predictor.folder}: the work directory of an encoder, which is not calibrated; "
            "needed: a work directory of MiSTER-E"
        )
    if predictor.config.data.get("validate_on_train"):
        if kind is None:
            return
        raise InputError(
            f"{predictor.folder}: trained on the validation split (config.data.validate_on_train), "
            "so its probabilities cannot be calibrated on that split; needed: a model that was "
            "not trained on it"
        )
    try:
        fit_on_validation(predictor, validation, with_bias=kind == "bias", quiet=quiet)
    except (InputError, OSError) as error:
        if kind is not None:
            raise
        # The dataset may no longer exist, and the work directory may be read-only.
        logging.warning("%s is not written: %s", predictor.folder / CALIBRATION_FILE, error)


def _labeled_rows(features: DialogueFeatures, predictions: Predictions) -> Iterator[dict]:
    """Yields a split's rows for `predictions.jsonl`, in the stored order of the utterances.

    Next to the label, a row contains the annotated score ("true_score", None if unknown) and the
    number of raters who chose each class ("ratings"), if the dataset has them.
    """
    names = features.class_names
    dialogues = np.repeat(np.arange(len(features.lengths)), features.lengths)
    # `Utterances`, on which encoders are trained, have no extra columns.
    metadata = getattr(features, "utterance_metadata", None)
    ratings = getattr(features, "ratings", None)
    rows = prediction_rows(names, predictions)
    for index, (dialogue, row) in enumerate(zip(dialogues, rows, strict=True)):
        label = features.label[index]
        columns = {} if metadata is None else json.loads(metadata[index])
        annotations: dict[str, Any] = {}
        if features.score is not None:
            score = round(float(features.score[index]), 6)
            annotations["true_score"] = None if math.isnan(score) else score
        if ratings is not None:
            counts = (round(count, 6) for count in ratings[index].tolist())
            annotations["ratings"] = dict(zip(names, counts, strict=True))
        yield {
            "dataset": features.name,
            "split": features.split,
            "dialogue": str(features.dialogue_ids[dialogue]),
            "utterance": str(features.utterance_ids[index]),
            "label": names[label] if label >= 0 else None,
            **annotations,
            **({"metadata": columns} if columns else {}),
            **row,
        }
