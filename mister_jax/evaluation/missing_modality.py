"""Runs the missing-modality study, which scores a model on utterances without speech or text."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from mister_jax.console import ProgressReporter
from mister_jax.data import DialogueFeatures
from mister_jax.data.schema import MODALITIES
from mister_jax.errors import InputError
from mister_jax.evaluation import figures
from mister_jax.evaluation.confidence_intervals import LEVEL, DialogueBootstrap, Estimate
from mister_jax.evaluation.split_predictions import SplitPredictions
from mister_jax.io import read_json, write_json
from mister_jax.metrics import mean_and_deviation
from mister_jax.predictor import Predictor

MISSING_MODALITY = "missing_modality"
MISSING_MODALITY_AS_ZEROS = "missing_modality_as_zeros"
"""Names of a study's files, without file extensions."""

_REPORT_RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
_REPORT_DRAWS = 3


def drop_modalities(
    features: DialogueFeatures,
    drop_speech: float,
    drop_text: float,
    seed: int,
    *,
    zero_fill_values: Mapping[str, np.ndarray | float] | None = None,
) -> DialogueFeatures:
    """Drops the speech and the text of random utterances independently.

    Args:
      features: Features of a split.
      drop_speech: Probability that an utterance loses its speech.
      drop_text: Probability that an utterance loses its text.
      seed: Random seed that determines which modalities are dropped.
      zero_fill_values: Replacement for the dropped features of each modality, a vector [D] or a
        number. Replaced features are not flagged as missing. By default, dropped features are only
        flagged as missing.
    """
    draw = np.random.default_rng(seed).random((2, len(features.label)))
    changes = {}
    for modality, row, rate in zip(MODALITIES, draw, (drop_speech, drop_text), strict=True):
        if zero_fill_values is None:
            name = f"{modality}_present"
            changes[name] = getattr(features, name) & (row >= rate)
        else:
            vectors = getattr(features, modality)
            filled = np.where((row < rate)[:, None], zero_fill_values[modality], vectors)
            changes[modality] = filled.astype(vectors.dtype)
    return dataclasses.replace(features, **changes)


def missing_modality_study(
    workdir: epath.PathLike,
    split: str,
    *,
    drop_speech: Sequence[float] = (0.0,),
    drop_text: Sequence[float] = (0.0,),
    as_zeros: bool = False,
    draws: int = 5,
    dataset: str | None = None,
    data_dir: str | None = None,
    output: epath.PathLike | None = None,
    quiet: bool = False,
) -> list[dict[str, Any]]:
    """Scores a split with modalities missing at given rates.

    The rates in `drop_speech` and `drop_text` are paired in order. A single rate is paired with all
    rates of the other modality. The function writes `missing_modality.json` and
    `missing_modality.png`, or with `as_zeros`, `missing_modality_as_zeros.json` and
    `missing_modality_as_zeros.png`.

    Args:
      workdir: Work directory of a training run.
      split: Split of the dataset.
      drop_speech: Probabilities that an utterance loses its speech.
      drop_text: Probabilities that an utterance loses its text.
      as_zeros: Whether to replace dropped features by zeros and not flag them as missing, as in the
        paper's study. By default, dropped modalities are flagged as missing.
      draws: Number of random draws per pair of rates.
      dataset: Dataset to score; by default the training dataset.
      data_dir: Directory of the dataset.
      output: Folder of the files; the work directory by default.
      quiet: Whether to hide progress.

    Returns:
      A dict per pair of rates with "drop_speech", "drop_text", "weighted_f1" (mean over draws and
      seeds), "deviation", and "loss" (weighted F1 with nothing dropped minus "weighted_f1", with
      the "low" and "high" ends of its 95% interval).

    Raises:
      InputError: A rate is outside [0, 1], the lists cannot be paired, the split has no labels, or
        the work directory belongs to an encoder.
    """
    pairs = _pair_rates(drop_speech, drop_text)
    predictor = Predictor(workdir, data_dir)
    features = predictor.task.features(split, dataset)
    if not isinstance(features, DialogueFeatures):
        raise InputError(
            f"{workdir}: the work directory of an encoder; needed: a work directory of MiSTER-E"
        )
    if not (features.label >= 0).any():
        raise InputError(
            f"split {split!r} of {features.name} has no labels; needed: labels to score"
        )
    zero_fill_values = predictor.task.zero_fill_values() if as_zeros else None
    study = _run_study(predictor, features, pairs, draws, zero_fill_values, quiet=quiet)
    if jax.process_index() == 0:
        output = epath.Path(workdir if output is None else output)
        output.mkdir(parents=True, exist_ok=True)
        write_study(study, output, MISSING_MODALITY_AS_ZEROS if as_zeros else MISSING_MODALITY)
    return study["points"]


def study_for_report(
    predictor: Predictor, features: Any, output: epath.Path, *, quiet: bool
) -> dict[str, Any] | None:
    """Returns the study in `output` if it matches the checkpoint and features, or a new study.

    Returns None instead of a new study if the model is an encoder, or if the split lacks labels,
    speech or text.
    """
    path = output / f"{MISSING_MODALITY}.json"
    if path.exists():
        study = read_json(path)
        identity = _study_identity(predictor, features)
        if all(study.get(name) == value for name, value in identity.items()):
            return study
    can_study = (
        isinstance(features, DialogueFeatures)
        and (features.label >= 0).any()
        and features.speech_present.any()
        and features.text_present.any()
    )
    if not can_study:
        return None
    pairs = [(rate, 0.0) for rate in _REPORT_RATES] + [(0.0, rate) for rate in _REPORT_RATES]
    return _run_study(predictor, features, pairs, _REPORT_DRAWS, quiet=quiet)


def write_study(study: Mapping[str, Any], output: epath.Path, name: str = MISSING_MODALITY) -> None:
    """Writes a study as JSON and as a figure."""
    write_json(output / f"{name}.json", study)
    figures.plot_missing_modality(study, output / f"{name}.png")


def _pair_rates(
    drop_speech: Sequence[float], drop_text: Sequence[float]
) -> list[tuple[float, float]]:
    count = max(len(drop_speech), len(drop_text))
    columns = []
    for name, rates in (("drop_speech", drop_speech), ("drop_text", drop_text)):
        if len(rates) not in (1, count):
            raise InputError(f"{name} has {len(rates)} rates; allowed: 1 or {count}")
        if any(not 0 <= rate <= 1 for rate in rates):
            raise InputError(f"{name}={list(rates)}; allowed: rates from 0 to 1")
        columns.append(list(rates) * (count if len(rates) == 1 else 1))
    return list(zip(*columns, strict=True))


def _run_study(
    predictor: Predictor,
    features: DialogueFeatures,
    pairs: Sequence[tuple[float, float]],
    draws: int,
    zero_fill_values: Mapping[str, np.ndarray | float] | None = None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """Returns the content of `missing_modality.json` for pairs of speech and text rates.

    Seeds are scored separately. Means and deviations are over draws and seeds.
    """
    per_seed = predictor.predict_per_seed(features, quiet=True)
    bootstrap = DialogueBootstrap(SplitPredictions.from_features(features, per_seed[0]))

    def scores_per_seed(
        per_seed: Sequence[Mapping[str, np.ndarray]],
    ) -> list[tuple[Any, np.ndarray]]:
        """Returns each seed's weighted F1 on the split, and on the resamples, [R]."""
        return [
            bootstrap.scores(predictions["probabilities"].argmax(-1))["weighted_f1"]
            for predictions in per_seed
        ]

    complete, complete_resampled = _mean_scores(scores_per_seed(per_seed))
    points = []
    with ProgressReporter(len(pairs) * draws, unit="draws", quiet=quiet) as reporter:
        for speech_rate, text_rate in pairs:
            scores: list[tuple[Any, np.ndarray]] = []
            for draw in range(draws):
                seen = drop_modalities(
                    features, speech_rate, text_rate, draw, zero_fill_values=zero_fill_values
                )
                scores += scores_per_seed(predictor.predict_per_seed(seen, quiet=True))
                reporter.advance(f"drop speech {speech_rate}, text {text_rate}")
            mean, deviation = mean_and_deviation([float(value) for value, _ in scores])
            _, resampled = _mean_scores(scores)
            loss = Estimate.from_resamples(complete - mean, complete_resampled - resampled)
            points.append(
                {
                    "drop_speech": speech_rate,
                    "drop_text": text_rate,
                    "weighted_f1": mean,
                    "deviation": deviation,
                    "loss": loss.to_json(),
                }
            )
    return {**_study_identity(predictor, features), "complete": complete, "points": points}


def _mean_scores(scores: Sequence[tuple[Any, np.ndarray]]) -> tuple[float, np.ndarray]:
    """Returns the mean score on the split and on each resample, [R]."""
    values, resampled = zip(*scores, strict=True)
    return float(np.mean(values)), np.mean(resampled, axis=0)


def _study_identity(predictor: Predictor, features: Any) -> dict[str, Any]:
    """Returns the entries that identify the predictions of a study."""
    return {
        "dataset": features.name,
        "split": features.split,
        # Adapted features have the same dataset name and split, but another fingerprint.
        "fingerprint": features.fingerprint(),
        "checkpoint": predictor.progress,
        "confidence_level": LEVEL,
    }
