"""Generates synthetic dialogues of feature vectors, for which the Bayes classifier is known.

Emotions follow a Markov chain along a dialogue. An utterance's speech and text features are
Gaussian around the mean of its emotion, so the exact posterior is known; see `dialogue_process`.
The task rewards each part of a multimodal dialogue model:

- Speech separates odd from even emotions well, and emotions of equal parity poorly. Text separates
  the pairs (0, 1), (2, 3), ... well, and the emotions within a pair poorly. A model needs both
  modalities.
- Emotions tend to persist, so context helps.
- Some utterances have one uninformative modality, which no flag reveals, so a gate that weights
  the modalities helps.
- Some utterances lack one modality, which is flagged.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mister_jax.data.dialogue_process import (
    ConversationProcess,
    check_num_dialogues,
    emotion_chain,
    gaussian_log_density,
    reference_scores,
)
from mister_jax.data.schema import DialogueFeatures

DEFAULT_NUM_DIALOGUES: Mapping[str, int] = {"train": 200, "validation": 40, "test": 60}

MIN_LENGTH, MAX_LENGTH = 2, 30
"""Minimum and maximum number of utterances in a dialogue."""

# Norms of the two components of a mean vector. The strong component separates groups of emotions
# well, and the weak component separates emotions within a group poorly. The noise has standard
# deviation 1 in every direction.
_STRONG, _WEAK = 2.0, 0.8


@dataclasses.dataclass(frozen=True, eq=False)
class EmotionProcess(ConversationProcess):
    """Random process that generates dialogues of feature vectors.

    Attributes:
        speech_mean: Mean speech features of each emotion, [C, Ds].
        text_mean: Mean text features of each emotion, [C, Dt].
        speech_neutral: Mean of uninformative speech features, [Ds].
        text_neutral: Mean of uninformative text features, [Dt].
    """

    speech_mean: np.ndarray
    text_mean: np.ndarray
    speech_neutral: np.ndarray
    text_neutral: np.ndarray

    def speech_log_density(self, speech: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ConversationProcess`."""
        uninformative = gaussian_log_density(speech, self.speech_neutral[None])
        return gaussian_log_density(speech, self.speech_mean), uninformative

    def text_log_density(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ConversationProcess`."""
        uninformative = gaussian_log_density(text, self.text_neutral[None])
        return gaussian_log_density(text, self.text_mean), uninformative

    def sample(
        self, length: int, generator: np.random.Generator
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Draws a dialogue of T utterances.

        Returns:
            Two values. The first is a tuple of the labels [T] int32, the speech [T, Ds] float32,
            the text [T, Dt] float32, whether speech is present [T] bool, and whether text is
            present [T] bool. The second is each utterance's uninformative modality [T]: "speech",
            "text" or "".
        """
        label, uninformative, speech_present, text_present = self.sample_labels_and_flags(
            length, generator
        )
        speech = _draw_features(
            self.speech_mean[label], self.speech_neutral, uninformative == "speech", generator
        )
        text = _draw_features(
            self.text_mean[label], self.text_neutral, uninformative == "text", generator
        )
        speech[~speech_present] = 0
        text[~text_present] = 0
        return (label, speech, text, speech_present, text_present), uninformative


def emotion_process(
    seed: int,
    *,
    num_classes: int = 6,
    speech_dim: int = 64,
    text_dim: int = 96,
    stay_probability: float = 0.6,
    uninformative_share: float = 0.2,
    missing_share: float = 0.05,
) -> EmotionProcess:
    """Draws the means and the Markov chain of a process.

    Args:
        seed: Seed of the process, at least 0.
        num_classes: Number of emotions C, at least 2.
        speech_dim: Dimension Ds of the speech features.
        text_dim: Dimension Dt of the text features.
        stay_probability: Probability that the emotion does not change; see `emotion_chain`.
        uninformative_share: Probability that speech is uninformative, at most 0.5. Text has the
            same probability.
        missing_share: Probability that an utterance lacks one modality.

    Raises:
        ValueError: An argument is out of range.
    """
    generator = np.random.default_rng([seed, 0])
    initial, transition = emotion_chain(num_classes, stay_probability, generator)
    emotion = np.arange(num_classes)
    return EmotionProcess(
        initial=initial,
        transition=transition,
        speech_mean=_draw_means(emotion % 2, speech_dim, generator),
        text_mean=_draw_means(emotion // 2, text_dim, generator),
        speech_neutral=_STRONG * _draw_directions(1, speech_dim, generator)[0],
        text_neutral=_STRONG * _draw_directions(1, text_dim, generator)[0],
        uninformative_share=uninformative_share,
        missing_share=missing_share,
    )


def generate_features(
    seed: int = 0,
    num_dialogues: Mapping[str, int] = DEFAULT_NUM_DIALOGUES,
    **options: Any,
) -> dict[str, DialogueFeatures]:
    """Generates splits of synthetic dialogues. Equal arguments give equal dialogues.

    A split's metadata contains `reference_scores` (see `dialogue_process`) and `uninformative`, the
    uninformative modality of each utterance ("speech", "text" or ""). Models must not read them.

    Args:
        seed: Seed, at least 0.
        num_dialogues: Number of dialogues by split. Each dialogue has 2 to 30 utterances. Empty
            splits are omitted.
        **options: Options of `emotion_process`, such as `num_classes` and `speech_dim`.

    Raises:
        InputError: `num_dialogues` has an unknown split or a negative number, or all numbers are 0.
        ValueError: Another argument is out of range.
    """
    check_num_dialogues(num_dialogues)
    process = emotion_process(seed, **options)
    return {
        split: _generate_split(process, split, count, seed, np.random.default_rng([seed, 1, index]))
        for index, (split, count) in enumerate(num_dialogues.items())
        if count
    }


def _generate_split(
    process: EmotionProcess, split: str, count: int, seed: int, generator: np.random.Generator
) -> DialogueFeatures:
    lengths = generator.integers(MIN_LENGTH, MAX_LENGTH, size=count, endpoint=True)
    dialogues, uninformative = zip(
        *(process.sample(length, generator) for length in lengths), strict=True
    )
    label, speech, text, speech_present, text_present = map(
        np.concatenate, zip(*dialogues, strict=True)
    )
    dialogue_ids = tuple(f"{split}_{index}" for index in range(count))
    utterance_ids = [
        f"{dialogue}_{index}"
        for dialogue, length in zip(dialogue_ids, lengths, strict=True)
        for index in range(length)
    ]
    return DialogueFeatures(
        name="synthetic_features",
        split=split,
        class_names=tuple(f"emotion_{index}" for index in range(len(process.initial))),
        dialogue_ids=dialogue_ids,
        lengths=lengths,
        utterance_ids=np.array(utterance_ids),
        speech=speech,
        text=text,
        speech_present=speech_present,
        text_present=text_present,
        label=label,
        metadata={
            "seed": seed,
            "reference_scores": reference_scores(process, dialogues),
            "uninformative": np.concatenate(uninformative).tolist(),
        },
    )


def _draw_directions(count: int, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Draws unit vectors [count, dim]."""
    vectors = generator.normal(size=(count, dim))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _draw_means(group: np.ndarray, dim: int, generator: np.random.Generator) -> np.ndarray:
    """Draws means [C, dim]: close for classes with equal `group` [C], and far apart for others."""
    group_directions = _draw_directions(int(group.max()) + 1, dim, generator)
    return _STRONG * group_directions[group] + _WEAK * _draw_directions(len(group), dim, generator)


def _draw_features(
    mean: np.ndarray, neutral: np.ndarray, uninformative: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """Draws features [T, D] float32 around `mean`, or around `neutral` [D] if uninformative."""
    center = np.where(uninformative[:, None], neutral, mean)
    return (center + generator.normal(size=mean.shape)).astype(np.float32)
