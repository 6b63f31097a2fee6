"""Draws emotions, speaking styles and sentences, and computes the posterior of the emotions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mister_jax.data.dialogue_process import (
    ConversationProcess,
    emotion_chain,
    gaussian_log_density,
)


class _Emotion(NamedTuple):
    style: tuple[float, float, float, float]  # mean pitch, loudness, tempo and brightness
    feelings: str
    things: str


# Speech separates calm, loud and shrill emotions (tendencies as in Juslin & Laukka 2003,
# doi:10.1037/0033-2909.129.5.770). Words separate negative, positive and neutral emotions.
_EMOTIONS: Mapping[str, _Emotion] = {
    "neutral": _Emotion(
        (-0.6, -0.5, -0.2, -0.5),
        "ready busy early late awake outside seated nearby upstairs prepared indoors punctual",
        "meeting table window report street kettle ticket station letter garden number schedule",
    ),
    "joy": _Emotion(
        (0.8, 1.3, 0.5, 1.0),
        "happy delighted cheerful glad thrilled merry",
        "party gift wedding holiday prize reunion",
    ),
    "sadness": _Emotion(
        (-1.1, -1.2, -1.3, -1.0),
        "sad lonely heartbroken gloomy miserable tearful",
        "funeral loss farewell grave tears goodbye",
    ),
    "anger": _Emotion(
        (0.3, 1.8, 0.6, 1.7),
        "angry furious outraged mad annoyed fuming",
        "insult lie betrayal fight injustice rudeness",
    ),
    "surprise": _Emotion(
        (1.9, 0.3, 0.7, 0.4),
        "surprised amazed astonished stunned speechless baffled",
        "miracle twist coincidence revelation magic bombshell",
    ),
    "fear": _Emotion(
        (1.6, -0.8, 1.4, -0.3),
        "afraid scared terrified nervous anxious frightened",
        "danger threat nightmare monster darkness scream",
    ),
    "disgust": _Emotion(
        (-1.0, 0.3, -1.0, 1.0),
        "disgusted sick nauseous revolted repelled queasy",
        "filth stench mould rot slime vomit",  # codespell:ignore mould
    ),
}

# Groups of emotions that share words.
_VALENCES = (("neutral",), ("joy", "surprise"), ("sadness", "anger", "fear", "disgust"))

# Probability that a word is emotional. Neutral speakers use fewer emotional words, and draw these
# words from the lists of all other emotions.
_EMOTIONAL, _EMOTIONAL_IF_NEUTRAL = 0.75, 0.12
# Probabilities that an emotional word is drawn from the list of the same emotion, from all lists of
# the same valence, or from all lists but neutral.
_SAME_EMOTION, _SAME_VALENCE, _ANY = 0.4, 0.5, 0.1

_TEMPLATES = (
    "I am {feeling} because of the {thing}.",
    "Well, the {thing} was on, and I felt {feeling} and {feeling}.",
    "Are you {feeling}? I heard about the {thing}.",
    "First the {thing}, then the {thing}, and now I am {feeling}.",
    "You look {feeling}, is it the {thing}?",
    "We talked of the {thing} and the {thing}, and she seemed {feeling} and {feeling}.",
    "He is {feeling}, I think, or {feeling}; it must be the {thing}.",
    "So that was the {thing}, and here I stand, {feeling}.",
)


@dataclasses.dataclass(frozen=True, eq=False)
class SpokenDialogueProcess(ConversationProcess):
    """Random process that generates speaking styles and words.

    Attributes:
        style_mean: Mean pitch, loudness, tempo and brightness of each emotion [C, 4], in standard
            deviations. Uninformative speech has the mean of the first emotion.
        words: Vocabulary of V words.
        is_feeling: Whether each word is a feeling (true) or a thing (false), [V] bool.
        word_probability: Probability of each word among the words of the same kind (feelings or
            things), given the emotion, [C, V].
        neutral_probability: Word probabilities for uninformative text, [V].
    """

    style_mean: np.ndarray
    words: tuple[str, ...]
    is_feeling: np.ndarray
    word_probability: np.ndarray
    neutral_probability: np.ndarray

    def speech_log_density(self, speech: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ConversationProcess`. `speech` contains speaking styles [T, 4]."""
        density = gaussian_log_density(speech, self.style_mean)
        return density, density[:, :1]

    def text_log_density(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ConversationProcess`. `text` contains the count of each word [T, V]."""

        def log_density(probability: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore"):
                log_probability = np.log(probability)  # [C, V]
            # Impossible words have log probability -inf, and -inf times a count of 0 would be NaN.
            counted = np.where(text[:, None] > 0, log_probability, 0.0)  # [T, C, V]
            return np.sum(text[:, None] * counted, axis=-1)

        return log_density(self.word_probability), log_density(self.neutral_probability[None])

    def sample_style(
        self, label: np.ndarray, uninformative: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """Draws speaking styles [T, 4], in standard deviations, for emotions `label` [T]."""
        mean = np.where(uninformative[:, None], self.style_mean[0], self.style_mean[label])
        return mean + generator.normal(size=mean.shape)

    def sample_sentence(
        self, label: int, uninformative: bool, generator: np.random.Generator
    ) -> tuple[str, np.ndarray]:
        """Draws a sentence. Returns the sentence and the count of each word [V] int."""
        probability = self.neutral_probability if uninformative else self.word_probability[label]
        sentence = _TEMPLATES[generator.integers(len(_TEMPLATES))]
        count = np.zeros(len(self.words), np.int64)
        kinds = (("{feeling}", self.is_feeling), ("{thing}", ~self.is_feeling))
        for placeholder, is_of_kind in kinds:
            (allowed,) = np.nonzero(is_of_kind)
            drawn = generator.choice(allowed, sentence.count(placeholder), p=probability[allowed])
            for word in drawn:
                sentence = sentence.replace(placeholder, self.words[word], 1)
                count[word] += 1
        return sentence, count


def make_spoken_dialogue_process(
    seed: int,
    *,
    num_classes: int = 6,
    stay_probability: float = 0.6,
    uninformative_share: float = 0.1,
    missing_share: float = 0.05,
) -> SpokenDialogueProcess:
    """Makes a process with a random Markov chain.

    `num_classes` is 2 to 7; see `class_names`. The other options are described in
    `dialogue_process.emotion_chain` and `dialogue_process.ConversationProcess`.

    Raises:
        ValueError: An argument is out of range.
    """
    names = class_names(num_classes)
    generator = np.random.default_rng([seed, 0])
    initial, transition = emotion_chain(num_classes, stay_probability, generator)
    emotions = [_EMOTIONS[name] for name in names]
    shares = _list_shares(names)
    words: list[str] = []
    probabilities: list[np.ndarray] = []
    is_feeling: list[bool] = []
    for kind in ("feelings", "things"):
        for emotion, share in zip(emotions, shares.T, strict=True):
            list_words = getattr(emotion, kind).split()
            words += list_words
            # All words of a list are equally frequent.
            probabilities += [share / len(list_words)] * len(list_words)
            is_feeling += [kind == "feelings"] * len(list_words)
    probability = np.stack(probabilities, axis=1)  # [C + 1, V]
    return SpokenDialogueProcess(
        initial=initial,
        transition=transition,
        uninformative_share=uninformative_share,
        missing_share=missing_share,
        style_mean=np.array([emotion.style for emotion in emotions]),
        words=tuple(words),
        is_feeling=np.array(is_feeling),
        word_probability=probability[:-1],
        neutral_probability=probability[-1],
    )


def class_names(num_classes: int) -> tuple[str, ...]:
    """Returns the first `num_classes` classes.

    The classes are neutral, joy, sadness, anger, surprise, fear and disgust.

    Raises:
        ValueError: The number of classes is not between 2 and 7.
    """
    if not 2 <= num_classes <= len(_EMOTIONS):
        raise ValueError(f"{num_classes=}; allowed: 2 to {len(_EMOTIONS)}")
    return tuple(_EMOTIONS)[:num_classes]


def _list_shares(names: Sequence[str]) -> np.ndarray:
    """Returns the probability that an emotion (row) uses each emotion's words, [C + 1, C].

    The last row is for uninformative text.
    """
    neutral, *emotional = np.eye(len(names))
    uniform = np.mean(emotional, axis=0)
    shares = [(1 - _EMOTIONAL_IF_NEUTRAL) * neutral + _EMOTIONAL_IF_NEUTRAL * uniform]
    for name, one_hot in zip(names[1:], emotional, strict=True):
        (valence,) = (group for group in _VALENCES if name in group)
        same_valence = np.array([other in valence for other in names])
        emotional_share = (
            _SAME_EMOTION * one_hot
            + _SAME_VALENCE * same_valence / same_valence.sum()
            + _ANY * uniform
        )
        shares.append((1 - _EMOTIONAL) * neutral + _EMOTIONAL * emotional_share)
    return np.array([*shares, neutral])
