"""The data of the dialogue view, which `script.js` renders in the browser."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mister_jax.data.dialogues import DialogueDataset
from mister_jax.errors import InputError
from mister_jax.evaluation.split_predictions import SplitPredictions


def read_utterance_texts(features: Any, data_dir: epath.PathLike | None = None) -> dict[str, str]:
    """Reads the transcripts of a split from the dialogue dataset that its features came from.

    Returns:
      Transcripts by utterance id, empty if the dataset is not available.
    """
    source = features.metadata.get("text")
    name = source.get("dataset") if isinstance(source, Mapping) else None
    try:
        dialogues = DialogueDataset(name or features.name, data_dir).dialogues(features.split)
    except InputError:  # Texts are optional in a report.
        return {}
    utterances = (utterance for dialogue in dialogues for utterance in dialogue.utterances)
    return {utterance.id: utterance.text for utterance in utterances if utterance.text_present}


def dialogue_data(predictions: SplitPredictions, texts: Mapping[str, str]) -> dict[str, Any]:
    """Returns the data of the dialogue view as columns over utterances.

    Probabilities and gate weights are integers in thousandths, which keeps the page small.
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


def embedded_json(value: Any) -> str:
    """Returns compact JSON without characters that could end a `script` element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def dialogues_lead(predictions: SplitPredictions, *, has_texts: bool) -> str:
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
