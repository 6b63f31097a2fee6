"""Measures prediction on a recording: speed, memory, and coverage of speech by utterances.

Each row is measured in a new process, so the memory of one row does not affect other rows.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks.report import Row
from mister_jax.data import SAMPLE_RATE
from mister_jax.data.audio import stream_blocks
from mister_jax.data.audio_source import existing_path
from mister_jax.data.transcripts.reader import find_transcript, read_transcript
from mister_jax.data.transcripts.segments import Segment, Word
from mister_jax.errors import InputError

_COMMAND = (sys.executable, "-m", "benchmarks.recordings")

Interval = tuple[float, float]
"""Start and end in seconds."""


def measure_recording(
    recording: str | os.PathLike[str],
    model: str,
    *,
    transcript: str | os.PathLike[str] | None = None,
    reference: str | os.PathLike[str] | None = None,
    repeat: int = 1,
    log: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Measures predictions with utterances from a transcript and from voice activity detection.

    Args:
      recording: Recording in any format that FFmpeg reads.
      model: Model of `EmotionRecognizer`.
      transcript: Transcript of the recording; by default, the transcript beside the recording, if
        it has text.
      reference: RTTM file with the speech of the recording; by default, the RTTM file beside the
        recording.
      repeat: Number of copies of the recording and its annotations to concatenate.
      log: Function called with a message before each long step.

    Returns:
      A row for each source of utterances. Before the measurement, the model is loaded and predicts
      the unrepeated recording once; only "start_seconds" and "start_memory_mib" include this.

    Raises:
      InputError: A file or the model cannot be used.
    """
    source = pathlib.Path(existing_path(recording))
    segments: dict[str, Sequence[Segment]] = {}
    path = find_transcript(source) if transcript is None else transcript
    if path is not None:
        contents = read_transcript(path, recording=source.stem)
        # A file with turns but no words is used as a transcript only if the user passed it.
        if contents.has_text or transcript is not None:
            segments["transcript"] = contents.segments
    beside = source.with_suffix(".rttm")
    if reference is None and beside.exists():
        reference = beside
    turns = () if reference is None else read_transcript(reference, recording=source.stem).segments
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        log(f"writing the recording {repeat} times")
        repeated = folder / "recording.wav"
        seconds = _write_repeated(source, repeated, repeat)
        speech = _union((it.start, it.end) for it in _repeated(turns, seconds, repeat))
        for what in ("transcript", "voice activity"):
            if what == "transcript" and what not in segments:
                continue
            log(f"predicting {seconds * repeat:.0f} s with {what}")
            settings = {
                "model": model,
                "warm": str(source),
                "recording": str(repeated),
                "warm_segments": _as_json(segments.get(what)),
                "segments": _as_json(
                    _repeated(segments[what], seconds, repeat) if what in segments else None
                ),
            }
            rows.append(_measure(what, settings, seconds * repeat, speech))
    return rows


def covered_seconds(intervals: Sequence[Interval], others: Sequence[Interval]) -> float:
    """Returns the seconds that are in both of two lists of sorted, disjoint intervals."""
    total, first = 0.0, 0
    for start, end in intervals:
        while first < len(others) and others[first][1] <= start:
            first += 1
        for other_start, other_end in others[first:]:
            if other_start >= end:
                break
            total += min(end, other_end) - max(start, other_start)
    return total


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    """Returns the union of intervals, sorted and disjoint."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return union


def _length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _write_repeated(source: pathlib.Path, path: pathlib.Path, repeat: int) -> float:
    """Writes repetitions of a recording to a WAV file; returns the seconds of one repetition."""
    num_samples = 0
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        for _ in range(repeat):
            for block in stream_blocks(str(source)):
                file.writeframes(block.samples.astype("<i2", copy=False).tobytes())
                num_samples += len(block.samples)
    return num_samples / repeat / SAMPLE_RATE


def _repeated(segments: Sequence[Segment], seconds: float, repeat: int) -> list[Segment]:
    """Returns the segments of every repetition of a recording."""
    return [_shifted(it, index * seconds) for index in range(repeat) for it in segments]


def _shifted(segment: Segment, shift: float) -> Segment:
    def later(time: float | None) -> float | None:
        return None if time is None else time + shift

    words = tuple(Word(it.text, later(it.start), later(it.end)) for it in segment.words)
    start, end = segment.start + shift, segment.end + shift
    return dataclasses.replace(segment, start=start, end=end, words=words)


def _as_json(segments: Sequence[Segment] | None) -> list[dict[str, Any]] | None:
    return None if segments is None else list(map(dataclasses.asdict, segments))


def _from_json(segment: dict[str, Any]) -> Segment:
    return Segment(**{**segment, "words": tuple(Word(**it) for it in segment["words"])})


def _measure(
    what: str, settings: dict[str, Any], seconds: float, speech: Sequence[Interval]
) -> Row:
    """Returns the row of a prediction, measured by `main` in another process."""
    result = subprocess.run(
        _COMMAND,
        input=json.dumps(settings),
        cwd=pathlib.Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise InputError(reason.partition("InputError: ")[2] or reason)
    measured = json.loads(result.stdout.splitlines()[-1])
    utterances = _union(map(tuple, measured.pop("utterances")))
    row = {"what": what, "audio_seconds": seconds, **measured}
    row["times_real_time"] = seconds / row["seconds"]
    if speech:
        both = covered_seconds(utterances, speech)
        row["speech_in_utterances"] = both / _length(speech)
        row["utterance_time_with_speech"] = both / _length(utterances)
    return row


def main() -> None:
    """Reads settings from standard input, predicts their recording, and prints measurements."""
    from mister_jax.inference.recognizer import EmotionRecognizer
    from mister_jax.inference.speech_recognition import detect_voice_activity

    settings = json.load(sys.stdin)
    start = time.perf_counter()
    recognizer = EmotionRecognizer(settings["model"])

    def predict(recording: str, segments: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
        options: dict[str, Any] = {"recognizer": detect_voice_activity, "search_transcript": False}
        if segments is not None:
            options = {"transcript": list(map(_from_json, segments))}
        return recognizer.predict_recording(recording, **options)

    predict(settings["warm"], settings["warm_segments"])
    ready = time.perf_counter()
    memory = _peak_memory_mib()
    rows = predict(settings["recording"], settings["segments"])
    done = time.perf_counter()
    result = {
        "num_utterances": len(rows),
        "seconds": done - ready,
        "start_seconds": ready - start,
        "start_memory_mib": memory,
        "memory_above_start_mib": _peak_memory_mib() - memory,
        "utterances": [(row["start"], row["end"]) for row in rows],
    }
    print(json.dumps(result))


def _peak_memory_mib() -> float:
    """Returns the peak memory of this process."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        # Unlike ru_maxrss, VmHWM excludes memory that this process inherited from its parent.
        (line,) = (it for it in status.read_text().splitlines() if it.startswith("VmHWM:"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
