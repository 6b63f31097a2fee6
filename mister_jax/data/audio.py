"""Recordings of any format as 16 kHz mono samples, decoded by the FFmpeg that PyAV brings along.

`decode` reads one recording or a cut of it, `decode_many` reads many in parallel processes, and
`encode_wav` writes samples. All that can be wrong with a recording is one `AudioError`.
"""

import collections
import dataclasses
import functools
import math
import os
import sys
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mister_jax.data.audio_frames import FULL_SCALE, MAX_PEAK, SAMPLE_RATE, float_to_int16
from mister_jax.data.audio_reader import (
    MIX,
    AudioError,
    AudioReader,
    Channel,
    Reason,
    Source,
    check_channel,
    decoder_failures,
    error_message,
    existing_path,
    source_name,
)
from mister_jax.data.workers import WorkerCrashError, ordered_map

__all__ = [
    "SAMPLE_RATE",
    "AudioError",
    "Clip",
    "DecodeRequest",
    "Reason",
    "check_channel",
    "decode",
    "decode_many",
    "encode_wav",
    "existing_path",
    "float_to_int16",
]

# A number of samples larger than that of any recording.
_ALL = sys.maxsize

# Seconds of sound that one call of a worker returns at most: 38 MB of int16.
_GROUP_SECONDS = 1200.0


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A decoded recording, or a cut of it.

    Attributes:
        samples: Samples [N] int16, mono, `SAMPLE_RATE` a second.
        seconds: Length of the recording or cut, also where `samples` holds its beginning only.
        capped: `samples` was cut at `max_seconds`.
        damaged: Some of it could not be decoded.
        notes: What a user should know, a short line each, such as "2.0 s missing".
    """

    samples: np.ndarray
    seconds: float
    capped: bool = False
    damaged: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecodeRequest:
    """A recording or cut for `decode_many`; the fields are the arguments of `decode`."""

    source: Source
    start: float | None = None
    end: float | None = None
    channel: Channel = MIX


def decode(
    source: Source,
    *,
    start: float | None = None,
    end: float | None = None,
    channel: Channel = MIX,
    max_seconds: float | None = None,
) -> Clip:
    """Decodes the audio of a recording to `SAMPLE_RATE` and one channel.

    Channels with a place (left, center, ...) are mixed by FFmpeg's weights: the mean of two, and of
    5.1 most of the center, where film and television put speech, less of the sides and nothing of
    the bass. Channels without one are averaged. The weights add up to 1, so a mix does not clip.
    Where channels cancel each other out, the strongest of them is used. Among several audio
    streams FFmpeg chooses. Frames that cannot be decoded become silence if time stamps show them,
    else they are left out. A recording or cut with samples far beyond full scale is scaled down to
    its peak. `Clip.notes` reports all of this.

    Args:
        source: Any container and codec that FFmpeg reads. A path is a local file, never an address.
        start: Seconds from the beginning of the container where the cut begins; None for the
            beginning.
        end: Seconds where the cut ends; the end of the recording if None or later than that. The
            cut equals, to the sample, that part of the decoded recording. (AAC fills bands with
            noise, which differs each time.)
        channel: "mix", "left", "right", or the index of a channel.
        max_seconds: Seconds that are kept at most.

    Raises:
        AudioError: There is no sample, for one of the reasons in `Reason`.
        ValueError: `max_seconds` is not positive, or `channel` has another value.
    """
    _check_max_seconds(max_seconds)
    (result,) = _decode_cuts(
        (DecodeRequest(source, start, end, check_channel(channel)),), max_seconds
    )
    if isinstance(result, AudioError):
        raise result
    return result


def decode_many(
    requests: Iterable[DecodeRequest],
    *,
    num_workers: int,
    max_seconds: float | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Iterator[Clip | AudioError]:
    """Decodes recordings in parallel processes, in the order of the requests.

    Neighboring requests for cuts of one recording are served by one pass through it. Requests are
    taken a little ahead of the results, see `workers.ordered_map`, so memory does not grow with the
    corpus.

    Args:
        requests: What to decode.
        num_workers: Number of processes; with 0 this process decodes.
        max_seconds: See `decode`.
        on_done: Called with the number of results so far, before each is given.

    Yields:
        A clip, or the error that says why there is none; one for every request.

    Raises:
        ValueError: `num_workers` is negative or `max_seconds` not positive.
    """
    _check_max_seconds(max_seconds)
    pending: collections.deque[Sequence[DecodeRequest]] = collections.deque()

    def remembered_groups() -> Iterator[Sequence[DecodeRequest]]:
        for group in _groups(requests, max_seconds):
            pending.append(group)
            yield group

    answer = functools.partial(_decode_cuts, max_seconds=max_seconds)
    results = ordered_map(answer, remembered_groups(), num_workers=num_workers)

    def one_by_one() -> Iterator[Clip | AudioError]:
        num_done = 0
        for result in results:
            group = pending.popleft()
            for clip in (
                _survivors(group, answer) if isinstance(result, WorkerCrashError) else result
            ):
                num_done += 1
                if on_done is not None:
                    on_done(num_done)
                yield clip

    return one_by_one()


def encode_wav(path: str | os.PathLike[str], samples: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Writes a WAV file of 16 bits.

    Args:
        path: Path of the file, which is overwritten.
        samples: Samples [N] int16 of one channel, or [N, channels].
        rate: Samples a second.

    Raises:
        ValueError: `samples` has another type or shape.
    """
    if samples.dtype != np.int16 or samples.ndim not in (1, 2):
        raise ValueError(f"samples {samples.dtype} {samples.shape}; allowed: int16 [N] or [N, C]")
    with wave.open(os.fspath(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2", copy=False).tobytes())


def _groups(
    requests: Iterable[DecodeRequest], max_seconds: float | None
) -> Iterator[list[DecodeRequest]]:
    """Yields neighboring requests for one recording together, up to `_GROUP_SECONDS` of sound."""
    group: list[DecodeRequest] = []
    seconds = 0.0
    for request in requests:
        length = math.inf if request.end is None else request.end - (request.start or 0)
        length = min(length, math.inf if max_seconds is None else max_seconds)
        if group and (request.source != group[0].source or seconds + length > _GROUP_SECONDS):
            yield group
            group, seconds = [], 0.0
        group.append(request)
        seconds += length
        if request.start is None and request.end is None:
            # A whole recording. Its clip need not wait for the next request.
            yield group
            group, seconds = [], 0.0
    if group:
        yield group


def _survivors(
    group: Sequence[DecodeRequest], answer: Callable[[Sequence[DecodeRequest]], Any]
) -> Iterator[Clip | AudioError]:
    """Decodes the requests of a group that crashed one by one, so that only some of them fail."""
    alone = ordered_map(answer, [[request] for request in group], num_workers=1)
    for request, result in zip(group, alone, strict=True):
        if isinstance(result, WorkerCrashError):
            yield AudioError(Reason.CRASH, source_name(request.source), str(result))
        else:
            yield from result


def _decode_cuts(
    requests: Sequence[DecodeRequest], max_seconds: float | None
) -> list[Clip | AudioError]:
    """Decodes cuts of one recording, in one pass for each channel that they ask for."""
    cuts = [_Cut(request, max_seconds) for request in requests]
    by_channel: dict[Channel, list[_Cut]] = collections.defaultdict(list)
    for cut in cuts:
        if cut.error is None:
            by_channel[cut.request.channel].append(cut)
    for channel, members in by_channel.items():
        _read_cuts(members, channel)
        canceled = collections.defaultdict(list)
        for cut in members:
            if cut.canceled_by is not None:
                canceled[cut.canceled_by].append(cut)
        for strongest, again in canceled.items():
            for cut in again:
                cut.restart(f"channels cancel out: only channel {strongest} is used")
            _read_cuts(again, strongest)
    return [cut.result() for cut in cuts]


def _read_cuts(cuts: Sequence["_Cut"], channel: Channel) -> None:
    """Reads cuts of one recording from one channel of it, in the order of their beginnings."""
    source = cuts[0].request.source
    try:
        recording = AudioReader(source, source_name(source), channel)
    except AudioError as error:
        for cut in cuts:
            cut.error = error
        return
    waiting = collections.deque(sorted(cuts, key=lambda cut: cut.first))
    active: list[_Cut] = []
    fatal: AudioError | None = None
    try:
        while waiting:
            end = 0
            for begin, chunk in recording.chunks(waiting[0].first):
                end = begin + len(chunk)
                while waiting and waiting[0].first < end:
                    active.append(waiting.popleft())
                for cut in active:
                    cut.add(begin, chunk)
                active = [cut for cut in active if cut.stop > end]
                if not active and (not waiting or recording.is_worth_a_jump(end, waiting[0].first)):
                    break
            else:
                # The end of the recording: what still waits begins behind it.
                for cut in waiting:
                    cut.position = end
                waiting.clear()
    except AudioError as error:
        fatal = error
    except decoder_failures() as error:
        fatal = AudioError(Reason.DAMAGED, source_name(source), error_message(error))
    finally:
        recording.close()
    for cut in cuts:
        if fatal is not None and (cut in active or cut in waiting):
            cut.error = fatal
        cut.finish(recording)


class _Cut:
    """A cut of a recording while it is decoded. All indices are at `SAMPLE_RATE`.

    Attributes:
        request: What was asked for.
        first: Index of its first sample.
        stop: Index behind its last sample.
        position: Index behind the last sample that was decoded.
        error: Why it has no samples.
        canceled_by: The strongest channel of a mix that is canceled; None if it is not.
    """

    def __init__(self, request: DecodeRequest, max_seconds: float | None) -> None:
        start, end = request.start, request.end
        self.request = request
        self.error: AudioError | None = None
        self.notes: list[str] = []
        self._range = f"from {start} to {end} s"
        self.first = self.stop = self._kept_stop = 0
        if not 0 <= (start or 0.0) < (math.inf if end is None else end):  # Also refuses NaN.
            self.error = AudioError(Reason.RANGE, source_name(request.source), self._range)
        else:
            self.first = _index(start or 0.0)
            self.stop = _ALL if end is None else _index(end)
            most = _ALL if max_seconds is None else self.first + max(1, _index(max_seconds))
            self._kept_stop = min(self.stop, most)
        self.restart()

    def restart(self, note: str = "") -> None:
        """Forgets what was decoded."""
        self.notes = [note] if note else []
        self.position = 0
        self.canceled_by: int | None = None
        self._chunks: list[np.ndarray] = []
        self._damage = ""
        self._is_damaged = False

    def add(self, begin: int, chunk: np.ndarray) -> None:
        """Adds its part of a chunk [n] int16 or float32 that begins at an index."""
        part = chunk[max(0, self.first - begin) : max(0, self._kept_stop - begin)]
        if len(part):  # Even an empty view would keep its chunk in memory.
            self._chunks.append(part)
        self.position = begin + len(chunk)

    def finish(self, recording: "AudioReader") -> None:
        """Takes over what the recording knows of this part of it."""
        end = min(self.position, self.stop)
        self.notes += recording.notes(self.first, end)
        self._damage = recording.damage(0, _ALL)
        self._is_damaged = bool(recording.damage(self.first, self.stop))
        self.canceled_by = recording.canceled_by(self.first, end)

    def result(self) -> Clip | AudioError:
        """Returns the clip, or why there is none."""
        name = source_name(self.request.source)
        if self.error is not None:
            return self.error
        try:
            samples, note = _joined(self._chunks)
        except ValueError as error:
            return AudioError(Reason.DAMAGED, name, str(error))
        if len(samples) == 0:
            if self._damage:
                return AudioError(Reason.DAMAGED, name, self._damage)
            if self.first > 0 or self.position > 0:
                return AudioError(Reason.RANGE, name, self._range)
            return AudioError(Reason.NO_SAMPLES, name)
        length = min(self.position, self.stop) - self.first
        return Clip(
            samples,
            seconds=length / SAMPLE_RATE,
            capped=len(samples) < length,
            damaged=self._is_damaged,
            notes=(*self.notes, *((note,) if note else ())),
        )


def _joined(chunks: Sequence[np.ndarray]) -> tuple[np.ndarray, str]:
    """Returns chunks of int16 or, beyond full scale, float32 as one of int16, and a note."""
    if not chunks:
        return np.zeros(0, np.int16), ""
    if not any(chunk.dtype.kind == "f" for chunk in chunks):
        return np.concatenate(chunks), ""
    floats = [
        chunk if chunk.dtype.kind == "f" else chunk.astype(np.float32) / FULL_SCALE
        for chunk in chunks
    ]
    joined = np.concatenate(floats)
    peak = np.abs(joined).max(initial=0.0)
    if peak > MAX_PEAK * FULL_SCALE:
        raise ValueError(f"float samples of up to {peak:g}")
    if peak > MAX_PEAK:
        # A recording of floats in integer range: its header cannot say so.
        joined /= FULL_SCALE
        samples, note = float_to_int16(joined)
        return samples, note or f"floats of up to {peak:g} read as integers of 16 bits"
    return float_to_int16(joined)


def _check_max_seconds(max_seconds: float | None) -> None:
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"{max_seconds=}; allowed: positive, or None")


def _index(seconds: float) -> int:
    return _ALL if math.isinf(seconds) else round(seconds * SAMPLE_RATE)
