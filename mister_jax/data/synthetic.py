"""Synthetic conversations whose best possible scores are known.

Emotions follow a Markov chain along a dialogue, and an utterance's speech and text features are
Gaussian around a mean of its emotion. So the posterior of each emotion given the whole dialogue
can be computed, and no model can be expected to do better: a model's distance from that score is
its own. The parts of the task are there by design:

- Speech separates odd emotions from even ones well and the rest badly; text separates the pairs
  (0, 1), (2, 3), ... well and within a pair badly. Only both together tell an emotion.
- Emotions last, so context helps.
- Some utterances say nothing in one modality, unmarked, so a gate helps.
- Some utterances lack a modality, marked.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mister_jax.data.schema import SPLITS, DialogueFeatures
from mister_jax.errors import InputError

DEFAULT_NUM_DIALOGUES: Mapping[str, int] = {"train": 200, "validation": 40, "test": 60}

MIN_LENGTH, MAX_LENGTH = 2, 30

# Length of the mean's part that a modality separates well, and of the part it separates badly,
# where the noise has standard deviation 1 in every direction.
_CLEAR, _FAINT = 2.0, 0.8


@dataclasses.dataclass(frozen=True, eq=False)
class ConversationProcess:
    """The course of a dialogue, and the exact posterior of its emotions.

    Emotions are a Markov chain. Given its emotion, an utterance's speech and text are independent
    of each other and of all else, save that at most one of them says nothing. What speech and text
    are is left to the subclass.

    Attributes:
        initial: [C] distribution of the first emotion.
        transition: [C, C] rows: distribution of the next emotion.
        uninformative_share: probability that speech says nothing, and as much for text; never both.
        missing_share: probability that an utterance lacks one modality, either as often.

    Raises:
        ValueError: a share is out of range.
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
        """Log p(speech | emotion) [T, C] and log p(speech that says nothing) [T, 1].

        Both up to the same constant of each utterance.
        """
        raise NotImplementedError

    def text_log_density(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `speech_log_density`, for text."""
        raise NotImplementedError

    def sample_course(
        self, length: int, generator: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Draws the emotions of T utterances and what tells of them.

        Returns:
            label [T] int32; whether speech says nothing, text says nothing, speech is there, text
            is there, [T] bool each.
        """
        label = np.empty(length, np.int32)
        distribution = self.initial
        for index in range(length):
            label[index] = generator.choice(len(distribution), p=distribution)
            distribution = self.transition[label[index]]
        silent = generator.uniform(size=length)
        missing = generator.uniform(size=length)
        share, half = self.uninformative_share, self.missing_share / 2
        return (
            label,
            silent < share,
            silent >= 1 - share,
            missing >= half,
            (missing < half) | (missing >= 2 * half),
        )

    def log_likelihood(
        self,
        speech: np.ndarray,
        text: np.ndarray,
        speech_present: np.ndarray,
        text_present: np.ndarray,
    ) -> np.ndarray:
        """Log p(speech, text | emotion) of utterances, up to a constant of each utterance.

        Args:
            speech: [T, Ds].
            text: [T, Dt].
            speech_present: [T] bool; false leaves the speech out.
            text_present: [T] bool; false leaves the text out.

        Returns:
            [T, C] float64.
        """
        speech_clear, speech_silent = (
            np.where(speech_present[:, None], density, 0.0)
            for density in self.speech_log_density(speech)
        )
        text_clear, text_silent = (
            np.where(text_present[:, None], density, 0.0) for density in self.text_log_density(text)
        )
        with np.errstate(divide="ignore"):
            log_silent = np.log(self.uninformative_share)
            log_clear = np.log(1 - 2 * self.uninformative_share)
        return np.logaddexp.reduce(
            [
                log_clear + speech_clear + text_clear,
                log_silent + speech_silent + text_clear,
                log_silent + speech_clear + text_silent,
            ]
        )

    def posterior(
        self,
        speech: np.ndarray,
        text: np.ndarray,
        speech_present: np.ndarray,
        text_present: np.ndarray,
    ) -> np.ndarray:
        """p(emotion of each utterance | all features of the dialogue), by forward-backward.

        Args:
            speech: [T, Ds].
            text: [T, Dt].
            speech_present: [T] bool.
            text_present: [T] bool.

        Returns:
            [T, C] float64, rows summing to 1.
        """
        emission = self.log_likelihood(speech, text, speech_present, text_present)  # [T, C]
        with np.errstate(divide="ignore"):
            log_transition = np.log(self.transition)
            forward = [np.log(self.initial) + emission[0]]
        for step in emission[1:]:
            before = np.logaddexp.reduce(forward[-1][:, None] + log_transition, axis=0)
            forward.append(before + step)
        backward = [np.zeros(emission.shape[1])]
        for step in emission[:0:-1]:
            backward.append(np.logaddexp.reduce(log_transition + step + backward[-1], axis=1))
        return _normalised(np.array(forward) + np.array(backward[::-1]))


@dataclasses.dataclass(frozen=True, eq=False)
class EmotionProcess(ConversationProcess):
    """The process that makes dialogues of feature vectors.

    Attributes:
        speech_mean: [C, Ds] mean speech features of each emotion.
        text_mean: [C, Dt] mean text features of each emotion.
        speech_neutral: [Ds] mean of speech that says nothing.
        text_neutral: [Dt] mean of text that says nothing.
    """

    speech_mean: np.ndarray
    text_mean: np.ndarray
    speech_neutral: np.ndarray
    text_neutral: np.ndarray

    def speech_log_density(self, speech: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        silent = gaussian_log_density(speech, self.speech_neutral[None])
        return gaussian_log_density(speech, self.speech_mean), silent

    def text_log_density(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        silent = gaussian_log_density(text, self.text_neutral[None])
        return gaussian_log_density(text, self.text_mean), silent

    def sample(
        self, length: int, generator: np.random.Generator
    ) -> tuple[tuple[np.ndarray, ...], np.ndarray]:
        """Draws a dialogue of T utterances.

        Returns:
            label [T] int32, speech [T, Ds] and text [T, Dt] float32, and their presence, [T] bool;
            and beside them which modality says nothing, [T]: "speech", "text" or "".
        """
        label, speech_silent, text_silent, speech_present, text_present = self.sample_course(
            length, generator
        )
        speech = _draw(self.speech_mean[label], self.speech_neutral, speech_silent, generator)
        text = _draw(self.text_mean[label], self.text_neutral, text_silent, generator)
        speech[~speech_present] = 0
        text[~text_present] = 0
        silent = np.where(speech_silent, "speech", np.where(text_silent, "text", ""))
        return (label, speech, text, speech_present, text_present), silent


def emotion_chain(
    num_classes: int, stay_probability: float, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a Markov chain of emotions that last.

    Args:
        num_classes: C, at least 2.
        stay_probability: of an emotion to last; else it changes in a way that depends on it.
        generator: source of randomness.

    Returns:
        initial [C] and transition [C, C]. The chain starts as it goes on, so a class is as frequent
        anywhere in a dialogue.

    Raises:
        ValueError: an argument is out of range.
    """
    if num_classes < 2 or not 0 <= stay_probability < 1:
        raise ValueError(f"{num_classes=}, {stay_probability=}; allowed: at least 2, and 0 to 1")
    change = generator.dirichlet(np.ones(num_classes), size=num_classes)
    np.fill_diagonal(change, 0)
    change *= (1 - stay_probability) / change.sum(axis=1, keepdims=True)
    transition = change + stay_probability * np.eye(num_classes)
    initial = np.linalg.matrix_power(transition, 1000)[0]
    return initial / initial.sum(), transition


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
    """Draws the means and the chain of a process.

    Args:
        seed: at least 0; the same seed gives the same process.
        num_classes: C, at least 2.
        speech_dim: Ds.
        text_dim: Dt.
        stay_probability: see `emotion_chain`.
        uninformative_share: see `ConversationProcess`, at most 0.5.
        missing_share: see `ConversationProcess`.

    Raises:
        ValueError: an argument is out of range.
    """
    generator = np.random.default_rng([seed, 0])
    initial, transition = emotion_chain(num_classes, stay_probability, generator)
    emotion = np.arange(num_classes)
    speech_mean = _means(emotion % 2, speech_dim, generator)
    text_mean = _means(emotion // 2, text_dim, generator)
    return EmotionProcess(
        initial=initial,
        transition=transition,
        speech_mean=speech_mean,
        text_mean=text_mean,
        speech_neutral=_CLEAR * _directions(1, speech_dim, generator)[0],
        text_neutral=_CLEAR * _directions(1, text_dim, generator)[0],
        uninformative_share=uninformative_share,
        missing_share=missing_share,
    )


def check_num_dialogues(num_dialogues: Mapping[str, int]) -> None:
    """Fails with InputError where there is no dialogue or an unknown split."""
    unknown = [split for split in num_dialogues if split not in SPLITS]
    if unknown or min(num_dialogues.values(), default=0) < 0 or not any(num_dialogues.values()):
        raise InputError(
            f"num_dialogues {dict(num_dialogues)}; allowed: numbers for {', '.join(SPLITS)}, "
            "not all 0"
        )


def generate_features(
    seed: int = 0,
    num_dialogues: Mapping[str, int] = DEFAULT_NUM_DIALOGUES,
    *,
    num_classes: int = 6,
    speech_dim: int = 64,
    text_dim: int = 96,
    stay_probability: float = 0.6,
    uninformative_share: float = 0.2,
    missing_share: float = 0.05,
) -> dict[str, DialogueFeatures]:
    """Generates splits of synthetic dialogues, the same for the same arguments.

    Each split's metadata holds its `reference_scores`, and of each utterance which modality is
    `uninformative`, what no model should see: "speech", "text" or "".

    Args:
        seed: at least 0.
        num_dialogues: dialogues by split; each has 2 to 30 utterances. A split of none is left out.
        num_classes: C, at least 2.
        speech_dim: Ds.
        text_dim: Dt.
        stay_probability: see `emotion_chain`.
        uninformative_share: see `ConversationProcess`.
        missing_share: see `ConversationProcess`.

    Raises:
        InputError: `num_dialogues` has no dialogue or an unknown split.
        ValueError: another argument is out of range.
    """
    check_num_dialogues(num_dialogues)
    process = emotion_process(
        seed,
        num_classes=num_classes,
        speech_dim=speech_dim,
        text_dim=text_dim,
        stay_probability=stay_probability,
        uninformative_share=uninformative_share,
        missing_share=missing_share,
    )
    return {
        split: _generate_split(process, split, count, seed, np.random.default_rng([seed, 1, index]))
        for index, (split, count) in enumerate(num_dialogues.items())
        if count
    }


def _generate_split(
    process: EmotionProcess, split: str, count: int, seed: int, generator: np.random.Generator
) -> DialogueFeatures:
    lengths = generator.integers(MIN_LENGTH, MAX_LENGTH, size=count, endpoint=True)
    dialogues, silent = zip(*(process.sample(length, generator) for length in lengths), strict=True)
    label, speech, text, speech_present, text_present = map(
        np.concatenate, zip(*dialogues, strict=True)
    )
    dialogue_ids = tuple(f"{split}_{index}" for index in range(count))
    return DialogueFeatures(
        name="synthetic_features",
        split=split,
        class_names=tuple(f"emotion_{index}" for index in range(len(process.initial))),
        dialogue_ids=dialogue_ids,
        lengths=lengths,
        utterance_ids=np.array(
            [
                f"{dialogue}_{index}"
                for dialogue, length in zip(dialogue_ids, lengths, strict=True)
                for index in range(length)
            ]
        ),
        speech=speech,
        text=text,
        speech_present=speech_present,
        text_present=text_present,
        label=label,
        metadata={
            "seed": seed,
            "reference_scores": reference_scores(process, dialogues),
            "uninformative": np.concatenate(silent).tolist(),
        },
    )


def reference_scores(
    process: ConversationProcess, dialogues: Sequence[tuple[np.ndarray, ...]]
) -> dict[str, dict[str, float]]:
    """The scores that no model can be expected to exceed.

    They are the weighted F1 and the accuracy, on the labels that were drawn, of

    - `bayes`: the most probable emotion given the whole dialogue;
    - `bayes_utterance`: given the utterance alone;
    - `bayes_speech`, `bayes_text`: given one modality of the whole dialogue;
    - `majority`: the most frequent emotion of the process.

    Args:
        process: that made the dialogues.
        dialogues: of each the labels [T], speech [T, Ds], text [T, Dt], and their presence, [T]
            bool.
    """
    label = np.concatenate([dialogue[0] for dialogue in dialogues])
    absent = np.zeros_like
    posteriors = {
        "bayes": [process.posterior(*features) for _, *features in dialogues],
        "bayes_utterance": [
            _normalised(np.log(process.initial) + process.log_likelihood(*features))
            for _, *features in dialogues
        ],
        "bayes_speech": [
            process.posterior(speech, text, speech_present, absent(text_present))
            for _, speech, text, speech_present, text_present in dialogues
        ],
        "bayes_text": [
            process.posterior(speech, text, absent(speech_present), text_present)
            for _, speech, text, speech_present, text_present in dialogues
        ],
        "majority": [np.tile(process.initial, (len(label), 1))],
    }
    scores = {}
    for reference, posterior in posteriors.items():
        predicted = np.concatenate(posterior).argmax(axis=1)
        scores[reference] = {
            "weighted_f1": _weighted_f1(label, predicted),
            "accuracy": float(np.mean(label == predicted)),
        }
    return scores


def _weighted_f1(label: np.ndarray, predicted: np.ndarray) -> float:
    """Mean F1 of the classes, weighted by how often each is the label."""
    total = 0.0
    for emotion in np.unique(label):
        is_label, is_predicted = label == emotion, predicted == emotion
        f1 = 2 * np.sum(is_label & is_predicted) / (is_label.sum() + is_predicted.sum())
        total += float(f1) * float(is_label.mean())
    return total


def _directions(count: int, width: int, generator: np.random.Generator) -> np.ndarray:
    """[count, width] random unit vectors."""
    vectors = generator.normal(size=(count, width))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _means(group: np.ndarray, width: int, generator: np.random.Generator) -> np.ndarray:
    """[C, width] means, far apart between the groups [C] and close within one."""
    clear = _directions(int(group.max()) + 1, width, generator)
    return _CLEAR * clear[group] + _FAINT * _directions(len(group), width, generator)


def _draw(
    mean: np.ndarray, neutral: np.ndarray, silent: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """[T, D] float32 features around `mean` [T, D], or around `neutral` [D] where silent [T]."""
    centre = np.where(silent[:, None], neutral, mean)
    return (centre + generator.normal(size=mean.shape)).astype(np.float32)


def gaussian_log_density(features: np.ndarray, means: np.ndarray) -> np.ndarray:
    """[T, C] log N(features; mean, 1) without the part that no mean enters."""
    return features.astype(float) @ means.T - np.sum(means**2, axis=1) / 2


def _normalised(log_weights: np.ndarray) -> np.ndarray:
    """[T, C] probabilities from log weights."""
    total = np.logaddexp.reduce(log_weights, axis=1, keepdims=True)
    return np.exp(log_weights - total)
