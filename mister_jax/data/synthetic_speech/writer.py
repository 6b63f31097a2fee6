"""Writes the synthetic speech corpus: recordings, manifest, ground truth and reference scores."""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
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
"""Minimum and maximum number of utterances in a dialogue."""


def write_speech_corpus(
    directory: str | os.PathLike[str],
    *,
    seed: int = 0,
    num_dialogues: Mapping[str, int] = DEFAULT_NUM_DIALOGUES,
    num_workers: int = 0,
    overwrite: bool = False,
    log: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> pathlib.Path:
    """Writes a corpus atomically. Dialogues have 4 to 14 utterances, which last 1 to 3 s each.

    The directory contains these files:

    - `manifest.jsonl`: One row per utterance. A row lacks `audio` or `text` if that modality is
      missing. `mister_jax.data.corpora.manifest` reads this file.
    - `audio/DIALOGUE/UTTERANCE.wav`: Recordings at 16 kHz, mono, 16 bits.
    - `truth.jsonl`: For each row of the manifest, the modality that is `uninformative` and the
      modality that is `missing` (null if none), the physical values of the speaking style, and the
      sampled words. Models must not read this file.
    - `reference_scores.json`: The scores of `dialogue_process.reference_scores` for each split.
    - `arguments.json`: The arguments that determine the other files.

    The same arguments produce the same bytes on machines of the same kind, with any `num_workers`.
    The number of dialogues does not affect the contents of a dialogue.

    An existing corpus with equal arguments is reused, and a line is passed to `log`. With
    `overwrite`, any existing synthetic speech corpus is replaced. With `num_workers=0`, this
    process synthesizes the recordings. `options` are passed to `make_spoken_dialogue_process`.

    Returns:
        The path of the manifest.

    Raises:
        InputError: The directory contains other files, contains another corpus and `overwrite` is
            false, or cannot be written; or `num_dialogues` has no dialogue or an unknown split.
        ValueError: Another argument is out of range.
    """
    directory = pathlib.Path(directory).expanduser().absolute()
    check_num_dialogues(num_dialogues)
    process = make_spoken_dialogue_process(seed, **options)
    arguments = {
        "seed": seed,
        "num_dialogues": dict(num_dialogues),
        "num_classes": len(process.initial),
        "stay_probability": float(process.transition[0, 0]),
        "uninformative_share": process.uninformative_share,
        "missing_share": process.missing_share,
    }
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
        tasks = []
        for split, count in num_dialogues.items():
            dialogues = []
            for index in range(count):
                features, rows, truth_rows = _sample_dialogue(process, seed, split, index)
                dialogues.append(features)
                manifest += rows
                truth += truth_rows
                paths = [folder / row["audio"] if "audio" in row else None for row in rows]
                style = features[1]
                tasks.append((paths, style, [seed, 2, SPLITS.index(split), index]))
            if dialogues:
                scores[split] = reference_scores(process, dialogues)
        for result in ordered_map(_write_recordings, tasks, num_workers=num_workers):
            if isinstance(result, WorkerCrashError):
                raise result
        _write_jsonl(folder / MANIFEST, manifest)
        _write_jsonl(folder / TRUTH, truth)
        for name, values in ((SCORES, scores), (ARGUMENTS, arguments)):
            (folder / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    return directory / MANIFEST


def _can_reuse(directory: pathlib.Path, arguments: Mapping[str, Any], overwrite: bool) -> bool:
    """Returns whether the corpus in a directory can be reused. With `overwrite`, returns false.

    Raises:
        InputError: The directory is not a synthetic speech corpus, or the corpus has other
            arguments and `overwrite` is false.
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


def _sample_dialogue(
    process: SpokenDialogueProcess, seed: int, split: str, index: int
) -> tuple[tuple[np.ndarray, ...], list[dict[str, Any]], list[dict[str, Any]]]:
    """Draws a dialogue.

    Returns:
        The dialogue's arrays for `reference_scores`, its rows in the manifest, and its rows in
        `truth.jsonl`.
    """
    generator = np.random.default_rng([seed, 1, SPLITS.index(split), index])
    length = int(generator.integers(MIN_LENGTH, MAX_LENGTH, endpoint=True))
    label, uninformative, speech_present, text_present = process.sample_labels_and_flags(
        length, generator
    )
    style = process.sample_style(label, uninformative == "speech", generator)
    names = class_names(len(process.initial))
    dialogue = f"{split}_{index}"
    manifest, truth, word_counts = [], [], []
    for turn in range(length):
        sentence, word_count = process.sample_sentence(
            label[turn], uninformative[turn] == "text", generator
        )
        utterance = f"{dialogue}_{turn}"
        ids = {"dialogue": dialogue, "utterance": utterance}
        row: dict[str, Any] = {**ids, "order": turn}
        missing = None if text_present[turn] else "text"
        if speech_present[turn]:
            row["audio"] = f"audio/{dialogue}/{utterance}.wav"
        else:
            missing = "speech"
        if text_present[turn]:
            row["text"] = sentence
        manifest.append(row | {"label": names[label[turn]], "split": split})
        pitch, level, tempo, tilt = physical_style(style[turn])
        truth.append(
            {
                **ids,
                "uninformative": str(uninformative[turn]) or None,
                "missing": missing,
                "pitch_hz": pitch,
                "level_db": level,
                "syllables_per_second": tempo,
                "tilt_db_per_octave": tilt,
                "words": np.repeat(process.words, word_count).tolist(),
            }
        )
        word_counts.append(word_count)
    return (label, style, np.array(word_counts), speech_present, text_present), manifest, truth


def _write_recordings(task: tuple[list[pathlib.Path | None], np.ndarray, list[int]]) -> None:
    """Writes a dialogue's recordings, given paths (None if missing), styles [T, 4] and a seed."""
    paths, style, seed = task
    generator = np.random.default_rng(seed)
    # Two speakers take turns.
    formant_scales = generator.uniform(MIN_FORMANT_SCALE, MAX_FORMANT_SCALE, size=2)
    for index, path in enumerate(paths):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            encode_wav(path, synthesize(style[index], formant_scales[index % 2], generator))


def _write_jsonl(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
