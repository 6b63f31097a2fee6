"""Scores and predictions of a trained work directory, on any split."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from mister_jax import metrics, multi_seed
from mister_jax.checkpoint import BEST, Checkpoints
from mister_jax.console import ProgressReporter
from mister_jax.data import DialogueFeatures, prefetch_to_device
from mister_jax.data.schema import MODALITIES
from mister_jax.errors import InputError
from mister_jax.evaluation import figures
from mister_jax.evaluation.report import Experiment, read_utterance_texts, write_report
from mister_jax.io import read_json, read_json_lines, write_json, write_text
from mister_jax.metrics import mean_and_deviation
from mister_jax.models import EXPERTS
from mister_jax.parallel.memory import explain_oom
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import data_mesh, shardings
from mister_jax.tasks import config_seeds, task_class
from mister_jax.training.loop import read_config
from mister_jax.training.steps import split_model

Predictions = dict[str, np.ndarray]

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""At which a report drops each modality, and how often anew."""
RATE_DRAWS = 3

STUDY = "missing_modality"
AS_ZEROS = "missing_modality_as_zeros"
"""Names of the files of a missing-modality study."""

_REMEDY = "devices with more memory, or more of them"


class Predictor:
    """The best parameters of a work directory, ready to predict on all devices.

    Of several seeds it predicts what they say together, see `multi_seed.ensemble`.

    Args:
      workdir: of a training.
      data_dir: where its datasets are now; the place of the training by default.

    Raises:
      InputError: not a work directory, one without a best checkpoint, or parameters that do not
        fit into the devices' memory.
    """

    def __init__(self, workdir: epath.PathLike, data_dir: str | None = None):
        workdir = epath.Path(workdir)
        config = read_config(workdir)
        if data_dir:
            config.data.data_dir = data_dir
        self.data_dir: str | None = config.data.data_dir or None
        description = read_json(workdir / "model.json")
        try:
            self.task = task_class(config).restore(config, description)
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{workdir / 'model.json'}: damaged ({error!r}); needed: that of a training"
            ) from error
        self.seeds = config_seeds(config)
        self.partitioner = JitPartitioner(data_mesh(), self.task.rules)
        shapes = nnx.eval_shape(lambda: self.task.init(jax.random.key(0)))
        self._graph, params, frozen = split_model(shapes, self.task.trainable)
        params = multi_seed.stacked_shapes(params, len(self.seeds))
        like = jax.tree.map(
            lambda value, sharding: jax.ShapeDtypeStruct(
                value.shape, value.dtype, sharding=sharding
            ),
            params,
            shardings(params, self.partitioner.mesh, self.task.rules),
        )
        memory = functools.partial(
            explain_oom,
            str(workdir),
            f"the model's parameters on {jax.device_count()} devices",
            _REMEDY,
        )
        with Checkpoints(workdir, read_only=True) as checkpoints, memory():
            restored = checkpoints.restore(BEST, like)
        if restored is None:
            raise InputError(
                f"{workdir}: no best checkpoint yet; train until the first validation has been"
            )
        params, self.progress = restored
        if jax.tree.leaves(frozen):  # They come from where the training had them from.
            with memory():
                loaded = self.task.load(jax.random.key(config.seed), self.partitioner)
                frozen = self.partitioner.put_state(split_model(loaded, self.task.trainable)[2])
        self.params = [
            {"trained": own, "frozen": frozen}
            for own in multi_seed.unstack_seeds(params, len(self.seeds))
        ]

        def read(params, batch, _axis_name):
            return {**self.task.predict(self._merged(params), batch), "row": batch["row"]}

        self._predict = self.partitioner.compile_eval(read)

    def _merged(self, params: Mapping[str, Any]) -> Any:
        return nnx.merge(self._graph, params["trained"], params["frozen"])

    def models(self) -> list[Any]:
        """The model of each seed, with its best parameters on all devices."""
        return [self._merged(own) for own in self.params]

    def run(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """What the task predicts for a placed batch, and its "row"."""
        return multi_seed.ensemble(self.predict_batch_per_seed(batch))

    def predict_batch_per_seed(self, batch: dict[str, Any]) -> list[dict[str, jax.Array]]:
        """`run` of each seed alone."""
        return [self._predict(own, batch) for own in self.params]

    def __call__(self, features: DialogueFeatures, *, quiet: bool = False) -> Predictions:
        """Predicts every utterance of a split.

        Args:
          features: N utterances.
          quiet: show no progress.

        Returns:
          Arrays in the order of the utterances: "probabilities" [N, C], "gate" [N, E],
          "expert_probabilities" [N, E, C], "expert_present" [N, E].
        """
        return multi_seed.ensemble(self.predict_per_seed(features, quiet=quiet))

    def predict_per_seed(
        self, features: DialogueFeatures, *, quiet: bool = False
    ) -> list[Predictions]:
        """`__call__` of each seed alone."""
        split = self.task.batched(features, num_shards=self.partitioner.num_shards)
        return self._over(split.batches(), split.steps, features, quiet=quiet)

    def over(
        self,
        batches: Iterable[dict[str, np.ndarray]],
        steps: int,
        features: DialogueFeatures,
        *,
        quiet: bool = False,
    ) -> Predictions:
        """`__call__` over batches that are made already, `steps` of them."""
        return multi_seed.ensemble(self._over(batches, steps, features, quiet=quiet))

    def _over(
        self,
        batches: Iterable[dict[str, np.ndarray]],
        steps: int,
        features: DialogueFeatures,
        *,
        quiet: bool,
    ) -> list[Predictions]:
        offsets = features.offsets
        found: list[Predictions] = [{} for _ in self.seeds]
        memory = explain_oom("prediction", f"batches on {jax.device_count()} devices", _REMEDY)
        with memory, ProgressReporter(steps, unit="batches", quiet=quiet) as reporter:
            for batch in prefetch_to_device(batches, self.partitioner.put_batch):
                for own, outputs in zip(
                    found, jax.device_get(self.predict_batch_per_seed(batch)), strict=True
                ):
                    rows = outputs.pop("row")  # of all processes
                    for name, values in outputs.items():
                        if name not in own:
                            shape = (len(features.label), *values.shape[2:])
                            own[name] = np.zeros(shape, values.dtype)
                        for row, value in zip(rows, values, strict=True):
                            if row >= 0:
                                length = features.lengths[row]
                                start = offsets[row]
                                own[name][start : start + length] = value[:length]
                reporter.advance("predicting")
        return found


def scores(features: DialogueFeatures, predictions: Predictions) -> dict[str, Any]:
    """`metrics.scores` of predictions, and of each expert's choices.

    Where utterances have scores and two classes of sentiment (see `metrics.positive_class`), also
    "sentiment": the readings of the scores.
    """
    classes = len(features.class_names)
    labeled = features.label >= 0

    def confusion(predicted: np.ndarray, counted: np.ndarray) -> np.ndarray:
        cells = features.label[counted] * classes + predicted[counted]
        return np.bincount(cells, minlength=classes**2).reshape(classes, classes)

    predicted = predictions["probabilities"].argmax(-1)
    counts = confusion(predicted, labeled)
    found = metrics.scores(counts, features.class_names)
    found["confusion"] = counts.tolist()
    confidence = predictions["probabilities"][labeled].max(-1)
    calibration = metrics.calibration(confidence, (predicted == features.label)[labeled])
    found["calibration_error"] = calibration["error"]
    if "gate" in predictions:
        found["mean_gate"] = {}
        found["experts"] = {}
        for index, name in enumerate(EXPERTS):
            present = labeled & predictions["expert_present"][:, index]
            if present.any():
                choices = predictions["expert_probabilities"][:, index].argmax(-1)
                own = metrics.scores(confusion(choices, present), features.class_names)
                found["experts"][name] = {key: own[key] for key in ("weighted_f1", "utterances")}
                found["mean_gate"][name] = float(predictions["gate"][labeled, index].mean())
    positive = metrics.positive_class(features.class_names)
    if features.score is not None and positive is not None:
        found["sentiment"] = metrics.binary_sentiment(
            np.where(labeled, features.score, np.nan), predicted == positive
        )
    if "reference_scores" in features.metadata:
        found["reference_scores"] = features.metadata["reference_scores"]
    return found


def prediction_rows(features: DialogueFeatures, predictions: Predictions) -> Iterator[dict]:
    """One JSON object an utterance, in the order of the split."""
    names = features.class_names
    dialogues = np.repeat(np.arange(len(features.lengths)), features.lengths)
    told = predicted_rows(names, predictions)
    for index, (dialogue, row) in enumerate(zip(dialogues, told, strict=True)):
        label = features.label[index]
        yield {
            "dataset": features.name,
            "split": features.split,
            "dialogue": str(features.dialogue_ids[dialogue]),
            "utterance": str(features.utterance_ids[index]),
            "label": names[label] if label >= 0 else None,
            **_further(features, index),
            **row,
        }


def _further(features: DialogueFeatures, index: int) -> dict[str, Any]:
    """Returns the further columns of an utterance under "metadata", nothing if it has none."""
    further = getattr(features, "utterance_metadata", None)  # Utterances of stage 1 have none.
    metadata = {} if further is None else json.loads(further[index])
    return {"metadata": metadata} if metadata else {}


def predicted_rows(names: Sequence[str], predictions: Predictions) -> Iterator[dict]:
    """What is predicted for each utterance, plain JSON values.

    Args:
      names: of the classes.
      predictions: arrays of `Predictor`.

    Yields:
      "predicted", "probabilities" by class; of MiSTER-E also "gate" by expert, and "experts": the
      vote of each, None where it has no modality to vote from.
    """
    for index, probabilities in enumerate(predictions["probabilities"]):
        row: dict[str, Any] = {
            "predicted": names[probabilities.argmax()],
            "probabilities": _rounded(names, probabilities),
        }
        if "gate" in predictions:
            present = predictions["expert_present"][index]
            choices = predictions["expert_probabilities"][index].argmax(-1)
            row["gate"] = _rounded(EXPERTS, predictions["gate"][index])
            row["experts"] = {
                name: names[choice] if there else None
                for name, choice, there in zip(EXPERTS, choices, present, strict=True)
            }
        yield row


def _rounded(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in zip(names, values, strict=True)}


def evaluate(
    workdir: epath.PathLike,
    split: str,
    *,
    dataset: str | None = None,
    data_dir: str | None = None,
    output: epath.PathLike | None = None,
    report: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores a split and writes `metrics.json`, `predictions.jsonl` and `confusion.png`.

    Each of the files holds all splits that were evaluated so far; this one is replaced in them.
    Those of another dataset than the training's are told apart: its test split is "DATASET/test" in
    `metrics.json`.

    Args:
      workdir: of a training.
      split: of the dataset.
      dataset: another than the training's, with the same classes and widths.
      data_dir: where the dataset is; as in the training by default.
      output: folder of the files; the work directory by default.
      report: write `report.html`, too, of this split alone. A missing-modality study belongs to
        it, that in the folder if it is of the same checkpoint, or one at `RATES`.
      quiet: show no progress.

    Returns:
      The scores of the split, as in `metrics.json`: of `scores`, and "dataset", "checkpoint" (the
      "epoch" of the parameters), "seeds" where there are several.

    Raises:
      InputError: a work directory, a dataset, or results in the folder that cannot be used.
    """
    predictor = Predictor(workdir, data_dir)
    features = predictor.task.features(split, dataset)
    output = epath.Path(workdir if output is None else output)
    trained_on = read_config(workdir).data.name
    key = split if features.name == trained_on else f"{features.name}/{split}"
    by_split = read_metrics(output)
    path = output / "predictions.jsonl"
    kept = [
        row
        for row in (read_json_lines(path) if path.exists() else [])
        if (row.get("dataset", trained_on), row.get("split")) != (features.name, split)
    ]
    study = _read_study(output, _studied(predictor, features)) if report else None
    if features.score is not None and metrics.positive_class(features.class_names) is None:
        logging.warning(
            "dataset %s: its scores are not read as sentiment, which needs classes such as "
            "negative and positive; it has %s",
            features.name,
            ", ".join(features.class_names),
        )
    of_each = predictor.predict_per_seed(features, quiet=quiet)
    predictions = multi_seed.ensemble(of_each)
    found = scores(features, predictions)
    if len(of_each) > 1:
        own = [scores(features, each) for each in of_each]
        found["seeds"] = multi_seed.summarize_seeds(predictor.seeds, own)
    found |= {"dataset": features.name, "checkpoint": {"epoch": predictor.progress["epoch"]}}
    if report and study is None and _has_both(features):
        pairs = [(rate, 0.0) for rate in RATES] + [(0.0, rate) for rate in RATES]
        study = _study(predictor, features, pairs, RATE_DRAWS, quiet=quiet)
    if jax.process_index() == 0:
        output.mkdir(parents=True, exist_ok=True)
        by_split = {**by_split, key: found}
        write_json(output / "metrics.json", by_split)
        rows = itertools.chain(kept, prediction_rows(features, predictions))
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        figures.plot_confusion(
            {
                f"{name}, weighted F1 {value['weighted_f1']:.3f}": np.array(value["confusion"])
                for name, value in by_split.items()
            },
            features.class_names,
            output / "confusion.png",
        )
        if report:
            if study is not None:
                _write_study(study, output)
            experiment = Experiment.from_workdir(workdir, found["checkpoint"])
            texts = read_utterance_texts(features, predictor.data_dir)
            write_report(output, features, predictions, found, experiment, texts, study)
    return found


def read_metrics(output: epath.PathLike) -> dict[str, Any]:
    """`metrics.json` of a folder, by split; empty if there is none.

    Raises:
      InputError: it is damaged.
    """
    path = epath.Path(output) / "metrics.json"
    return read_json(path) if path.exists() else {}


def drop(
    features: DialogueFeatures,
    drop_speech: float,
    drop_text: float,
    seed: int,
    *,
    zero_fill_values: Mapping[str, np.ndarray | float] | None = None,
) -> DialogueFeatures:
    """Features whose utterances have lost each modality independently, flagged as missing.

    Args:
      features: a split.
      drop_speech: probability that an utterance loses its speech.
      drop_text: likewise its text.
      seed: of the draw.
      zero_fill_values: of "speech" and "text" the vector [D] (or number) that stands for a lost one, which
        is then not flagged; without them it is.
    """
    draw = np.random.default_rng(seed).random((2, len(features.label)))
    changes = {}
    for modality, row, rate in zip(MODALITIES, draw, (drop_speech, drop_text), strict=True):
        if zero_fill_values is None:
            name, kept = f"{modality}_present", getattr(features, f"{modality}_present")
            changes[name] = kept & (row >= rate)
        else:
            vectors = getattr(features, modality)
            blanked = np.where((row < rate)[:, None], zero_fill_values[modality], vectors)
            changes[modality] = blanked.astype(vectors.dtype)
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
) -> list[dict[str, float]]:
    """Scores a split with modalities missing at given rates.

    Rates of one modality are paired with the other's (a single one goes with all). Writes
    `missing_modality.json` and `missing_modality.png`; `missing_modality_as_zeros` with `as_zeros`.

    Args:
      workdir: of a training.
      split: of the dataset.
      drop_speech: probabilities that an utterance loses its speech.
      drop_text: likewise its text.
      as_zeros: do as the paper's study does: the model reads zeros for what is lost and is not told
        that they stand for nothing. By default it is told, as of any utterance that lacks a
        modality.
      draws: of the utterances that lose them, for each pair of rates.
      dataset: another than the training's.
      data_dir: where the dataset is.
      output: folder of the files; the work directory by default.
      quiet: show no progress.

    Returns:
      For each pair "drop_speech", "drop_text", "weighted_f1" (mean of the draws), "deviation".

    Raises:
      InputError: a rate outside 0 to 1, or lists that cannot be paired.
    """
    count = max(len(drop_speech), len(drop_text))
    paired = []
    for name, rates in (("drop_speech", drop_speech), ("drop_text", drop_text)):
        if len(rates) not in (1, count):
            raise InputError(f"{name} has {len(rates)} rates; allowed are 1 or {count}")
        if any(not 0 <= rate <= 1 for rate in rates):
            raise InputError(f"{name}={list(rates)}; allowed are 0 <= rate <= 1")
        paired.append(list(rates) * (count if len(rates) == 1 else 1))
    predictor = Predictor(workdir, data_dir)
    features = predictor.task.features(split, dataset)
    if not isinstance(features, DialogueFeatures):
        raise InputError(f"{workdir}: a training of an encoder; needed: one of MiSTER-E")
    pairs = list(zip(*paired, strict=True))
    zero_fill_values = predictor.task.zero_fill_values() if as_zeros else None
    study = _study(predictor, features, pairs, draws, zero_fill_values, quiet=quiet)
    if jax.process_index() == 0:
        output = epath.Path(workdir if output is None else output)
        output.mkdir(parents=True, exist_ok=True)
        _write_study(study, output, AS_ZEROS if as_zeros else STUDY)
    return study["points"]


def _study(
    predictor: Predictor,
    features: DialogueFeatures,
    pairs: Sequence[tuple[float, float]],
    draws: int,
    zero_fill_values: Mapping[str, np.ndarray | float] | None = None,
    *,
    quiet: bool,
) -> dict[str, Any]:
    """What `missing_modality.json` holds, for pairs of rates of speech and of text.

    Of several seeds each is scored alone; means and deviations are over draws and seeds.
    """

    def scored(seen: DialogueFeatures) -> list[float]:
        of_each = predictor.predict_per_seed(seen, quiet=True)
        return [scores(seen, each)["weighted_f1"] for each in of_each]

    complete = mean_and_deviation(scored(features))[0]
    points = []
    with ProgressReporter(len(pairs) * draws, unit="draws", quiet=quiet) as reporter:
        for speech_rate, text_rate in pairs:
            values: list[float] = []
            for draw in range(draws):
                values += scored(drop(features, speech_rate, text_rate, draw, zero_fill_values=zero_fill_values))
                reporter.advance(f"drop speech {speech_rate}, text {text_rate}")
            mean, deviation = mean_and_deviation(values)
            points.append(
                {
                    "drop_speech": speech_rate,
                    "drop_text": text_rate,
                    "weighted_f1": mean,
                    "deviation": deviation,
                }
            )
    return {**_studied(predictor, features), "complete": complete, "points": points}


def _studied(predictor: Predictor, features: Any) -> dict[str, Any]:
    """What a study is of."""
    return {
        "dataset": features.name,
        "split": features.split,
        "checkpoint": predictor.progress,
    }


def _write_study(study: Mapping[str, Any], output: epath.Path, name: str = STUDY) -> None:
    write_json(output / f"{name}.json", study)
    figures.plot_missing_modality(study["points"], study["complete"], output / f"{name}.png")


def _read_study(output: epath.Path, of: Mapping[str, Any]) -> dict[str, Any] | None:
    """The study in a folder, if it is one of the same."""
    path = output / f"{STUDY}.json"
    study = read_json(path) if path.exists() else {}
    return study if all(study.get(name) == value for name, value in of.items()) else None


def _has_both(features: Any) -> bool:
    """Whether there is speech and text to drop."""
    return (
        isinstance(features, DialogueFeatures)
        and bool(features.speech_present.any())
        and bool(features.text_present.any())
    )
