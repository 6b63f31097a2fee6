"""Writes the synthetic speech corpus: recordings, manifest, ground truth and reference scores."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax.data.audio import encode_wav
from mister_jax.data.dialogue_process import check_num_dialogues, reference_scores
from mister_jax.data.schema import SPLITS
from mister_jax.data.storage import atomic_directory, recover_directory
from mister_jax.data.synthetic_speech.process import (
    SpokenDialogueProcess,
    class_names,
    make_spoken_dialogue_process,
)
from mister_jax.data.synthetic_speech.voice import (
    MAX_FORMANT_SCALE,
    MIN_FORMANT_SCALE,
    physical_style,
    synthesize,
)
from mister_jax.data.workers import WorkerCrashError, ordered_map
from mister_jax.errors import InputError

MANIFEST, TRUTH, SCORES = "manifest.jsonl", "truth.jsonl", "reference_scores.json"
ARGUMENTS = "arguments.json"

DEFAULT_NUM_DIALOGUES: Mapping[str, int] = {"train": 120, "validation": 30, "test": 40}

MIN_LENGTH, MAX_LENGTH = 4, 14
"""Utterances of a dialogue."""


def write_speech_corpus(
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
    log: Callable[[str], None] = lambda line: None,
) -> pathlib.Path:
    """Writes a corpus of dialogues of 4 to 14 utterances of 1 to 3 s, atomically.

    The directory contains

    - `manifest.jsonl`, which `mister_jax.data.corpora.manifest` reads: one row per utterance,
      without `audio` or `text` where that modality is missing;
    - `audio/DIALOGUE/UTTERANCE.wav`, 16 kHz, mono, 16 bits;
    - `truth.jsonl`, which no model may see: for each row of the manifest the `uninformative` and
      the `missing` modality, the physical values of the speaking style, and the drawn words;
    - `reference_scores.json`: the scores of `dialogue_process.reference_scores` for each split;
    - `arguments.json`: the arguments that determine the other files.

    The same arguments give the same bytes on the same kind of machine, with any `num_workers`. A
    dialogue does not depend on the number of dialogues.

    Args:
        directory: Directory to create.
        seed: Seed, at least 0.
        num_dialogues: Number of dialogues by split.
        num_classes: Number of emotions, 2 to 7, see `class_names`.
        stay_probability: See `dialogue_process.emotion_chain`.
        uninformative_share: See `dialogue_process.ConversationProcess`, at most 0.5.
        missing_share: See `dialogue_process.ConversationProcess`.
        num_workers: Number of processes that synthesize; with 0 this process does.
        overwrite: Replace the directory if it holds a synthetic speech corpus. Otherwise, an
            existing corpus with the same arguments is reused.
        log: Called with a line if an existing corpus is reused.

    Returns:
        The path of the manifest.

    Raises:
        InputError: The directory holds something else or cannot be written, or `num_dialogues` has
            no dialogue or an unknown split.
        ValueError: Another argument is out of range.
    """
    directory = pathlib.Path(directory).expanduser().absolute()
    check_num_dialogues(num_dialogues)
    options: dict[str, Any] = {
        "num_classes": num_classes,
        "stay_probability": stay_probability,
        "uninformative_share": uninformative_share,
        "missing_share": missing_share,
    }
    process = make_spoken_dialogue_process(seed, **options)
    arguments = {"seed": seed, "num_dialogues": dict(num_dialogues), **options}
    target, root = epath.Path(directory), epath.Path(directory.parent)
    recover_directory(target, root)
    if directory.exists() and _can_reuse(directory, arguments, overwrite):
        log(f"{directory}: reusing the recordings, which were made with the same arguments")
        return directory / MANIFEST
    with atomic_directory(target, root, overwrite=overwrite) as incomplete:
        folder = pathlib.Path(incomplete) / directory.name
        folder.mkdir()
        manifest: list[dict[str, Any]] = []
        truth: list[dict[str, Any]] = []
        scores: dict[str, Any] = {}
        tasks: list[_SynthesisTask] = []
        for split, count in num_dialogues.items():
            dialogues = [_Dialogue.sample(process, seed, split, index) for index in range(count)]
            for dialogue in dialogues:
                manifest += dialogue.manifest_rows()
                truth += dialogue.truth_rows(process.words)
                tasks.append(dialogue.synthesis_task(folder, seed))
            if dialogues:
                scores[split] = reference_scores(
                    process, [dialogue.features for dialogue in dialogues]
                )
        for result in ordered_map(_write_recordings, tasks, num_workers=num_workers):
            if isinstance(result, WorkerCrashError):
                raise result
        _write_jsonl(folder / MANIFEST, manifest)
        _write_jsonl(folder / TRUTH, truth)
        for name, values in ((SCORES, scores), (ARGUMENTS, arguments)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return directory / MANIFEST


def _can_reuse(directory: pathlib.Path, arguments: Mapping[str, Any], overwrite: bool) -> bool:
    """Returns whether an existing directory is the requested corpus.

    Raises:
        InputError: It is not, and may not be replaced either.
    """
    if not all((directory / name).is_file() for name in (MANIFEST, TRUTH, SCORES)):
        raise InputError(f"{directory}: not a synthetic speech corpus, so it is not overwritten")
    if overwrite:
        return False
    try:
        existing = dict(json.loads((directory / ARGUMENTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        existing = {}
    differences = [
        f"{name} {existing[name]} instead of {value}" if name in existing else f"no {name}"
        for name, value in arguments.items()
        if existing.get(name) != value
    ]
    if differences:
        raise InputError(
            f"{directory}: made with other arguments ({'; '.join(differences)}); allowed: another "
            "directory, or to overwrite it"
        )
    return True


@dataclasses.dataclass(frozen=True, eq=False)
class _SynthesisTask:
    """What a worker needs to write the recordings of a dialogue.

    Attributes:
        paths: T files; None where speech is missing.
        style: Speaking styles [T, 4].
        seed: Seed of everything that is independent of the emotion.
    """

    paths: list[pathlib.Path | None]
    style: np.ndarray
    seed: list[int]


@dataclasses.dataclass(frozen=True, eq=False)
class _Dialogue:
    """A dialogue of T utterances without its recordings."""

    split: str
    index: int
    label: np.ndarray
    class_names: tuple[str, ...]
    style: np.ndarray
    sentences: list[str]
    word_counts: np.ndarray
    speech_uninformative: np.ndarray
    text_uninformative: np.ndarray
    speech_present: np.ndarray
    text_present: np.ndarray

    @classmethod
    def sample(
        cls, process: SpokenDialogueProcess, seed: int, split: str, index: int
    ) -> "_Dialogue":
        generator = np.random.default_rng([seed, 1, SPLITS.index(split), index])
        length = int(generator.integers(MIN_LENGTH, MAX_LENGTH, endpoint=True))
        label, speech_uninformative, text_uninformative, speech_present, text_present = (
            process.sample_labels_and_flags(length, generator)
        )
        style = process.sample_style(label, speech_uninformative, generator)
        sentences, word_counts = zip(
            *(
                process.sample_sentence(emotion, uninformative, generator)
                for emotion, uninformative in zip(label, text_uninformative, strict=True)
            ),
            strict=True,
        )
        return cls(
            split=split,
            index=index,
            label=label,
            class_names=class_names(len(process.initial)),
            style=style,
            sentences=list(sentences),
            word_counts=np.array(word_counts),
            speech_uninformative=speech_uninformative,
            text_uninformative=text_uninformative,
            speech_present=speech_present,
            text_present=text_present,
        )

    @property
    def id(self) -> str:
        return f"{self.split}_{self.index}"

    @property
    def utterance_ids(self) -> list[str]:
        return [f"{self.id}_{index}" for index in range(len(self.label))]

    @property
    def features(self) -> tuple[np.ndarray, ...]:
        """The input of `reference_scores`."""
        return self.label, self.style, self.word_counts, self.speech_present, self.text_present

    def manifest_rows(self) -> Iterator[dict[str, Any]]:
        for index, utterance in enumerate(self.utterance_ids):
            row: dict[str, Any] = {"dialogue": self.id, "utterance": utterance, "order": index}
            if self.speech_present[index]:
                row["audio"] = _audio_path(self.id, utterance)
            if self.text_present[index]:
                row["text"] = self.sentences[index]
            yield row | {"label": self.class_names[self.label[index]], "split": self.split}

    def truth_rows(self, words: Sequence[str]) -> Iterator[dict[str, Any]]:
        for index, utterance in enumerate(self.utterance_ids):
            pitch, level, tempo, tilt = physical_style(self.style[index])
            yield {
                "dialogue": self.id,
                "utterance": utterance,
                "uninformative": _modality(
                    self.speech_uninformative[index], self.text_uninformative[index]
                ),
                "missing": _modality(~self.speech_present[index], ~self.text_present[index]),
                "pitch_hz": pitch,
                "level_db": level,
                "syllables_per_second": tempo,
                "tilt_db_per_octave": tilt,
                "words": np.repeat(words, self.word_counts[index]).tolist(),
            }

    def synthesis_task(self, directory: pathlib.Path, seed: int) -> _SynthesisTask:
        paths = [
            directory / _audio_path(self.id, utterance) if present else None
            for utterance, present in zip(self.utterance_ids, self.speech_present, strict=True)
        ]
        return _SynthesisTask(paths, self.style, [seed, 2, SPLITS.index(self.split), self.index])


def _audio_path(dialogue: str, utterance: str) -> str:
    return f"audio/{dialogue}/{utterance}.wav"


def _modality(speech: bool, text: bool) -> str | None:
    return "speech" if speech else "text" if text else None


def _write_recordings(task: _SynthesisTask) -> None:
    generator = np.random.default_rng(task.seed)
    # Two speakers take turns.
    formant_scales = generator.uniform(MIN_FORMANT_SCALE, MAX_FORMANT_SCALE, size=2)
    for index, path in enumerate(task.paths):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            samples = synthesize(task.style[index], formant_scales[index % 2], generator)
            encode_wav(path, samples)


def _write_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
