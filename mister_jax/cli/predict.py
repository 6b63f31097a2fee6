"""Predicts the emotions of recordings and texts with a trained work directory.

mister-jax predict --workdir=DIR --audio=1.wav --text="Hello?" --audio=2.wav --text="You!"
mister-jax predict --workdir=DIR --text="Hello?" --text="You again!"     # no recordings
mister-jax predict --workdir=DIR --manifest=my.jsonl --output=out.jsonl
mister-jax predict --workdir=DIR --corpus=meld --source=MELD.Raw --output=out.jsonl

Pass the recordings and texts of a dialogue in the order of its utterances; an empty value is a
missing one. The output has one row per utterance, in JSON Lines or CSV depending on its ending. The
exit status is 1 if none of the recordings is usable.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mister_jax.cli.app import required_workdir
from mister_jax.errors import InputError, require_extra

if TYPE_CHECKING:
    from mister_jax.data.corpus import Corpus, Utterance

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a training of MiSTER-E")
_MANIFEST = flags.DEFINE_string("manifest", None, ".jsonl or .csv file, see mister-jax prepare")
_CORPUS = flags.DEFINE_string("corpus", None, "iemocap, meld or mosi, with --source")
_SOURCE = flags.DEFINE_string("source", None, "folder of the corpus")
_CONFIG = flags.DEFINE_string("config", "", "config of the corpus; by default its first one")
_SPLIT = flags.DEFINE_string("split", None, "split of the corpus; by default all splits")
_AUDIO = flags.DEFINE_multi_string("audio", [], "recording of an utterance; may be repeated")
_TEXT = flags.DEFINE_multi_string("text", [], "text of an utterance; may be repeated")
_CHANNEL = flags.DEFINE_string(
    "audio_channel", "mix", "channel of --audio to read: mix, left, right, or an index from 0"
)
_OUTPUT = flags.DEFINE_string("output", None, "file to write, .jsonl or .csv")
_NEW_PATH = (
    "new path of the encoder if it has moved; adapter=PATH for its adapter, whisper=PATH, "
    "beats=PATH and vicuna=PATH for SALMONN's parts; may be repeated"
)
_SPEECH_ENCODER = flags.DEFINE_multi_string("speech_encoder", [], _NEW_PATH)
_TEXT_ENCODER = flags.DEFINE_multi_string("text_encoder", [], _NEW_PATH)
_SECONDS = flags.DEFINE_float("max_seconds", 60, "seconds of a recording to read", lower_bound=0.1)
_WORKERS = flags.DEFINE_integer("num_workers", 0, "processes that decode", lower_bound=0)


def main() -> int:
    """Runs `mister-jax predict`."""
    workdir = required_workdir(_WORKDIR, "a directory that `mister-jax train` has written")
    from rich.console import Console

    from mister_jax.console import prediction_table
    from mister_jax.inference.prediction_files import check_predictions_path, write_predictions
    from mister_jax.inference.recognizer import is_unusable, load, summarize_notes

    corpus = _read_corpus()
    utterances = [utterance for _, utterance in corpus.utterances()]
    dialogues = [dialogue for _, dialogue in corpus.dialogues()]
    if _OUTPUT.value:
        check_predictions_path(_OUTPUT.value)
    elif len(dialogues) > 1:
        raise InputError(f"--output is needed: a file for the {len(dialogues)} dialogues")
    recognizer = load(
        workdir,
        speech_encoder=_new_paths(_SPEECH_ENCODER.value),
        text_encoder=_new_paths(_TEXT_ENCODER.value),
    )
    rows_by_dialogue = recognizer.predict_dialogues(
        [[_recognizer_input(it) for it in dialogue.utterances] for dialogue in dialogues],
        max_seconds=_SECONDS.value,
        num_workers=_WORKERS.value,
        quiet=False,
    )
    predictions = [row for rows in rows_by_dialogue for row in rows]
    if len(dialogues) == 1:
        Console().print(prediction_table([it.text for it in utterances], predictions))
    num_recordings = sum(it.recording is not None for it in utterances)
    if num_recordings:
        notes = summarize_notes(predictions)
        print(f"recordings: {num_recordings}" + (f", of these {notes}" if notes else ""))
    for note in corpus.notes:
        print(f"note: {note}")
    if _OUTPUT.value:
        write_predictions(_OUTPUT.value, _output_rows(corpus, predictions))
        print(
            f"written to {_OUTPUT.value}: utterances {len(utterances)}, dialogues {len(dialogues)}"
        )
    num_unusable = sum(any(map(is_unusable, row["notes"])) for row in predictions)
    if num_unusable and num_unusable == num_recordings:
        print(f"error: none of {num_recordings} recordings could be used", file=sys.stderr)
        return 1
    return 0


def _new_paths(values: Sequence[str]) -> dict[str, str] | None:
    """Returns the new paths of an encoder and its parts, by the names that `load` takes."""
    from mister_jax.extraction import ENCODER_PARTS

    paths = {}
    for value in values:
        part, _, path = value.partition("=")
        if part in ENCODER_PARTS:
            paths[part] = path
        else:
            paths["encoder"] = value
    return paths or None


def _read_corpus() -> Corpus:
    """Reads the utterances that the flags name."""
    from mister_jax.data.corpora.manifest.reader import read_manifest

    sources = {
        "manifest": _MANIFEST.value,
        "corpus": _CORPUS.value,
        "command line": _AUDIO.value or _TEXT.value,
    }
    chosen = [name for name, value in sources.items() if value]
    if len(chosen) != 1:
        raise InputError(
            "one of --manifest, --corpus with --source, or --audio and --text is needed"
        )
    if chosen == ["manifest"]:
        # All dialogues are in one split, in the order of the file.
        return read_manifest(_MANIFEST.value or "", check_labels=False, fractions=(0, 0, 1))
    if chosen == ["corpus"]:
        return _read_released_corpus()
    return _corpus_from_flags(_AUDIO.value, _TEXT.value)


def _read_released_corpus() -> Corpus:
    # This import needs TensorFlow Datasets; the other sources do not.
    require_extra("train", f"--corpus={_CORPUS.value}")
    from mister_jax.data.corpus import Corpus
    from mister_jax.data.prepare import read_released

    corpus = read_released(_CORPUS.value or "", _SOURCE.value, _CONFIG.value, partial=True)
    if _SPLIT.value is None:
        return corpus
    if not corpus.splits.get(_SPLIT.value):
        allowed = ", ".join(split for split, dialogues in corpus.splits.items() if dialogues)
        raise InputError(f"--split={_SPLIT.value}; allowed: {allowed}")
    return Corpus(corpus.name, corpus.class_names, {_SPLIT.value: corpus.splits[_SPLIT.value]})


def _corpus_from_flags(paths: Sequence[str], texts: Sequence[str]) -> Corpus:
    from mister_jax.data.corpora.manifest.fields import Fields
    from mister_jax.data.corpus import Corpus, DecodeRequest, Dialogue, Utterance

    if paths and texts and len(paths) != len(texts):
        raise InputError(
            f"{len(paths)} of --audio and {len(texts)} of --text; pass as many of each, an "
            "empty one (--audio= or --text=) where it is missing"
        )
    channel = Fields("--audio_channel", {"audio_channel": _CHANNEL.value}).channel()
    count = len(paths) or len(texts)
    utterances = []
    for index, (path, text) in enumerate(
        zip(paths or [""] * count, texts or [""] * count, strict=True), start=1
    ):
        if not path and not text.strip():
            raise InputError(f"utterance {index}: neither --audio nor --text; needed: one of them")
        recording = DecodeRequest(path, channel=channel) if path else None
        utterances.append(Utterance(str(index), text=text, recording=recording))
    return Corpus("command line", (), {"test": (Dialogue("1", tuple(utterances)),)})


def _recognizer_input(utterance: Utterance) -> dict[str, Any]:
    """Returns the fields that `predict_dialogues` reads."""
    recording = utterance.recording
    if recording is None:
        return {"text": utterance.text}
    return {
        "text": utterance.text,
        "audio": recording.source,
        "audio_start": recording.start,
        "audio_end": recording.end,
        "audio_channel": recording.channel,
    }


def _output_rows(corpus: Corpus, predictions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the output: the input of each utterance and its prediction."""
    rows = []
    remaining = iter(predictions)
    for split, dialogue in corpus.dialogues():
        for utterance in dialogue.utterances:
            recording = utterance.recording
            # If the corpus has no times within the dialogue, write those within the recording.
            start, end = utterance.start, utterance.end
            if recording is not None and start is None and end is None:
                start, end = recording.start, recording.end
            rows.append(
                {
                    **({"split": split} if _CORPUS.value else {}),
                    "dialogue": dialogue.id,
                    "utterance": utterance.id.removeprefix(f"{dialogue.id}/"),
                    "start": start,
                    "end": end,
                    "text": utterance.text,
                    "audio": None if recording is None else recording.source,
                    "label": utterance.label,
                    **({"metadata": dict(utterance.metadata)} if utterance.metadata else {}),
                    **next(remaining),
                }
            )
    return rows
