"""Assembles the report: one HTML file from `template.html`, `style.css` and `script.js`."""

from __future__ import annotations

import base64
import hashlib
import string
from collections.abc import Mapping
from html import escape
from typing import Any, NamedTuple

import numpy as np
from etils import epath

import mister_jax
from mister_jax.evaluation.confidence_intervals import DialogueBootstrap
from mister_jax.evaluation.report import sections, statistics
from mister_jax.evaluation.report.dialogue_view import (
    dialogue_data,
    dialogues_lead,
    embedded_json,
)
from mister_jax.evaluation.report.elements import element, expert_legend
from mister_jax.evaluation.report.experiment import Experiment
from mister_jax.evaluation.split_predictions import SplitPredictions
from mister_jax.io import write_text

_FOLDER = epath.resource_path("mister_jax") / "evaluation" / "report"


class Section(NamedTuple):
    """One section of the page.

    Attributes:
      id: HTML id.
      title: Heading.
      content: HTML below the heading.
    """

    id: str
    title: str
    content: str


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
      output: Existing folder.
      features: `DialogueFeatures` or `Utterances` of the split.
      predictions: Predictions as returned by `Predictor`.
      scores: Scores as returned by `evaluate`.
      experiment: Training run that is evaluated.
      texts: Transcripts by utterance id, see `read_utterance_texts`.
      study: Content of `missing_modality.json`, see `report_html`.

    Returns:
      The path of the page.
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
      predictions: Predictions of the split.
      scores: Scores as returned by `evaluate`; only "reference_scores", "sentiment" and "seeds" are
        read, if they are present.
      experiment: Training run that is evaluated.
      texts: Transcripts by utterance id.
      study: Content of `missing_modality.json`; the section is left out if None.
    """
    content = _sections(predictions, scores, study)
    links = [(section.id, section.title) for section in content] + [("dialogues", "Dialogues")]
    script, texts = _read("script.js"), texts or {}
    title = f"{predictions.dataset}, {predictions.split}: {experiment.name}"
    return string.Template(_read("template.html")).substitute(
        title=escape(title),
        style=_read("style.css"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        header=sections.render_header(predictions, experiment),
        contents="".join(
            element("li", element("a", escape(heading), href=f"#{id_}")) for id_, heading in links
        ),
        sections="\n".join(_section_html(section) for section in content),
        dialogues_lead=dialogues_lead(predictions, has_texts=bool(texts)),
        legend=expert_legend(predictions.experts) if predictions.experts else "",
        data=embedded_json(dialogue_data(predictions, texts)),
        footer=f"Written by mister_jax {escape(mister_jax.__version__)}. "
        "This file is self-contained.",
    )


def _sections(
    predictions: SplitPredictions, scores: Mapping[str, Any], study: Mapping[str, Any] | None
) -> list[Section]:
    """Returns the sections that the predictions have data for."""
    content = []

    def add(id_: str, title: str, html: str) -> None:
        content.append(Section(id_, title, html))

    if predictions.labeled.any():
        bootstrap = DialogueBootstrap(predictions)
        references = scores.get("reference_scores", {})
        models = statistics.score_models(predictions, bootstrap, references)
        seeds = scores.get("seeds")
        add("scores", "Scores", sections.render_scores(predictions, models, bootstrap, seeds))
        if "sentiment" in scores:
            add("sentiment", "Sentiment", sections.render_sentiment(scores["sentiment"]))
        add("classes", "Classes", sections.render_classes(predictions, bootstrap))
        add("confusion", "Confusion", sections.render_confusion(predictions, bootstrap))
        if predictions.gate is not None:
            add("gate", "Gate", sections.render_gate(predictions))
        add("calibration", "Calibration", sections.render_calibration(predictions, bootstrap))
    if study is not None:
        add("missing", "Missing modalities", sections.render_missing_modality(study))
    return content


def _section_html(section: Section) -> str:
    title_id = f"{section.id}-title"
    heading = element("h2", escape(section.title), id=title_id)
    return element(
        "section", f"\n{heading}\n{section.content}\n", id=section.id, aria_labelledby=title_id
    )


def _read(name: str) -> str:
    return (_FOLDER / name).read_text()
