"""Random processes that generate dialogues, with the exact posterior of the emotions.

Emotions follow a Markov chain along a dialogue, so the posterior of each emotion given the whole
dialogue can be computed exactly. The Bayes classifier, which uses this posterior, has the highest
expected accuracy of all models.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mister_jax.data.schema import SPLITS
from mister_jax.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class ConversationProcess:
    """Markov chain of emotions, with the exact posterior given a dialogue's speech and text.

    Given the emotion of an utterance, its speech and its text are independent of each other and of
    all other utterances, except that speech and text are never both uninformative. Subclasses
    define the distributions of speech and text.

    Attributes:
        initial: Distribution of the first emotion, [C].
        transition: Distribution of the next emotion given each emotion, [C, C].
        uninformative_share: Probability that an utterance's speech is uninformative. Text is
            uninformative with the same probability, but never together with the speech.
        missing_share: Probability that an utterance lacks one modality. Speech and text are missing
            equally often.

    Raises:
        ValueError: A probability is out of range.
    """

    initial: np.ndarray
    transition: np.ndarray
    uninformative_share: float
    missing_share: float

    def __post_init__(self) -> None:
        if not 0 <= self.uninformative_share <= 0.5:
            raise ValueError(f"uninformative_share={self.uninformative_share}; allowed: 0 to 0.5")
        if not 0 <= self.missing_share <= 1:
            raise ValueError(f"missing_share={self.missing_share}; allowed: 0 to 1")

    def speech_log_density(self, speech: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns log p(speech | emotion) [T, C] and log p(uninformative speech) [T, 1].

        Both values omit the same additive constant, which depends on the utterance but not on the
        emotion.
        """
        raise NotImplementedError

    def text_log_density(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns log p(text | emotion) [T, C] and log p(uninformative text) [T, 1]."""
        raise NotImplementedError

    def sample_labels_and_flags(
        self, length: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draws the emotions of T utterances, and which modalities are uninformative or missing.

        Returns:
            The labels [T] int32; the uninformative modality of each utterance, [T], which is
            "speech", "text" or ""; and whether speech and text are present, each [T] bool.
        """
        label = np.empty(length, np.int32)
        distribution = self.initial
        for index in range(length):
            label[index] = generator.choice(len(distribution), p=distribution)
            distribution = self.transition[label[index]]
        uninformative_draw = generator.uniform(size=length)
        missing_draw = generator.uniform(size=length)
        share, half = self.uninformative_share, self.missing_share / 2
        uninformative = np.select(
            [uninformative_draw < share, uninformative_draw >= 1 - share], ["speech", "text"], ""
        )
        text_present = (missing_draw < half) | (missing_draw >= 2 * half)
        return label, uninformative, missing_draw >= half, text_present

    def log_likelihood(
        self,
        speech: np.ndarray,
        text: np.ndarray,
        speech_present: np.ndarray,
        text_present: np.ndarray,
    ) -> np.ndarray:
        """Computes log p(speech, text | emotion), [T, C], up to a constant per utterance.

        Args:
            speech: Speech of each utterance, [T, Ds].
            text: Text of each utterance, [T, Dt].
            speech_present: Whether to use the speech, [T] bool.
            text_present: Whether to use the text, [T] bool.
        """
        speech_informative, speech_uninformative = (
            np.where(speech_present[:, None], density, 0.0)
            for density in self.speech_log_density(speech)
        )
        text_informative, text_uninformative = (
            np.where(text_present[:, None], density, 0.0) for density in self.text_log_density(text)
        )
        with np.errstate(divide="ignore"):
            log_uninformative = np.log(self.uninformative_share)
            log_informative = np.log(1 - 2 * self.uninformative_share)
        return np.logaddexp.reduce(
            [
                log_informative + speech_informative + text_informative,
                log_uninformative + speech_uninformative + text_informative,
                log_uninformative + speech_informative + text_uninformative,
            ]
        )

    def posterior(self, *features: np.ndarray) -> np.ndarray:
        """Computes the posterior [T, C] of the emotions given the whole dialogue.

        The method is the forward-backward algorithm. `features` are the arguments of
        `log_likelihood`.
        """
        emission = self.log_likelihood(*features)  # [T, C]
        with np.errstate(divide="ignore"):
            log_transition = np.log(self.transition)
            forward = [np.log(self.initial) + emission[0]]
        for step in emission[1:]:
            prediction = np.logaddexp.reduce(forward[-1][:, None] + log_transition, axis=0)
            forward.append(prediction + step)
        backward = [np.zeros(emission.shape[1])]
        for step in emission[:0:-1]:
            backward.append(np.logaddexp.reduce(log_transition + step + backward[-1], axis=1))
        return _normalize(np.array(forward) + np.array(backward[::-1]))


def emotion_chain(
    num_classes: int, stay_probability: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a Markov chain whose emotion stays the same with probability `stay_probability`.

    Returns:
        The initial distribution [C] and the transition matrix [C, C]. The initial distribution is
        stationary, so a class has the same frequency at every position in a dialogue.

    Raises:
        ValueError: An argument is out of range.
    """
    if num_classes < 2 or not 0 <= stay_probability < 1:
        raise ValueError(
            f"{num_classes=}, {stay_probability=}; allowed: 2 or more, and 0 to below 1"
        )
    change = generator.dirichlet(np.ones(num_classes), size=num_classes)
    np.fill_diagonal(change, 0)
    change *= (1 - stay_probability) / change.sum(axis=1, keepdims=True)
    transition = change + stay_probability * np.eye(num_classes)
    initial = np.linalg.matrix_power(transition, 1000)[0]
    return initial / initial.sum(), transition


def gaussian_log_density(features: np.ndarray, means: np.ndarray) -> np.ndarray:
    """Computes log N(features [T, D]; means [C, D], I), [T, C], up to a constant per row."""
    return features.astype(float) @ means.T - np.sum(means**2, axis=1) / 2


def reference_scores(
    process: ConversationProcess, dialogues: Sequence[tuple[np.ndarray, ...]]
) -> dict[str, dict[str, float]]:
    """Computes the weighted F1 and accuracy of reference classifiers.

    Each classifier predicts the most probable emotion given certain inputs:

    - `bayes`: the whole dialogue;
    - `bayes_utterance`: only the utterance;
    - `bayes_speech`, `bayes_text`: one modality of the whole dialogue;
    - `majority`: no inputs, so it always predicts the most frequent emotion.

    Args:
        process: Process that generated the dialogues.
        dialogues: One tuple per dialogue: labels [T], speech [T, Ds], text [T, Dt], whether speech
            is present [T] bool, and whether text is present [T] bool.
    """
    label = np.concatenate([dialogue[0] for dialogue in dialogues])
    posteriors = collections.defaultdict(list)
    for _, speech, text, speech_present, text_present in dialogues:
        features = speech, text, speech_present, text_present
        utterance = np.log(process.initial) + process.log_likelihood(*features)
        absent = np.zeros_like(speech_present)
        posteriors["bayes"].append(process.posterior(*features))
        posteriors["bayes_utterance"].append(_normalize(utterance))
        posteriors["bayes_speech"].append(process.posterior(speech, text, speech_present, absent))
        posteriors["bayes_text"].append(process.posterior(speech, text, absent, text_present))
    posteriors["majority"] = [np.tile(process.initial, (len(label), 1))]
    scores = {}
    for reference, posterior in posteriors.items():
        predicted = np.concatenate(posterior).argmax(axis=1)
        scores[reference] = {
            "weighted_f1": _weighted_f1(label, predicted),
            "accuracy": float(np.mean(label == predicted)),
        }
    return scores


def check_num_dialogues(num_dialogues: Mapping[str, int]) -> None:
    """Checks the number of dialogues by split.

    Raises:
        InputError: A split is unknown, a number is negative, or all numbers are 0.
    """
    unknown = [split for split in num_dialogues if split not in SPLITS]
    if unknown or min(num_dialogues.values(), default=0) < 0 or not any(num_dialogues.values()):
        raise InputError(
            f"num_dialogues {dict(num_dialogues)}; allowed: numbers for {', '.join(SPLITS)}, "
            "not all 0"
        )


def _weighted_f1(label: np.ndarray, predicted: np.ndarray) -> float:
    """Computes the mean F1 of the classes, weighted by the frequency of each class."""
    total = 0.0
    for emotion in np.unique(label):
        is_label, is_predicted = label == emotion, predicted == emotion
        f1 = 2 * np.sum(is_label & is_predicted) / (is_label.sum() + is_predicted.sum())
        total += float(f1) * float(is_label.mean())
    return total


def _normalize(log_weights: np.ndarray) -> np.ndarray:
    """Returns probabilities [T, C] proportional to exp(`log_weights`)."""
    total = np.logaddexp.reduce(log_weights, axis=1, keepdims=True)
    return np.exp(log_weights - total)
