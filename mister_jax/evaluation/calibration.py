"""Fits a model's calibration on the validation split, and scores probabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from mister_jax import metrics
from mister_jax.calibration import fit_calibration, negative_log_likelihood, write_calibration
from mister_jax.data import DialogueFeatures
from mister_jax.errors import InputError
from mister_jax.evaluation.confidence_intervals import DialogueBootstrap, Estimate
from mister_jax.evaluation.split_predictions import SplitPredictions
from mister_jax.predictor import Predictions, Predictor
from mister_jax.tasks.fusion import FusionTask
from mister_jax.workdir import read_fingerprints

CALIBRATION_SPLIT = "validation"


def has_changed(predictor: Predictor, features: DialogueFeatures) -> bool:
    """Returns whether a split of the training dataset of MiSTER-E has changed since the training.

    The result is False if the fingerprint is unknown. Training stores fingerprints of the splits
    that it reads. Those of encoders are not of `features`, but of the labeled utterances.
    """
    stored = read_fingerprints(predictor.folder).get(features.split)
    is_known = stored is not None and isinstance(predictor.task, FusionTask)
    return is_known and stored != features.fingerprint()


def fit_on_validation(
    predictor: Predictor,
    per_seed: Sequence[Predictions] | None = None,
    *,
    with_bias: bool = False,
    quiet: bool = False,
) -> None:
    """Fits the predictor's calibration, and writes it to the predictor's work directory.

    If no utterance has a label, the function logs a warning, and the predictor has no calibration.

    Args:
      predictor: Predictor to calibrate.
      per_seed: Predictions of each seed for the validation split, if already computed.
      with_bias: Whether to fit a bias per class in addition to the temperature.
      quiet: Whether to hide progress.

    Raises:
      InputError: The validation split of the training dataset is not available, or has changed.
    """
    features = predictor.task.features(CALIBRATION_SPLIT)
    if has_changed(predictor, features):
        raise InputError(
            f"dataset {features.name}: the split {CALIBRATION_SPLIT} has changed since the "
            "training; needed: the original data"
        )
    if per_seed is None:
        per_seed = predictor.predict_per_seed(features, quiet=quiet)
    predictor.calibration = None
    probabilities = predictor.combine_seeds(per_seed)["probabilities"]
    calibration = fit_calibration(probabilities, features.label, with_bias=with_bias)
    if calibration is None:
        logging.warning(
            "dataset %s: no utterance of %s has a label, so there is no calibration",
            features.name,
            CALIBRATION_SPLIT,
        )
        return
    predictor.calibration = calibration
    if jax.process_index() == 0:
        write_calibration(predictor.folder, calibration, predictor.progress)


def calibration_scores(
    predictions: SplitPredictions, bootstrap: DialogueBootstrap
) -> dict[str, Estimate]:
    """Scores the probabilities of the labeled utterances; lower scores are better.

    Resampling adds noise to the bins' accuracies, which raises the calibration error. The interval
    of a small calibration error may therefore lie above the error itself.

    Args:
      predictions: Predictions for a split with at least one label.
      bootstrap: Bootstrap over the dialogues of the same split.

    Returns:
      The `metrics.CALIBRATION_SCORES` with confidence intervals.
    """
    scores = _resampled_scores(predictions, bootstrap)
    return {name: Estimate.from_resamples(*score) for name, score in scores.items()}


def _resampled_scores(
    predictions: SplitPredictions, bootstrap: DialogueBootstrap
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns the `metrics.CALIBRATION_SCORES` on the whole split and on the resamples, [R]."""
    labeled = predictions.labeled
    probabilities, label = predictions.probabilities[labeled], predictions.label[labeled]
    confidence = probabilities.max(-1).astype(float)
    correct = ~predictions.wrong[labeled]
    bins = metrics.calibration(confidence, correct)
    in_bin = np.eye(len(bins["count"]))[bins["bin"]]  # n, bins
    columns = np.column_stack(
        [
            np.ones(len(label)),
            metrics.brier_scores(probabilities, label),
            negative_log_likelihood(probabilities, label),
            in_bin * (correct - confidence)[:, None],
        ]
    )
    sums = bootstrap.sums(columns)

    def scores(sums: np.ndarray) -> dict[str, np.ndarray]:
        total = sums[..., 0]
        return {
            "calibration_error": np.abs(sums[..., 3:]).sum(-1) / total,
            "brier_score": sums[..., 1] / total,
            "negative_log_likelihood": sums[..., 2] / total,
        }

    whole, resampled = map(scores, sums)
    return {name: (whole[name], resampled[name]) for name in metrics.CALIBRATION_SCORES}


def summarize_calibration(
    predictor: Predictor, uncalibrated: SplitPredictions, calibrated: SplitPredictions | None
) -> dict[str, Any]:
    """Returns the calibration's parameters, and the scores before and after it, as JSON values.

    Args:
      predictor: Predictor that made the predictions.
      uncalibrated: Predictions for a split with at least one label.
      calibrated: Calibrated predictions; None if the predictions were not calibrated.

    Returns:
      "uncalibrated": for each score, its "value" and the bounds "low" and "high". If calibrated
      predictions are given, also "calibrated" and "difference" (calibrated minus uncalibrated) in
      the same form, and the parameters "temperature" and "bias" (by class, or None).
    """
    bootstrap = DialogueBootstrap(uncalibrated)
    summary: dict[str, Any] = {}
    if calibrated is not None and predictor.calibration is not None:
        bias = predictor.calibration.bias
        summary = {
            "temperature": predictor.calibration.temperature,
            "bias": bias and dict(zip(uncalibrated.class_names, bias, strict=True)),
        }
    versions = {"uncalibrated": _resampled_scores(uncalibrated, bootstrap)}
    if calibrated is not None:
        before, after = versions["uncalibrated"], _resampled_scores(calibrated, bootstrap)
        versions["calibrated"] = after
        # Both versions are scored on the same resamples, so their difference has an interval.
        versions["difference"] = {
            key: (after[key][0] - before[key][0], after[key][1] - before[key][1]) for key in after
        }
    for name, scores in versions.items():
        summary[name] = {
            key: Estimate.from_resamples(*score).to_json() for key, score in scores.items()
        }
    return summary


def warn_if_worse(features: Any, summary: Mapping[str, Any]) -> None:
    """Logs a warning if calibration significantly increases a split's negative log-likelihood.

    Args:
      features: Features of the split.
      summary: Result of `summarize_calibration`.
    """
    name = "negative_log_likelihood"
    low = summary["difference"][name]["low"] if "difference" in summary else None
    if low is not None and low > 0:
        before, after = (summary[it][name]["value"] for it in ("uncalibrated", "calibrated"))
        logging.warning(
            "dataset %s, split %s: calibration makes the probabilities worse (negative log "
            "likelihood %.3f -> %.3f); the validation split may differ from this split; "
            "--calibrate=false disables calibration",
            features.name,
            features.split,
            before,
            after,
        )
