"""Combines published emotion classifiers, without training.

A text model and a speech model classify each utterance separately. The prediction is the weighted
mean of the models' probabilities for the emotions that both models know.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.data.labels import EMOTION_SYNONYMS, emotion_name
from mister_jax.encoders import hub, registry, speech
from mister_jax.encoders.classification import Classifier, load_classifier, placeholder_names
from mister_jax.encoders.tokenization import encode_texts
from mister_jax.errors import InputError
from mister_jax.extraction.encoder import Encoder, compile_encoder
from mister_jax.extraction.speech import SpeechInput
from mister_jax.extraction.text import TextInput
from mister_jax.models import EXPERTS
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, data_mesh
from mister_jax.predictor import Predictions

_FULL_SCALE = 2**15
_MAX_TOKENS = 512


class PublishedModels:
    """A text classifier, a speech classifier, or both; see `EmotionRecognizer.from_models`.

    Labels are renamed by `data.labels.EMOTION_SYNONYMS` before they are compared. If several labels
    of a model get the same name, their probabilities are added. Each model's probabilities of the
    shared emotions are divided by their sum.

    Args:
      text: Checkpoint for sequence classification, a folder or a name on the Hugging Face Hub; see
        `encoders.classification.load_classifier`.
      speech: Checkpoint for audio classification.
      text_weight: Weight of the text model, 0 or more.
      speech_weight: Weight of the speech model, 0 or more.
      map_labels: Mapping from labels to new names, for labels that differ between the models.

    Attributes:
      class_names: Emotions that all models know.
      encoders: Encoder of each modality. The encoder's features are its label probabilities.
      feature_dims: Number of labels of each modality's model; 1 for a modality without a model.

    Raises:
      InputError: A model cannot be loaded or has the wrong modality, the weights or labels cannot
        be used, or the models share no emotion.
    """

    def __init__(
        self,
        *,
        text: str | None = None,
        speech: str | None = None,
        text_weight: float = 1.0,
        speech_weight: float = 1.0,
        map_labels: Mapping[str, str] | None = None,
    ):
        names = {"speech": speech, "text": text}
        weights = {"speech": speech_weight, "text": text_weight}
        used = {modality: name for modality, name in names.items() if name}
        if not used:
            raise InputError("no models; needed: a text model, a speech model, or both")
        total = sum(weights[modality] for modality in used)
        if min(weights.values()) < 0 or not 0 < total < math.inf:  # also rejects NaN
            raise InputError(
                f"text_weight={text_weight}, speech_weight={speech_weight}; allowed: 0 or more, "
                "and more than 0 for one of the models"
            )
        self._weights = weights
        classifiers = {modality: _load(name, modality) for modality, name in used.items()}
        labels = {modality: it.class_names for modality, it in classifiers.items()}
        emotions = _name_emotions(labels, used, map_labels or {})
        self.class_names = _shared_emotions(emotions)
        self.feature_dims = {
            modality: len(labels[modality]) if modality in labels else 1 for modality in names
        }
        self.encoders = {
            modality: _make_encoder(it, used[modality]) for modality, it in classifiers.items()
        }
        # Matrices [labels of the model, C] that add the probabilities of labels with the same name.
        self._emotions = {
            modality: np.array(
                [[name == emotion for emotion in self.class_names] for name in names_of_model],
                np.float32,
            )
            for modality, names_of_model in emotions.items()
        }

    def combine(self, encoded: Mapping[str, np.ndarray]) -> Predictions:
        """Computes the weighted average of the models' probabilities.

        Args:
          encoded: Arrays by name: label probabilities "speech" and "text", [N, num_labels], and
            presence flags "speech_present" and "text_present", [N] bool.

        Returns:
          The arrays of `FusionTask.predict` without the dialogue axis. If an utterance has neither
          speech nor text, all emotions are equally likely.
        """
        num_utterances, num_classes = len(encoded["text"]), len(self.class_names)
        probabilities = np.full(
            (num_utterances, len(EXPERTS), num_classes), 1 / num_classes, np.float32
        )
        present = np.zeros((num_utterances, len(EXPERTS)), bool)
        gate = np.zeros((num_utterances, len(EXPERTS)), np.float32)
        for modality, emotions in self._emotions.items():
            expert = EXPERTS.index(modality)
            present[:, expert] = encoded[f"{modality}_present"]
            gate[:, expert] = present[:, expert] * self._weights[modality]
            shared = encoded[modality] @ emotions  # N C
            total = shared.sum(-1, keepdims=True)
            np.divide(shared, total, out=probabilities[:, expert], where=total > 0)
        # If only a model with weight 0 can read an utterance, use that model's prediction.
        gate = np.where(gate.any(-1, keepdims=True), gate, present)
        gate = gate / np.maximum(gate.sum(-1, keepdims=True), np.finfo(np.float32).tiny)
        mixture = np.einsum("ne,nec->nc", gate, probabilities)
        mixture = np.where(present.any(-1, keepdims=True), mixture, 1 / num_classes)
        return {
            "probabilities": mixture,
            "gate": gate,
            "expert_probabilities": probabilities,
            "expert_present": present,
        }


def _load(name: str, modality: str) -> Classifier:
    classifier = load_classifier(name)
    if classifier.modality != modality:
        raise InputError(
            f"--{modality}_model={name}: a {classifier.modality} model; needed: a {modality} model"
        )
    return classifier


def _name_emotions(
    labels: Mapping[str, Sequence[str]], models: Mapping[str, str], map_labels: Mapping[str, str]
) -> dict[str, list[str]]:
    """Returns the emotion that each label of each model stands for."""
    known = {label for names in labels.values() for label in names}
    unknown = sorted(map_labels.keys() - known)
    if unknown:
        raise InputError(
            f"--map_labels={unknown[0]}={map_labels[unknown[0]]}: no model has this label; "
            f"allowed: {', '.join(sorted(known))}"
        )
    for modality, names in labels.items():
        unnamed = [name for name in placeholder_names(tuple(names)) if name not in map_labels]
        if unnamed:
            raise InputError(
                f"{models[modality]}: its labels have no names ({', '.join(unnamed)}); name them "
                f"with --map_labels={unnamed[0]}=EMOTION and so on, see its model card"
            )
    return {
        modality: [emotion_name(map_labels.get(label, label)) for label in names]
        for modality, names in labels.items()
    }


def _shared_emotions(emotions: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Returns the emotions that all models know, in the order of the first model."""
    first, *others = emotions.values()
    shared = tuple(dict.fromkeys(name for name in first if all(name in it for it in others)))
    if not shared:
        sets = "; ".join(f"{modality}: {', '.join(it)}" for modality, it in emotions.items())
        raise InputError(
            f"the models share no emotion ({sets}); give equivalent labels the same name with "
            f"--map_labels=LABEL=EMOTION, such as LABEL={next(iter(EMOTION_SYNONYMS))}"
        )
    left_out = sorted({name for it in emotions.values() for name in it} - set(shared))
    if left_out:
        logging.getLogger(__name__).warning(
            "emotions that only one model knows are left out: %s", ", ".join(left_out)
        )
    return shared


def _make_encoder(classifier: Classifier, name: str) -> Encoder:
    """Returns an encoder whose features are the probabilities of the classifier's labels."""
    folder = hub.fetch(name)
    partitioner = JitPartitioner(data_mesh(), ENCODER_SHARDING_RULES)
    module: Any = classifier.module
    processor = registry.load_processor(folder, module.config)
    if classifier.modality == "text":
        max_tokens = min(_MAX_TOKENS, getattr(module.config, "max_length", None) or _MAX_TOKENS)

        tokenize = functools.partial(encode_texts, processor, max_tokens=max_tokens)
        inputs: TextInput | SpeechInput = TextInput(tokenize, max_tokens)
    else:
        inputs = SpeechInput(
            speech.max_seconds(module) or speech.LONGEST_SECONDS,
            pads_to_max=speech.has_fixed_input_length(module),
        )

    def encode(encoder: nnx.Module, batch: dict[str, Any]) -> jax.Array:
        bound = copy.copy(classifier)
        bound.module = encoder
        if classifier.modality == "text":
            return bound.probabilities(batch["input_ids"], batch["mask"])
        waveform = batch["waveform"].astype(jnp.float32) / _FULL_SCALE
        return bound.probabilities(waveform, batch["lengths"])

    metadata = {
        "kind": "published",
        "name": hub.pinned_name(name),
        "options": {},
        "files": hub.fingerprint(folder),
    }
    return Encoder(inputs, partitioner, metadata, compile_encoder(partitioner, module, encode))
