"""The page: sections as HTML, the dialogues as JSON for `script.js`, all in one file."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import datetime
import hashlib
import json
import string
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from etils import epath

import mister_jax
from mister_jax.checkpoint import BEST
from mister_jax.errors import InputError
from mister_jax.evaluation.report import charts, summary
from mister_jax.evaluation.report.charts import element
from mister_jax.evaluation.report.summary import DRAWS, Bootstrap, Score, SplitPredictions, System
from mister_jax.io import read_json, write_text
from mister_jax.metrics import SCORE_NAMES
from mister_jax.training.loop import read_config

_HERE = epath.resource_path("mister_jax") / "evaluation" / "report"
_TITLES = {
    "weighted_f1": "Weighted F1",
    "macro_f1": "Macro F1",
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
}
# A confusion matrix of more classes has narrow columns.
_NARROW = 10
# Where a dataset is does not tell what was done with it.
_PLACES = ("data.data_dir",)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What was trained, and which of its checkpoints was evaluated.

    Attributes:
      name: of the work directory.
      config: of the training, nested.
      epochs: after which the parameters of each seed were best, counted from 1.
      versions: of packages, and the device.
      date: of the checkpoint, as ISO 8601; None where unknown.
    """

    name: str
    config: Mapping[str, Any]
    epochs: Sequence[int]
    versions: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    date: str | None = None

    @classmethod
    def from_workdir(cls, workdir: epath.PathLike, checkpoint: Mapping[str, Any]) -> Experiment:
        """Of a work directory.

        Args:
          workdir: of the training.
          checkpoint: as `evaluate.evaluate` gives it, of one seed or several.

        Raises:
          InputError: it is none.
        """
        workdir = epath.Path(workdir)
        config = json.loads(read_config(workdir).to_json_best_effort())
        versions = workdir / "versions.json"
        return cls(
            name=workdir.name,
            config=config,
            epochs=checkpoint.get("epochs") or (checkpoint["epoch"],),
            versions=read_json(versions) if versions.exists() else {},
            date=_saved_on(workdir / "checkpoints" / BEST),
        )


def _saved_on(folder: epath.Path) -> str | None:
    """When the newest checkpoint was written, by what it says itself: copies keep that."""
    written = []
    for path in folder.glob("*/_CHECKPOINT_METADATA"):
        with contextlib.suppress(InputError):  # A checkpoint can be read without these notes.
            told = read_json(path).get("commit_timestamp_nsecs")
            if told:
                written.append(told)
    if not written:
        return None
    moment = datetime.datetime.fromtimestamp(max(written) / 1e9, datetime.UTC)
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def write_report(
    output: epath.PathLike,
    features: Any,
    predictions: Mapping[str, np.ndarray],
    scores: Mapping[str, Any],
    experiment: Experiment,
    texts: Mapping[str, str] | None = None,
    study: Mapping[str, Any] | None = None,
) -> epath.Path:
    """Writes `report.html` into a folder.

    Args:
      output: folder, which exists.
      features: of a task.
      predictions: arrays of `evaluate.Predictor`.
      scores: of `evaluate.scores`.
      experiment: what was trained.
      texts: utterance id to what was said, for those where it is known.
      study: of missing modalities, see `report_html`.

    Returns:
      The path of the page.
    """
    path = epath.Path(output) / "report.html"
    evaluated = SplitPredictions.from_features(features, predictions)
    write_text(path, report_html(evaluated, scores, experiment, texts, study))
    return path


def report_html(
    evaluated: SplitPredictions,
    scores: Mapping[str, Any],
    experiment: Experiment,
    texts: Mapping[str, str] | None = None,
    study: Mapping[str, Any] | None = None,
) -> str:
    """The page as text.

    Args:
      evaluated: a split and its predictions.
      scores: of `evaluate.evaluate`; "reference_scores", "sentiment" and "seeds" are taken from it.
      experiment: what was trained.
      texts: utterance id to what was said.
      study: content of `missing_modality.json`; without it there is no curve.
    """
    sections: list[tuple[str, str, str]] = []  # id, title, content
    if evaluated.labeled.any():
        bootstrap = Bootstrap(evaluated)
        systems = summary.systems(evaluated, bootstrap, scores.get("reference_scores", {}))
        of_seeds = scores.get("seeds")
        sections.append(("scores", "Scores", _scores(evaluated, systems, bootstrap, of_seeds)))
        if "sentiment" in scores:
            sections.append(("sentiment", "Sentiment", _sentiment(scores["sentiment"])))
        sections.append(("classes", "Classes", _classes(evaluated, bootstrap)))
        sections.append(("confusion", "Confusion", _confusion(evaluated, bootstrap)))
        if evaluated.gate is not None:
            sections.append(("gate", "Gate", _gate(evaluated)))
        sections.append(("calibration", "Calibration", _calibration(evaluated, bootstrap)))
    if study is not None:
        sections.append(("missing", "Missing modalities", _missing_modality(study)))
    script, texts = _file("script.js"), texts or {}
    digest = hashlib.sha256(script.encode()).digest()
    title = f"{evaluated.dataset}, {evaluated.split}: {experiment.name}"
    names = [(name, heading) for name, heading, _ in sections] + [("dialogues", "Dialogues")]
    return string.Template(_file("template.html")).substitute(
        title=escape(title),
        style=_file("style.css"),
        script=script,
        script_hash=base64.b64encode(digest).decode(),
        header=_header(evaluated, experiment),
        contents="".join(
            element("li", element("a", escape(heading), href=f"#{name}")) for name, heading in names
        ),
        sections="\n".join(_section(*section) for section in sections),
        dialogues_lead=_dialogues_lead(evaluated, bool(texts)),
        legend=_legend(evaluated.experts) if evaluated.experts else "",
        data=embedded_json(dialogue_data(evaluated, texts)),
        footer=f"Written by mister_jax {escape(mister_jax.__version__)}. "
        "Everything on this page is in this one file.",
    )


def embedded_json(value: Any) -> str:
    """Compact JSON that may stand in a `script` element, whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def dialogue_data(evaluated: SplitPredictions, texts: Mapping[str, str]) -> dict[str, Any]:
    """What `script.js` shows: columns over utterances, shares in thousandths.

    Args:
      evaluated: a split and its predictions.
      texts: utterance id to what was said.
    """
    # Single utterances need not come dialogue after dialogue.
    order = np.argsort(evaluated.dialogue, kind="stable")
    ids = evaluated.utterance_ids[order].tolist()
    counts = np.bincount(evaluated.dialogue, minlength=len(evaluated.dialogue_ids))

    def thousandths(values: np.ndarray) -> list[int]:
        return np.rint(1000 * values[order].astype(float)).astype(int).tolist()

    probabilities = np.rint(1000 * evaluated.probabilities[order].astype(float)).astype(int)
    return {
        "classes": list(evaluated.class_names),
        "experts": list(evaluated.experts),
        "dialogues": list(evaluated.dialogue_ids),
        "offsets": [0, *np.cumsum(counts).tolist()],
        "utterances": ids,
        "texts": [texts.get(name, "") for name in ids] if texts else None,
        "label": evaluated.label[order].tolist(),
        "predicted": evaluated.predicted[order].tolist(),
        "probabilities": probabilities.ravel().tolist(),
        "votes": evaluated.votes[order].T.tolist(),
        "gate": None
        if evaluated.gate is None
        else [thousandths(column) for column in evaluated.gate.T],
    }


def _file(name: str) -> str:
    return (_HERE / name).read_text()


def _section(name: str, title: str, content: str) -> str:
    heading = element("h2", escape(title), id=f"{name}-title")
    return element("section", f"\n{heading}\n{content}\n", id=name, aria_labelledby=f"{name}-title")


def _table(label: str, head: Sequence[str], rows: Iterable[Sequence[str]], class_: str = "") -> str:
    """A table whose first column heads its rows; cells are HTML. It scrolls where it is wide."""
    heads = "".join(element("th", cell, scope="col") for cell in head)
    body = "".join(
        element(
            "tr",
            element("th", row[0], scope="row") + "".join(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    )
    table = element(
        "table",
        element("caption", escape(label), class_="hidden")
        + element("thead", element("tr", heads))
        + element("tbody", body),
        class_=class_,
    )
    return element("div", table, class_="scroll", role="region", tabindex=0, aria_label=label)


def _details(title: str, content: str) -> str:
    return element("details", element("summary", escape(title)) + content)


def _score(score: Score | None, *, signed: bool = False) -> str:
    """A score, its interval below."""
    if score is None:
        return element("span", "&ndash;", class_="none")
    form = "{:+.3f}" if signed else "{:.3f}"

    def shown(value: float) -> str:
        return form.format(value).replace("-", "&minus;")

    text = element("span", shown(score.value), class_="value")
    if score.low is not None and score.high is not None:
        ends = f"{shown(score.low)} to {shown(score.high)}" if signed else _ends(score)
        text += element("span", ends, class_="interval")
    return text


def _ends(score: Score) -> str:
    return f"{score.low:.3f}&ndash;{score.high:.3f}"


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _header(evaluated: SplitPredictions, experiment: Experiment) -> str:
    config = dict(_flat(experiment.config))
    unlabeled = int(np.sum(~evaluated.labeled))
    utterances = f"{len(evaluated.label):,} utterances"
    if unlabeled:
        utterances += f", {unlabeled:,} of them unlabeled"
    epoch = "epoch" if len(experiment.epochs) == 1 else "epochs"
    epoch += f" {', '.join(map(str, experiment.epochs))}"
    if "train.epochs" in config:
        epoch += f" of {config['train.epochs']}, the best on validation"
    optimizer = [str(config["optimizer.name"])] if "optimizer.name" in config else []
    if "optimizer.learning_rate" in config:
        optimizer.append(f"learning rate {config['optimizer.learning_rate']:g}")
    if "data.batch_size" in config:
        optimizer.append(f"batch size {config['data.batch_size']}")
    if "seed" in config:
        count = len(experiment.epochs)
        seeds = ", ".join(str(config["seed"] + index) for index in range(count))
        optimizer.append(f"seed {seeds}" if count == 1 else f"seeds {seeds}")
    versions = experiment.versions
    facts = {
        "Split": f"{evaluated.split}: {len(evaluated.dialogue_ids):,} dialogues, {utterances}, "
        f"{len(evaluated.class_names)} classes",
        "Trained on": str(config.get("data.name", "")),
        "Training": ", ".join(optimizer),
        "Checkpoint": epoch + (f"; saved {experiment.date}" if experiment.date else ""),
        "With": ", ".join(
            f"{name} {versions[name]}"
            for name in ("mister_jax", "jax", "flax", "device")
            if name in versions
        ),
    }
    lines = "".join(
        element("dt", escape(name)) + element("dd", escape(value))
        for name, value in facts.items()
        if value
    )
    rows = [
        (escape(name), escape(json.dumps(value, ensure_ascii=False)))
        for name, value in config.items()
        if name not in _PLACES
    ]
    task = str(experiment.config.get("task", "")).replace("_", " ")
    over = f"Evaluation report · {task}" if task else "Evaluation report"
    return "\n".join(
        (
            element("p", escape(over), class_="over"),
            element(
                "h1",
                f"{escape(evaluated.dataset)} <span>{escape(evaluated.split)}</span>",
            ),
            element("p", escape(experiment.name), class_="experiment"),
            element("dl", lines, class_="facts"),
            _details("All of the config", _table("Config", ("field", "value"), rows, "config")),
        )
    )


def _named(system: System) -> str:
    if system.kind == "expert":
        swatch = element("span", class_=f"swatch {system.name}", aria_hidden="true")
        return f"{swatch}{escape(system.name)} alone"
    if system.kind == "reference":
        return f"{escape(system.name.replace('_', ' '))} (reference)"
    return {"model": "this model", "majority": "majority class"}[system.kind]


def _scores(
    evaluated: SplitPredictions,
    systems: Sequence[System],
    bootstrap: Bootstrap,
    of_seeds: Mapping[str, Any] | None,
) -> str:
    main = systems[0]
    figures = "".join(
        element(
            "div",
            element("dt", _TITLES[key])
            + element(
                "dd",
                element("strong", f"{score.value:.3f}")
                + (element("span", _ends(score)) if score.low is not None else ""),
            ),
        )
        for key, score in main.scores.items()
    )
    rows = []
    for system in systems:
        own, kind = system.scores.get("weighted_f1"), system.kind
        drawn = ""
        if own is not None:
            name = system.name if kind == "expert" else kind
            drawn = charts.whisker(own, name, main.scores["weighted_f1"].value)
        rows.append(
            (
                _named(system),
                _score(own),
                drawn,
                *(_score(system.scores.get(key)) for key in SCORE_NAMES[1:]),
                _score(system.difference, signed=True),
                f"{system.utterances:,}" if system.utterances is not None else _score(None),
            )
        )
    head = (
        "predicted by",
        "weighted F1",
        "from 0 to 1",
        *(_TITLES[key].lower().replace("f1", "F1") for key in SCORE_NAMES[1:]),
        "difference in weighted F1",
        "utterances",
    )
    if bootstrap.draws:
        note = (
            f"Intervals hold 95 % of {DRAWS:,} bootstrap draws of the {len(bootstrap.dialogues):,} "
            "labeled dialogues, not of single utterances, which are not independent. Differences "
            "are from this model, on the same utterances and draws; one whose interval excludes 0 "
            "is hardly chance."
        )
    else:
        note = "There is one labeled dialogue, so there are no intervals."
    if of_seeds is not None:
        note += (
            f" This model is the mean of {len(of_seeds['of_each'])} seeds; one alone has weighted "
            f"F1 {of_seeds['mean']['weighted_f1']:.3f} ± {of_seeds['deviation']['weighted_f1']:.3f}"
            " (mean and standard deviation)."
        )
    if evaluated.experts:
        note += " An expert alone is scored where its modality is there."
    return "\n".join(
        (
            element("dl", figures, class_="figures"),
            _table("Scores of the model and what it is compared with", head, rows, "systems"),
            element("p", note, class_="note"),
        )
    )


def _sentiment(readings: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        (
            escape(name.replace("_", " ")),
            f"{found['weighted_f1']:.3f}",
            f"{found['accuracy']:.3f}",
            f"{found['utterances']:,}",
        )
        for name, found in readings.items()
    ]
    head = ("reading of the scores", "weighted F1", "accuracy", "utterances")
    return _table("Binary readings of the sentiment scores", head, rows)


def _classes(evaluated: SplitPredictions, bootstrap: Bootstrap) -> str:
    rows = [
        (
            escape(name),
            f"{found['support']:,}",
            _score(found["precision"]),
            _score(found["recall"]),
            _score(found["f1"]),
            charts.whisker(found["f1"], "model"),
        )
        for name, found in summary.per_class(evaluated, bootstrap).items()
    ]
    head = ("emotion", "support", "precision", "recall", "F1", "from 0 to 1")
    return _table("Scores of each class", head, rows, "classes")


def _confusion(evaluated: SplitPredictions, bootstrap: Bootstrap) -> str:
    counts, _ = bootstrap.confusion(evaluated.predicted)
    names = [escape(name) for name in evaluated.class_names]
    rows = []
    for index, name in enumerate(names):
        support = int(counts[index].sum())
        cells = []
        for column, count in enumerate(counts[index].tolist()):
            share = 100 * count / max(support, 1)
            percent = element("span", f"{share:.0f} %" if count else "", class_="share")
            kind = "cell diagonal" if column == index else "cell"
            cells.append(
                element("div", f"{count}{percent}", class_=kind, style=f"--share:{share:.1f}%")
            )
        rows.append((name, *cells, f"{support:,}"))
    head = ("true ↓ predicted →", *names, "support")
    lead = "Counts, and below them the share of their row. A framed cell is right."
    kind = "confusion" if len(names) <= _NARROW else "confusion narrow"
    return element("p", lead, class_="note") + _table(
        "Confusion: true emotions down, predicted across", head, rows, kind
    )


def _calibration(evaluated: SplitPredictions, bootstrap: Bootstrap) -> str:
    error, bins = summary.calibration(evaluated, bootstrap)
    rows = [
        (
            f"{part.low:.1f}&ndash;{part.high:.1f}",
            f"{part.count:,}",
            f"{part.confidence:.3f}",
            _score(part.accuracy),
        )
        for part in bins
    ]
    confidence = sum(part.confidence * part.count for part in bins)
    accuracy = sum(part.accuracy.value * part.count for part in bins)
    gap = (confidence - accuracy) / sum(part.count for part in bins)
    side = "above" if gap > 0 else "below"
    lead = (
        f"Expected calibration error {element('strong', f'{error:.3f}')}, over ten bins of equal "
        "width of the probability of the predicted emotion. Mean confidence is "
        f"{abs(gap):.3f} {side} accuracy. On the dashed line the model would be right just as "
        "often as it says; the bars are the utterances of each bin."
    )
    head = ("confidence", "utterances", "mean confidence", "accuracy")
    return "".join(
        (
            element("p", lead),
            element("figure", charts.calibration_curve(bins)),
            _details("The bins as a table", _table("Calibration", head, rows)),
        )
    )


def _gate(evaluated: SplitPredictions) -> str:
    assert evaluated.gate is not None
    found = summary.gate_rows(evaluated)
    rows: list[tuple[str, ...]] = []
    before = None
    for name, outcome, count, gate in found:
        shown = "all emotions" if name is None else name
        # The second row of an emotion is named for those who cannot see that it is one.
        title = element("span", escape(shown), class_="hidden" if shown == before else "first")
        rows.append((title, outcome, f"{count:,}", charts.stacked_bar(evaluated.experts, gate)))
        before = shown
    lead = (
        "The weight of each expert, in percent, mean over the utterances of an emotion that the "
        "model predicted rightly and wrongly."
    )
    head = ("true emotion", "predicted", "utterances", "mean gate")
    return (
        element("p", lead) + _legend(evaluated.experts) + _table("Mean gate", head, rows, "gates")
    )


def _legend(experts: Sequence[str]) -> str:
    items = "".join(
        element("li", element("span", class_=f"swatch {name}", aria_hidden="true") + escape(name))
        for name in experts
    )
    return element("ul", items, class_="legend", aria_label="Colours of the experts")


def _missing_modality(study: Mapping[str, Any]) -> str:
    names = {"speech": "speech dropped", "text": "text dropped", "both": "both dropped"}
    lines = charts.missing_modality_lines(study)
    legend = "".join(
        element("li", element("span", class_=f"swatch {name}", aria_hidden="true") + names[name])
        for name in lines
    )
    rows = [
        (
            f"{point['drop_speech']:g}",
            f"{point['drop_text']:g}",
            f"{point['weighted_f1']:.3f} ± {point['deviation']:.3f}",
        )
        for point in study["points"]
    ]
    head = ("share without speech", "share without text", "weighted F1")
    lead = (
        "Weighted F1 when utterances lose a modality at random, mean and deviation of the draws. "
        f"The dashed line is the score with nothing dropped, {study['complete']:.3f}."
    )
    return "".join(
        (
            element("p", lead),
            element("ul", legend, class_="legend"),
            element("figure", charts.missing_modality_curve(study)),
            _details("The points as a table", _table("Missing modalities", head, rows)),
        )
    )


def _dialogues_lead(evaluated: SplitPredictions, texts: bool) -> str:
    parts = ["Each utterance with its predicted and its true emotion"]
    if evaluated.gate is not None:
        parts.append("the weights of the experts and their votes")
    elif evaluated.experts:
        parts.append("the experts' votes")
    lead = " and ".join(parts) + "."
    if evaluated.experts:
        lead += " A vote in bold is the true emotion."
    return lead if texts else f"{lead} What was said is not part of the features."
