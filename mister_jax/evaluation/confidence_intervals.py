"""Computes 95% confidence intervals of scores, with a bootstrap over dialogues.

The utterances in a dialogue are not independent, so whole dialogues are resampled. Each of R
resamples draws M dialogues, with replacement, from the M labeled dialogues in a split. A score's
interval reaches from the 2.5% to the 97.5% quantile of its resampled values.

In a cross-validation by speaker, session or another column, whole speakers or sessions are
resampled instead; see `SplitPredictions.group_index`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from mister_jax import metrics
from mister_jax.evaluation.split_predictions import SplitPredictions

NUM_RESAMPLES = 1000
LEVEL = 0.95


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A score on the whole split, and the ends of its confidence interval if there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def from_resamples(cls, value: Any, resampled: np.ndarray) -> Estimate:
        """Computes a percentile interval from resampled values.

        Args:
          value: Value on the whole split.
          resampled: Values on the resamples, [R]. If R is 0 or all values are NaN, the interval is
            None.
        """
        if not np.isfinite(resampled).any():
            return cls(float(value))
        tail = (1 - LEVEL) / 2
        low, high = np.nanquantile(resampled, [tail, 1 - tail])
        return cls(float(value), float(low), float(high))

    def to_json(self) -> dict[str, float | None]:
        """Returns the value and the ends of the interval by name."""
        return dataclasses.asdict(self)


class DialogueBootstrap:
    """Computes scores on a whole split and on each resample.

    All scores use the same resamples, so differences between scores also have intervals.

    Args:
      predictions: Predictions for a split with at least one label.
      num_resamples: Number of resamples R.
      seed: Random seed of the resamples.

    Attributes:
      dialogues: Indices of the M dialogues (or groups) with at least one label, [M] int.
      num_resamples: Number of resamples R; 0 if M is 1, because all resamples would be equal.
    """

    def __init__(
        self, predictions: SplitPredictions, num_resamples: int = NUM_RESAMPLES, seed: int = 0
    ):
        self._predictions = predictions
        index = predictions.group_index
        index = predictions.dialogue_index if index is None else index
        self.dialogues, self._dialogue = np.unique(index[predictions.labeled], return_inverse=True)
        num_dialogues = len(self.dialogues)
        self.num_resamples = num_resamples if num_dialogues > 1 else 0
        draws = np.random.default_rng(seed).multinomial(
            num_dialogues, np.full(num_dialogues, 1 / num_dialogues), size=self.num_resamples
        )
        # Number of times that each resample contains each dialogue, [R, M]. The counts are floats,
        # because NumPy multiplies matrices of floats faster than matrices of integers.
        self._weights = draws.astype(float)

    def count(self, cells: np.ndarray, num_cells: int) -> tuple[np.ndarray, np.ndarray]:
        """Counts the labeled utterances in each bin of a histogram or entry of a confusion matrix.

        Args:
          cells: Index of the bin or entry of each labeled utterance, [n] int, -1 for excluded
            utterances.
          num_cells: Number of bins or entries.

        Returns:
          Counts on the whole split, [num_cells], and on the resamples, [R, num_cells].
        """
        counted = cells >= 0
        flat = self._dialogue[counted] * num_cells + cells[counted]
        shape = (len(self.dialogues), num_cells)
        counts = np.bincount(flat, minlength=math.prod(shape)).reshape(shape)
        return counts.sum(0), self._weights @ counts

    def sums(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sums values over the labeled utterances.

        Args:
          values: Values of each labeled utterance, [n, K].

        Returns:
          Sums on the whole split, [K], and on the resamples, [R, K].
        """
        sums = np.zeros((len(self.dialogues), values.shape[1]))
        np.add.at(sums, self._dialogue, values)
        return sums.sum(0), self._weights @ sums

    def confusion(self, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Computes confusion matrices on the whole split and on the resamples.

        Args:
          predicted: Predicted classes, [N] int, -1 for excluded utterances.

        Returns:
          Counts on the whole split, [C, C], and on the resamples, [R, C, C].
        """
        labeled = self._predictions.labeled
        num_classes = len(self._predictions.class_names)
        label, predicted = self._predictions.label[labeled], predicted[labeled]
        cells = np.where(predicted >= 0, label * num_classes + predicted, -1)
        counts, resampled = self.count(cells, num_classes**2)
        shape = (num_classes, num_classes)
        return counts.reshape(shape), resampled.reshape(-1, *shape)

    def scores(self, predicted: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Computes `metrics.confusion_scores` on the whole split and on the resamples.

        The scores of a class on a resample without this class are NaN.

        Args:
          predicted: Predicted classes, [N] int, -1 for excluded utterances.
        """
        counts, resampled_counts = self.confusion(predicted)
        scores = metrics.confusion_scores(counts)
        resampled = dict(metrics.confusion_scores(resampled_counts))
        for name in ("precision", "recall", "f1"):
            resampled[name] = np.where(resampled["support"] > 0, resampled[name], np.nan)
        return {name: (scores[name], resampled[name]) for name in scores}


def score_intervals(predictions: SplitPredictions) -> dict[str, dict[str, float | None]]:
    """Returns the "low" and "high" end of the confidence interval of each of the `SCORE_NAMES`.

    Args:
      predictions: Predictions for a split with at least one label. If there are labels in only one
        dialogue, the ends are None.
    """
    scores = DialogueBootstrap(predictions).scores(predictions.predicted)
    estimates = {name: Estimate.from_resamples(*scores[name]) for name in metrics.SCORE_NAMES}
    return {name: {"low": it.low, "high": it.high} for name, it in estimates.items()}
