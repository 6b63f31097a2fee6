"""Length of a training run, selection of its best epoch, and progress of the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mister_jax import metrics
from mister_jax.config_checks import check_at_least, check_choice

# Values of `TrainConfig.select_by` that are not in `metrics.SCORE_NAMES`.
LOSS, LAST, MAE = "loss", "last", "mae"
# Maps values of `TrainConfig.select_by` to validation values for which lower is better.
_ERRORS = {LOSS: "cross_entropy", MAE: "mae"}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Options for the length of training, the choice of the epoch, logging and checkpoints.

    Attributes:
      epochs: Number of passes over the training split.
      patience: Number of epochs without improvement of a seed's validation score after which the
        seed's best epoch is final; 0 disables early stopping. An equal score is no improvement. The
        run ends when the best epochs of all seeds are final.
      select_by: Validation score that determines the best epoch: one of `metrics.SCORE_NAMES`,
        "loss" for the lowest cross-entropy, or "mae" for the lowest mean absolute error of a model
        that predicts scores. With "last", the last epoch is used, and validation scores are only
        reported.
      init_from: Model to start training from: a work directory, a bundle or a name on the Hugging
        Face Hub. Parameters with equal names and shapes are copied. If empty, the initial
        parameters are random or pretrained. A resumed run ignores this field.
      log_every: Number of steps between records of the training loss.
      save_every: Number of steps between checkpoints, in addition to those at the ends of epochs; 0
        for none.
      min_save_seconds: An epoch is saved at its end only if the previous checkpoint, or the start,
        is at least this many seconds ago, because saving can take longer than an epoch. A killed
        run repeats the epochs that have not been saved. 0 saves every epoch. The last epoch and the
        state at SIGTERM are always saved. With several processes, whose clocks differ, every epoch
        is saved.
      accumulation: Number of gradient accumulation steps: each device splits its rows into this
        many parts. Must be 1 for MiSTER-E, whose loss is not a sum over rows.
    """

    epochs: int
    patience: int = 0
    select_by: str = "weighted_f1"
    init_from: str = ""
    log_every: int = 10
    save_every: int = 0
    min_save_seconds: float = 10.0
    accumulation: int = 1

    def __post_init__(self):
        check_at_least(self, 1, "epochs", "log_every", "accumulation")
        check_at_least(self, 0, "patience", "save_every", "min_save_seconds")
        check_choice(self, "select_by", (*metrics.SCORE_NAMES, *_ERRORS, LAST))
        if self.select_by == LAST and self.patience:
            raise ValueError("patience needs a select_by other than 'last'; allowed: patience=0")

    def selection_scores(self, values: Mapping[str, Any]) -> np.ndarray:
        """Returns each seed's score for the choice of the best epoch, [S]; higher is better.

        Args:
          values: Validation scores and "cross_entropy" by name: [S] each, or numbers for one seed.
        """
        if self.select_by in _ERRORS:
            return -np.atleast_1d(values[_ERRORS[self.select_by]])
        if self.select_by == LAST:  # Of equal epochs, `complete_epoch` selects the last.
            return np.zeros(np.atleast_1d(values["cross_entropy"]).shape)
        return np.atleast_1d(values[self.select_by])

    def describe(self, scores: Sequence[float] | np.ndarray, digits: int) -> str:
        """Formats a selection score, or the mean and standard deviation of several scores."""
        mean, deviation = metrics.mean_and_deviation(scores)
        # Errors are stored with a negative sign, so that higher is better.
        mean = -mean if self.select_by in _ERRORS else mean
        return f"{mean:.{digits}f}" + (f" +- {deviation:.{digits}f}" if len(scores) > 1 else "")


@dataclasses.dataclass
class TrainProgress:
    """Progress of a training run, saved with the training state.

    Attributes:
      best_scores: Best validation score per seed; see `TrainConfig.selection_scores`.
      best_epochs: Epoch of each best score, counted from 1; 0 before the first validation.
      epoch: Number of completed epochs.
      finished: Whether training is complete.
      improved_epochs: Epoch in which each seed's best score was first reached.
    """

    best_scores: list[float]
    best_epochs: list[int]
    epoch: int = 0
    finished: bool = False
    improved_epochs: list[int] = dataclasses.field(default_factory=list)

    @classmethod
    def initial(cls, num_seeds: int) -> TrainProgress:
        """Returns the progress before the first step."""
        return cls([0.0] * num_seeds, [0] * num_seeds, improved_epochs=[0] * num_seeds)

    def active_seeds(self, patience: int) -> np.ndarray:
        """Returns which seeds have not stopped early, [S] bool."""
        # Checkpoints of an older version have no `improved_epochs`.
        stale_epochs = self.epoch - np.array(self.improved_epochs or self.best_epochs)
        return (stale_epochs < patience) | (patience == 0)

    def is_finished(self, options: TrainConfig) -> bool:
        """Returns whether the last epoch is complete, or all seeds have stopped early."""
        return self.epoch >= options.epochs or not self.active_seeds(options.patience).any()

    def complete_epoch(self, scores: np.ndarray, options: TrainConfig) -> np.ndarray:
        """Completes an epoch and returns which seeds have a new best score, [S] bool.

        Args:
          scores: Validation score per seed, [S]; higher is better.
          options: Training options, which include the number of epochs and the patience.
        """
        active = self.active_seeds(options.patience)
        self.epoch += 1
        # If scores are equal, which happens on small validation splits, the later epoch wins,
        # because its parameters had more updates.
        is_first = np.array(self.best_epochs) == 0
        is_best = active & (is_first | (scores >= self.best_scores))
        improved = active & (is_first | (scores > self.best_scores))
        last_improved = self.improved_epochs or self.best_epochs
        self.improved_epochs = np.where(improved, self.epoch, last_improved).tolist()
        self.best_scores = np.where(is_best, scores, self.best_scores).tolist()
        self.best_epochs = np.where(is_best, self.epoch, self.best_epochs).tolist()
        self.finished = self.is_finished(options)
        return is_best
