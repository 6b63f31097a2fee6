"""Decodes recordings, in any format that FFmpeg reads, to 16 kHz mono samples.

- `decode` reads one recording or a segment of a recording.
- `decode_many` reads many recordings in parallel processes.
- `stream_cuts` reads several segments of a long recording.
- `encode_wav` writes samples to a WAV file.

Unusable recordings are reported as `AudioError`.
"""

import collections
import contextlib
import dataclasses
import functools
import itertools
import math
import os
import sys
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mister_jax.data.audio_frames import FULL_SCALE, MAX_PEAK, SAMPLE_RATE, float_to_int16
from mister_jax.data.audio_reader import AudioReader, decoder_errors
from mister_jax.data.audio_source import (
    MIX,
    AudioError,
    Channel,
    Reason,
    Source,
    check_channel,
    error_message,
    source_name,
)
from mister_jax.data.workers import WorkerCrashError, ordered_map

# Stands for the index after the last sample of a recording, which is unknown before decoding.
_END = sys.maxsize

# One worker call returns at most this many seconds of audio (38 MB of int16 samples), or a single
# longer segment.
_MAX_GROUP_SECONDS = 1200.0

# Length in seconds of the longest recording that `stream_blocks` reads: 30 days.
_MAX_SECONDS = 30 * 24 * 3600.0


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A decoded recording, or a decoded segment of a recording.

    Attributes:
        samples: Mono samples [N] int16 at `SAMPLE_RATE`.
        seconds: Length of the recording or segment in seconds before truncation to `max_seconds`.
        capped: Whether the samples are truncated to `max_seconds`.
        damaged: Whether a part of the audio could not be decoded.
        notes: Short notes for the user, such as "2.0 s missing".
    """

    samples: np.ndarray
    seconds: float
    capped: bool = False
    damaged: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class DecodeRequest:
    """A recording or a segment to decode. The fields are the arguments of `decode`."""

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
    """Decodes a recording to one channel at `SAMPLE_RATE`.

    Channels with a position (left, center, ...) are mixed with FFmpeg's weights. For example,
    stereo channels are averaged. In 5.1 audio, the center channel, which holds speech in films, has
    the largest weight, and the bass channel has weight 0. Channels without a position are averaged.
    The weights add up to 1, so a mix does not clip. If channels cancel each other out, the
    strongest channel is used.

    If the file has several audio streams, FFmpeg chooses one. Frames that cannot be decoded are
    replaced with silence if timestamps reveal the gap, and dropped otherwise. If the peak of float
    samples is more than 1 dB above full scale, the samples are scaled so that the peak is at full
    scale. `Clip.damaged` and `Clip.notes` report these changes.

    Args:
        source: Path or content of a file in any format that FFmpeg reads. URLs are not supported.
        start: Start of the segment in seconds, as media players display times; by default 0.
        end: End of the segment in seconds; by default, the end of the recording. The samples of a
            segment equal the samples at the same time in the fully decoded recording, except for
            the noise that AAC decoders synthesize. The scaling of loud samples and the choice of
            the strongest channel may also differ, because they depend only on the segment.
        channel: "mix", "left", "right", or the index of a channel.
        max_seconds: Maximum number of seconds to keep.

    Raises:
        AudioError: The recording yields no samples; `Reason` lists the possible reasons.
        ValueError: `max_seconds` is not positive, or `channel` is invalid.
    """
    _check_max_seconds(max_seconds)
    request = DecodeRequest(source, start, end, check_channel(channel))
    (result,) = _decode_cuts((request,), max_seconds)
    if isinstance(result, AudioError):
        raise result
    return result


def decode_many(
    requests: Iterable[DecodeRequest],
    *,
    num_workers: int,
    max_seconds: float | None = None,
) -> Iterator[Clip | AudioError]:
    """Decodes recordings in parallel processes, and yields a clip or an error for each request.

    Consecutive segments of one recording usually share one pass. Memory does not grow with the
    number of requests; see `workers.ordered_map`. With `num_workers=0`, decoding runs in this
    process, and each clip is yielded as soon as the clip is complete.

    Raises:
        ValueError: `num_workers` is negative, or `max_seconds` is not positive.
    """
    _check_max_seconds(max_seconds)
    if num_workers == 0:
        cuts = _group_by_pass(requests)
        return itertools.chain.from_iterable(stream_cuts(it, max_seconds) for it in cuts)
    groups, submitted = itertools.tee(_group_by_recording(requests, max_seconds))
    decode_group = functools.partial(_decode_cuts, max_seconds=max_seconds)
    results = ordered_map(decode_group, submitted, num_workers=num_workers)

    def flat_results() -> Iterator[Clip | AudioError]:
        for result, group in zip(results, groups, strict=True):
            if isinstance(result, WorkerCrashError):
                yield from _decode_one_by_one(group, decode_group)
            else:
                yield from result

    return flat_results()


def stream_cuts(
    requests: Iterable[DecodeRequest], max_seconds: float | None = None
) -> Iterator[Clip | AudioError]:
    """Decodes sorted segments of a recording in one pass, and yields each completed segment.

    The samples of a segment are freed after the segment is yielded, so memory does not grow with
    the length of the recording.

    Args:
        requests: Segments with equal `source` and `channel`, sorted by `start`.
        max_seconds: Maximum number of seconds to keep from each segment.

    Raises:
        ValueError: `max_seconds` is not positive, or the segments are not sorted.
    """
    _check_max_seconds(max_seconds)
    cuts = [_Cut(request, max_seconds) for request in requests]
    readable = [cut for cut in cuts if cut.error is None]
    if any(later.first < cut.first for cut, later in itertools.pairwise(readable)):
        raise ValueError("the cuts are not sorted by their start")
    completed = _completed_cuts(readable, readable[0].request.channel) if readable else iter(())
    pending = collections.deque(cuts)
    unread = set(map(id, readable))
    while pending:
        cut = pending.popleft()
        while id(cut) in unread:
            unread.discard(id(next(completed)))
        if cut.canceled_by is None:
            result = cut.result()
        else:
            # This reads the segment twice more: mixed, and with only the strongest channel. As
            # channels rarely cancel out, this is cheap on average.
            (result,) = _decode_cuts((cut.request,), max_seconds)
        cut.restart()  # Frees the samples.
        yield result


def container_seconds(source: Source) -> float | None:
    """Returns a recording's length in seconds according to its container, or None if unknown.

    Raises:
        AudioError: The recording cannot be read.
    """
    with contextlib.closing(AudioReader(source, MIX)) as reader:
        return reader.container_seconds


def missing_seconds(source: Source) -> float:
    """Returns how many seconds of audio a truncated WAV file lacks, according to its header.

    Raises:
        AudioError: The recording cannot be read.
    """
    with contextlib.closing(AudioReader(source, MIX)) as reader:
        return reader.missing_seconds


def decoded_seconds(source: Source) -> float:
    """Decodes a recording to find its exact length in seconds.

    Raises:
        AudioError: The recording cannot be read.
    """
    return sum(len(block.samples) for block in stream_blocks(source)) / SAMPLE_RATE


def stream_blocks(source: Source, channel: Channel = MIX, seconds: float = 30.0) -> Iterator[Clip]:
    """Decodes a recording of any length in one pass, and yields blocks of equal length.

    The last block may be shorter. If decoding stops before the end of the recording, the last block
    has `Clip.damaged` set.

    Args:
        source: Path or content of a file; see `decode`.
        channel: Channel to read.
        seconds: Length of each block in seconds.

    Raises:
        AudioError: The first block cannot be decoded.
    """
    # A container's length may be missing or wrong, so more blocks are requested than needed.
    total_seconds = min(2 * (container_seconds(source) or 0) + 48 * 3600, _MAX_SECONDS)
    requests = (
        DecodeRequest(source, index * seconds, (index + 1) * seconds, channel)
        for index in range(math.ceil(total_seconds / seconds))
    )
    for index, clip in enumerate(stream_cuts(requests)):
        if isinstance(clip, Clip):
            yield clip
        elif index == 0:
            raise clip
        else:
            if clip.reason is Reason.DAMAGED:
                yield Clip(np.zeros(0, np.int16), 0.0, damaged=True)
            return


def num_channels(source: Source) -> int:
    """Returns the number of channels in a recording.

    Raises:
        AudioError: The recording cannot be read.
    """
    with contextlib.closing(AudioReader(source, MIX)) as reader:
        return reader.num_channels


def encode_wav(path: str | os.PathLike[str], samples: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Writes samples [N] or [N, channels] int16 at a rate in Hz to a 16-bit WAV file.

    Raises:
        ValueError: `samples` has another dtype or shape.
    """
    if samples.dtype != np.int16 or samples.ndim not in (1, 2):
        raise ValueError(f"samples {samples.dtype} {samples.shape}; allowed: int16 [N] or [N, C]")
    with wave.open(os.fspath(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2", copy=False).tobytes())


def _group_by_pass(requests: Iterable[DecodeRequest]) -> Iterator[list[DecodeRequest]]:
    """Groups consecutive requests that one pass over one channel of a recording can serve."""
    group: list[DecodeRequest] = []
    for request in requests:
        if group and not _follows(group[-1], request):
            yield group
            group = []
        group.append(request)
        if request.start is None and request.end is None:
            yield group
            group = []
    if group:
        yield group


def _follows(request: DecodeRequest, later: DecodeRequest) -> bool:
    same = (request.source, request.channel) == (later.source, later.channel)
    return same and later.start is not None and later.start >= (request.start or 0)


def _group_by_recording(
    requests: Iterable[DecodeRequest], max_seconds: float | None
) -> Iterator[list[DecodeRequest]]:
    """Groups consecutive requests for one recording, up to `_MAX_GROUP_SECONDS` of audio."""
    group: list[DecodeRequest] = []
    seconds = 0.0
    for request in requests:
        length = math.inf if request.end is None else request.end - (request.start or 0)
        length = min(length, math.inf if max_seconds is None else max_seconds)
        if group and (request.source != group[0].source or seconds + length > _MAX_GROUP_SECONDS):
            yield group
            group, seconds = [], 0.0
        group.append(request)
        seconds += length
        if request.start is None and request.end is None:
            # A request for a whole recording is decoded without waiting for the next request.
            yield group
            group, seconds = [], 0.0
    if group:
        yield group


def _decode_one_by_one(
    group: Sequence[DecodeRequest], decode_group: Callable[[Sequence[DecodeRequest]], Any]
) -> Iterator[Clip | AudioError]:
    """Decodes each request of a group that crashed a worker, so that only faulty requests fail."""
    results = ordered_map(decode_group, [[request] for request in group], num_workers=1)
    for request, result in zip(group, results, strict=True):
        if isinstance(result, WorkerCrashError):
            yield AudioError(Reason.CRASH, source_name(request.source), str(result))
        else:
            yield from result


def _decode_cuts(
    requests: Sequence[DecodeRequest], max_seconds: float | None
) -> list[Clip | AudioError]:
    """Decodes segments of one recording, in one pass per requested channel."""
    cuts = [_Cut(request, max_seconds) for request in requests]
    by_channel: dict[Channel, list[_Cut]] = collections.defaultdict(list)
    for cut in cuts:
        if cut.error is None:
            by_channel[cut.request.channel].append(cut)
    for channel, channel_cuts in by_channel.items():
        _read_cuts(channel_cuts, channel)
        canceled = collections.defaultdict(list)
        for cut in channel_cuts:
            if cut.canceled_by is not None:
                canceled[cut.canceled_by].append(cut)
                cut.restart(f"channels cancel out: only channel {cut.canceled_by} is used")
        for strongest, canceled_cuts in canceled.items():
            _read_cuts(canceled_cuts, strongest)
    return [cut.result() for cut in cuts]


def _read_cuts(cuts: Sequence["_Cut"], channel: Channel) -> None:
    """Reads segments of one channel in a single pass."""
    for _ in _completed_cuts(cuts, channel):
        pass


def _completed_cuts(cuts: Sequence["_Cut"], channel: Channel) -> Iterator["_Cut"]:
    """Reads segments of one channel in a single pass, and yields each completed segment."""
    source = cuts[0].request.source
    try:
        reader = AudioReader(source, channel)
    except AudioError as error:
        for cut in cuts:
            cut.error = error
            yield cut
        return
    waiting = collections.deque(sorted(cuts, key=lambda cut: cut.first))
    active: list[_Cut] = []
    fatal: AudioError | None = None
    try:
        while waiting:
            end = 0
            for begin, chunk in reader.chunks(waiting[0].first):
                end = begin + len(chunk)
                while waiting and waiting[0].first < end:
                    active.append(waiting.popleft())
                for cut in active:
                    cut.add(begin, chunk)
                for cut in active:
                    if cut.stop <= end:
                        cut.finish(reader)
                        yield cut
                active = [cut for cut in active if cut.stop > end]
                if not active and (not waiting or reader.should_seek(end, waiting[0].first)):
                    break
            else:
                # The remaining segments begin at or after the end of the recording.
                for cut in waiting:
                    cut.position = end
                active += waiting
                waiting.clear()
    except AudioError as error:
        fatal = error
    except decoder_errors() as error:
        fatal = AudioError(Reason.DAMAGED, source_name(source), error_message(error))
    finally:
        reader.close()
    for cut in [*active, *waiting]:
        cut.error = fatal
        cut.finish(reader)
        yield cut


class _Cut:
    """A segment that is being decoded. All sample indices are at `SAMPLE_RATE`.

    Attributes:
        first: Index of the first sample.
        stop: Index after the last sample.
        position: Index after the last sample that was decoded.
        canceled_by: Index of the strongest channel if the channels cancel out, else None.
    """

    def __init__(self, request: DecodeRequest, max_seconds: float | None) -> None:
        start, end = request.start, request.end
        self.request = request
        self.error: AudioError | None = None
        self._range = f"from {start} to {end} s"
        self.first = self.stop = self._capped_stop = 0
        if not 0 <= (start or 0.0) < (math.inf if end is None else end):  # also rejects NaN
            self.error = AudioError(Reason.RANGE, source_name(request.source), self._range)
        else:
            self.first = _index(start or 0.0)
            self.stop = _END if end is None else _index(end)
            cap = _END if max_seconds is None else max(1, _index(max_seconds))
            self._capped_stop = min(self.stop, self.first + cap)
        self.restart()

    def restart(self, note: str = "") -> None:
        """Discards all decoded samples, damage and notes."""
        self._notes = [note] if note else []
        self.position = 0
        self.canceled_by: int | None = None
        self._chunks: list[np.ndarray] = []
        self._damage_message = ""
        self._is_damaged = False

    def add(self, begin: int, chunk: np.ndarray) -> None:
        """Adds the part of a chunk [n], int16 or float32, that belongs to the segment.

        `begin` is the index of the chunk's first sample.
        """
        part = chunk[max(0, self.first - begin) : max(0, self._capped_stop - begin)]
        if len(part):  # An empty view would keep its chunk in memory.
            self._chunks.append(part)
        self.position = begin + len(chunk)

    def finish(self, reader: AudioReader) -> None:
        """Collects the damage and the notes that the reader reports for this segment."""
        end = min(self.position, self.stop)
        self._notes += reader.notes(self.first, end)
        self._damage_message = reader.damage(0, _END)
        self._is_damaged = bool(reader.damage(self.first, self.stop))
        self.canceled_by = reader.canceled_by(self.first, end)

    def result(self) -> Clip | AudioError:
        """Returns the clip or the error."""
        name = source_name(self.request.source)
        if self.error is not None:
            return self.error
        if not self._chunks:
            if self._damage_message:
                return AudioError(Reason.DAMAGED, name, self._damage_message)
            if self.first > 0 or self.position > 0:
                return AudioError(Reason.RANGE, name, self._range)
            return AudioError(Reason.NO_SAMPLES, name)
        try:
            samples, note = _concatenate(self._chunks)
        except ValueError as error:
            return AudioError(Reason.DAMAGED, name, str(error))
        length = min(self.position, self.stop) - self.first
        return Clip(
            samples,
            seconds=length / SAMPLE_RATE,
            capped=len(samples) < length,
            damaged=self._is_damaged,
            notes=(*self._notes, note) if note else tuple(self._notes),
        )


def _concatenate(chunks: Sequence[np.ndarray]) -> tuple[np.ndarray, str]:
    """Returns int16 or float32 chunks as one int16 array, and a note on scaling."""
    if not any(chunk.dtype.kind == "f" for chunk in chunks):
        return np.concatenate(chunks), ""
    floats = [
        chunk if chunk.dtype.kind == "f" else chunk.astype(np.float32) / FULL_SCALE
        for chunk in chunks
    ]
    samples = np.concatenate(floats)
    peak = np.abs(samples).max(initial=0.0)
    if peak > MAX_PEAK * FULL_SCALE:
        raise ValueError(f"float samples of up to {peak:g}")
    if peak > MAX_PEAK:
        # Some float recordings contain values in the range of int16 instead of -1 to 1.
        integers, note = float_to_int16(samples / FULL_SCALE)
        return integers, note or f"floats of up to {peak:g} read as integers of 16 bits"
    return float_to_int16(samples)


def _check_max_seconds(max_seconds: float | None) -> None:
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"{max_seconds=}; allowed: positive, or None")


def _index(seconds: float) -> int:
    return _END if math.isinf(seconds) else round(seconds * SAMPLE_RATE)
