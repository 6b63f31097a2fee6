"""Recordings of any format as 16 kHz mono samples, by the FFmpeg that PyAV brings along.

`decode` reads one recording or a cut of it, `decode_many` reads many in parallel processes, and
`encode_wav` writes samples. All that can be wrong with a recording is one `AudioError`.
"""

import collections
import dataclasses
import enum
import functools
import io
import itertools
import math
import os
import pathlib
import stat
import sys
import wave
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from etils import epy

from mister_jax.data.workers import WorkerCrash, ordered_map
from mister_jax.errors import InputError

with epy.lazy_imports(error_callback="Recordings need PyAV: pip install av"):
    import av

SAMPLE_RATE = 16_000

Source = str | os.PathLike[str] | bytes
"""The path of a file, or what would be in it."""

_ALL = sys.maxsize
"""More samples than there are in any recording."""

# Formats whose time stamps count samples, also after a jump. Others are read from the beginning:
# they round time stamps (Matroska) or guess them (MP3 of variable rate).
_SEEKABLE = ("wav", "flac", "mov,mp4,m4a,3gp,3g2,mj2")

# How long before a cut decoding and resampling begin, in seconds. Decoders need some frames until
# their output is that of an undisturbed run, and the resampler's filter is a few ms long.
_DECODER_LEAD, _RESAMPLER_LEAD = 1.0, 0.1


class Reason(enum.StrEnum):
    """Why there are no samples."""

    MISSING = "no such file"
    UNREADABLE = "cannot be read"
    EMPTY = "empty file"
    FORMAT = "not a format that FFmpeg reads, or damaged at its beginning"
    NO_AUDIO = "no audio stream that FFmpeg decodes"
    DAMAGED = "damaged: nothing could be decoded"
    NO_SAMPLES = "no samples"
    RANGE = "the cut is not in the recording"
    CRASH = "the decoder crashed"


class AudioError(InputError):
    """A recording cannot be used.

    Attributes:
        reason: one of few.
        source: the path of the recording.
        detail: what FFmpeg or the system said, one line.
    """

    def __init__(self, reason: Reason, source: str, detail: str = "") -> None:
        super().__init__(reason, source, detail)  # What pickle gives back to `__init__`.
        self.reason = reason
        self.source = source
        self.detail = " ".join(detail.split())

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A decoded recording, or the cut of it that was asked for.

    Attributes:
        samples: [N] int16, mono, `SAMPLE_RATE` a second.
        seconds: how long it lasts, also where `samples` holds its beginning only.
        capped: `samples` was cut at `max_seconds`.
        damaged: some of it could not be decoded and is left out.
    """

    samples: np.ndarray
    seconds: float
    capped: bool = False
    damaged: bool = False


@dataclasses.dataclass(frozen=True)
class Request:
    """What `decode_many` is to decode; the fields are the arguments of `decode`."""

    source: Source
    start: float | None = None
    end: float | None = None


def decode(
    source: Source,
    *,
    start: float | None = None,
    end: float | None = None,
    max_seconds: float | None = None,
) -> Clip:
    """Decodes the audio of a recording to `SAMPLE_RATE` and one channel.

    Channels with a place (left, centre, ...) are mixed by FFmpeg's weights: the mean of two, and of
    5.1 most of the centre, where film and television put speech, less of the sides and nothing of
    the bass. Channels without one are averaged. The weights add up to 1, so nothing clips. Of
    several audio streams FFmpeg chooses. Frames that cannot be decoded are left out, and pauses
    between time stamps are not filled.

    Args:
        source: any container and codec that FFmpeg reads. A path is a local file, never an address.
        start: seconds from the first sample where the cut begins; the first sample if None.
        end: seconds from the first sample where it ends; the end if None or later than that. The
            cut is, to the sample, that part of what decoding all of the recording gives. (AAC
            fills bands with noise, which is other noise each time.)
        max_seconds: at most as much is kept.

    Raises:
        AudioError: there is no sample, for one of the reasons in `Reason`.
        ValueError: `max_seconds` is not positive.
    """
    _check_max_seconds(max_seconds)
    name = _name(source)
    if not 0 <= (start or 0.0) < (math.inf if end is None else end):  # Nor NaN.
        raise AudioError(Reason.RANGE, name, f"from {start} to {end} s")
    first = _index(start or 0.0)
    stop = _ALL if end is None else _index(end)
    kept_stop = stop if max_seconds is None else min(stop, first + max(1, _index(max_seconds)))
    recording = _Recording(source, name)
    kept: list[np.ndarray] = []
    position = 0  # Of the next sample in the recording.
    try:
        for begin, chunk in recording.chunks(first):
            kept.append(chunk[max(0, first - begin) : max(0, kept_stop - begin)])
            position = begin + len(chunk)
            if position >= stop:
                break
    except AudioError:
        raise
    except _failures() as error:
        raise AudioError(Reason.DAMAGED, name, _said(error)) from None
    finally:
        recording.close()
    samples = np.concatenate(kept) if kept else np.zeros(0, np.int16)
    if len(samples) == 0:
        if recording.damage:
            raise AudioError(Reason.DAMAGED, name, recording.damage)
        if first > 0 or position > 0:
            raise AudioError(Reason.RANGE, name, f"from {start} to {end} s")
        raise AudioError(Reason.NO_SAMPLES, name)
    length = min(position, stop) - first
    return Clip(
        samples,
        seconds=length / SAMPLE_RATE,
        capped=len(samples) < length,
        damaged=bool(recording.damage),
    )


def decode_many(
    requests: Iterable[Request],
    *,
    num_workers: int,
    max_seconds: float | None = None,
    on_done: Callable[[int], None] | None = None,
) -> Iterator[Clip | AudioError]:
    """Decodes recordings in parallel processes, in the order of the requests.

    Requests are taken a little ahead of the results, see `workers.ordered_map`, so memory does not
    grow with the corpus.

    Args:
        requests: what to decode.
        num_workers: processes; with 0 this process decodes.
        max_seconds: see `decode`.
        on_done: called with the number of results so far, before each is given.

    Yields:
        A clip, or the error that says why there is none; one for every request.

    Raises:
        ValueError: `num_workers` is negative or `max_seconds` not positive.
    """
    _check_max_seconds(max_seconds)
    asked: collections.deque[Request] = collections.deque()

    def remembered() -> Iterator[Request]:
        for request in requests:
            asked.append(request)
            yield request

    answer = functools.partial(_decode_request, max_seconds=max_seconds)
    results = ordered_map(answer, remembered(), num_workers=num_workers)

    def told() -> Iterator[Clip | AudioError]:
        for done, result in enumerate(results, start=1):
            request = asked.popleft()
            if on_done is not None:
                on_done(done)
            if isinstance(result, WorkerCrash):
                yield AudioError(Reason.CRASH, _name(request.source), str(result))
            else:
                yield result

    return told()


def encode_wav(path: str | os.PathLike[str], samples: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Writes a WAV file of 16 bits.

    Args:
        path: is overwritten.
        samples: [N] int16 of one channel, or [N, channels].
        rate: samples a second.

    Raises:
        ValueError: `samples` is of another type or shape.
    """
    if samples.dtype != np.int16 or samples.ndim not in (1, 2):
        raise ValueError(f"samples {samples.dtype} {samples.shape}; allowed: int16 [N] or [N, C]")
    with wave.open(os.fspath(path), "wb") as file:
        file.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2", copy=False).tobytes())


class _Recording:
    """An open recording.

    Attributes:
        damage: what FFmpeg said of the first part that it could not decode, else empty.
    """

    def __init__(self, source: Source, name: str) -> None:
        self.damage = ""
        _check_there(source, name)
        self._source = source
        self._name = name
        self._open()

    def _open(self) -> None:
        try:
            self._container = av.open(
                io.BytesIO(self._source)
                if isinstance(self._source, bytes)
                else f"file:{os.fspath(self._source)}",
                mode="r",
                # A playlist must not make FFmpeg go to the net.
                container_options={"protocol_whitelist": "file"},
                # Tags in another encoding are no reason to refuse a recording.
                metadata_errors="replace",
            )
        except _failures() as error:
            raise AudioError(Reason.FORMAT, self._name, _said(error)) from None
        stream = self._container.streams.best("audio")
        if stream is None or stream.codec_context is None:
            self.close()
            raise AudioError(Reason.NO_AUDIO, self._name)
        for other in self._container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        # Recordings are decoded in parallel, so each by one thread.
        stream.codec_context.thread_count = 1
        self._stream: Any = stream  # The type that PyAV declares has no `decode`.

    def close(self) -> None:
        self._container.close()

    def chunks(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """The samples in parts, from a little before `first` on if the format lets one jump.

        Args:
            first: index of the first sample that is wanted, as are all indices at `SAMPLE_RATE`.

        Yields:
            The index of a part's first sample and the part, [n] int16. It begins where the part
            before ended.
        """
        lead = max(0.0, first / SAMPLE_RATE - _RESAMPLER_LEAD)
        frames = self._frames(lead)
        position, frame = next(frames, (0, None))
        if frame is None:
            return
        # Resampling begins where a sample of the recording and one at the new rate have the same
        # time, so it gives the samples that resampling all of the recording would give.
        rate = frame.sample_rate
        common = rate // math.gcd(rate, SAMPLE_RATE)
        begin = common * max(int(lead * rate) // common, -(-position // common))
        index = begin // common * (SAMPLE_RATE * common // rate)
        rest = (later for _, later in frames)
        for chunk in _resampled(_without(begin - position, itertools.chain([frame], rest))):
            yield index, chunk
            index += len(chunk)

    def _frames(self, lead: float) -> "Iterator[tuple[int, av.AudioFrame]]":
        """Decoded frames, each with the index of its first sample at its own rate.

        Args:
            lead: the time in seconds that the frames have to hold, and all after it.
        """
        # Where the stream's clock starts, in its own unit.
        origin = self._stream.start_time or 0
        jumped = self._jump(origin, lead - _DECODER_LEAD)
        position = 0
        for frame in self._decoded():
            if jumped:
                jumped = False
                if frame.pts is None or frame.time_base is None:
                    raise AudioError(Reason.DAMAGED, self._name, "no time stamps")
                position = round((frame.pts - origin) * frame.time_base * frame.sample_rate)
            yield position, frame
            position += frame.samples
        # FFmpeg passes over damage in FLAC in silence, but FLAC tells how much there is.
        if position and self._stream.duration and self._container.format.name == "flac":
            announced = float(self._stream.duration * self._stream.time_base)
            missing = announced - position / frame.sample_rate
            if missing > 0.1:
                self._note(f"{missing:.1f} of {announced:.1f} s are missing")

    def _jump(self, origin: int, seconds: float) -> bool:
        """Goes to a time or a little before it, and tells whether it did."""
        if seconds <= 0 or self._container.format.name not in _SEEKABLE:
            return False
        try:
            self._container.seek(
                origin + int(seconds / self._stream.time_base), stream=self._stream
            )
        except _failures():
            self.close()
            self._open()
            return False
        return True

    def _decoded(self) -> "Iterator[av.AudioFrame]":
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except av.error.FFmpegError as error:
                self._note(_said(error))
                continue
            yield from frames

    def _packets(self) -> "Iterator[av.Packet | None]":
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt and not self._is_of_unknown_length():
                    self._note("the file breaks off")
                yield packet
        except av.error.FFmpegError as error:
            self._note(_said(error))
            yield None  # The decoder gives what it still holds.

    def _is_of_unknown_length(self) -> bool:
        """Whether it is a WAV file from a pipe, which ends before the length it announces."""
        if self._container.format.name != "wav":
            return False
        if isinstance(self._source, bytes):
            head = self._source[:4096]
        else:
            with pathlib.Path(self._source).open("rb") as file:
                head = file.read(4096)
        begin = head.find(b"data") + len(b"data")
        length = int.from_bytes(head[begin : begin + 4], "little")
        return length == 0 or length >= 0x7FFF_0000

    def _note(self, damage: str) -> None:
        self.damage = self.damage or damage


def _decode_request(request: Request, max_seconds: float | None) -> Clip | AudioError:
    try:
        return decode(request.source, start=request.start, end=request.end, max_seconds=max_seconds)
    except AudioError as error:
        return error


def _check_max_seconds(max_seconds: float | None) -> None:
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"{max_seconds=}; allowed: positive, or None")


def _index(seconds: float) -> int:
    return _ALL if math.isinf(seconds) else round(seconds * SAMPLE_RATE)


def _name(source: Source) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


def _check_there(source: Source, name: str) -> None:
    """Raises what the system, not FFmpeg, has against a source."""
    if isinstance(source, bytes):
        if not source:
            raise AudioError(Reason.EMPTY, name)
        return
    path = pathlib.Path(source)
    try:
        status = path.stat()
        # A pipe would keep one waiting.
        is_file = stat.S_ISREG(status.st_mode)
        if is_file:
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise AudioError(Reason.MISSING, name) from None
    except (OSError, ValueError) as error:
        raise AudioError(Reason.UNREADABLE, name, _said(error)) from None
    if not is_file:
        raise AudioError(Reason.UNREADABLE, name, "not a file")
    if status.st_size == 0:
        raise AudioError(Reason.EMPTY, name)


def _failures() -> tuple[type[Exception], ...]:
    """What PyAV raises for a file that it cannot use."""
    return (av.error.FFmpegError, OSError, RuntimeError, ValueError)


def _said(error: Exception) -> str:
    """The part of an error's message that does not name the file again."""
    return getattr(error, "strerror", None) or str(error)


def _resampled(frames: "Iterator[av.AudioFrame]") -> Iterator[np.ndarray]:
    """Samples [n] int16, mono, at `SAMPLE_RATE`, of frames that may change their format."""
    for _, alike in itertools.groupby(frames, _format):
        resampler = av.AudioResampler("s16", "mono", SAMPLE_RATE)
        for frame in itertools.chain(alike, [None]):
            for out in resampler.resample(frame and _with_places(_numbers(frame))):
                if out is not None:  # As is the answer to None where nothing is to be done.
                    yield out.to_ndarray()[0]


def _format(frame: "av.AudioFrame") -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _numbers(frame: "av.AudioFrame") -> "av.AudioFrame":
    """The frame, silent where its samples are no finite numbers: FFmpeg would make them loudest."""
    samples = frame.to_ndarray()
    if samples.dtype.kind != "f" or np.isfinite(samples).all():
        return frame
    finite = np.where(np.isfinite(samples), samples, 0).astype(samples.dtype)
    return _frame(finite, frame, layout=frame.layout.name)


def _with_places(frame: "av.AudioFrame") -> "av.AudioFrame":
    """The frame, or the mean of its channels where these have no place.

    FFmpeg would guess the places from the number of channels and, for example, drop the third of
    three as a subwoofer's.
    """
    channels = len(frame.layout.channels)
    if channels < 3 or frame.layout.channels[0].name != "NONE":
        return frame
    samples = frame.to_ndarray()
    if not frame.format.is_planar:
        samples = samples.reshape(-1, channels).T
    mean = samples.mean(axis=0, dtype=np.float64)
    if samples.dtype.kind != "f":
        mean = np.rint(mean)
    return _frame(mean[None].astype(samples.dtype), frame, layout="mono")


def _without(count: int, frames: "Iterator[av.AudioFrame]") -> "Iterator[av.AudioFrame]":
    """The frames without their first `count` samples."""
    for frame in frames:
        if count < frame.samples:
            yield _frame_from(frame, count) if count else frame
        count = max(0, count - frame.samples)


def _frame_from(frame: "av.AudioFrame", first: int) -> "av.AudioFrame":
    width = 1 if frame.format.is_planar else len(frame.layout.channels)
    samples = np.ascontiguousarray(frame.to_ndarray()[:, first * width :])
    return _frame(samples, frame, layout=frame.layout.name)


def _frame(samples: np.ndarray, like: "av.AudioFrame", layout: str) -> "av.AudioFrame":
    frame = av.AudioFrame.from_ndarray(samples, format=like.format.name, layout=layout)
    frame.sample_rate = like.sample_rate
    return frame
