"""Predicts a stream of utterances: reads JSON Lines and writes one prediction per line."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any, TextIO

from absl import logging

from mister_jax.data.corpora.manifest.fields import Fields
from mister_jax.errors import InputError
from mister_jax.inference.recognizer import EmotionRecognizer
from mister_jax.inference.streaming import DialogueStream

MAX_DIALOGUES = 1000
"""Default number of dialogues to keep in memory."""

_IDS = ("dialogue", "utterance")


def follow(
    recognizer: EmotionRecognizer,
    lines: Iterable[bytes],
    answers: TextIO,
    *,
    max_seconds: float = 60.0,
    min_confidence: float | None = None,
    max_dialogues: int = MAX_DIALOGUES,
) -> None:
    """Answers each line with one JSON line before reading the next line.

    An input line is an object with the fields of a manifest, such as "text" and "audio". The answer
    has the "dialogue" and "utterance" of the input line, and the prediction. Lines with the same
    "dialogue" belong to one dialogue. All lines without this field belong to one separate dialogue.
    The answer to a line that cannot be used is {"error": ..., "line": ...} with the number of the
    line, and the dialogue continues without this line.

    Args:
      recognizer: Recognizer that predicts the utterances.
      lines: Input lines in UTF-8.
      answers: Text file for the answers.
      max_seconds: Maximum number of seconds to read from each utterance's speech.
      min_confidence: Probability below which predictions are marked as "uncertain".
      max_dialogues: Maximum number of dialogues to keep. When this number is exceeded, the least
        recently used dialogue is dropped. If a dropped dialogue continues, its context is lost.
    """
    streams: OrderedDict[str | None, DialogueStream] = OrderedDict()
    options = {"max_seconds": max_seconds, "min_confidence": min_confidence}
    for number, line in enumerate(lines, start=1):
        try:
            answer = _answer(recognizer, streams, line, options)
        except (InputError, OSError) as error:
            answer = {"error": str(error), "line": number}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if len(streams) > max_dialogues:
            dropped, _ = streams.popitem(last=False)
            logging.warning(
                "dialogue %s is dropped, because %d others were updated later",
                json.dumps(dropped),
                max_dialogues,
            )


def _answer(
    recognizer: EmotionRecognizer,
    streams: OrderedDict[str | None, DialogueStream],
    line: bytes,
    options: dict[str, Any],
) -> dict[str, Any]:
    utterance = _read_utterance(line)
    row = Fields("utterance", utterance)
    ids = {name: row.id(name) for name in _IDS if utterance.get(name) is not None}
    path = row.audio_path()
    # Path.is_file raises an OSError for a name that is too long.
    if path is not None and not os.path.isfile(path):  # noqa: PTH113
        row.fail("audio", f"{path!r}: no such file")
    dialogue = ids.get("dialogue")
    stream = streams.get(dialogue) or recognizer.stream(**options)
    prediction = stream.predict(utterance)
    # This step comes last, because an unusable utterance must not start a dialogue or mark a
    # dialogue as recently used.
    streams[dialogue] = stream
    streams.move_to_end(dialogue)
    return {**{name: utterance[name] for name in ids}, **prediction}


def _read_utterance(line: bytes) -> dict[str, Any]:
    try:
        utterance = json.loads(line)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError.
        reason = " ".join(str(error).split()) if line.strip() else "an empty line"
        raise InputError(f"not JSON: {reason}; needed: an object in one line of UTF-8") from error
    if not isinstance(utterance, dict):
        raise InputError(f"{json.dumps(utterance)[:60]}; needed: a JSON object with text or audio")
    return utterance
