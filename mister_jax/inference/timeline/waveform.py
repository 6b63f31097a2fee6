"""Prepares the audio of a recording for the web page: its waveform, and a small MP3 file."""

from __future__ import annotations

import base64
import dataclasses
import io
import os
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epy

from mister_jax.data.audio import stream_blocks
from mister_jax.data.audio_frames import SAMPLE_RATE
from mister_jax.data.audio_source import MIX, Channel

with epy.lazy_imports(error_callback="Recordings need PyAV: pip install av"):
    import av

_BIN_SAMPLES = SAMPLE_RATE // 100
_MAX_BINS = 100_000  # 270 KB as base64


@dataclasses.dataclass(frozen=True)
class Waveform:
    """The lowest and the highest sample in each bin of a recording.

    Attributes:
      low: Minima [N] int8, where 127 is the highest absolute value of the recording.
      high: Maxima [N] int8.
      bin_seconds: Length of a bin in seconds.
    """

    low: np.ndarray
    high: np.ndarray
    bin_seconds: float

    def to_base64(self) -> str:
        """Returns all minima followed by all maxima, as base64."""
        return base64.b64encode(self.low.tobytes() + self.high.tobytes()).decode()


def waveform_peaks(
    recording: str | os.PathLike[str],
    channel: Channel = MIX,
    *,
    max_bins: int = _MAX_BINS,
    mp3: Mp3Encoder | None = None,
) -> Waveform:
    """Decodes a recording in blocks and returns its waveform.

    Each block is reduced to bins of 10 ms, so the recording's samples are never all in memory.

    Args:
      recording: Audio or video file that FFmpeg reads.
      channel: Channel to read.
      max_bins: Maximum number of bins; longer recordings have longer bins.
      mp3: Encoder that receives the decoded samples.

    Raises:
      AudioError: The recording cannot be read.
    """
    lows, highs = [np.zeros(0, np.int16)], [np.zeros(0, np.int16)]
    for samples in _blocks(recording, channel):
        starts = np.arange(0, len(samples), _BIN_SAMPLES)
        lows.append(np.minimum.reduceat(samples, starts))
        highs.append(np.maximum.reduceat(samples, starts))
        if mp3 is not None:
            mp3.add(samples)
    low, high = np.concatenate(lows), np.concatenate(highs)
    factor = max(1, -(-len(low) // max_bins))
    starts = np.arange(0, len(low), factor)
    if len(low):
        low, high = np.minimum.reduceat(low, starts), np.maximum.reduceat(high, starts)
    peak = max(1, -int(low.min()), int(high.max())) if len(low) else 1
    low, high = (np.rint(it * (127 / peak)).astype(np.int8) for it in (low, high))
    return Waveform(low, high, factor * _BIN_SAMPLES / SAMPLE_RATE)


def _blocks(recording: str | os.PathLike[str], channel: Channel) -> Iterator[np.ndarray]:
    # A block of 30 s contains a whole number of bins, so no bin spans two blocks.
    return (block.samples for block in stream_blocks(recording, channel) if len(block.samples))


class Mp3Encoder:
    """Encodes mono speech at `SAMPLE_RATE` to MP3, which every browser plays.

    The bit rate is constant, so browsers can seek exactly.
    """

    def __init__(self, bit_rate: int = 32_000) -> None:
        self._file = io.BytesIO()
        self._container = av.open(self._file, "w", format="mp3")
        self._stream = self._container.add_stream("libmp3lame", rate=SAMPLE_RATE)
        self._stream.bit_rate = bit_rate
        self._stream.codec_context.layout = "mono"
        self._position = 0

    def add(self, samples: np.ndarray) -> None:
        """Appends samples [N] int16."""
        frame = av.AudioFrame.from_ndarray(samples.reshape(1, -1), format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = self._position
        self._position += len(samples)
        self._mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """Returns the MP3 file."""
        self._mux(self._stream.encode(None))
        self._container.close()
        return self._file.getvalue()

    def _mux(self, packets: Iterable[av.Packet]) -> None:
        for packet in packets:
            self._container.mux(packet)
