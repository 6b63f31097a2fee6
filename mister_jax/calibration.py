"""Calibration of a trained model's probabilities, fitted on the validation split.

The probabilities p are replaced with softmax(log p / T + b), where T is a temperature and b is an
optional bias per class (arXiv 1706.04599, section 4.2). This formula needs probabilities instead of
logits, so it also applies to the mean probabilities of several models.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mister_jax.errors import InputError
from mister_jax.io import read_json, write_json
from mister_jax.metrics import check_labels

CALIBRATION_FILE = "calibration.json"
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0

_MAX_STEPS, _TOLERANCE = 100, 1e-10


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Temperature and class biases.

    Attributes:
      temperature: Temperature, positive. It does not change the predicted class.
      bias: Bias of each class, [C], which may change the predicted class; None without biases.
    """

    temperature: float = 1.0
    bias: tuple[float, ...] | None = None

    def __post_init__(self):
        values = (self.temperature, *(self.bias or ()))
        if not all(map(math.isfinite, values)) or self.temperature <= 0:
            raise ValueError(f"{self}; allowed: a positive temperature and finite biases")

    def __call__(self, probabilities: Any) -> Any:
        """Calibrates class probabilities.

        Args:
          probabilities: Class probabilities, [..., C], a NumPy or JAX array. Integers are converted
            to floats.

        Raises:
          ValueError: The number of biases is not the number of classes C.
        """
        xp, num_classes = probabilities.__array_namespace__(), probabilities.shape[-1]
        if self.bias is not None and len(self.bias) != num_classes:
            raise ValueError(
                f"calibration has {len(self.bias)} biases; allowed: {num_classes}, one per class"
            )
        if probabilities.dtype.kind in "biu":
            probabilities = probabilities.astype(float)
        logits = _log(probabilities, xp) / self.temperature
        if self.bias is not None:
            logits = logits + xp.asarray(self.bias, dtype=logits.dtype)
        exponentials = xp.exp(logits - logits.max(-1, keepdims=True))
        return exponentials / exponentials.sum(-1, keepdims=True)

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON values that `from_json` reads."""
        return {
            "temperature": self.temperature,
            "bias": None if self.bias is None else list(self.bias),
        }

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], where: epath.PathLike, num_classes: int
    ) -> Calibration:
        """Reads a calibration from JSON values.

        Args:
          values: Values from `to_json`.
          where: File that contains the values, for error messages.
          num_classes: Number of classes C of the model.

        Raises:
          InputError: The values are damaged or were written for another number of classes.
        """
        try:
            bias = values["bias"]
            calibration = cls(
                float(values["temperature"]), None if bias is None else tuple(map(float, bias))
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{where}: damaged calibration ({error!r}); needed: one that `mister-jax evaluate` "
                "has written"
            ) from error
        if calibration.bias is not None and len(calibration.bias) != num_classes:
            raise InputError(
                f"{where}: calibration of {len(calibration.bias)} classes; the model has "
                f"{num_classes}"
            )
        return calibration


def _log(probabilities: Any, xp: Any = np) -> Any:
    """Returns the logarithms of probabilities, finite even for a probability of 0."""
    return xp.log(xp.maximum(probabilities, xp.finfo(probabilities.dtype).tiny))


def negative_log_likelihood(probabilities: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Returns the negative log-likelihood of each label.

    Args:
      probabilities: Class probabilities, [N, C].
      label: Class indices, [N] int.

    Raises:
      ValueError: A label is not in 0..C-1.
    """
    check_labels(label, probabilities.shape[-1])
    return -_log(probabilities[np.arange(len(label)), label].astype(float))


def fit_calibration(
    probabilities: np.ndarray, label: np.ndarray, *, with_bias: bool = False
) -> Calibration | None:
    """Fits a calibration that minimizes the mean negative log-likelihood of the labels.

    The inverse temperature has a Gaussian prior with mean 1, and each bias has one with mean 0. All
    priors have standard deviation 1. An inverse temperature of 1 and biases of 0 do not change the
    probabilities. Without the priors, a few predictions that are all correct would give the minimum
    temperature. The fitted calibration never makes the likelihood of these labels worse.

    Args:
      probabilities: Class probabilities, [N, C].
      label: Class indices, [N] int. Negative indices mark unlabeled utterances, which are ignored.
      with_bias: Whether to also fit one bias per class.

    Returns:
      The calibration, with a temperature from `MIN_TEMPERATURE` to `MAX_TEMPERATURE`; None if no
      utterance has a label.

    Raises:
      ValueError: A label is C or more.
    """
    labeled = label >= 0
    if not labeled.any():
        return None
    check_labels(label[labeled], probabilities.shape[-1])
    log_probabilities = _log(probabilities[labeled].astype(float))
    objective = _Objective(log_probabilities, label[labeled], with_bias)
    parameters = _minimize(objective)
    temperature = 1 / parameters[0]
    if not with_bias:
        return Calibration(float(temperature))
    bias = parameters[1:] - parameters[1:].mean()
    return Calibration(float(temperature), tuple(bias.tolist()))


class _Objective:
    """Regularized negative log-likelihood, convex in its parameters.

    Args:
      log_probabilities: Log-probabilities, [n, C] float64.
      label: Class indices, [n] int.
      with_bias: Whether the parameters are the inverse temperature and C biases, [1 + C], or only
        the inverse temperature, [1].
    """

    def __init__(self, log_probabilities: np.ndarray, label: np.ndarray, with_bias: bool):
        self._inputs, self._label = log_probabilities, label
        num_classes = log_probabilities.shape[1] if with_bias else 0
        self.start = np.concatenate([[1.0], np.zeros(num_classes)])
        self._one_hot = np.eye(log_probabilities.shape[1])[label]

    def __call__(self, parameters: np.ndarray) -> float:
        """Returns the value of the objective."""
        logits = self._logits(parameters)
        chosen = logits[np.arange(len(logits)), self._label]
        highest = logits.max(-1)
        log_sum = highest + np.log(np.exp(logits - highest[:, None]).sum(-1))
        prior = ((parameters - self.start) ** 2).sum() / (2 * len(logits))
        return float((log_sum - chosen).mean() + prior)

    def derivatives(self, parameters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the gradient, [P], and the Hessian, [P, P]."""
        logits = self._logits(parameters)
        exponentials = np.exp(logits - logits.max(-1, keepdims=True))
        model = exponentials / exponentials.sum(-1, keepdims=True)  # n C
        mean = (model * self._inputs).sum(-1)  # n
        residual = model - self._one_hot
        gradient = [np.array([(residual * self._inputs).sum(-1).mean()])]
        centered = model * (self._inputs - mean[:, None])  # n C
        hessian = np.zeros((len(parameters),) * 2)
        hessian[0, 0] = (centered * self._inputs).sum(-1).mean()
        if len(parameters) > 1:
            gradient.append(residual.mean(0))
            hessian[0, 1:] = hessian[1:, 0] = centered.mean(0)
            hessian[1:, 1:] = np.diag(model.mean(0)) - model.T @ model / len(model)
        prior = 1 / len(logits)
        return (
            np.concatenate(gradient) + prior * (parameters - self.start),
            hessian + prior * np.eye(len(parameters)),
        )

    def _logits(self, parameters: np.ndarray) -> np.ndarray:
        bias = parameters[1:] if len(parameters) > 1 else 0.0
        return parameters[0] * self._inputs + bias


def _minimize(objective: _Objective) -> np.ndarray:
    """Minimizes the objective with Newton steps that keep the inverse temperature in bounds."""
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    parameters, value = objective.start, objective(objective.start)
    for _ in range(_MAX_STEPS):
        gradient, hessian = objective.derivatives(parameters)
        free = np.ones(len(parameters), bool)
        free[0] = not (
            (parameters[0] <= low and gradient[0] > 0)
            or (parameters[0] >= high and gradient[0] < 0)
        )
        step = np.zeros_like(parameters)
        step[free] = -np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        if np.abs(step).max() < _TOLERANCE:
            break
        scale = 1.0
        while scale > _TOLERANCE:
            candidate = parameters + scale * step
            candidate[0] = np.clip(candidate[0], low, high)
            candidate_value = objective(candidate)
            if candidate_value < value:
                break
            scale /= 2
        else:
            break
        parameters, value = candidate, candidate_value
    return parameters


def write_calibration(
    workdir: epath.PathLike, calibration: Calibration, progress: Mapping[str, Any]
) -> None:
    """Writes the calibration of a work directory.

    Args:
      workdir: Work directory of a training run.
      calibration: Calibration fitted for the best parameters.
      progress: Training progress when the best parameters were saved.
    """
    content = {**calibration.to_json(), "checkpoint": progress}
    write_json(epath.Path(workdir) / CALIBRATION_FILE, content)


def read_calibration(
    workdir: epath.PathLike, progress: Mapping[str, Any], num_classes: int
) -> Calibration | None:
    """Reads the calibration of a work directory.

    Args:
      workdir: Work directory of a training run.
      progress: Training progress when the parameters to calibrate were saved.
      num_classes: Number of classes of the model.

    Returns:
      The calibration, or None if no calibration was fitted for these parameters.

    Raises:
      InputError: The file is damaged, or was written for another number of classes.
    """
    path = epath.Path(workdir) / CALIBRATION_FILE
    if not path.exists():
        return None
    content = read_json(path)
    calibration = Calibration.from_json(content, path, num_classes)
    return calibration if content.get("checkpoint") == dict(progress) else None
