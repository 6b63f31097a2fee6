"""Renders each section of a report as HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mister_jax.console import rater_rows, regression_rows
from mister_jax.evaluation.confidence_intervals import DialogueBootstrap, Estimate
from mister_jax.evaluation.figures import missing_modality_lines
from mister_jax.evaluation.report import charts, statistics
from mister_jax.evaluation.report.elements import (
    details,
    element,
    estimate_cell,
    expert_legend,
    legend,
    swatch,
    table,
)
from mister_jax.evaluation.report.statistics import ScoredModel
from mister_jax.evaluation.split_predictions import SplitPredictions
from mister_jax.metrics import CALIBRATION_SCORES, SCORE_NAMES

_SCORE_TITLES = {
    "weighted_f1": "Weighted F1",
    "macro_f1": "Macro F1",
    "accuracy": "Accuracy",
    "uar": "UAR (unweighted average recall)",
}
_MODEL_NAMES = {
    "model": "this model",
    "mean": "mean of the experts, without the gate",
    "majority": "majority class",
}
_VERSIONS = ("uncalibrated", "calibrated", "difference")
_MAX_WIDE_CLASSES = 10  # Confusion matrices with more classes get narrow columns.


def render_scores(
    predictions: SplitPredictions,
    models: Sequence[ScoredModel],
    bootstrap: DialogueBootstrap,
    seeds: Mapping[str, Any] | None,
) -> str:
    """Renders the scores of `models`, and of the seeds of the evaluated model, `models[0]`."""
    figures = []
    for key, score in models[0].scores.items():
        number = element("strong", f"{score.value:.3f}")
        if score.low is not None:
            number += element("span", f"{score.low:.3f}&ndash;{score.high:.3f}")
        figures.append(element("div", element("dt", _SCORE_TITLES[key]) + element("dd", number)))
    head = (
        "predicted by",
        "weighted F1",
        "from 0 to 1",
        *(_SCORE_TITLES[key].lower().replace("f1", "F1") for key in SCORE_NAMES[1:]),
        "difference in weighted F1",
        "utterances",
    )
    rows = [_score_row(model, models[0].scores["weighted_f1"].value) for model in models]
    notes = [_interval_note(bootstrap)]
    if seeds is not None:
        mean, deviation = seeds["mean"]["weighted_f1"], seeds["deviation"]["weighted_f1"]
        notes.append(
            f"This model is an ensemble of {len(seeds['of_each'])} seeds. A single seed reaches "
            f"weighted F1 {mean:.3f} ± {deviation:.3f} (mean and standard deviation)."
        )
    if predictions.experts:
        notes.append(
            "Experts are scored only on utterances that have their modality, or neither speech nor "
            "text."
        )
    return "\n".join(
        (
            element("dl", "".join(figures), class_="figures"),
            table("Scores of the model and of its baselines", head, rows, "models"),
            element("p", " ".join(notes), class_="note"),
        )
    )


def _score_row(model: ScoredModel, mark: float) -> tuple[str, ...]:
    if model.kind == "expert":
        name = f"{swatch(model.name)}{escape(model.name)} alone"
    elif model.kind == "reference":
        name = f"{escape(model.name.replace('_', ' '))} (reference)"
    else:
        name = _MODEL_NAMES[model.kind]
    weighted_f1 = model.scores.get("weighted_f1")
    color = model.name if model.kind == "expert" else model.kind
    return (
        name,
        estimate_cell(weighted_f1),
        "" if weighted_f1 is None else charts.whisker(weighted_f1, color, mark),
        *(estimate_cell(model.scores.get(key)) for key in SCORE_NAMES[1:]),
        estimate_cell(model.difference, signed=True),
        estimate_cell(None) if model.utterances is None else f"{model.utterances:,}",
    )


def _interval_note(bootstrap: DialogueBootstrap) -> str:
    if not bootstrap.num_resamples:
        return "There is only one labeled dialogue, so there are no intervals."
    return (
        f"Intervals are 95% bootstrap intervals from {bootstrap.num_resamples:,} resamples of the "
        f"{len(bootstrap.dialogues):,} labeled dialogues. Whole dialogues are resampled, because "
        "the utterances of a dialogue are not independent. Differences are relative to this "
        "model, on the same utterances and resamples; an interval that excludes 0 indicates a "
        "difference that is unlikely to be due to chance."
    )


def render_sentiment(conventions: Mapping[str, Mapping[str, Any]]) -> str:
    """Renders the scores of `metrics.binary_sentiment`, one row per convention."""
    rows = [
        (
            escape(name.replace("_", " ")),
            f"{scores['weighted_f1']:.3f}",
            f"{scores['accuracy']:.3f}",
            f"{scores['utterances']:,}",
        )
        for name, scores in conventions.items()
    ]
    head = ("convention", "weighted F1", "accuracy", "utterances")
    return table("Binary sentiment under each convention", head, rows)


def render_regression(regression: Mapping[str, Any]) -> str:
    """Renders the scores of `metrics.regression_scores`."""
    rows = [(escape(name), value) for name, value in regression_rows(regression)]
    caption = f"Predicted and annotated scores of {regression['utterances']:,} utterances"
    return table(caption, ("measure", "value"), rows)


def render_raters(raters: Mapping[str, Any]) -> str:
    """Renders the scores of `metrics.rater_scores`."""
    rows = [(escape(name), value) for name, value in rater_rows(raters)]
    caption = (
        f"Predicted distributions and the ratings of {raters['utterances']:,} utterances "
        f"({raters['mean_raters']:.1f} raters on average), with or without a majority"
    )
    return table(caption, ("measure", "value"), rows)


def render_classes(predictions: SplitPredictions, bootstrap: DialogueBootstrap) -> str:
    """Renders precision, recall and F1 of each class."""
    rows = [
        (
            escape(name),
            f"{scores['support']:,}",
            estimate_cell(scores["precision"]),
            estimate_cell(scores["recall"]),
            estimate_cell(scores["f1"]),
            charts.whisker(scores["f1"], "model"),
        )
        for name, scores in statistics.class_scores(predictions, bootstrap).items()
    ]
    head = ("emotion", "support", "precision", "recall", "F1", "from 0 to 1")
    return table("Scores of each class", head, rows, "classes")


def render_confusion(predictions: SplitPredictions, bootstrap: DialogueBootstrap) -> str:
    """Renders the confusion matrix with the counts and each count's share of its row."""
    counts, _ = bootstrap.confusion(predictions.predicted)
    names = [escape(name) for name in predictions.class_names]
    rows = []
    for index, name in enumerate(names):
        support = int(counts[index].sum())
        cells = []
        for column, count in enumerate(counts[index].tolist()):
            share = 100 * count / max(support, 1)
            percent = element("span", f"{share:.0f}%" if count else "", class_="share")
            class_ = "cell diagonal" if column == index else "cell"
            cells.append(
                element("div", f"{count}{percent}", class_=class_, style=f"--share:{share:.1f}%")
            )
        rows.append((name, *cells, f"{support:,}"))
    lead = "Each cell shows a count and its share of the row. Framed cells are correct predictions."
    class_ = "confusion" if len(names) <= _MAX_WIDE_CLASSES else "confusion narrow"
    return element("p", lead, class_="note") + table(
        "Confusion matrix: true emotions as rows, predicted emotions as columns",
        ("true ↓ predicted →", *names, "support"),
        rows,
        class_,
    )


def render_gate(predictions: SplitPredictions) -> str:
    """Renders the mean gate weights by emotion, for correct and wrong predictions."""
    rows = []
    previous = None
    for emotion, outcome, count, weights in statistics.mean_gates(predictions):
        title = "all emotions" if emotion is None else emotion
        # In an emotion's second row, the title is visible only to screen readers.
        class_ = "hidden" if title == previous else "first"
        bar = charts.stacked_bar(predictions.experts, weights)
        rows.append((element("span", escape(title), class_=class_), outcome, f"{count:,}", bar))
        previous = title
    lead = (
        "Mean gate weight of each expert in percent, by true emotion, for correct and for wrong "
        "predictions of the model."
    )
    head = ("true emotion", "predicted", "utterances", "mean gate")
    return (
        element("p", lead)
        + expert_legend(predictions.experts)
        + table("Mean gate weights", head, rows, "gates")
    )


def render_calibration(
    predictions: SplitPredictions, bootstrap: DialogueBootstrap, summary: Mapping[str, Any]
) -> str:
    """Renders the expected calibration error, the calibration curve, and `summary`.

    Args:
      predictions: Predictions for the split.
      bootstrap: Bootstrap over the dialogues of the split.
      summary: Scores before and after calibration (see `evaluation.calibration`); may be empty.
    """
    error, bins = statistics.calibration(predictions, bootstrap)
    rows = [
        (
            f"{part.low:.1f}&ndash;{part.high:.1f}",
            f"{part.utterances:,}",
            f"{part.confidence:.3f}",
            estimate_cell(part.accuracy),
        )
        for part in bins
    ]
    confidence = sum(part.confidence * part.utterances for part in bins)
    accuracy = sum(part.accuracy.value * part.utterances for part in bins)
    gap = (confidence - accuracy) / sum(part.utterances for part in bins)
    side = "above" if gap > 0 else "below"
    lead = (
        f"Expected calibration error {element('strong', f'{error:.3f}')}, over ten bins of equal "
        "width of the predicted emotion's probability. The mean confidence is "
        f"{abs(gap):.3f} {side} the accuracy. The dashed line is perfect calibration; the bars "
        "show the number of utterances in each bin."
    )
    head = ("confidence", "utterances", "mean confidence", "accuracy")
    return "".join(
        (
            element("p", lead),
            element("figure", charts.calibration_curve(bins)),
            details("Bins as a table", table("Calibration", head, rows)),
            _calibration_scores(summary) if summary else "",
        )
    )


def _calibration_scores(summary: Mapping[str, Any]) -> str:
    """Renders the scores of the probabilities before and after calibration."""
    versions = [name for name in _VERSIONS if name in summary]
    rows = [
        (
            name.replace("_", " ").replace("brier", "Brier"),
            *(
                estimate_cell(Estimate(**summary[version][name]), signed=version == "difference")
                for version in versions
            ),
        )
        for name in CALIBRATION_SCORES
    ]
    if "temperature" in summary:
        note = f"Calibrated on validation with temperature {summary['temperature']:.3f}"
        if summary["bias"]:
            biases = (f"{name} {value:+.2f}" for name, value in summary["bias"].items())
            note += f" and biases: {', '.join(biases)}"
        note += ". The figure and all other sections show calibrated probabilities."
    else:
        note = "The probabilities are not calibrated."
    return table("Scores of the probabilities", ("lower is better", *versions), rows) + element(
        "p", escape(note), class_="note"
    )


def render_abstention(predictions: SplitPredictions, bootstrap: DialogueBootstrap) -> str:
    """Renders the risk-coverage curve and the scores of utterances above minimum confidences."""
    curve = statistics.risk_coverage(predictions)
    rows = [
        (
            f"{row.min_confidence:g}" if row.min_confidence else "all utterances",
            estimate_cell(row.coverage),
            estimate_cell(row.accuracy),
            estimate_cell(row.weighted_f1),
        )
        for row in statistics.abstention(predictions, bootstrap)
    ]
    lead = (
        "Share of wrong predictions if only the most confident predictions are kept. The area "
        f"under the curve is {element('strong', f'{curve.area:.3f}')}; it would be "
        f"{curve.error:.3f} with random confidences (dashed) and {curve.best_area:.3f} if all "
        "correct predictions were more confident than all wrong ones."
    )
    note = (
        "<code>mister-jax predict --min_confidence</code> marks predictions below a minimum "
        "confidence as uncertain."
    )
    head = ("minimum confidence", "kept", "accuracy", "weighted F1")
    return "".join(
        (
            element("p", lead),
            element("figure", charts.risk_coverage_curve(curve.coverage, curve.risk)),
            table("Scores of the predictions above a minimum confidence", head, rows),
            element("p", note, class_="note"),
        )
    )


def render_missing_modality(study: Mapping[str, Any]) -> str:
    """Renders the content of `missing_modality.json`."""
    rows = [
        (
            f"{point['drop_speech']:g}",
            f"{point['drop_text']:g}",
            f"{point['weighted_f1']:.3f} ± {point['deviation']:.3f}",
            estimate_cell(Estimate(**point["loss"]), signed=True),
        )
        for point in study["points"]
    ]
    lead = (
        "Weighted F1 of a single seed when random utterances lose a modality: mean and standard "
        "deviation of several draws and all seeds. The dashed line is the mean score of the seeds "
        f"with nothing dropped, {study['complete']:.3f}. The loss is the decrease from this score, "
        "with a 95% interval."
    )
    head = ("share without speech", "share without text", "weighted F1", "loss")
    names = missing_modality_lines(study)
    return "".join(
        (
            element("p", lead),
            legend((name, f"{name} dropped") for name in names),
            element("figure", charts.missing_modality_curve(study)),
            details("Points as a table", table("Missing modalities", head, rows)),
        )
    )
