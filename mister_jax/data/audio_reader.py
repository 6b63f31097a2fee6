"""Reads one recording: its clock, holes, damage and channels.

Times are those of a player: seconds from the beginning of the container. Sound that starts later
is preceded by silence, and holes between time stamps are filled with it.
"""

import contextlib
import enum
import io
import itertools
import math
import os
import pathlib
import stat
import unicodedata
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epy

from mister_jax.data import wav
from mister_jax.data.audio_frames import (
    BLOCK_SECONDS,
    SAMPLE_RATE,
    make_frame,
    merged,
    resampled,
    silent_frames,
    without,
)
from mister_jax.errors import InputError

with epy.lazy_imports(error_callback="Recordings need PyAV: pip install av"):
    import av

Source = str | os.PathLike[str] | bytes
"""The path of a file, or the content of one."""

Channel = str | int
"""Channel of a recording: "mix", "left", "right", or an index from 0."""

MIX = "mix"
_NAMED_CHANNELS = {"left": 0, "right": 1}

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
# A mix is canceled if its power is less than this share of the strongest channel's (-26 dB).
_CANCELED_SHARE = 10 ** (-26 / 10)
_POWER_BIN = 0.25  # Seconds over which the power of channels is summed.
_POWER_STEP = 7  # Every seventh sample counts.
_MAX_POWERED = 2.0**31  # Larger floats count as that.


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


def check_channel(channel: Any) -> Channel:
    """Returns a channel as `decode` takes it; an index may be given as text.

    Raises:
        ValueError: It is no channel; the message says what is allowed.
    """
    if isinstance(channel, str) and channel.strip().isdecimal():
        channel = int(channel)
    if channel in (MIX, *_NAMED_CHANNELS):
        return channel
    if isinstance(channel, int) and not isinstance(channel, bool) and channel >= 0:
        return channel
    names = ", ".join((MIX, *_NAMED_CHANNELS))
    raise ValueError(f"{channel!r}; allowed: {names}, or the index of a channel from 0")


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


class AudioReader:
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
        except decoder_failures() as error:
            raise AudioError(Reason.FORMAT, self._name, error_message(error)) from None
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
        for chunk in resampled(without(begin - position, itertools.chain([frame], rest))):
            yield index, chunk
            index += len(chunk)

    def _frames(self, lead: float) -> "Iterator[tuple[int, av.AudioFrame]]":
        """Yields frames of the channel without holes, each with its index at its own rate.

        Args:
            lead: Time in seconds that the frames have to hold, and all after it.
        """
        num_seconds = 0.0
        for position, frame in merged(self._timed_frames(lead)):
            num_seconds = (position + frame.samples) / frame.sample_rate
            yield position, self._one_channel(frame, position / frame.sample_rate)
        self._position = round(num_seconds * SAMPLE_RATE)
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
        filled = 0.0  # Seconds of holes that were filled.
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
                yield from ((0, kept) for kept in without(-gap, iter([frame])))
                position = max(0, gap + frame.samples)
                continue
            if gap > (0 if is_first else _TIME_TOLERANCE * rate):
                self._holes.add(
                    (_at_sample_rate(position, rate), _at_sample_rate(position + gap, rate))
                )
                filled += 0 if is_first else gap / rate
                for silence in silent_frames(frame, gap):
                    yield position, silence
                    position += silence.samples
            elif gap < -_TIME_TOLERANCE * rate and -gap <= filled * rate:
                # Packets after a late one catch up. What comes too late to be played is left out.
                filled -= min(-gap, frame.samples) / rate
                for kept in without(-gap, iter([frame])):
                    yield position, kept
                    position += kept.samples
                continue
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
        except decoder_failures():
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
                self._note_damage(error_message(error))
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
            self._note_damage(error_message(error))
            yield None  # The decoder gives what it still holds.

    def _pcm_frames(self, lead: float) -> "Iterator[tuple[int, av.AudioFrame]]":
        """Yields frames of a WAV file whose samples are integers."""
        header = self._header
        assert header is not None
        size = math.ceil(BLOCK_SECONDS * header.rate)
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
            return make_frame(plane, frame, layout="mono")
        if num_channels == 1:
            return frame if is_finite else make_frame(samples, frame, layout=frame.layout.name)
        self._add_power(planes, frame.sample_rate, seconds)
        # FFmpeg would guess the places of channels without one from their number and, for
        # example, drop the third of three as a subwoofer's.
        if num_channels > 2 and frame.layout.channels[0].name == "NONE":
            mean = planes.mean(axis=0, dtype=np.float64)
            if samples.dtype.kind != "f":
                mean = np.rint(mean)
            return make_frame(mean[None].astype(samples.dtype), frame, layout="mono")
        return frame if is_finite else make_frame(samples, frame, layout=frame.layout.name)

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


def source_name(source: Source) -> str:
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
        raise AudioError(Reason.UNREADABLE, name, error_message(error)) from None
    if not is_file:
        raise AudioError(Reason.UNREADABLE, name, "not a file")
    if status.st_size == 0:
        raise AudioError(Reason.EMPTY, name)


def decoder_failures() -> tuple[type[Exception], ...]:
    """Returns what PyAV raises for a file that it cannot use."""
    return (av.error.FFmpegError, OSError, RuntimeError, ValueError)


def error_message(error: Exception) -> str:
    """Returns the part of an error's message that does not repeat the name of the file."""
    return getattr(error, "strerror", None) or str(error)
