"""Predicts the emotions of recordings and texts with a trained work directory.

python -m launch.predict --workdir=DIR --audio=1.wav --text="Hello?" --audio=2.wav --text="You!"
python -m launch.predict --workdir=DIR --text="Hello?" --text="You again!"     # no recordings
python -m launch.predict --workdir=DIR --manifest=my.jsonl --output=out.jsonl
python -m launch.predict --workdir=DIR --corpus=meld --source=MELD.Raw --output=out.jsonl

A dialogue's recordings and texts come in the order in which they were said; an empty one is
missing. The output has a row for each utterance, as JSON Lines or CSV by its ending. The exit
status is 1 if none of the recordings could be used.
"""

import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console

from launch import run
from mister_jax.console import prediction_table
from mister_jax.data.corpus import Corpus, Dialogue, Recording, Utterance
from mister_jax.data.manifest import reader
from mister_jax.data.manifest.fields import Fields
from mister_jax.errors import InputError
from mister_jax.extract import ENCODER_PARTS
from mister_jax.inference.prediction_files import (
    FORMATS,
    check_predictions_path,
    write_predictions,
)
from mister_jax.inference.recognizer import is_unusable, load, summarize_notes

_WORKDIR = flags.DEFINE_string("workdir", None, "of a training of MiSTER-E")
_MANIFEST = flags.DEFINE_string("manifest", None, "a .jsonl or .csv file, see launch.prepare")
_CORPUS = flags.DEFINE_string("corpus", None, "iemocap, meld or mosi, with --source")
_SOURCE = flags.DEFINE_string("source", None, "folder of the corpus")
_CONFIG = flags.DEFINE_string("config", "", "of the corpus, its first one by default")
_SPLIT = flags.DEFINE_string("split", None, "of the corpus, all of it by default")
_AUDIO = flags.DEFINE_multi_string("audio", [], "recording of an utterance; may be repeated")
_TEXT = flags.DEFINE_multi_string("text", [], "text of an utterance; may be repeated")
_CHANNEL = flags.DEFINE_string(
    "audio_channel", "mix", "channel of --audio that is read: mix, left, right, or an index from 0"
)
_OUTPUT = flags.DEFINE_string("output", None, f"file to write, {' or '.join(FORMATS)}")
_MOVED = (
    "where it is now, if it has moved; adapter=PLACE for its adapter, whisper=PLACE, beats=PLACE "
    "and vicuna=PLACE for those of SALMONN; may be repeated"
)
_SPEECH = flags.DEFINE_multi_string("speech_encoder", [], _MOVED)
_TEXT_ENCODER = flags.DEFINE_multi_string("text_encoder", [], _MOVED)
_SECONDS = flags.DEFINE_float("max_seconds", 60, "of a recording that are read", lower_bound=0.1)
_WORKERS = flags.DEFINE_integer("num_workers", 0, "processes that decode", lower_bound=0)


def main() -> int:
    if not _WORKDIR.value:
        raise InputError("--workdir is needed: a directory that training has made")
    corpus = _corpus()
    turns = [turn for _, turn in corpus.utterances()]
    dialogues = [dialogue for _, dialogue in corpus.dialogues()]
    if _OUTPUT.value:
        check_predictions_path(_OUTPUT.value)
    elif len(dialogues) > 1:
        raise InputError(f"--output is needed: a file for the {len(dialogues)} dialogues")
    system = load(
        _WORKDIR.value,
        speech_encoder=_places(_SPEECH.value),
        text_encoder=_places(_TEXT_ENCODER.value),
    )
    by_dialogue = system.predict_dialogues(
        [[_fields(turn) for turn in dialogue.utterances] for dialogue in dialogues],
        max_seconds=_SECONDS.value,
        num_workers=_WORKERS.value,
        quiet=False,
    )
    predicted = [row for rows in by_dialogue for row in rows]
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if len(dialogues) == 1:
        Console().print(prediction_table([turn.text for turn in turns], predicted))
    num_recordings = sum(turn.recording is not None for turn in turns)
    if num_recordings:
        notes = summarize_notes(predicted)
        console.print(f"recordings: {num_recordings}" + (f", of these {notes}" if notes else ""))
    for note in corpus.notes:
        console.print(f"note: {note}")
    if _OUTPUT.value:
        write_predictions(_OUTPUT.value, _rows(corpus, predicted))
        console.print(
            f"written to {_OUTPUT.value}: utterances {len(turns)}, dialogues {len(dialogues)}"
        )
    num_unusable = sum(any(map(is_unusable, row["notes"])) for row in predicted)
    if num_unusable and num_unusable == num_recordings:
        print(f"error: none of {num_recordings} recordings could be used", file=sys.stderr)
        return 1
    return 0


def _places(values: Sequence[str]) -> dict[str, str] | None:
    """Returns the places of an encoder and its further files, by the names that `load` takes."""
    parts = (value.partition("=") for value in values)
    named = (
        (part, place) if part in ENCODER_PARTS else ("encoder", part + equals + place)
        for part, equals, place in parts
    )
    return dict(named) or None


def _corpus() -> Corpus:
    """Returns the utterances that the flags name."""
    ways: dict[str, Any] = {"manifest": _MANIFEST.value, "corpus": _CORPUS.value}
    ways["typed"] = _AUDIO.value or _TEXT.value
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) != 1:
        raise InputError(
            "one of --manifest, --corpus with --source, or --audio and --text is needed"
        )
    if chosen == ["manifest"]:
        # All dialogues as one split, in the order of the file.
        return reader.read(_MANIFEST.value or "", check_labels=False, shares=(0, 0, 1))
    if chosen == ["corpus"]:
        return _released()
    return _typed(_AUDIO.value, _TEXT.value)


def _released() -> Corpus:
    # Reading a corpus takes TensorFlow Datasets; what is typed and a manifest do not.
    from mister_jax.data.prepare import read_released

    corpus = read_released(_CORPUS.value or "", _SOURCE.value, _CONFIG.value, partial=True)
    if _SPLIT.value is None:
        return corpus
    if not corpus.splits.get(_SPLIT.value):
        allowed = ", ".join(split for split, dialogues in corpus.splits.items() if dialogues)
        raise InputError(f"--split={_SPLIT.value}; allowed: {allowed}")
    return Corpus(corpus.name, corpus.class_names, {_SPLIT.value: corpus.splits[_SPLIT.value]})


def _typed(paths: Sequence[str], texts: Sequence[str]) -> Corpus:
    if paths and texts and len(paths) != len(texts):
        raise InputError(
            f"{len(paths)} of --audio and {len(texts)} of --text; needed: as many of both, an "
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
        recording = Recording(path, channel=channel) if path else None
        utterances.append(Utterance(str(index), text=text, recording=recording))
    return Corpus("typed", (), {"test": (Dialogue("1", tuple(utterances)),)})


def _fields(turn: Utterance) -> dict[str, Any]:
    """Returns what `predict_dialogues` reads of an utterance."""
    fields: dict[str, Any] = {"text": turn.text}
    if turn.recording is not None:
        fields["audio"] = turn.recording.path
        fields["audio_start"] = turn.recording.start
        fields["audio_end"] = turn.recording.end
        fields["audio_channel"] = turn.recording.channel
    return fields


def _rows(corpus: Corpus, predicted: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the output: what was read of each utterance, and what is predicted."""
    rows: list[dict[str, Any]] = []
    for split, dialogue in corpus.dialogues():
        for turn in dialogue.utterances:
            recording = turn.recording
            # The times in the recording stand in for those in the dialogue.
            start, end = turn.start, turn.end
            if recording is not None and start is None and end is None:
                start, end = recording.start, recording.end
            rows.append(
                {
                    **({"split": split} if _CORPUS.value else {}),
                    "dialogue": dialogue.id,
                    "utterance": turn.id.removeprefix(f"{dialogue.id}/"),
                    "start": start,
                    "end": end,
                    "text": turn.text,
                    "audio": None if recording is None else recording.path,
                    "label": turn.label,
                    **({"metadata": dict(turn.metadata)} if turn.metadata else {}),
                }
            )
    return [{**row, **outcome} for row, outcome in zip(rows, predicted, strict=True)]


if __name__ == "__main__":
    run(main)
