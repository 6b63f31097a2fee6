"""Writes the model card of a bundle, the README.md that the Hugging Face Hub shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mister_jax.bundle import LIBRARY
from mister_jax.metrics import SCORE_NAMES, title

_PIPELINE_TAGS: dict[tuple[str, ...], str] = {
    ("speech",): "audio-classification",
    ("text",): "text-classification",
}

_USE = """\
```python
from mister_jax import EmotionRecognizer

recognizer = EmotionRecognizer.from_pretrained("FOLDER or OWNER/NAME")
for row in recognizer.predict([{"text": "You again?"}, {"text": "Me."}]):
    print(row["emotion"], row["probabilities"])
```

or `mister-jax predict --model=FOLDER_OR_NAME --text="You again?" --text="Me."`"""

_LIMITS = (
    "The scores hold for speakers, language, topics and recordings like those of {dataset}. "
    "The labels are emotions that annotators perceived, which may differ from the emotions that "
    "speakers felt. The scores show how often the model is wrong. Do not base decisions about a "
    "person on the model's output."
)


def model_card(
    name: str,
    *,
    class_names: Sequence[str],
    encoders: Mapping[str, Mapping[str, Any]],
    dataset: str,
    num_params: int,
    progress: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> ModelCard:
    """Returns the model card of a recognizer.

    Args:
      name: Name of the model.
      class_names: Names of the classes.
      encoders: Encoder metadata by modality, for the modalities that the model uses.
      dataset: Name of the dataset that the model was trained on.
      num_params: Number of parameters, excluding the encoders.
      progress: Epoch of the parameters, and the validation scores of this epoch, by name.
      scores: Scores of each evaluated split, from the work directory's `metrics.json`.
    """
    pipeline_tag = _PIPELINE_TAGS.get(tuple(encoders))
    results = [
        EvalResult(
            task_type=pipeline_tag or "text-classification",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=score,
            metric_value=round(values[score], 4),
        )
        for split, values in scores.items()
        for score in SCORE_NAMES
    ]
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=pipeline_tag,
        tags=["emotion-recognition", "emotion-recognition-in-conversations", "mister-e", "jax"],
        datasets=[dataset],
        metrics=["f1", "accuracy"],
        model_name=name,
        eval_results=results or None,
    )
    rows = [
        ("emotions", ", ".join(class_names)),
        *((f"{modality} encoder", _describe(it)) for modality, it in encoders.items()),
        ("parameters without encoders", f"{num_params:,}"),
        ("trained on", dataset),
        (
            "validation",
            # With several seeds, the epoch and the score are lists.
            f"epoch {', '.join(map(str, np.ravel(progress['epoch'])))}, weighted F1 "
            + ", ".join(f"{score:.3f}" for score in np.ravel(progress["weighted_f1"])),
        ),
    ]
    sections = [
        f"# {name}",
        "Recognizes the emotion of every utterance in a conversation, in the context of the whole "
        "conversation, with [MiSTER-E](https://arxiv.org/abs/2602.23300) in mister_jax. It reads "
        f"{' and '.join(encoders)}{' only' if len(encoders) == 1 else ''}.",
        _table(("", ""), rows),
        "## Use",
        _USE,
        "## Scores",
        *(_scores_section(split, values, class_names) for split, values in scores.items()),
        *([] if scores else ["The exported run was not evaluated."]),
        "## Limits",
        _LIMITS.format(dataset=dataset),
    ]
    text = "\n\n".join(sections)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}\n")


def _scores_section(split: str, scores: Mapping[str, Any], class_names: Sequence[str]) -> str:
    """Returns the section with the scores and the confusion matrix of a split."""
    summary = [
        (title(name), f"{scores[name]:.3f}", f"{scores['majority'][name]:.3f}")
        for name in SCORE_NAMES
    ]
    confusion = [
        (name, *map(str, counts), f"{per_class['recall']:.2f}", f"{per_class['precision']:.2f}")
        for name, counts in zip(class_names, scores["confusion"], strict=True)
        for per_class in [scores["per_class"][name]]
    ]
    return "\n\n".join(
        [
            f"{split.capitalize()} split, {scores['utterances']} utterances, next to a classifier "
            "that always predicts the most frequent emotion:",
            _table(("", "model", "majority"), summary),
            "Confusion matrix. Rows are true emotions, columns are predicted emotions:",
            _table(("", *class_names, "recall", "precision"), confusion),
        ]
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _describe(metadata: Mapping[str, Any]) -> str:
    """Describes an encoder by name, or a fine-tuned encoder by its base model and dataset."""
    if metadata["kind"] != "tuned":
        return str(metadata["name"])
    experiment = metadata["config"]["experiment"]
    return f"{experiment['encoder']['options']['name']}, tuned on {experiment['data']['name']}"
