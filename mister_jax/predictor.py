"""Prediction with the best parameters of a training run, from its work directory or a bundle."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from flax import nnx
from jax.sharding import Mesh

from mister_jax import bundle, multi_seed
from mister_jax.calibration import read_calibration
from mister_jax.checkpoint import BEST, Checkpoints
from mister_jax.console import ProgressReporter
from mister_jax.data import DialogueFeatures, prefetch_to_device
from mister_jax.errors import InputError
from mister_jax.models import EXPERTS
from mister_jax.parallel.oom import explain_oom
from mister_jax.parallel.partitioning import CompiledStep, JitPartitioner
from mister_jax.parallel.sharding import data_mesh, shardings
from mister_jax.tasks.base import split_params
from mister_jax.tasks.config import config_seeds
from mister_jax.tasks.registry import task_class
from mister_jax.workdir import read_config, read_model_description

Predictions = dict[str, np.ndarray]

_OOM_HINT = "devices with more memory, or more devices"


@dataclasses.dataclass(frozen=True)
class _Programs:
    """Compiled functions for prediction, which models of one architecture can share.

    Attributes:
      task: Task of the first of these models.
      mesh: Mesh of the devices.
      predict: Function of `((params, constants), batch)`.
      predict_step: Function of `((params, constants, state), batch)`.
      is_shared: Whether later models can use the programs. The task is then a `FusionTask`.
      shapes: Row counts and padded lengths of the batches that have been predicted.
    """

    task: Any
    mesh: Mesh
    predict: CompiledStep
    predict_step: CompiledStep
    is_shared: bool
    shapes: set[tuple[int, int]] = dataclasses.field(default_factory=set)


# Models of one architecture, such as those of the folds of a cross-validation, share programs, so
# each program is traced and compiled only once. Programs of the last eight architectures are kept.
_shared_programs: collections.deque[_Programs] = collections.deque(maxlen=8)


def _programs_for(task: Any, graph: Any, partitioner: JitPartitioner) -> _Programs:
    """Returns the programs of a model, if possible those of an earlier model."""
    for programs in tuple(_shared_programs):
        if (
            programs.mesh == partitioner.mesh
            and type(programs.task) is type(task)
            and task.shares_steps_with(programs.task)
        ):
            return programs

    def predict(params_and_constants, batch, _axis_name):
        params, constants = params_and_constants
        outputs = task.with_constants(constants).predict(_merge(graph, params), batch)
        return {**outputs, "row": batch["row"]}

    def predict_step(inputs, batch, _axis_name):
        params, constants, state = inputs
        return task.with_constants(constants).predict_step(_merge(graph, params), state, batch)

    programs = _Programs(
        task,
        partitioner.mesh,
        partitioner.compile_eval(predict),
        partitioner.compile_eval(predict_step),
        # False for encoders, because shared programs would keep the encoder in memory.
        is_shared=task.shares_steps_with(task),
    )
    if programs.is_shared:
        _shared_programs.append(programs)
    return programs


def _merge(graph: Any, params: Mapping[str, Any]) -> Any:
    return nnx.merge(graph, params["trained"], params["frozen"])


class Predictor:
    """Runs a trained model with its best parameters on all devices.

    Args:
      model: Work directory of a training run, or a bundle.
      data_dir: Directory of the datasets; by default, the directory used in training.
      calibrate: Whether to calibrate the probabilities if the model has a calibration.

    Attributes:
      folder: Work directory or bundle.
      config: Config of the training run.
      task: Restored task.
      params: One dict per seed with the "trained" and the "frozen" parameters.
      progress: Training progress when the best parameters were saved.
      calibration: Calibration of the model, even if `calibrate` is False; None if no calibration
        was fitted.

    Raises:
      InputError: The folder is neither a work directory with a best checkpoint nor a complete
        bundle, or the parameters do not fit in the devices' memory.
    """

    def __init__(
        self, model: epath.PathLike, data_dir: str | None = None, *, calibrate: bool = True
    ):
        self.folder = epath.Path(model)
        opened = bundle.read_bundle(self.folder) if bundle.is_bundle(self.folder) else None
        self.config = opened.config if opened else read_config(self.folder)
        if data_dir:
            self.config.data.data_dir = str(data_dir)
        self.data_dir: str | None = self.config.data.data_dir or None
        description = opened.description if opened else read_model_description(self.folder)
        try:
            self.task = task_class(self.config).restore(self.config, description)
        except (AttributeError, KeyError, TypeError) as error:
            damaged = bundle.CONFIG_FILE if opened else "model.json"
            raise InputError(
                f"{self.folder / damaged}: damaged ({error!r}); needed: a file that training or "
                "export has written"
            ) from error
        self.seeds = config_seeds(self.config)
        self.partitioner = JitPartitioner(data_mesh(), self.task.sharding_rules)
        self.params, self.progress = self._load_params(opened)
        if opened:
            self.calibration = opened.calibration
        else:
            num_classes = len(self.task.class_names)
            self.calibration = read_calibration(self.folder, self.progress, num_classes)
        self._calibrate = calibrate
        self._constants = self.partitioner.put_state(self.task.constants())
        self._programs = _programs_for(self.task, self._graph, self.partitioner)

    def _load_params(self, opened: bundle.Bundle | None) -> tuple[list[Any], dict[str, Any]]:
        """Returns the parameters of each seed, and the progress saved with these parameters."""
        abstract_model = nnx.eval_shape(lambda: self.task.init(jax.random.key(0)))
        self._graph, params, frozen = split_params(abstract_model, self.task.trainable)
        params = multi_seed.stacked_shapes(params, len(self.seeds))
        like = jax.tree.map(
            lambda value, sharding: jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=sharding
            ),
            params,
            shardings(params, self.partitioner.mesh, self.task.sharding_rules),
        )
        work = f"the model's parameters on {jax.device_count()} devices"
        explain = functools.partial(explain_oom, str(self.folder), work, _OOM_HINT)
        with explain():
            if opened:
                params, progress = opened.load_params(like), opened.progress
            else:
                params, progress = self._restore(like)
        if jax.tree.leaves(frozen):  # Neither checkpoints nor bundles contain frozen parameters.
            with explain():
                model = self.task.load(jax.random.key(self.config.seed), self.partitioner)
                frozen = self.partitioner.put_state(split_params(model, self.task.trainable)[2])
        per_seed = multi_seed.unstack_seeds(params, len(self.seeds))
        return [{"trained": trained, "frozen": frozen} for trained in per_seed], progress

    def _restore(self, like: Any) -> tuple[Any, dict[str, Any]]:
        with Checkpoints(self.folder, read_only=True) as checkpoints:
            restored = checkpoints.restore(BEST, like)
        if restored is None:
            raise InputError(
                f"{self.folder}: no best checkpoint; wait until training has saved one, or train "
                "again in another work directory if it was deleted"
            )
        return restored

    def models(self) -> list[Any]:
        """Returns one model per seed, with its best parameters."""
        return [_merge(self._graph, params) for params in self.params]

    def predict_batch(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Returns the predictions for a batch that is on the devices, with the batch's "row" array.

        Probabilities are not calibrated.
        """
        return multi_seed.ensemble(self.predict_batch_per_seed(batch))

    def predict_batch_per_seed(self, batch: dict[str, Any]) -> list[dict[str, jax.Array]]:
        """Returns the result of `predict_batch` for each seed."""
        return [self._programs.predict((params, self._constants), batch) for params in self.params]

    def initial_states(self, batch_size: int = 1) -> list[Any]:
        """Returns the state of each seed's causal model before the first utterance."""
        states = [model.initial_state(batch_size) for model in self.models()]
        # Use the sharding of later states, so that the first step runs the same program.
        return jax.device_put(states, self.partitioner.replicated)

    def predict_step(
        self, states: Sequence[Any], batch: dict[str, np.ndarray]
    ) -> tuple[list[Any], Predictions]:
        """Predicts the next utterance of each dialogue with a causal model.

        Args:
          states: State of each seed's model after the previous utterance.
          batch: See `FusionTask.predict_step`.

        Returns:
          The new states, and the arrays that `__call__` returns, with one row per dialogue.
        """
        with explain_oom("prediction", f"utterances on {jax.device_count()} devices", _OOM_HINT):
            results = [
                self._programs.predict_step((params, self._constants, state), batch)
                for params, state in zip(self.params, states, strict=True)
            ]
            per_seed = jax.device_get([predictions for _, predictions in results])
        # The outputs of a step have a single utterance, T = 1.
        per_seed = [{name: values[:, 0] for name, values in it.items()} for it in per_seed]
        return [state for state, _ in results], self.combine_seeds(per_seed)

    def __call__(self, features: DialogueFeatures, *, quiet: bool = False) -> Predictions:
        """Predicts every utterance in a split.

        Args:
          features: Features of N utterances.
          quiet: Whether to hide the progress bar.

        Returns:
          Arrays in the order of the utterances: "probabilities" [N, C]. For MiSTER-E, also "gate"
          [N, E], "expert_probabilities" [N, E, C], "expert_present" [N, E], and "score" [N] if the
          model predicts scores.
        """
        return self.combine_seeds(self.predict_per_seed(features, quiet=quiet))

    def combine_seeds(self, per_seed: Sequence[Predictions]) -> Predictions:
        """Averages the predictions of the seeds, and calibrates "probabilities".

        The experts' probabilities are not calibrated, because the calibration was fitted on the
        mixture.
        """
        predictions = multi_seed.ensemble(per_seed)
        if self._calibrate and self.calibration is not None:
            predictions["probabilities"] = self.calibration(predictions["probabilities"])
        return predictions

    def predict_per_seed(
        self, features: DialogueFeatures, *, quiet: bool = False
    ) -> list[Predictions]:
        """Returns each seed's uncalibrated predictions for every utterance in a split."""
        programs = self._programs
        options = {"compiled": sorted(programs.shapes)} if programs.is_shared else {}
        split = self.task.batched(features, num_shards=self.partitioner.num_shards, **options)
        predictions = self._predict_batches(split.batches(), split.steps, features, quiet=quiet)
        programs.shapes.update(split.shapes)
        return predictions

    def predict_batches(
        self,
        batches: Iterable[dict[str, np.ndarray]],
        num_batches: int,
        features: DialogueFeatures,
        *,
        quiet: bool = False,
    ) -> Predictions:
        """Predicts every utterance in a split from batches that the caller has prepared."""
        per_seed = self._predict_batches(batches, num_batches, features, quiet=quiet)
        return self.combine_seeds(per_seed)

    def _predict_batches(
        self,
        batches: Iterable[dict[str, np.ndarray]],
        num_batches: int,
        features: DialogueFeatures,
        *,
        quiet: bool,
    ) -> list[Predictions]:
        predictions: list[Predictions] = [{} for _ in self.seeds]
        explain = explain_oom("prediction", f"batches on {jax.device_count()} devices", _OOM_HINT)
        with explain, ProgressReporter(num_batches, unit="batches", quiet=quiet) as reporter:
            for batch in prefetch_to_device(batches, self.partitioner.put_batch):
                outputs_per_seed = jax.device_get(self.predict_batch_per_seed(batch))
                for seed_predictions, outputs in zip(predictions, outputs_per_seed, strict=True):
                    _scatter(outputs, features, seed_predictions)
                reporter.advance("predicting")
        return predictions


def read_task_name(model: epath.PathLike) -> str:
    """Returns the name of the task of a work directory or bundle, without loading the model.

    Raises:
      InputError: The folder is neither a work directory nor a complete bundle.
    """
    if bundle.is_bundle(model):
        return str(bundle.read_bundle(model).config.task)
    return str(read_config(model).task)


def _scatter(
    outputs: dict[str, np.ndarray], features: DialogueFeatures, predictions: Predictions
) -> None:
    """Copies the outputs for a batch, [B, T, ...], to the arrays of all utterances, [N, ...]."""
    rows = outputs.pop("row")
    for name, values in outputs.items():
        if name not in predictions:
            shape = (len(features.label), *values.shape[2:])
            predictions[name] = np.zeros(shape, values.dtype)
        for row, value in zip(rows, values, strict=True):
            if row >= 0:
                start, length = features.offsets[row], features.lengths[row]
                predictions[name][start : start + length] = value[:length]


def check_min_confidence(min_confidence: float | None) -> None:
    """Raises InputError if a minimum confidence is not a probability."""
    if min_confidence is not None and not 0 <= min_confidence <= 1:
        raise InputError(f"min_confidence={min_confidence}; allowed: 0 to 1")


def prediction_rows(
    class_names: Sequence[str], predictions: Predictions, min_confidence: float | None = None
) -> Iterator[dict]:
    """Yields the prediction for each utterance as JSON values.

    Args:
      class_names: Names of the classes.
      predictions: Result of a `Predictor`.
      min_confidence: Probability below which a prediction is uncertain.

    Yields:
      A dict with "emotion" (the predicted class) and "probabilities" (by class). If
      `min_confidence` is given, "uncertain" says whether the probability of the predicted class is
      below `min_confidence`. For MiSTER-E, the dict also has "gate" (weights by expert) and
      "experts" (each expert's prediction, or None if the expert is disabled or the utterance lacks
      its modality; all enabled experts predict an utterance without speech and text, from its
      context). If the model predicts scores, "score" is the predicted score.
    """
    for index, probabilities in enumerate(predictions["probabilities"]):
        row: dict[str, Any] = {"emotion": class_names[probabilities.argmax()]}
        rounded = _round(class_names, probabilities)
        if min_confidence is not None:
            row["uncertain"] = rounded[row["emotion"]] < min_confidence
        row["probabilities"] = rounded
        if "score" in predictions:
            row["score"] = round(float(predictions["score"][index]), 6)
        if "gate" in predictions:
            present = predictions["expert_present"][index]
            choices = predictions["expert_probabilities"][index].argmax(-1)
            row["gate"] = _round(EXPERTS, predictions["gate"][index])
            row["experts"] = {
                name: class_names[choice] if is_present else None
                for name, choice, is_present in zip(EXPERTS, choices, present, strict=True)
            }
        yield row


def _round(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}
