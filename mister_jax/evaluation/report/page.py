"""Assembles the report, an HTML file, from `template.html`, `style.css` and `script.js`."""

from __future__ import annotations

import base64
import hashlib
import itertools
import string
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np
from etils import epath

import mister_jax
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.folds import FOLD
from mister_jax.errors import InputError
from mister_jax.evaluation.confidence_intervals import DialogueBootstrap
from mister_jax.evaluation.report import sections, statistics
from mister_jax.evaluation.report.elements import element, expert_legend
from mister_jax.evaluation.report.experiment import Experiment, render_header
from mister_jax.evaluation.split_predictions import SplitPredictions
from mister_jax.io import embedded_json, write_text

_FOLDER = epath.resource_path("mister_jax") / "evaluation" / "report"


def write_report(
    output: epath.PathLike,
    features: Any,
    predictions: Mapping[str, np.ndarray],
    scores: Mapping[str, Any],
    experiment: Experiment,
    texts: Mapping[str, str] | None = None,
    study: Mapping[str, Any] | None = None,
) -> epath.Path:
    """Writes `report.html` into an existing folder and returns its path.

    Args:
      output: Folder of the report.
      features: `DialogueFeatures` or `Utterances` of the split.
      predictions: Predictions that `Predictor` returned.
      scores: Scores; see `report_html`.
      experiment: Training run that is evaluated.
      texts: Transcripts by utterance id; see `read_utterance_texts`.
      study: Content of `missing_modality.json`; its section is omitted if None.
    """
    path = epath.Path(output) / "report.html"
    split = SplitPredictions.from_features(features, predictions)
    write_text(path, report_html(split, scores, experiment, texts, study))
    return path


def report_html(
    predictions: SplitPredictions,
    scores: Mapping[str, Any],
    experiment: Experiment,
    texts: Mapping[str, str] | None = None,
    study: Mapping[str, Any] | None = None,
) -> str:
    """Returns the report as HTML.

    Args:
      predictions: Predictions for the split.
      scores: Scores that `evaluate` returned, of which "reference_scores", "sentiment",
        "regression", "raters", "calibration" and "seeds" are used if present.
      experiment: Training run that is evaluated.
      texts: Transcripts by utterance id.
      study: Content of `missing_modality.json`; its section is omitted if None.
    """
    content = _sections(predictions, scores, study)
    headings = {title: id_ for title, (id_, _) in content.items()} | {"Dialogues": "dialogues"}
    script, texts = (_FOLDER / "script.js").read_text(), texts or {}
    title = f"{predictions.dataset}, {predictions.split}: {experiment.name}"
    return string.Template((_FOLDER / "template.html").read_text()).substitute(
        title=escape(title),
        style=(_FOLDER / "style.css").read_text(),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        header=render_header(predictions, experiment),
        contents="".join(
            element("li", element("a", title, href=f"#{id_}")) for title, id_ in headings.items()
        ),
        sections="\n".join(
            element(
                "section",
                f"\n{element('h2', title, id=f'{id_}-title')}\n{html}\n",
                id=id_,
                aria_labelledby=f"{id_}-title",
            )
            for title, (id_, html) in content.items()
        ),
        dialogues_lead=_dialogues_lead(predictions, has_texts=bool(texts)),
        legend=expert_legend(predictions.experts) if predictions.experts else "",
        data=embedded_json(dialogue_data(predictions, texts)),
        footer=f"Written by mister_jax {escape(mister_jax.__version__)}. "
        "This file is self-contained.",
    )


def _sections(
    predictions: SplitPredictions, scores: Mapping[str, Any], study: Mapping[str, Any] | None
) -> dict[str, tuple[str, str]]:
    """Returns the id and HTML of each section by title. Sections without data are omitted."""
    content = {}
    if predictions.labeled.any():
        bootstrap = DialogueBootstrap(predictions)
        references = scores.get("reference_scores", {})
        models = statistics.score_models(predictions, bootstrap, references)
        seeds = scores.get("seeds")
        html = sections.render_scores(predictions, models, bootstrap, seeds)
        content["Scores"] = "scores", html
        if "sentiment" in scores:
            content["Sentiment"] = "sentiment", sections.render_sentiment(scores["sentiment"])
        if scores.get("raters", {}).get("utterances"):
            content["Raters"] = "raters", sections.render_raters(scores["raters"])
        if scores.get("regression", {}).get("utterances"):
            content["Score"] = "score", sections.render_regression(scores["regression"])
        content["Classes"] = "classes", sections.render_classes(predictions, bootstrap)
        content["Confusion"] = "confusion", sections.render_confusion(predictions, bootstrap)
        if predictions.gate is not None:
            content["Gate"] = "gate", sections.render_gate(predictions)
        summary = scores.get("calibration", {})
        html = sections.render_calibration(predictions, bootstrap, summary)
        content["Calibration"] = "calibration", html
        html = sections.render_abstention(predictions, bootstrap)
        content["Abstention"] = "abstention", html
    if study is not None:
        content["Missing modalities"] = "missing", sections.render_missing_modality(study)
    return content


def read_utterance_texts(features: Any, data_dir: epath.PathLike | None = None) -> dict[str, str]:
    """Reads a split's transcripts from the dialogue dataset that the features were extracted from.

    Returns:
      Transcripts by utterance id; empty if the dataset is not available.
    """
    source = features.metadata.get("text")
    name = source.get("dataset") if isinstance(source, Mapping) else None
    try:
        dataset = DialogueDataset(name or features.name, data_dir)
        # A fold of a cross-validation may have dialogues from all splits.
        splits = dataset.splits if FOLD in features.metadata else (features.split,)
        dialogues = itertools.chain.from_iterable([dataset.dialogues(split) for split in splits])
    except InputError:  # Transcripts are optional in a report.
        return {}
    utterances = (utterance for dialogue in dialogues for utterance in dialogue.utterances)
    return {utterance.id: utterance.text for utterance in utterances if utterance.text_present}


def dialogue_data(predictions: SplitPredictions, texts: Mapping[str, str]) -> dict[str, Any]:
    """Returns the data of the dialogue view. Utterances are grouped by dialogue.

    Probabilities and gate weights are integers in thousandths, to keep the report small.
    """
    # `Utterances` may interleave the utterances of several dialogues.
    order = np.argsort(predictions.dialogue_index, kind="stable")
    ids = predictions.utterance_ids[order].tolist()
    counts = np.bincount(predictions.dialogue_index, minlength=len(predictions.dialogue_ids))

    def thousandths(values: np.ndarray) -> np.ndarray:
        return np.rint(1000 * values[order].astype(float)).astype(int)

    gate = predictions.gate
    return {
        "classes": list(predictions.class_names),
        "experts": list(predictions.experts),
        "dialogues": list(predictions.dialogue_ids),
        "offsets": [0, *np.cumsum(counts).tolist()],
        "utterances": ids,
        "texts": [texts.get(name, "") for name in ids] if texts else None,
        "label": predictions.label[order].tolist(),
        "predicted": predictions.predicted[order].tolist(),
        "probabilities": thousandths(predictions.probabilities).ravel().tolist(),
        "votes": predictions.votes[order].T.tolist(),
        "gate": None if gate is None else thousandths(gate).T.tolist(),
    }


def _dialogues_lead(predictions: SplitPredictions, *, has_texts: bool) -> str:
    """Returns the text that introduces the dialogue view."""
    parts = ["Each utterance with its predicted and its true emotion"]
    if predictions.gate is not None:
        parts.append("the gate weights and votes of the experts")
    elif predictions.experts:
        parts.append("the votes of the experts")
    lead = " and ".join(parts) + "."
    if predictions.experts:
        lead += " A correct vote is shown in bold."
    return lead if has_texts else f"{lead} The transcripts are not available."
