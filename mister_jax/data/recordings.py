"""A synthetic corpus of recordings and transcripts whose best possible scores are known.

Emotions follow a Markov chain along a dialogue, as in `synthetic`. Each utterance has a way of
speaking, four numbers that are Gaussian around the emotion's: pitch, loudness, tempo and
brightness; and some words, drawn by the emotion from lists of telling and of neutral ones. A voice
of harmonics, formants and breath says syllables without meaning in that way of speaking, and
sentence templates take the words. All else, from the vowels to the template and the duration, has
nothing to do with the emotion. So the posterior of the emotions given the ways of speaking and the
words can be computed, and no model of sound and text can be expected to do better.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from mister_jax.data.audio import SAMPLE_RATE, encode_wav
from mister_jax.data.schema import SPLITS
from mister_jax.data.storage import clean_up, whole_directory
from mister_jax.data.synthetic import (
    ConversationProcess,
    check_num_dialogues,
    emotion_chain,
    gaussian_log_density,
    reference_scores,
)
from mister_jax.data.workers import WorkerCrash, ordered_map
from mister_jax.errors import InputError

MANIFEST, TRUTH, SCORES = "manifest.jsonl", "truth.jsonl", "reference_scores.json"
ARGUMENTS = "arguments.json"

DEFAULT_NUM_DIALOGUES: Mapping[str, int] = {"train": 120, "validation": 30, "test": 40}

MIN_LENGTH, MAX_LENGTH = 4, 14
"""Utterances of a dialogue."""


class _Emotion(NamedTuple):
    """How an emotion is spoken of.

    Attributes:
        manner: mean pitch, loudness, tempo and brightness, in standard deviations from the middle.
        feelings: words for how one feels.
        things: words for what one speaks about.
    """

    manner: tuple[float, float, float, float]
    feelings: str
    things: str


# Speech separates the calm, the loud and the shrill (tendencies as in Juslin & Laukka 2003,
# doi:10.1037/0033-2909.129.5.770); words separate the negative, the positive and the neutral.
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
        "filth stench mould rot slime vomit",
    ),
}

# Emotions that share words.
_VALENCES = (("neutral",), ("joy", "surprise"), ("sadness", "anger", "fear", "disgust"))

# How often a word is a telling one, and from where: the emotion's own list, that of an emotion of
# its valence, any. A neutral speaker uses fewer, from any list.
_TELLING, _TELLING_IF_NEUTRAL = 0.75, 0.12
_OWN, _OF_VALENCE, _ANY = 0.4, 0.5, 0.1

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


# A way of speaking as sound, in the order of its four numbers: the value in the middle and what a
# standard deviation adds. Pitch and tempo go by octaves, so they add to the logarithm.
_OCTAVE_OF_PITCH = (math.log2(165.0), 0.2)  # Hz
_LEVEL = (-28.0, 2.5)  # dB of full scale, root mean square
_OCTAVE_OF_TEMPO = (math.log2(4.5), 0.2)  # Syllables a second.
_TILT = (-10.0, 2.0)  # dB an octave of the voice's source.

_MIN_SECONDS, _MAX_SECONDS = 1.0, 3.0

# Formants of five vowels in Hz (after Peterson & Barney 1952), their bandwidths, and by how much
# they stand out.
_VOWELS = np.array(
    [[730, 1090, 2440], [530, 1840, 2480], [270, 2290, 3010], [570, 840, 2410], [300, 870, 2240]]
)
_BANDWIDTHS = np.array([60, 90, 130])
_PEAK = 6.0

# Vocal tracts are this much shorter or longer than those of the formants.
_MIN_TRACT, _MAX_TRACT = 0.88, 1.14

_BREATH = 0.01  # Of the voice, root mean square.
_ROOM = 8.0  # Noise of the room, root mean square, 72 dB below full scale.


@dataclasses.dataclass(frozen=True, eq=False)
class SpokenProcess(ConversationProcess):
    """The process that makes ways of speaking and words.

    Attributes:
        manner_mean: [C, 4] mean pitch, loudness, tempo and brightness of each emotion, in standard
            deviations. Speech that says nothing is as the first.
        words: V words.
        is_feeling: [V] bool, the word is a feeling, not a thing.
        word_probability: [C, V] probability of each word among those of its kind.
        neutral_probability: [V] likewise, of text that says nothing.
    """

    manner_mean: np.ndarray
    words: tuple[str, ...]
    is_feeling: np.ndarray
    word_probability: np.ndarray
    neutral_probability: np.ndarray

    def speech_log_density(self, speech: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ConversationProcess`; speech is [T, 4], ways of speaking."""
        density = gaussian_log_density(speech, self.manner_mean)
        return density, density[:, :1]

    def text_log_density(self, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See `ConversationProcess`; text is [T, V], how often each word occurs."""

        def log_density(probability: np.ndarray) -> np.ndarray:
            with np.errstate(divide="ignore"):
                log_probability = np.log(probability)  # [C, V]
            # A word that does not occur may be an impossible one.
            counted = np.where(text[:, None] > 0, log_probability, 0.0)  # [T, C, V]
            return np.sum(text[:, None] * counted, axis=-1)

        return log_density(self.word_probability), log_density(self.neutral_probability[None])

    def sample_manner(
        self, label: np.ndarray, silent: np.ndarray, generator: np.random.Generator
    ) -> np.ndarray:
        """Draws ways of speaking, [T, 4], of labels [T]; where silent [T] they say nothing."""
        mean = np.where(silent[:, None], self.manner_mean[0], self.manner_mean[label])
        return mean + generator.normal(size=mean.shape)

    def sample_sentence(
        self, label: int, silent: bool, generator: np.random.Generator
    ) -> tuple[str, np.ndarray]:
        """Draws a sentence; also returns how often it has each of the words, [V] int."""
        probability = self.neutral_probability if silent else self.word_probability[label]
        sentence = _TEMPLATES[generator.integers(len(_TEMPLATES))]
        count = np.zeros(len(self.words), np.int64)
        for place, kind in (("{feeling}", self.is_feeling), ("{thing}", ~self.is_feeling)):
            (allowed,) = np.nonzero(kind)
            drawn = generator.choice(allowed, sentence.count(place), p=probability[allowed])
            for word in drawn:
                sentence = sentence.replace(place, self.words[word], 1)
                count[word] += 1
        return sentence, count


def spoken_process(
    seed: int,
    *,
    num_classes: int = 6,
    stay_probability: float = 0.6,
    uninformative_share: float = 0.1,
    missing_share: float = 0.05,
) -> SpokenProcess:
    """Draws the chain of a process.

    Args:
        seed: at least 0; the same seed gives the same process.
        num_classes: C, from 2 to 7, see `class_names`.
        stay_probability: see `synthetic.emotion_chain`.
        uninformative_share: see `synthetic.ConversationProcess`, at most 0.5.
        missing_share: see `synthetic.ConversationProcess`.

    Raises:
        ValueError: an argument is out of range.
    """
    names = class_names(num_classes)
    generator = np.random.default_rng([seed, 0])
    initial, transition = emotion_chain(num_classes, stay_probability, generator)
    emotions = [_EMOTIONS[name] for name in names]
    shares = _list_shares(names)
    words: list[str] = []
    probabilities: list[np.ndarray] = []
    for kind in ("feelings", "things"):
        for emotion, share in zip(emotions, shares.T, strict=True):
            of_list = getattr(emotion, kind).split()
            words += of_list
            # The words of a list are equally frequent.
            probabilities += [share / len(of_list)] * len(of_list)
    probability = np.stack(probabilities, axis=1)  # [C + 1, V]
    num_feelings = sum(len(emotion.feelings.split()) for emotion in emotions)
    return SpokenProcess(
        initial=initial,
        transition=transition,
        uninformative_share=uninformative_share,
        missing_share=missing_share,
        manner_mean=np.array([emotion.manner for emotion in emotions]),
        words=tuple(words),
        is_feeling=np.arange(len(words)) < num_feelings,
        word_probability=probability[:-1],
        neutral_probability=probability[-1],
    )


def class_names(num_classes: int) -> tuple[str, ...]:
    """The first of neutral, joy, sadness, anger, surprise, fear, disgust.

    Raises:
        ValueError: there are not as many, or fewer than two are asked for.
    """
    if not 2 <= num_classes <= len(_EMOTIONS):
        raise ValueError(f"{num_classes=}; allowed: 2 to {len(_EMOTIONS)}")
    return tuple(_EMOTIONS)[:num_classes]


def _list_shares(names: Sequence[str]) -> np.ndarray:
    """[C + 1, C] from whose list each emotion takes a word; last, text that says nothing."""
    neutral, *telling = np.eye(len(names))
    any_telling = np.mean(telling, axis=0)
    shares = [(1 - _TELLING_IF_NEUTRAL) * neutral + _TELLING_IF_NEUTRAL * any_telling]
    for name, own in zip(names[1:], telling, strict=True):
        (valence,) = (group for group in _VALENCES if name in group)
        mates = np.array([other in valence for other in names])
        told = _OWN * own + _OF_VALENCE * mates / mates.sum() + _ANY * any_telling
        shares.append((1 - _TELLING) * neutral + _TELLING * told)
    return np.array([*shares, neutral])


def write_recordings(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_dialogues: Mapping[str, int] = DEFAULT_NUM_DIALOGUES,
    num_classes: int = 6,
    stay_probability: float = 0.6,
    uninformative_share: float = 0.1,
    missing_share: float = 0.05,
    num_workers: int = 0,
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda line: None,
) -> pathlib.Path:
    """Writes a corpus of dialogues of 4 to 14 utterances of 1 to 3 s, whole or not at all.

    In the directory are

    - `manifest.jsonl`, as `mister_jax.data.manifest` reads it: an utterance a row, without `audio`
      or `text` where the modality is missing;
    - `audio/DIALOGUE/UTTERANCE.wav`, 16 kHz, mono, 16 bits;
    - `truth.jsonl`, which no model should see: of each row of the manifest which modality is
      `uninformative` and which `missing`, the physical values of the way of speaking, and the
      words that were drawn;
    - `reference_scores.json`: of each split what `synthetic.reference_scores` describes;
    - `arguments.json`: those of this function that tell what is in the other files.

    The same arguments give the same bytes on the same kind of machine, with any `num_workers`. A
    dialogue does not depend on how many others there are.

    Args:
        directory: to be made.
        seed: at least 0.
        num_dialogues: dialogues by split.
        num_classes: from 2 to 7, see `class_names`.
        stay_probability: see `synthetic.emotion_chain`.
        uninformative_share: see `synthetic.ConversationProcess`, at most 0.5.
        missing_share: see `synthetic.ConversationProcess`.
        num_workers: processes that make the sound; with 0 this one does.
        overwrite: replace a directory, if it holds such a corpus. Without, a corpus of the same
            arguments is left as it is.
        tell: is given a line where a corpus is left as it is.

    Returns:
        The path of the manifest.

    Raises:
        InputError: the directory holds something else or cannot be written, or `num_dialogues` has
            no dialogue or an unknown split.
        ValueError: another argument is out of range.
    """
    directory = pathlib.Path(directory).expanduser().absolute()
    check_num_dialogues(num_dialogues)
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "stay_probability": stay_probability,
        "uninformative_share": uninformative_share,
        "missing_share": missing_share,
    }
    process = spoken_process(seed, **options)
    arguments = {"seed": seed, "num_dialogues": dict(num_dialogues), **options}
    made, root = epath.Path(directory), epath.Path(directory.parent)
    clean_up(made, root)
    if directory.exists() and _is_made(directory, arguments, overwrite):
        tell(f"{directory}: recordings of the same arguments were there and are used")
        return directory / MANIFEST
    with whole_directory(made, root, overwrite=overwrite) as incomplete:
        place = pathlib.Path(incomplete) / directory.name
        place.mkdir()
        manifest: list[dict[str, Any]] = []
        truth: list[dict[str, Any]] = []
        scores: dict[str, Any] = {}
        tasks: list[_Sound] = []
        for split, count in num_dialogues.items():
            dialogues = [_Dialogue.sample(process, seed, split, index) for index in range(count)]
            for dialogue in dialogues:
                manifest += dialogue.rows()
                truth += dialogue.truth(process.words)
                tasks.append(dialogue.sound(place, seed))
            if dialogues:
                scores[split] = reference_scores(
                    process, [dialogue.features for dialogue in dialogues]
                )
        for result in ordered_map(_write_sound, tasks, num_workers=num_workers):
            if isinstance(result, WorkerCrash):
                raise result
        _write_jsonl(place / MANIFEST, manifest)
        _write_jsonl(place / TRUTH, truth)
        for name, values in ((SCORES, scores), (ARGUMENTS, arguments)):
            (place / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return directory / MANIFEST


def _is_made(directory: pathlib.Path, arguments: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether what is there is what was asked for; fails where it may not be replaced either."""
    if not all((directory / name).is_file() for name in (MANIFEST, TRUTH, SCORES)):
        raise InputError(f"{directory}: not a synthetic corpus of recordings; not overwritten")
    if overwrite:
        return False
    try:
        known = dict(json.loads((directory / ARGUMENTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        known = {}
    differences = [
        f"{name} {known[name]} in place of {value}" if name in known else f"no {name}"
        for name, value in arguments.items()
        if known.get(name) != value
    ]
    if differences:
        raise InputError(
            f"{directory}: recordings of other arguments exist ({'; '.join(differences)}); "
            "allowed: another directory, or to overwrite them"
        )
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class _Sound:
    """What a worker needs to write the recordings of a dialogue.

    Attributes:
        paths: of T files; None where speech is missing.
        manner: [T, 4].
        seed: of all that has nothing to do with the emotion.
    """

    paths: list[pathlib.Path | None]
    manner: np.ndarray
    seed: list[int]


@dataclasses.dataclass(frozen=True, eq=False)
class _Dialogue:
    """A dialogue of T utterances before it is heard."""

    split: str
    index: int
    label: np.ndarray
    class_names: tuple[str, ...]
    manner: np.ndarray
    sentences: list[str]
    counts: np.ndarray
    speech_silent: np.ndarray
    text_silent: np.ndarray
    speech_present: np.ndarray
    text_present: np.ndarray

    @classmethod
    def sample(cls, process: SpokenProcess, seed: int, split: str, index: int) -> "_Dialogue":
        generator = np.random.default_rng([seed, 1, SPLITS.index(split), index])
        length = int(generator.integers(MIN_LENGTH, MAX_LENGTH, endpoint=True))
        course = process.sample_course(length, generator)
        label, speech_silent, text_silent, speech_present, text_present = course
        manner = process.sample_manner(label, speech_silent, generator)
        sentences, counts = zip(
            *(
                process.sample_sentence(emotion, silent, generator)
                for emotion, silent in zip(label, text_silent, strict=True)
            ),
            strict=True,
        )
        return cls(
            split,
            index,
            label,
            class_names(len(process.initial)),
            manner,
            list(sentences),
            np.array(counts),
            speech_silent,
            text_silent,
            speech_present,
            text_present,
        )

    @property
    def id(self) -> str:
        return f"{self.split}_{self.index}"

    @property
    def utterance_ids(self) -> list[str]:
        return [f"{self.id}_{index}" for index in range(len(self.label))]

    @property
    def features(self) -> tuple[np.ndarray, ...]:
        """As `reference_scores` takes them."""
        return self.label, self.manner, self.counts, self.speech_present, self.text_present

    def rows(self) -> Iterator[dict[str, Any]]:
        """Of the manifest."""
        for index, utterance in enumerate(self.utterance_ids):
            row: dict[str, Any] = {"dialogue": self.id, "utterance": utterance, "order": index}
            if self.speech_present[index]:
                row["audio"] = _audio_path(self.id, utterance)
            if self.text_present[index]:
                row["text"] = self.sentences[index]
            yield row | {"label": self.class_names[self.label[index]], "split": self.split}

    def truth(self, words: Sequence[str]) -> Iterator[dict[str, Any]]:
        """What the rows do not tell."""
        for index, utterance in enumerate(self.utterance_ids):
            pitch, level, tempo, tilt = _physical(self.manner[index])
            yield {
                "dialogue": self.id,
                "utterance": utterance,
                "uninformative": _either(self.speech_silent[index], self.text_silent[index]),
                "missing": _either(~self.speech_present[index], ~self.text_present[index]),
                "pitch_hz": pitch,
                "level_db": level,
                "syllables_per_second": tempo,
                "tilt_db_per_octave": tilt,
                "words": np.repeat(words, self.counts[index]).tolist(),
            }

    def sound(self, directory: pathlib.Path, seed: int) -> _Sound:
        paths = [
            directory / _audio_path(self.id, utterance) if present else None
            for utterance, present in zip(self.utterance_ids, self.speech_present, strict=True)
        ]
        return _Sound(paths, self.manner, [seed, 2, SPLITS.index(self.split), self.index])


def _audio_path(dialogue: str, utterance: str) -> str:
    return f"audio/{dialogue}/{utterance}.wav"


def _either(speech: bool, text: bool) -> str | None:
    return "speech" if speech else "text" if text else None


def _physical(manner: np.ndarray) -> tuple[float, float, float, float]:
    """Hz, dB of full scale, syllables a second, and dB an octave, of a way of speaking [4]."""
    pitch, level, tempo, tilt = (
        middle + deviation * float(value)
        for (middle, deviation), value in zip(
            (_OCTAVE_OF_PITCH, _LEVEL, _OCTAVE_OF_TEMPO, _TILT), manner, strict=True
        )
    )
    return 2**pitch, level, 2**tempo, tilt


def _write_sound(sound: _Sound) -> None:
    generator = np.random.default_rng(sound.seed)
    # Two people take turns.
    tracts = generator.uniform(_MIN_TRACT, _MAX_TRACT, size=2)
    for index, path in enumerate(sound.paths):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            encode_wav(path, _voice(sound.manner[index], tracts[index % 2], generator))


def _voice(manner: np.ndarray, tract: float, generator: np.random.Generator) -> np.ndarray:
    """An utterance of meaningless syllables.

    Args:
        manner: [4], the way of speaking.
        tract: factor of the formants.
        generator: of all else.

    Returns:
        [S] int16 at `SAMPLE_RATE`. Over its whole length the mean logarithm of the pitch, the root
        mean square and the rate of syllables are those of the way of speaking.
    """
    pitch, level, tempo, tilt = _physical(manner)
    seconds = generator.uniform(_MIN_SECONDS, _MAX_SECONDS)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    # Counts syllables. They are of uneven length, and the last one may be cut short.
    syllable = tempo * time
    syllable += 0.1 * np.sin(2 * np.pi * (syllable / 2.3 + generator.uniform()))
    syllable = np.maximum(syllable - syllable[0], 0)
    count = int(syllable[-1]) + 2
    stress = np.interp(syllable, np.arange(count), generator.uniform(0.6, 1.0, size=count))
    envelope = stress * (0.08 + 0.92 * np.sin(np.pi * syllable) ** 2)

    octave = np.interp(syllable, np.arange(count), generator.normal(scale=0.05, size=count))
    octave += np.linspace(0.08, -0.08, len(time))  # The voice falls along a sentence.
    frequency = pitch * 2 ** (octave - octave.mean())
    source = envelope * _harmonics(frequency, tilt)
    source += _BREATH * _level(source) * envelope * generator.normal(size=len(time))

    formants = tract * _VOWELS[generator.integers(len(_VOWELS), size=count)]  # [syllables, 3]
    voice = _resonate(source, syllable, formants)
    voice *= 32768 * 10 ** (level / 20) / _level(voice)
    voice += _ROOM * generator.normal(size=len(time))
    return np.clip(np.rint(voice), -32768, 32767).astype(np.int16)


def _harmonics(frequency: np.ndarray, tilt: float) -> np.ndarray:
    """[S] sum of all harmonics of `frequency` [S] in Hz, `tilt` dB louder each octave."""
    angle = np.cumsum(2 * np.pi * frequency / SAMPLE_RATE)
    fundamental = np.exp(1j * (angle % (2 * np.pi))).astype(np.complex64)
    harmonic = fundamental.copy()
    total = np.zeros(len(frequency), np.float32)
    for number in range(1, int(0.48 * SAMPLE_RATE / frequency.max()) + 1):
        total += np.float32(10 ** (tilt * math.log2(number) / 20)) * harmonic.imag
        harmonic *= fundamental
    return total.astype(np.float64)


def _resonate(source: np.ndarray, syllable: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """Filters a source by formants that glide from syllable to syllable.

    Args:
        source: [S].
        syllable: [S] which of the formants are heard when; between two of them it is their mean.
        formants: [syllables, 3] Hz.

    Returns:
        [S].
    """
    hop, width = 256, 512  # Samples. Hann windows of twice the hop add up to 1.
    count = -(-len(source) // hop) + 1
    padded = np.zeros((count + 1) * hop)
    padded[hop : hop + len(source)] = source
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(width) / width)
    frames = np.lib.stride_tricks.sliding_window_view(padded, width)[::hop] * window  # [F, width]

    centre = np.minimum(np.arange(count) * hop, len(source) - 1)
    place = np.arange(len(formants))
    heard = np.stack([np.interp(syllable[centre], place, each) for each in formants.T], axis=1)
    away = np.fft.rfftfreq(2 * width, 1 / SAMPLE_RATE) - heard[..., None]  # [F, 3, bins]
    # Peaks on level ground, so that the tilt of the source can be heard.
    gain = np.prod(1 + _PEAK / (1 + (away / _BANDWIDTHS[:, None]) ** 2), axis=1)
    spectrum = np.fft.rfft(frames, 2 * width) * gain

    # Without delay, so a frame's answer rings on both sides of it.
    answer = np.roll(np.fft.irfft(spectrum), width // 2, axis=1)
    total = np.zeros((count + 3) * hop)
    for part in range(4):
        piece = answer[:, part * hop : (part + 1) * hop]
        total[part * hop : part * hop + piece.size] += piece.ravel()
    return total[width // 2 + hop :][: len(source)]


def _level(samples: np.ndarray) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(samples**2)))


def _write_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
