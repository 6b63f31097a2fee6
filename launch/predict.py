"""Predicts the emotions of recordings and texts with a trained work directory.

python -m launch.predict --workdir=DIR --audio=1.wav --text="Hello?" --audio=2.wav --text="You!"
python -m launch.predict --workdir=DIR --text="Hello?" --text="You again!"     # no recordings
python -m launch.predict --workdir=DIR --manifest=my.jsonl --output=out.jsonl
python -m launch.predict --workdir=DIR --corpus=meld --source=MELD.Raw --output=out.jsonl

A dialogue's recordings and texts come in the order in which they were said; an empty one is
missing. The output has a JSON object for each utterance.
"""

import json
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath
from rich.console import Console

from launch import run
from mister_jax.data.corpus import Corpus, Dialogue, Recording, Utterance
from mister_jax.data.manifest import reader
from mister_jax.errors import InputError
from mister_jax.extract import ENCODER_PARTS
from mister_jax.predict import load
from mister_jax.writers import prediction_table, write_text

_WORKDIR = flags.DEFINE_string("workdir", None, "of a training of MiSTER-E")
_MANIFEST = flags.DEFINE_string("manifest", None, "a .jsonl or .csv file, see launch.prepare")
_CORPUS = flags.DEFINE_string("corpus", None, "iemocap, meld or mosi, with --source")
_SOURCE = flags.DEFINE_string("source", None, "folder of the corpus")
_CONFIG = flags.DEFINE_string("config", "", "of the corpus, its first one by default")
_SPLIT = flags.DEFINE_string("split", None, "of the corpus, all of it by default")
_AUDIO = flags.DEFINE_multi_string("audio", [], "recording of an utterance; may be repeated")
_TEXT = flags.DEFINE_multi_string("text", [], "text of an utterance; may be repeated")
_OUTPUT = flags.DEFINE_string("output", None, "file to write: a JSON object a line")
_MOVED = (
    "where it is now, if it has moved; adapter=PLACE for its adapter, whisper=PLACE, beats=PLACE "
    "and vicuna=PLACE for those of SALMONN; may be repeated"
)
_SPEECH = flags.DEFINE_multi_string("speech_encoder", [], _MOVED)
_TEXT_ENCODER = flags.DEFINE_multi_string("text_encoder", [], _MOVED)
_SECONDS = flags.DEFINE_float("max_seconds", 60, "of a recording that are read", lower_bound=0.1)
_WORKERS = flags.DEFINE_integer("num_workers", 0, "processes that decode", lower_bound=0)


def main() -> None:
    if not _WORKDIR.value:
        raise InputError("--workdir is needed: a directory that training has made")
    corpus = _corpus()
    turns = [turn for _, turn in corpus.utterances()]
    dialogues = [dialogue for _, dialogue in corpus.dialogues()]
    if not _OUTPUT.value and len(dialogues) > 1:
        raise InputError(f"--output is needed: a file for the {len(dialogues)} dialogues")
    if _OUTPUT.value:
        path = epath.Path(_OUTPUT.value).absolute()
        if path.is_dir() or not path.parent.is_dir():
            raise InputError(f"--output={_OUTPUT.value}; needed: a file, in a folder that is there")
    system = load(
        _WORKDIR.value,
        speech_encoder=_places(_SPEECH.value),
        text_encoder=_places(_TEXT_ENCODER.value),
    )
    found = system.predict_dialogues(
        [[_fields(turn) for turn in dialogue.utterances] for dialogue in dialogues],
        max_seconds=_SECONDS.value,
        num_workers=_WORKERS.value,
        quiet=False,
    )
    console = Console(highlight=False, soft_wrap=True)
    if len(dialogues) == 1:
        Console().print(prediction_table([turn.text for turn in turns], found[0]))
    if _OUTPUT.value:
        write_text(_OUTPUT.value, "".join(_lines(corpus, found)))
        console.print(
            f"written to {_OUTPUT.value}: utterances {len(turns)}, dialogues {len(dialogues)}",
            markup=False,
        )


def _places(values: Sequence[str]) -> dict[str, str] | None:
    """Of an encoder and its further files, by the names that `load` takes."""
    parts = (value.partition("=") for value in values)
    named = (
        (part, place) if part in ENCODER_PARTS else ("encoder", part + equals + place)
        for part, equals, place in parts
    )
    return dict(named) or None


def _corpus() -> Corpus:
    """What the flags name."""
    ways: dict[str, Any] = {"manifest": _MANIFEST.value, "corpus": _CORPUS.value}
    ways["typed"] = _AUDIO.value or _TEXT.value
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) != 1:
        raise InputError(
            "one of --manifest, --corpus with --source, or --audio and --text is needed"
        )
    if chosen == ["manifest"]:
        # All dialogues as one split, in the order of the file.
        return reader.read(_MANIFEST.value or "", shares=(0, 0, 1))
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
    count = len(paths) or len(texts)
    utterances = []
    for index, (path, text) in enumerate(
        zip(paths or [""] * count, texts or [""] * count, strict=True), start=1
    ):
        if not path and not text.strip():
            raise InputError(f"utterance {index}: neither --audio nor --text; needed: one of them")
        recording = Recording(path) if path else None
        utterances.append(Utterance(str(index), text=text, recording=recording))
    return Corpus("typed", (), {"test": (Dialogue("1", tuple(utterances)),)})


def _fields(turn: Utterance) -> dict[str, Any]:
    fields: dict[str, Any] = {"text": turn.text}
    if turn.recording is not None:
        fields["audio"] = turn.recording.path
        fields["audio_start"] = turn.recording.start
        fields["audio_end"] = turn.recording.end
    return fields


def _lines(corpus: Corpus, found: Sequence[Sequence[dict]]) -> Sequence[str]:
    """A JSON object for each utterance."""
    lines = []
    for (split, dialogue), rows in zip(corpus.dialogues(), found, strict=True):
        for turn, row in zip(dialogue.utterances, rows, strict=True):
            told = {"dialogue": dialogue.id, "utterance": turn.id, "label": turn.label}
            told = {"split": split, **told} if _CORPUS.value else told
            lines.append(json.dumps({**told, **row}, ensure_ascii=False) + "\n")
    return lines


if __name__ == "__main__":
    run(main)
