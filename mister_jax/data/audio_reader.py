"""Reads one channel of a recording as a gapless stream of samples.

Times are seconds from the beginning of the container, as media players display them. Silence fills
the time before the first sample and the gaps between timestamps.
"""

import io
import itertools
import math
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from etils import epy

from mister_jax.data import wav
from mister_jax.data.audio_frames import (
    BLOCK_SECONDS,
    SAMPLE_RATE,
    make_frame,
    merge_frames,
    resample,
    silent_frames,
    skip_samples,
)
from mister_jax.data.audio_source import (
    MIX,
    NAMED_CHANNELS,
    AudioError,
    Channel,
    Reason,
    Source,
    check_readable,
    error_message,
    existing_path,
    source_name,
)

with epy.lazy_imports(error_callback="Recordings need PyAV: pip install av"):
    import av

# Formats whose timestamps are sample-accurate, even after seeking. Other formats round timestamps
# (Matroska) or estimate timestamps (MP3 with a variable bit rate), so recordings in other formats
# are read from the beginning.
_SEEKABLE = ("wav", "flac", "mov,mp4,m4a,3gp,3g2,mj2")

# Decoding and resampling begin this many seconds before a segment. A decoder's output depends on
# some earlier frames, and the resampler's filter is a few ms long.
_DECODER_LEAD, _RESAMPLER_LEAD = 1.0, 0.1

# Differences of up to this many seconds between a timestamp and the decoded duration are ignored as
# rounding or drift. Matroska rounds to 1 ms, and packets of common codecs last 20 to 64 ms.
_TIME_TOLERANCE = 0.05
# A timestamp that jumps by more than this many seconds indicates a clock reset, as in
# concatenated recordings.
_MAX_GAP = 3600.0
# Distance between two segments, in seconds, above which seeking is faster than decoding.
_MIN_SEEK_SECONDS = 10.0
# Channels cancel out if the power of their mix is over 26 dB below that of the strongest channel.
_CANCELED_RATIO = 10 ** (-26 / 10)
_POWER_BIN = 0.25  # seconds over which the power of channels is summed
_POWER_STRIDE = 7  # power is measured on every seventh sample
_MAX_POWER_SAMPLE = 2.0**31  # larger floats are clipped before the power is computed


class AudioReader:
    """Reads one channel of an open recording.

    The methods take and return sample indices at `SAMPLE_RATE`, whatever the recording's rate.

    Raises:
        AudioError: The recording cannot be read or has no audio.
    """

    def __init__(self, source: Source, channel: Channel) -> None:
        self._name = source_name(source)
        self._source = source if isinstance(source, bytes) else existing_path(source)
        self._channel = channel
        # Maps the sample index of each damaged place to a message.
        self._damage: dict[int, str] = {}
        self._gaps: set[tuple[int, int]] = set()
        self._clock_resets: list[str] = []
        # Maps the index of each bin of `_POWER_BIN` seconds to sums of squares [C + 1]: one per
        # channel, and one for the mean of the channels.
        self._powers: dict[int, np.ndarray] = {}
        # Start of the latest frame, in samples at `SAMPLE_RATE`. After the last frame, this is the
        # end of that frame.
        self._position = 0
        check_readable(self._source, self._name)
        self._header = wav.read_header(self._source)
        self._container: Any = None
        if self._header is None or not self._header.is_pcm:
            self._open()

    def _open(self) -> None:
        self.close()
        try:
            self._container = av.open(
                io.BytesIO(self._source)
                if isinstance(self._source, bytes)
                else f"file:{os.fspath(self._source)}",
                mode="r",
                # A playlist must not make FFmpeg use the network.
                container_options={"protocol_whitelist": "file"},
                # Tags in another encoding must not make a recording unusable.
                metadata_errors="replace",
            )
        except decoder_errors() as error:
            raise AudioError(Reason.FORMAT, self._name, error_message(error)) from None
        stream = self._container.streams.best("audio")
        if stream is None or stream.codec_context is None:
            self.close()
            raise AudioError(Reason.NO_AUDIO, self._name)
        for other in self._container.streams:
            if other.index != stream.index:
                other.discard = av.stream.Discard.all
        # Parallel processes decode recordings, so each decoder uses a single thread.
        stream.codec_context.thread_count = 1
        self._stream: Any = stream  # The type that PyAV declares has no `decode`.

    def close(self) -> None:
        """Closes the file."""
        if self._container is not None:
            self._container.close()

    @property
    def container_seconds(self) -> float | None:
        """Length of the recording according to its container, which may be an estimate."""
        if self._container is None:
            assert self._header is not None
            return self._header.seconds
        duration = self._container.duration
        return None if duration is None else duration / av.time_base

    @property
    def missing_seconds(self) -> float:
        """Seconds of audio that a truncated WAV file lacks, according to its header."""
        return 0.0 if self._header is None else self._header.missing_seconds

    @property
    def num_channels(self) -> int:
        """Number of channels of the recording."""
        if self._container is None:
            assert self._header is not None
            return self._header.channels
        return self._stream.codec_context.channels

    def should_seek(self, current: int, target: int) -> bool:
        """Returns whether seeking from one index to another is faster than decoding."""
        is_seekable = self._container is None or self._container.format.name in _SEEKABLE
        return is_seekable and target - current > _MIN_SEEK_SECONDS * SAMPLE_RATE

    def damage(self, first: int, stop: int) -> str:
        """Returns the message about the first damage in an interval, or an empty string."""
        messages = (text for index, text in self._damage.items() if first <= index <= stop)
        return next(messages, "")

    def notes(self, first: int, stop: int) -> list[str]:
        """Returns notes for the user about an interval, such as "2.0 s missing"."""
        gaps = [(begin, min(end, stop) - max(begin, first)) for begin, end in self._gaps]
        late = sum(max(0, size) for begin, size in gaps if begin == 0)
        missing = sum(max(0, size) for begin, size in gaps if begin > 0)
        notes = list(self._clock_resets)
        if late >= 0.1 * SAMPLE_RATE:
            notes.append(f"audio starts {late / SAMPLE_RATE:.1f} s late")
        if missing >= 0.1 * SAMPLE_RATE:
            notes.append(f"{missing / SAMPLE_RATE:.1f} s missing")
        return notes

    def canceled_by(self, first: int, stop: int) -> int | None:
        """Returns the strongest channel if channels cancel out in an interval, else None."""
        first_bin, last_bin = (
            int(index / SAMPLE_RATE / _POWER_BIN) for index in (first, max(first, stop - 1))
        )
        # A recording may have thousands of segments and bins, so only this segment's bins are read.
        bins: Iterable[int] = range(first_bin, last_bin + 1)
        if last_bin - first_bin >= len(self._powers):
            bins = (index for index in self._powers if first_bin <= index <= last_bin)
        powers = [self._powers[index] for index in bins if index in self._powers]
        if not powers:
            return None
        *channels, mix = np.sum(powers, axis=0)
        strongest = int(np.argmax(channels))
        return strongest if mix < _CANCELED_RATIO * channels[strongest] else None

    def chunks(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yields consecutive chunks of samples, starting at index `first` or earlier.

        Yields:
            The index of the chunk's first sample, and the chunk [n]. The chunk is int16, or float32
            if its samples exceed full scale.
        """
        lead = max(0.0, first / SAMPLE_RATE - _RESAMPLER_LEAD)
        frames = self._frames(lead)
        position, frame = next(frames, (0, None))
        if frame is None:
            return
        # Resampling begins where an input sample and an output sample coincide, so that the result
        # equals the same part of the fully resampled recording.
        rate = frame.sample_rate
        common = rate // math.gcd(rate, SAMPLE_RATE)
        begin = common * max(int(lead * rate) // common, -(-position // common))
        index = begin // common * (SAMPLE_RATE * common // rate)
        rest = (later for _, later in frames)
        for chunk in resample(skip_samples(begin - position, itertools.chain([frame], rest))):
            yield index, chunk
            index += len(chunk)

    def _frames(self, lead: float) -> "Iterator[tuple[int, av.AudioFrame]]":
        """Yields gapless frames of the channel, starting at `lead` seconds or earlier.

        Each frame is paired with its position, in samples at the frame's sample rate.
        """
        num_seconds = 0.0
        for position, frame in merge_frames(self._timed_frames(lead)):
            num_seconds = (position + frame.samples) / frame.sample_rate
            yield position, self._one_channel(frame, position / frame.sample_rate)
        self._position = round(num_seconds * SAMPLE_RATE)
        # FFmpeg skips damaged FLAC frames without an error, but timestamps reveal the gaps.
        if self._container is not None and self._container.format.name == "flac":
            missing = sum(end - begin for begin, end in self._gaps) / SAMPLE_RATE
            if self._stream.duration:
                header_seconds = float(self._stream.duration * self._stream.time_base)
                missing += max(0.0, header_seconds - num_seconds)
            if missing > 0.1:
                self._note_damage(f"{missing:.1f} s are missing")
        elif self._header is not None and self._header.missing_seconds > 0.1:
            self._note_damage(f"{self._header.missing_seconds:.1f} s are missing at its end")

    def _timed_frames(self, lead: float) -> "Iterator[tuple[int, av.AudioFrame]]":
        """Yields decoded frames at the times given by their timestamps; silence fills gaps."""
        if self._container is None:
            yield from self._pcm_frames(lead)
            return
        origin = self._origin()
        did_seek = self._seek(origin, lead - _DECODER_LEAD)
        if did_seek and origin is None:
            origin = self._stream_start()
        position: int | None = None  # expected position of the next frame
        rate = 0
        filled = 0.0  # seconds of gaps that were filled
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
            if did_seek and position is None:
                if time is None:
                    raise AudioError(Reason.DAMAGED, self._name, "no time stamps")
                if time > lead:
                    # A gap or a coarse seek index led past the target, so decode from the start.
                    self._open()
                    yield from self._timed_frames(0.0)
                    return
                position = round(time * rate)
            is_first = position is None
            position = position or 0
            gap = 0 if time is None else round(time * rate) - position
            if abs(gap) > _MAX_GAP * rate:
                self._clock_resets.append(
                    f"time stamps jump by {gap / rate:.0f} s, which is ignored"
                )
                origin, gap = (origin or 0.0) + gap / rate, 0
            if is_first and gap < 0:
                # Like players, skip audio before the origin, such as the codec's priming samples.
                yield from ((0, rest) for rest in skip_samples(-gap, iter([frame])))
                position = max(0, gap + frame.samples)
                continue
            if gap > (0 if is_first else _TIME_TOLERANCE * rate):
                self._gaps.add(
                    (_at_sample_rate(position, rate), _at_sample_rate(position + gap, rate))
                )
                filled += 0 if is_first else gap / rate
                for silence in silent_frames(frame, gap):
                    yield position, silence
                    position += silence.samples
            elif gap < -_TIME_TOLERANCE * rate and -gap <= filled * rate:
                # The timestamps jump back, for example after a late packet. Silence already fills
                # the time of this audio, so the audio is dropped.
                filled -= min(-gap, frame.samples) / rate
                for rest in skip_samples(-gap, iter([frame])):
                    yield position, rest
                    position += rest.samples
                continue
            elif gap < -_TIME_TOLERANCE * rate:
                origin = (origin or 0.0) + gap / rate
            self._position = _at_sample_rate(position, rate)
            yield position, frame
            position += frame.samples

    def _origin(self) -> float | None:
        """Returns the container's start time, or None if the first frame defines the start."""
        has_other_streams = any(
            stream.type in ("audio", "video")
            and stream.index != self._stream.index
            and not stream.disposition & av.stream.Disposition.attached_pic
            for stream in self._container.streams
        )
        # Without another stream, the first frame defines the start, because the container's start
        # time may differ from the first frame's time by the codec's priming samples.
        if has_other_streams and self._container.start_time is not None:
            return max(0.0, self._container.start_time / av.time_base)
        return None

    def _seek(self, origin: float | None, seconds: float) -> bool:
        """Seeks to the given time or slightly earlier, and returns whether seeking succeeded."""
        if seconds <= 0 or self._container.format.name not in _SEEKABLE:
            return False
        start = self._stream_start() if origin is None else origin
        target = int((start + seconds) / self._stream.time_base)
        try:
            self._container.seek(target, stream=self._stream)
        except decoder_errors():
            self._open()
            return False
        return True

    def _stream_start(self) -> float:
        return float((self._stream.start_time or 0) * self._stream.time_base)

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
                # If a WAV file is truncated, `_frames` reports how much audio is missing.
                if packet.is_corrupt and self._header is None:
                    self._note_damage("the file breaks off")
                yield packet
        except av.error.FFmpegError as error:
            self._note_damage(error_message(error))
            yield None  # flushes the decoder

    def _pcm_frames(self, lead: float) -> "Iterator[tuple[int, av.AudioFrame]]":
        """Yields frames of a WAV file with integer samples; see `wav.pcm_blocks`."""
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
        """Returns the frame's selected channel or, for a mix, a frame that FFmpeg can mix."""
        num_channels = len(frame.layout.channels)
        samples: np.ndarray = frame.to_ndarray()
        if samples.dtype.kind == "f" and not np.isfinite(samples).all():
            # FFmpeg would convert NaN and infinity to full-scale samples.
            samples = np.where(np.isfinite(samples), samples, 0).astype(samples.dtype)
            frame = make_frame(samples, frame, layout=frame.layout.name)
        planes = samples if frame.format.is_planar else samples.reshape(-1, num_channels).T
        if self._channel != MIX:
            index = int(NAMED_CHANNELS.get(str(self._channel), self._channel))
            if index >= num_channels:
                raise AudioError(
                    Reason.NO_CHANNEL, self._name, f"{self._channel} of {num_channels} channels"
                )
            return make_frame(np.ascontiguousarray(planes[[index]]), frame, layout="mono")
        if num_channels == 1:
            return frame
        self._add_power(planes, frame.sample_rate, seconds)
        # For channels without a position, FFmpeg would guess a layout from the number of channels.
        # For example, FFmpeg would drop the third of three channels, as if it were a subwoofer.
        if num_channels > 2 and frame.layout.channels[0].name == "NONE":
            mean = planes.mean(axis=0, dtype=np.float64)
            if samples.dtype.kind != "f":
                mean = np.rint(mean)
            return make_frame(mean[None].astype(samples.dtype), frame, layout="mono")
        return frame

    def _add_power(self, planes: np.ndarray, rate: int, seconds: float) -> None:
        """Adds the power of channels [C, n] and of their mean to the bin at `seconds`."""
        strided = planes[:, ::_POWER_STRIDE]
        if planes.dtype.kind == "f":
            strided = np.clip(strided, -_MAX_POWER_SAMPLE, _MAX_POWER_SAMPLE)
        floats = strided.astype(np.float32)
        if planes.dtype == np.uint8:
            floats -= 128
        products = (floats @ floats.T).astype(np.float64)  # [C, C]
        powers = np.append(np.diagonal(products), products.mean())
        index = int(seconds / _POWER_BIN)
        self._powers[index] = self._powers.get(index, 0) + powers / rate

    def _note_damage(self, damage: str) -> None:
        self._damage.setdefault(self._position, damage)


def _at_sample_rate(position: int, rate: int) -> int:
    return round(position * SAMPLE_RATE / rate)


def decoder_errors() -> tuple[type[Exception], ...]:
    """Returns the exceptions that PyAV raises for unusable files."""
    return (av.error.FFmpegError, OSError, RuntimeError, ValueError)
