"""Operations on decoded audio frames: merging, silence, resampling, mixing and scaling."""

import functools
import itertools
import math
from collections.abc import Iterable, Iterator

import numpy as np
from etils import epy

with epy.lazy_imports(error_callback="Recordings need PyAV: pip install av"):
    import av

SAMPLE_RATE = 16_000

# Peaks relative to a full scale of 1. Lossy codecs can exceed full scale by up to 1 dB, and this
# excess is clipped. Float recordings may exceed full scale by about 10 dB. A peak above +40 dB
# means that the samples have a different full scale.
_CLIPPED_PEAK, MAX_PEAK = 10 ** (1 / 20), 100.0
FULL_SCALE = 2**15

BLOCK_SECONDS = 0.25  # minimum length in seconds of all merged frames except the last


def float_to_int16(samples: np.ndarray) -> tuple[np.ndarray, str]:
    """Converts float samples, whose full scale is 1, to int16.

    Peaks up to 1 dB over full scale are clipped. If the peak is higher, all samples are scaled down
    so that the peak is at full scale.

    Returns:
        The samples [N], and a note on the scaling. The note is empty if no scaling was needed.

    Raises:
        ValueError: Samples are not finite, or too large for a full scale of 1.
    """
    peak = float(np.abs(samples).max(initial=0.0))
    if not math.isfinite(peak):
        raise ValueError("samples are not finite; allowed: -1 to 1")
    if peak > MAX_PEAK:
        raise ValueError(
            f"float samples of up to {peak:g}; allowed: full scale 1 (divide int16 "
            "values by 32768, or pass them as int16)"
        )
    scale, note = 1.0, ""
    if peak > _CLIPPED_PEAK:
        scale = 1 / peak
        decibels = 20 * math.log10(peak)
        note = f"scaled by {scale:.2f}: its peak is {decibels:.1f} dB over full scale"
    scaled = np.rint(samples * (scale * FULL_SCALE))
    return np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1).astype(np.int16), note


def resample(frames: "Iterator[av.AudioFrame]") -> Iterator[np.ndarray]:
    """Resamples frames, whose formats may differ, to `SAMPLE_RATE` and mixes their channels.

    Yields:
        Samples [n]: int16, or float32 if the samples exceed full scale.
    """
    for (format_name, layout, _), group in itertools.groupby(frames, _format):
        is_float = format_name in ("flt", "fltp", "dbl", "dblp")
        resampler = av.AudioResampler("flt" if is_float else "s16", "mono", SAMPLE_RATE)
        gain = _mix_gain(layout) if is_float else 1.0
        for frame in itertools.chain(group, [None]):
            for out in resampler.resample(frame):
                samples = out.to_ndarray()[0]
                if is_float:
                    samples = samples * gain
                    if np.abs(samples).max(initial=0.0) <= 1:
                        samples, _ = float_to_int16(samples)
                yield samples


@functools.cache
def _mix_gain(layout: str) -> np.float32:
    """Returns the factor that scales FFmpeg's mixing weights for floats to a sum of at most 1."""
    channels = av.AudioLayout(layout).nb_channels
    ones = av.AudioFrame.from_ndarray(np.ones((1, channels), np.float32), "flt", layout)
    ones.sample_rate = SAMPLE_RATE
    resampler = av.AudioResampler("flt", "mono", SAMPLE_RATE)
    (mixed,) = resampler.resample(ones)
    return np.float32(1 / max(1.0, float(mixed.to_ndarray()[0, 0])))


def _format(frame: "av.AudioFrame") -> tuple[str, str, int]:
    return frame.format.name, frame.layout.name, frame.sample_rate


def merge_frames(
    frames: "Iterable[tuple[int, av.AudioFrame]]",
) -> "Iterator[tuple[int, av.AudioFrame]]":
    """Merges consecutive frames into blocks of `BLOCK_SECONDS`, which are faster to process."""
    for (_, layout, rate), group in itertools.groupby(frames, lambda pair: _format(pair[1])):
        start, size = 0, 0
        blocks: list[np.ndarray] = []
        for position, frame in group:
            if not blocks:
                if frame.samples >= BLOCK_SECONDS * rate:
                    yield position, frame
                    continue
                start = position
            blocks.append(frame.to_ndarray())
            size += frame.samples
            if size >= BLOCK_SECONDS * rate:
                yield start, make_frame(np.concatenate(blocks, axis=1), frame, layout)
                blocks, size = [], 0
        if blocks:
            yield start, make_frame(np.concatenate(blocks, axis=1), frame, layout)


def silent_frames(like: "av.AudioFrame", count: int) -> "Iterator[av.AudioFrame]":
    """Yields `count` samples of silence as frames of up to one second, in the format of `like`."""
    num_channels = len(like.layout.channels)
    rows, interleaved = (num_channels, 1) if like.format.is_planar else (1, num_channels)
    dtype = like.to_ndarray().dtype
    while count > 0:
        size = min(count, like.sample_rate)
        level = 128 if dtype == np.uint8 else 0
        yield make_frame(np.full((rows, size * interleaved), level, dtype), like, like.layout.name)
        count -= size


def skip_samples(count: int, frames: "Iterator[av.AudioFrame]") -> "Iterator[av.AudioFrame]":
    """Drops the first `count` samples of a sequence of frames, and yields the rest."""
    for frame in frames:
        num_samples = frame.samples
        if count and count < num_samples:
            interleaved = 1 if frame.format.is_planar else len(frame.layout.channels)
            samples = np.ascontiguousarray(frame.to_ndarray()[:, count * interleaved :])
            frame = make_frame(samples, frame, layout=frame.layout.name)
        if count < num_samples:
            yield frame
        count = max(0, count - num_samples)


def make_frame(samples: np.ndarray, like: "av.AudioFrame", layout: str) -> "av.AudioFrame":
    """Makes a frame from samples, with the format and rate of another frame."""
    frame = av.AudioFrame.from_ndarray(samples, format=like.format.name, layout=layout)
    frame.sample_rate = like.sample_rate
    return frame
