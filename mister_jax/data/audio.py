"""Recordings of any format as 16 kHz mono samples, decoded by the FFmpeg that PyAV brings along.

`decode` reads one recording or a cut of it, `decode_many` reads many in parallel processes, and
`encode_wav` writes samples. All that can be wrong with a recording is one `AudioError`.

Times are those of a player: seconds from the beginning of the container. Sound that starts later
is preceded by silence, and holes between time stamps are filled with it.
"""

import collections
import contextlib
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
import unicodedata
import wave
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epy

from mister_jax.data import wav
from mister_jax.data.workers import WorkerCrash, ordered_map
from mister_jax.errors import InputError

with epy.lazy_imports(error_callback="Recordings need PyAV: pip install av"):
    import av

SAMPLE_RATE = 16_000

Source = str | os.PathLike[str] | bytes
"""The path of a file, or the content of one."""

Channel = str | int
"""Channel of a recording: "mix", "left", "right", or an index from 0."""

MIX = "mix"
_NAMED_CHANNELS = {"left": 0, "right": 1}

# A number of samples larger than that of any recording.
_ALL = sys.maxsize

# Formats whose time stamps count samples, also after a jump. Others are read from the beginning:
# they round time stamps (Matroska) or guess them (MP3 of variable rate).
_SEEKABLE = ("wav", "flac", "mov,mp4,m4a,3gp,3g2,mj2")

# Seconds before a cut where decoding and resampling begin. Decoders need some frames until their
# output is that of an undisturbed run, and the resampler's filter is a few ms long.
_DECODER_LEAD, _RESAMPLER_LEAD = 1.0, 0.1

# Differences between time stamps and the number of samples up to this are rounding or drift, and
# are ignored. Matroska rounds to 1 ms; packets of the common coders last 20 to 64 ms.
_TIME_TOLERANCE = 0.05
# A longer hole is not a pause but a reset clock, as in joined recordings.
_MAX_HOLE = 3600.0
# Over a longer gap between two cuts of one recording, seeking is cheaper than decoding.
_JUMP_SECONDS = 10.0
# Seconds of sound that one call of a worker returns at most: 38 MB of int16.
_GROUP_SECONDS = 1200.0

# Full scale is 1. Lossy coders overshoot it a little, which is clipped. Recordings in float may
# exceed it by some 10 dB; samples above the second bound (+40 dB) have another full scale.
_CLIPPED_PEAK, _MAX_PEAK = 10 ** (1 / 20), 100.0
_FULL_SCALE = 2**15

# A mix is canceled if its power is less than this share of the strongest channel's (-26 dB).
_CANCELED_SHARE = 10 ** (-26 / 10)
_POWER_BIN = 0.25  # Seconds over which the power of channels is summed.
_POWER_STEP = 7  # Every seventh sample counts.
_MAX_POWERED = 2.0**31  # Larger floats count as that.
_BLOCK_SECONDS = 0.25  # Decoded frames are worked on in blocks of that length.


class Reason(enum.StrEnum):
    """Why there are no samples."""

    MISSING = "no such file"
    UNREADABLE = "cannot be read"
    EMPTY = "empty file"
    FORMAT = "not a format that FFmpeg reads, or damaged at its beginning"
    NO_AUDIO = "no audio stream that FFmpeg decodes"
    NO_CHANNEL = "no such channel"
    DAMAGED = "damaged: nothing could be decoded"
    NO_SAMPLES = "no samples"
    RANGE = "the cut is not in the recording"
    CRASH = "the decoder crashed"


class AudioError(InputError):
    """A recording cannot be used.

    Attributes:
        reason: One of few reasons.
        source: Path of the recording.
        detail: Message of FFmpeg or of the system, one line.
    """

    def __init__(self, reason: Reason, source: str, detail: str = "") -> None:
        super().__init__(reason, source, detail)  # What pickle passes to `__init__`.
        self.reason = reason
        self.source = source
        self.detail = " ".join(detail.split())

    def __str__(self) -> str:
        return f"{self.source}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


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
class Request:
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
    (result,) = _decode_cuts((Request(source, start, end, check_channel(channel)),), max_seconds)
    if isinstance(result, AudioError):
        raise result
    return result


def decode_many(
    requests: Iterable[Request],
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
    pending: collections.deque[Sequence[Request]] = collections.deque()

    def remembered_groups() -> Iterator[Sequence[Request]]:
        for group in _groups(requests, max_seconds):
            pending.append(group)
            yield group

    answer = functools.partial(_decode_cuts, max_seconds=max_seconds)
    results = ordered_map(answer, remembered_groups(), num_workers=num_workers)

    def one_by_one() -> Iterator[Clip | AudioError]:
        num_done = 0
        for result in results:
            group = pending.popleft()
            for clip in _survivors(group, answer) if isinstance(result, WorkerCrash) else result:
                num_done += 1
                if on_done is not None:
                    on_done(num_done)
                yield clip

    return one_by_one()


def check_channel(channel: Any) -> Channel:
    """Returns a channel as `decode` takes it; an index may be given as text.

    Raises:
        ValueError: It is no channel; the message says what is allowed.
    """
    if isinstance(channel, str) and channel.strip().isdecimal():
        channel = int(channel)
    if channel == MIX or channel in _NAMED_CHANNELS:
        return channel
    if isinstance(channel, int) and not isinstance(channel, bool) and channel >= 0:
        return channel
    names = ", ".join((MIX, *_NAMED_CHANNELS))
    raise ValueError(f"{channel!r}; allowed: {names}, or the index of a channel from 0")


def float_to_int16(samples: np.ndarray) -> tuple[np.ndarray, str]:
    """Converts samples of full scale 1 to int16.

    Up to 1 dB beyond full scale is clipped, as the overshoot of a lossy coder. Beyond that, all
    samples are scaled so that the peak fits.

    Args:
        samples: Samples [N] of any float type.

    Returns:
        The samples, and a note that says by how much they were scaled, empty if they were not.

    Raises:
        ValueError: Samples are not finite, or so large that their full scale cannot be 1.
    """
    peak = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(peak):
        raise ValueError("samples are not finite; allowed: -1 to 1")
    if peak > _MAX_PEAK:
        raise ValueError(
            f"float samples of up to {peak:g}, as of integers; allowed: full scale 1 (divide int16 "
            "values by 32768, or pass them as int16)"
        )
    scale, note = 1.0, ""
    if peak > _CLIPPED_PEAK:
        scale = 1 / peak
        decibels = 20 * math.log10(peak)
        note = f"scaled by {scale:.2f}: its peak is {decibels:.1f} dB over full scale"
    scaled = np.rint(samples * (scale * _FULL_SCALE))
    return np.clip(scaled, -_FULL_SCALE, _FULL_SCALE - 1).astype(np.int16), note


def existing_path(path: str | os.PathLike[str]) -> str:
    """Returns the path under which a file exists, whatever the Unicode form of its names.

    macOS decomposes accented letters in file names (NFD), most other systems and lists compose
    them (NFC). The path is returned as it is if there is no such file in either form.
    """
    path = os.fspath(path)
    if path.isascii():
        return path
    with contextlib.suppress(OSError, ValueError):
        if pathlib.Path(path).exists():
            return path
        parts = pathlib.Path(path).parts
        place = pathlib.Path(parts[0])
        for part in parts[1:]:
            forms = (part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD")))
            place /= next((form for form in forms if (place / form).exists()), part)
        if place.exists():
            return str(place)
    return path


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


def _groups(requests: Iterable[Request], max_seconds: float | None) -> Iterator[list[Request]]:
    """Yields neighboring requests for one recording together, up to `_GROUP_SECONDS` of sound."""
    group: list[Request] = []
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
    group: Sequence[Request], answer: Callable[[Sequence[Request]], Any]
) -> Iterator[Clip | AudioError]:
    """Decodes the requests of a group that crashed one by one, so that only some of them fail."""
    alone = ordered_map(answer, [[request] for request in group], num_workers=1)
    for request, result in zip(group, alone, strict=True):
        if isinstance(result, WorkerCrash):
            yield AudioError(Reason.CRASH, _name(request.source), str(result))
        else:
            yield from result


def _decode_cuts(requests: Sequence[Request], max_seconds: float | None) -> list[Clip | AudioError]:
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
        recording = _Recording(source, _name(source), channel)
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
    except _failures() as error:
        fatal = AudioError(Reason.DAMAGED, _name(source), _message(error))
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

    def __init__(self, request: Request, max_seconds: float | None) -> None:
        start, end = request.start, request.end
        self.request = request
        self.error: AudioError | None = None
        self.notes: list[str] = []
        self._range = f"from {start} to {end} s"
        self.first = self.stop = self._kept_stop = 0
        if not 0 <= (start or 0.0) < (math.inf if end is None else end):  # Also refuses NaN.
            self.error = AudioError(Reason.RANGE, _name(request.source), self._range)
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

    def finish(self, recording: "_Recording") -> None:
        """Takes over what the recording knows of this part of it."""
        end = min(self.position, self.stop)
        self.notes += recording.notes(self.first, end)
        self._damage = recording.damage(0, _ALL)
        self._is_damaged = bool(recording.damage(self.first, self.stop))
        self.canceled_by = recording.canceled_by(self.first, end)

    def result(self) -> Clip | AudioError:
        """Returns the clip, or why there is none."""
        name = _name(self.request.source)
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
        chunk if chunk.dtype.kind == "f" else chunk.astype(np.float32) / _FULL_SCALE
        for chunk in chunks
    ]
    joined = np.concatenate(floats)
    peak = np.abs(joined).max(initial=0.0)
    if peak > _MAX_PEAK * _FULL_SCALE:
        raise ValueError(f"float samples of up to {peak:g}")
    if peak > _MAX_PEAK:
        # A recording of floats in integer range: its header cannot say so.
        joined /= _FULL_SCALE
        samples, note = float_to_int16(joined)
        return samples, note or f"floats of up to {peak:g} read as integers of 16 bits"
    return float_to_int16(joined)


class _Recording:
    """An open recording, of which one channel is read."""

    def __init__(self, source: Source, name: str, channel: Channel) -> None:
        self._source = source
        self._name = name
        self._channel = channel
        # Indices behind which FFmpeg could not decode something, and its messages.
        self._damage: dict[int, str] = {}
        self._holes: set[tuple[int, int]] = set()
        self._jumps: list[str] = []
        # Sums of squares by `_POWER_BIN`: of each channel, and of their mean at the end.
        self._powers: dict[int, np.ndarray] = {}
        self._position = 0  # Index of the frame that is decoded.
        if not isinstance(source, bytes):
            source = self._source = existing_path(source)
        _check_readable(source, name)
        self._header = wav.read_header(source)
        self._container: Any = None
        if self._header is None or not self._header.is_pcm:
            self._open()

    def _open(self) -> None:
        try:
            self._container = av.open(
                io.BytesIO(self._source)
                if isinstance(self._source, bytes)
                else f"file:{os.fspath(self._source)}",
                mode="r",
                # A playlist must not make FFmpeg use the network.
                container_options={"protocol_whitelist": "file"},
                # Tags in another encoding are no reason to refuse a recording.
                metadata_errors="replace",
            )
        except _failures() as error:
            raise AudioError(Reason.FORMAT, self._name, _message(error)) from None
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
        """Closes the file."""
        if self._container is not None:
            self._container.close()

    def is_worth_a_jump(self, end: int, first: int) -> bool:
        """Returns whether the way from one index to another is jumped over, not decoded."""
        is_seekable = self._container is None or self._container.format.name in _SEEKABLE
        return is_seekable and first - end > _JUMP_SECONDS * SAMPLE_RATE

    def damage(self, first: int, stop: int) -> str:
        """Returns what FFmpeg said of the first damage between two indices, empty if none."""
        return next((said for index, said in self._damage.items() if first <= index <= stop), "")

    def notes(self, first: int, stop: int) -> list[str]:
        """Returns notes on the part between two indices."""
        late = missing = 0
        for begin, end in self._holes:
            overlap = min(end, stop) - max(begin, first)
            if overlap > 0 and begin == 0:
                late += overlap
            elif overlap > 0:
                missing += overlap
        notes = list(self._jumps)
        if late >= 0.1 * SAMPLE_RATE:
            notes.append(f"audio starts {late / SAMPLE_RATE:.1f} s late")
        if missing >= 0.1 * SAMPLE_RATE:
            notes.append(f"{missing / SAMPLE_RATE:.1f} s missing")
        return notes

    def canceled_by(self, first: int, stop: int) -> int | None:
        """Returns the strongest channel of a part whose mix is canceled, None if it is not."""
        ends = (place / SAMPLE_RATE / _POWER_BIN for place in (first, max(first, stop - 1)))
        bins = range(int(next(ends)), int(next(ends)) + 1)
        powers = [self._powers[index] for index in bins if index in self._powers]
        if not powers:
            return None
        *channels, mix = np.sum(powers, axis=0)
        strongest = int(np.argmax(channels))
        return strongest if mix < _CANCELED_SHARE * channels[strongest] else None

    def chunks(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields the samples in parts, from a little before an index on if the format can jump.

        Args:
            first: Index of the first sample that is wanted, as are all indices at `SAMPLE_RATE`.

        Yields:
            The index of a part's first sample and the part [n], int16, or float32 if it exceeds
            full scale. It begins where the part before it ended.
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
        """Yields frames of the channel without holes, each with its index at its own rate.

        Args:
            lead: Time in seconds that the frames have to hold, and all after it.
        """
        num_seconds = 0.0
        for position, frame in _merged(self._timed_frames(lead)):
            num_seconds = (position + frame.samples) / frame.sample_rate
            yield position, self._one_channel(frame, position / frame.sample_rate)
        # FFmpeg passes over damage in FLAC in silence, but the time stamps show it.
        if self._container is not None and self._container.format.name == "flac":
            missing = sum(end - begin for begin, end in self._holes) / SAMPLE_RATE
            if self._stream.duration:
                announced = float(self._stream.duration * self._stream.time_base)
                missing += max(0.0, announced - num_seconds)
            if missing > 0.1:
                self._note_damage(f"{missing:.1f} s are missing")
        elif self._header is not None and self._header.missing_seconds > 0.1:
            self._note_damage(f"{self._header.missing_seconds:.1f} s are missing at its end")

    def _timed_frames(self, lead: float) -> "Iterator[tuple[int, av.AudioFrame]]":
        """Yields decoded frames by the container's clock; holes are filled with silence."""
        if self._container is None:
            yield from self._pcm_frames(lead)
            return
        origin = self._origin()
        jumped = self._jump(origin, lead - _DECODER_LEAD)
        if jumped and origin is None:
            origin = self._stream_start()
        position: int | None = None  # Where the next frame is expected.
        rate = 0
        for frame in self._decoded():
            if rate and frame.sample_rate != rate and position is not None:
                position = round(position * frame.sample_rate / rate)
            rate = frame.sample_rate
            time = None
            if frame.pts is not None and frame.time_base is not None:
                time = frame.pts * float(frame.time_base)
                if origin is None:
                    origin = time
                time -= origin
            if jumped and position is None:
                if time is None:
                    raise AudioError(Reason.DAMAGED, self._name, "no time stamps")
                if time > lead:
                    # It landed behind the place: the sound is silent there, or its index is coarse.
                    self._reopen()
                    yield from self._timed_frames(0.0)
                    return
                position = round(time * rate)
            is_first = position is None
            position = position or 0
            gap = 0 if time is None else round(time * rate) - position
            if abs(gap) > _MAX_HOLE * rate:
                self._jumps.append(f"time stamps jump by {gap / rate:.0f} s, which is ignored")
                origin, gap = _shifted(origin, gap / rate), 0
            if is_first and gap < 0:
                # What comes before the beginning is not played, such as a coder's filling.
                yield from ((0, kept) for kept in _without(-gap, iter([frame])))
                position = max(0, gap + frame.samples)
                continue
            if gap > (0 if is_first else _TIME_TOLERANCE * rate):
                self._holes.add(
                    (_at_sample_rate(position, rate), _at_sample_rate(position + gap, rate))
                )
                for silence in _silence(frame, gap):
                    yield position, silence
                    position += silence.samples
            elif gap < -_TIME_TOLERANCE * rate:
                origin = _shifted(origin, gap / rate)
            self._position = _at_sample_rate(position, rate)
            yield position, frame
            position += frame.samples

    def _origin(self) -> float | None:
        """Returns the container's beginning on its clock in seconds.

        None stands for the first frame. Where sound is alone it is the beginning, and coders that
        fill the beginning make the container's own value differ from it.
        """
        is_alone = not any(
            stream.type in ("audio", "video")
            and stream.index != self._stream.index
            and not stream.disposition & av.stream.Disposition.attached_pic
            for stream in self._container.streams
        )
        if not is_alone and self._container.start_time is not None:
            return max(0.0, self._container.start_time / av.time_base)
        return None

    def _jump(self, origin: float | None, seconds: float) -> bool:
        """Goes to a time or a little before it, and returns whether it did."""
        if seconds <= 0 or self._container.format.name not in _SEEKABLE:
            return False
        start = self._stream_start() if origin is None else origin
        target = int((start + seconds) / self._stream.time_base)
        try:
            self._container.seek(target, stream=self._stream)
        except _failures():
            self._reopen()
            return False
        return True

    def _stream_start(self) -> float:
        return float((self._stream.start_time or 0) * self._stream.time_base)

    def _reopen(self) -> None:
        self.close()
        self._open()

    def _decoded(self) -> "Iterator[av.AudioFrame]":
        for packet in self._packets():
            try:
                frames = self._stream.decode(packet)
            except av.error.FFmpegError as error:
                self._note_damage(_message(error))
                continue
            yield from frames

    def _packets(self) -> "Iterator[av.Packet | None]":
        try:
            for packet in self._container.demux(self._stream):
                # The header of a WAV file says more about its length.
                if packet.is_corrupt and self._header is None:
                    self._note_damage("the file breaks off")
                yield packet
        except av.error.FFmpegError as error:
            self._note_damage(_message(error))
            yield None  # The decoder gives what it still holds.

    def _pcm_frames(self, lead: float) -> "Iterator[tuple[int, av.AudioFrame]]":
        """Yields frames of a WAV file whose samples are integers."""
        header = self._header
        assert header is not None
        size = math.ceil(_BLOCK_SECONDS * header.rate)
        position = max(0, int((lead - _DECODER_LEAD) * header.rate)) // size * size
        layout = {1: "mono", 2: "stereo"}.get(header.channels, f"{header.channels} channels")
        for block in wav.pcm_blocks(self._source, header, position, size):
            frame = av.AudioFrame.from_ndarray(
                block.reshape(1, -1), format="s16" if block.itemsize == 2 else "s32", layout=layout
            )
            frame.sample_rate = header.rate
            yield position, frame
            position += frame.samples

    def _one_channel(self, frame: "av.AudioFrame", seconds: float) -> "av.AudioFrame":
        """Returns the channel that is read, or a frame that FFmpeg can mix to one.

        Args:
            frame: A frame of all channels.
            seconds: Where it begins.
        """
        num_channels = len(frame.layout.channels)
        samples: np.ndarray = frame.to_ndarray()
        is_finite = samples.dtype.kind != "f" or bool(np.isfinite(samples).all())
        if not is_finite:  # FFmpeg would make them the loudest of all.
            samples = np.where(np.isfinite(samples), samples, 0).astype(samples.dtype)
        planes = samples if frame.format.is_planar else samples.reshape(-1, num_channels).T
        if self._channel != MIX:
            index = _channel_index(self._channel)
            if index >= num_channels:
                raise AudioError(
                    Reason.NO_CHANNEL, self._name, f"{self._channel} of {num_channels} channels"
                )
            plane = np.ascontiguousarray(planes[index : index + 1])
            return _frame(plane, frame, layout="mono")
        if num_channels == 1:
            return frame if is_finite else _frame(samples, frame, layout=frame.layout.name)
        self._add_power(planes, frame.sample_rate, seconds)
        # FFmpeg would guess the places of channels without one from their number and, for
        # example, drop the third of three as a subwoofer's.
        if num_channels > 2 and frame.layout.channels[0].name == "NONE":
            mean = planes.mean(axis=0, dtype=np.float64)
            if samples.dtype.kind != "f":
                mean = np.rint(mean)
            return _frame(mean[None].astype(samples.dtype), frame, layout="mono")
        return frame if is_finite else _frame(samples, frame, layout=frame.layout.name)

    def _add_power(self, planes: np.ndarray, rate: int, seconds: float) -> None:
        """Adds the power of channels [C, n] and of their mean to the bin of their place."""
        part = planes[:, ::_POWER_STEP]
        if planes.dtype.kind == "f":
            part = np.clip(part, -_MAX_POWERED, _MAX_POWERED)
        floats = part.astype(np.float32)
        if planes.dtype == np.uint8:
            floats -= 128
        products = (floats @ floats.T).astype(np.float64)  # [C, C]
        powers = np.append(np.diagonal(products), products.mean())
        index = int(seconds / _POWER_BIN)
        self._powers[index] = self._powers.get(index, 0) + powers / rate

    def _note_damage(self, damage: str) -> None:
        self._damage.setdefault(self._position, damage)


def _channel_index(channel: Channel) -> int:
    return channel if isinstance(channel, int) else _NAMED_CHANNELS[channel]


def _at_sample_rate(position: int, rate: int) -> int:
    return round(position * SAMPLE_RATE / rate)


def _shifted(origin: float | None, seconds: float) -> float | None:
    return None if origin is None else origin + seconds


def _check_max_seconds(max_seconds: float | None) -> None:
    if max_seconds is not None and not max_seconds > 0:
        raise ValueError(f"{max_seconds=}; allowed: positive, or None")


def _index(seconds: float) -> int:
    return _ALL if math.isinf(seconds) else round(seconds * SAMPLE_RATE)


def _name(source: Source) -> str:
    return f"<{len(source)} bytes>" if isinstance(source, bytes) else os.fspath(source)


def _check_readable(source: Source, name: str) -> None:
    """Raises what the system, not FFmpeg, objects to in a source."""
    if isinstance(source, bytes):
        if not source:
            raise AudioError(Reason.EMPTY, name)
        return
    path = pathlib.Path(source)
    try:
        status = path.stat()
        # Reading a pipe would wait forever.
        is_file = stat.S_ISREG(status.st_mode)
        if is_file:
            path.open("rb").close()
    except (FileNotFoundError, NotADirectoryError):
        raise AudioError(Reason.MISSING, name) from None
    except (OSError, ValueError) as error:
        raise AudioError(Reason.UNREADABLE, name, _message(error)) from None
    if not is_file:
        raise AudioError(Reason.UNREADABLE, name, "not a file")
    if status.st_size == 0:
        raise AudioError(Reason.EMPTY, name)


def _failures() -> tuple[type[Exception], ...]:
    """Returns what PyAV raises for a file that it cannot use."""
    return (av.error.FFmpegError, OSError, RuntimeError, ValueError)


def _message(error: Exception) -> str:
    """Returns the part of an error's message that does not repeat the name of the file."""
    return getattr(error, "strerror", None) or str(error)


def _resampled(frames: "Iterator[av.AudioFrame]") -> Iterator[np.ndarray]:
    """Yields samples [n] at `SAMPLE_RATE`, mono, of frames that may change their format.

    They are int16, or float32 where they exceed full scale.
    """
    for (format_name, layout, _), alike in itertools.groupby(frames, _format):
        is_float = format_name in ("flt", "fltp", "dbl", "dblp")
        resampler = av.AudioResampler("flt" if is_float else "s16", "mono", SAMPLE_RATE)
        gain = _mix_gain(layout) if is_float else 1.0
        for frame in itertools.chain(alike, [None]):
            for out in resampler.resample(frame):
                if out is None:  # As for the flush of a resampler that has nothing to do.
                    continue
                samples = out.to_ndarray()[0]
                yield _to_int16(samples * gain) if is_float else samples


@functools.cache
def _mix_gain(layout: str) -> np.float32:
    """Returns what makes the weights of a mix in float add up to 1, as FFmpeg's do for integers."""
    channels = av.AudioLayout(layout).nb_channels
    ones = av.AudioFrame.from_ndarray(np.ones((1, channels), np.float32), "flt", layout)
    ones.sample_rate = SAMPLE_RATE
    resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
    (mixed,) = (out for out in resampler.resample(ones) if out is not None)
    return np.float32(1 / max(1.0, float(mixed.to_ndarray()[0, 0])))


def _to_int16(samples: np.ndarray) -> np.ndarray:
    """Returns samples [n] float32 as int16 if they are within full scale, else as they are."""
    return samples if np.abs(samples).max(initial=0.0) > 1 else float_to_int16(samples)[0]


def _format(frame: "av.AudioFrame") -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def _merged(
    frames: "Iterable[tuple[int, av.AudioFrame]]",
) -> "Iterator[tuple[int, av.AudioFrame]]":
    """Yields frames that follow each other as larger ones, which cost less to work on."""
    for (_, layout, rate), alike in itertools.groupby(frames, lambda pair: _format(pair[1])):
        start, size = 0, 0
        blocks: list[np.ndarray] = []
        for position, frame in alike:
            if not blocks:
                if frame.samples >= _BLOCK_SECONDS * rate:
                    yield position, frame
                    continue
                start = position
            blocks.append(frame.to_ndarray())
            size += frame.samples
            if size >= _BLOCK_SECONDS * rate:
                yield start, _frame(np.concatenate(blocks, axis=1), frame, layout)
                blocks, size = [], 0
        if blocks:
            yield start, _frame(np.concatenate(blocks, axis=1), frame, layout)


def _silence(like: "av.AudioFrame", count: int) -> "Iterator[av.AudioFrame]":
    """Yields `count` samples of silence in the format of a frame, a second at a time."""
    num_channels = len(like.layout.channels)
    rows, width = (num_channels, 1) if like.format.is_planar else (1, num_channels)
    dtype = like.to_ndarray().dtype
    while count > 0:
        size = min(count, like.sample_rate)
        level = 128 if dtype == np.uint8 else 0
        yield _frame(np.full((rows, size * width), level, dtype), like, like.layout.name)
        count -= size


def _without(count: int, frames: "Iterator[av.AudioFrame]") -> "Iterator[av.AudioFrame]":
    """Yields frames without their first `count` samples."""
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
