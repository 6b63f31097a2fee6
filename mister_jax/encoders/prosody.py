"""Prosody: a speech encoder without weights, which gives one vector of named features a clip.

It tells how something was said: pitch, loudness, voice quality, rhythm. Nothing is learned or
downloaded. Frames are centred every 10 ms; a frame is *sounding* if it is at most 40 dB below the
clip's loudest, and *voiced* if it is periodic, too. The features, in the order of `FEATURE_NAMES`:

- `pitch_*` over voiced frames, octaves above 55 Hz (YIN, 55 to 500 Hz), and `energy_*` over
  sounding frames, log10 of the mean square above 1e-10 of full scale (a step of 1 is 10 dB; 0 for
  digital silence): `mean`, `deviation`, percentiles `p10`, `p50`, `p90`, their `range`, `slope` (a
  second), `rise` (mean of the last third of the frames less that of the first), `change` (mean
  absolute step to the next frame); and `energy_maximum`.
- Over sounding frames, `mean`, `deviation` and `change` of: `periodicity` (0 noise, 1 periodic),
  `zero_crossings` (a sample), `centroid`, `spread` and `rolloff` (85 %) of the power spectrum
  (octaves above 1 kHz), `flatness` (log10 of geometric by arithmetic mean), `tilt` (slope of the
  Mel spectrum, log10 an octave), `alpha` (log10 of power below by power above 1 kHz), `hammarberg`
  (log10 of the largest peak below by that above 2 kHz), `mfcc_1` to `mfcc_13`.
- `flux_mean`, `flux_deviation`: distance of a frame's spectrum from the next one's, 0 to sqrt 2.
- `duration` (log10 of seconds), `sounding` and `voiced` (parts of all frames), `voiced_rate`
  (stretches a second), `voiced_length` (mean, seconds), `pause_rate` and `pause_length` (stretches
  that are not sounding, between others), `peak_rate` (of loudness, a second, about a syllable's).

All but `energy_mean`, `energy_p10`, `energy_p50`, `energy_p90` and `energy_maximum` stay when the
recording is louder or softer. Shape letters: B clips, S samples, F frames, P features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mister_jax.encoders import frontends
from mister_jax.nn.masking import length_mask

_CONTOUR = ("mean", "deviation", "p10", "p50", "p90", "range", "slope", "rise", "change")
_SPREAD = ("mean", "deviation", "change")
_NUM_MFCC = 13
_SPECTRAL = (
    "periodicity",
    "zero_crossings",
    "centroid",
    "spread",
    "rolloff",
    "flatness",
    "tilt",
    "alpha",
    "hammarberg",
    *(f"mfcc_{index}" for index in range(1, _NUM_MFCC + 1)),
)
FEATURE_NAMES: tuple[str, ...] = (
    *(f"pitch_{statistic}" for statistic in _CONTOUR),
    *(f"energy_{statistic}" for statistic in _CONTOUR),
    "energy_maximum",
    *(f"{name}_{statistic}" for name in _SPECTRAL for statistic in _SPREAD),
    "flux_mean",
    "flux_deviation",
    "duration",
    "sounding",
    "voiced",
    "voiced_rate",
    "voiced_length",
    "pause_rate",
    "pause_length",
    "peak_rate",
)

_FRAME_RATE = frontends.SAMPLE_RATE / frontends.FRAME_STEP
_LOWEST_PITCH, _HIGHEST_PITCH = 55.0, 500.0
_MIN_LAG = int(frontends.SAMPLE_RATE / _HIGHEST_PITCH)
_MAX_LAG = int(frontends.SAMPLE_RATE / _LOWEST_PITCH)
_PITCH_FRAME = 800  # samples
_NUM_LAGS = 300
_DIP = 0.15  # the first lag whose difference dips below this is the period
_VOICED = 0.35  # largest difference of a voiced frame
_SOUNDING = 4.0  # log10 of power below the loudest frame
_ENERGY_ZERO = 1e-10  # of full scale
_LOWEST_PEAK = 1e-5  # of full scale; softer clips count as that loud
_NUM_MEL_BINS = 40
_PEAK_SIDE = 6  # frames to either side that a peak of loudness exceeds
_PEAK_HEIGHT = 0.2  # log10 of power that it rises above the lowest of them


@jax.jit
def prosody(waveform: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Prosodic features of clips.

    Args:
      waveform: mono at 16 kHz, full scale 1 [B, S]; what is behind a clip is not read.
      lengths: samples of each clip [B] int.

    Returns:
      features [B, P] float32 in the order of `FEATURE_NAMES`, finite for every finite clip and 0
      where nothing is there to measure; and true for clips with at least one sample [B] bool.
    """
    lengths = jnp.minimum(lengths, waveform.shape[1])
    x, peak = _prepared(waveform, lengths)
    num_frames = max(1, -(-x.shape[1] // frontends.FRAME_STEP))
    valid = length_mask(frontends.log_mel_lengths(lengths), num_frames)  # B F

    framed = _centred_frames(x, frontends.FRAME_SIZE, num_frames)  # B F 400
    power = (framed**2).mean(-1)
    largest = jnp.where(valid, power, 0).max(1, keepdims=True)
    sounding = valid & (power > 10**-_SOUNDING * largest)
    level = 2 * jnp.log10(jnp.maximum(peak, _LOWEST_PEAK)) - np.log10(_ENERGY_ZERO)
    energy = jnp.log10(jnp.maximum(power, 1e-30)) + level

    pitch, difference = _pitch(x, lengths, num_frames)
    voiced = sounding & (difference < _VOICED)
    spectral, roots = _spectral(framed)
    spectral["periodicity"] = jnp.clip(1 - difference, 0, 1)

    contours = _contours(
        jnp.stack([pitch, energy], axis=-1), jnp.stack([voiced, sounding], axis=-1)
    )
    features = {f"pitch_{name}": value[:, 0] for name, value in contours.items()}
    features |= {f"energy_{name}": value[:, 1] for name, value in contours.items()}
    features["energy_maximum"] = jnp.where(sounding, energy, 0).max(1)
    stacked = jnp.stack([spectral[name] for name in _SPECTRAL], axis=-1)  # B F names
    statistics = (*_moments(stacked, sounding[..., None]), _change(stacked, sounding[..., None]))
    for statistic, values in zip(_SPREAD, statistics, strict=True):
        features |= {f"{name}_{statistic}": values[:, i] for i, name in enumerate(_SPECTRAL)}
    flux = jnp.sqrt((jnp.diff(roots, axis=1) ** 2).sum(-1) + 1e-12)
    features["flux_mean"], features["flux_deviation"] = _moments(
        flux, sounding[:, 1:] & sounding[:, :-1]
    )
    features |= _rhythm(energy, valid, sounding, voiced, lengths)
    present = lengths > 0
    vector = jnp.stack([features[name] for name in FEATURE_NAMES], axis=-1)
    return jnp.where(present[:, None], vector, 0), present


def _prepared(waveform: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Clips without their mean, at least a sample long, largest value 1; what it was, [B, 1]."""
    waveform = jnp.pad(waveform, ((0, 0), (0, max(0, 1 - waveform.shape[1]))))
    mask = length_mask(lengths, waveform.shape[1])

    def level(x: jax.Array) -> jax.Array:
        largest = jnp.abs(x).max(1, keepdims=True)
        return jnp.where(largest > np.finfo(np.float32).tiny, largest, 1)

    x = jnp.where(mask, waveform, 0).astype(jnp.float32)
    # Scaled before it is summed: neither overflows then.
    first = level(x)
    x = x / first
    mean = x.sum(1, keepdims=True) / jnp.maximum(lengths, 1)[:, None]
    x = jnp.where(mask, x - mean, 0)
    # What rounding leaves of a constant is silence.
    x = jnp.where(jnp.abs(x).max(1, keepdims=True) > 1e-6, x, 0)
    second = level(x)
    return x / second, first * second


def _centred_frames(x: jax.Array, size: int, count: int) -> jax.Array:
    """Frames [B, F, size] about every 160th sample from the first on, zeros beyond the ends."""
    return frontends.frames(jnp.pad(x, ((0, 0), (size // 2, 0))), size, frontends.FRAME_STEP, count)


def _low_pass(x: jax.Array) -> jax.Array:
    """x [B, S] below 1.5 kHz, where lags are long enough to compare sample by sample."""
    time = np.arange(-32, 33)
    taps = np.sinc(time * 3000 / frontends.SAMPLE_RATE) * np.hanning(67)[1:-1]
    taps = (taps / taps.sum()).astype(np.float32)
    filtered = jax.lax.conv_general_dilated(
        x[:, None],
        jnp.asarray(taps)[None, None],
        (1,),
        [(32, 32)],
        precision=jax.lax.Precision.HIGHEST,
    )
    return filtered[:, 0]


def _pitch(x: jax.Array, lengths: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Pitch by YIN (de Cheveigne and Kawahara, JASA 111, 2002), octaves above 55 Hz, [B, F].

    Also the normalised difference at the period [B, F]: 0 is periodic, 1 is noise or nothing.
    """
    x = jnp.where(length_mask(lengths, x.shape[1]), _low_pass(x), 0)
    framed = _centred_frames(x, _PITCH_FRAME, count)  # B F 800
    window = _PITCH_FRAME - _NUM_LAGS
    # The window at the largest lag ends with the frame, so nothing wraps around.
    start = jnp.where(np.arange(_PITCH_FRAME) < window, framed, 0)
    spectrum = jnp.conj(jnp.fft.rfft(start)) * jnp.fft.rfft(framed)
    product = jnp.fft.irfft(spectrum, _PITCH_FRAME)[..., :_NUM_LAGS]
    running = jnp.pad(jnp.cumsum(framed**2, axis=-1), ((0, 0), (0, 0), (1, 0)))
    energy = running[..., window : window + _NUM_LAGS] - running[..., :_NUM_LAGS]
    difference = jnp.maximum(energy[..., :1] + energy - 2 * product, 0)[..., 1:]  # lags 1 ... 299
    total = jnp.cumsum(difference, axis=-1)
    lag = np.arange(1, _NUM_LAGS, dtype=np.float32)
    # Rounding alone, of frames with next to nothing in them, is no period.
    present = total > 1e-6 * running[..., -1:] + 1e-20
    normal = jnp.where(present, difference * lag / jnp.where(present, total, 1), 1)

    before, here, after = normal[..., :-2], normal[..., 1:-1], normal[..., 2:]  # lags 2 ... 298
    lag = lag[1:-1]
    allowed = (lag >= _MIN_LAG) & (lag <= _MAX_LAG)
    dips = allowed & (here < _DIP) & (here <= before) & (here <= after)
    lowest = jnp.argmin(jnp.where(allowed, here, jnp.inf), axis=-1)
    chosen = jnp.where(dips.any(-1), jnp.argmax(dips, axis=-1), lowest)[..., None]

    def at(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, chosen, axis=-1)[..., 0]

    left, middle, right = at(before), at(here), at(after)
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / jnp.where(curvature > 1e-9, curvature, 1)
    shift = jnp.where(curvature > 1e-9, jnp.clip(shift, -1, 1), 0)
    period = jnp.asarray(lag)[chosen[..., 0]] + shift
    return jnp.log2(frontends.SAMPLE_RATE / period / _LOWEST_PITCH), middle


def _spectral(framed: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Features of each frame's spectrum [B, F] by name, and roots of its parts of power."""
    hann = np.hanning(frontends.FRAME_SIZE + 1)[:-1].astype(np.float32)
    spectrum = jnp.fft.rfft(framed * hann)  # B F 201
    power = spectrum.real**2 + spectrum.imag**2
    # Far below any sounding frame, so it decides nothing but what an empty one gives.
    power = power + 1e-8
    parts = power / power.sum(-1, keepdims=True)
    frequency = np.linspace(0, frontends.SAMPLE_RATE / 2, power.shape[-1]).astype(np.float32)

    def octaves(hertz: jax.Array) -> jax.Array:
        return jnp.log2(jnp.maximum(hertz, 40) / 1000)

    def log_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
        return jnp.log10(numerator) - jnp.log10(denominator)

    def band(low: float, high: float) -> jax.Array:
        return power[..., (frequency >= low) & (frequency < high)]

    centroid = (parts * frequency).sum(-1)
    variance = (parts * (frequency - centroid[..., None]) ** 2).sum(-1)
    filters = frontends.slaney_filters(_NUM_MEL_BINS)
    mel = jnp.log10(jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST))  # B F M
    centre = np.log2(frequency @ filters / filters.sum(0))
    centre = centre - centre.mean()
    index = np.arange(_NUM_MEL_BINS)
    cosines = np.cos(np.pi / _NUM_MEL_BINS * np.outer(index + 0.5, np.arange(1, _NUM_MFCC + 1)))
    cosines = (cosines * np.sqrt(2 / _NUM_MEL_BINS)).astype(np.float32)
    mfcc = jnp.matmul(mel, cosines, precision=jax.lax.Precision.HIGHEST)
    signs = framed >= 0
    features = {
        "zero_crossings": (signs[..., 1:] != signs[..., :-1]).astype(jnp.float32).mean(-1),
        "centroid": octaves(centroid),
        "spread": octaves(jnp.sqrt(variance)),
        "rolloff": octaves(((jnp.cumsum(parts, -1) < 0.85) * np.diff(frequency)[0]).sum(-1)),
        "flatness": jnp.log10(power).mean(-1) - jnp.log10(power.mean(-1)),
        "tilt": (mel * (centre / (centre**2).sum()).astype(np.float32)).sum(-1),
        "alpha": log_ratio(band(50, 1000).sum(-1), band(1000, 5000).sum(-1)),
        "hammarberg": log_ratio(band(0, 2000).max(-1), band(2000, 5000).max(-1)),
    }
    features |= {f"mfcc_{place + 1}": mfcc[..., place] for place in range(_NUM_MFCC)}
    return features, jnp.sqrt(parts)


def _mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over the frames of the mask [B, F, ...], [B, ...]; 0 if there is none."""
    return jnp.where(mask, x, 0).sum(1) / jnp.maximum(mask.sum(1), 1)


def _moments(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation over the frames of the mask [B, F, ...]."""
    mean = _mean(x, mask)
    return mean, jnp.sqrt(_mean((x - mean[:, None]) ** 2, mask))


def _change(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean absolute step between neighbours that are both in the mask [B, F, ...]."""
    return _mean(jnp.abs(jnp.diff(x, axis=1)), mask[:, 1:] & mask[:, :-1])


def _percentiles(x: jax.Array, mask: jax.Array, parts: tuple[float, ...]) -> jax.Array:
    """Over the frames of the mask [B, F, ...], linear between neighbours; [B, parts, ...]."""
    ordered = jnp.sort(jnp.where(mask, x, jnp.inf), axis=1)
    last = jnp.maximum(mask.sum(1, keepdims=True) - 1, 0)
    place = last * jnp.asarray(parts, jnp.float32).reshape(1, -1, *(1,) * (x.ndim - 2))
    low = place.astype(jnp.int32)
    below = jnp.take_along_axis(ordered, low, axis=1)
    above = jnp.take_along_axis(ordered, jnp.minimum(low + 1, last), axis=1)
    value = below + (place - low) * (above - below)
    return jnp.where(mask.any(1, keepdims=True), value, 0)


def _contours(x: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """The statistics `_CONTOUR` of x over the frames of the mask [B, F, ...], each [B, ...]."""
    mean, deviation = _moments(x, mask)
    p10, p50, p90 = jnp.moveaxis(_percentiles(x, mask, (0.1, 0.5, 0.9)), 1, 0)
    time = (jnp.arange(x.shape[1]) / _FRAME_RATE).reshape(1, -1, *(1,) * (x.ndim - 2))
    time = jnp.where(mask, time - _mean(time, mask)[:, None], 0)
    moment = (time**2).sum(1)
    slope = (time * jnp.where(mask, x - mean[:, None], 0)).sum(1)
    order, count = jnp.cumsum(mask, axis=1), mask.sum(1, keepdims=True)
    last, first = mask & (3 * order > 2 * count), mask & (3 * order <= count)
    return {
        "mean": mean,
        "deviation": deviation,
        "p10": p10,
        "p50": p50,
        "p90": p90,
        "range": p90 - p10,
        "slope": jnp.where(moment > 0, slope / jnp.where(moment > 0, moment, 1), 0),
        "rise": jnp.where(first.any(1), _mean(x, last) - _mean(x, first), 0),
        "change": _change(x, mask),
    }


def _stretches(mask: jax.Array) -> jax.Array:
    """How many stretches of true frames the mask [B, F] has, [B]."""
    return (mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))).sum(1)


def _rhythm(
    energy: jax.Array,
    valid: jax.Array,
    sounding: jax.Array,
    voiced: jax.Array,
    lengths: jax.Array,
) -> dict[str, jax.Array]:
    """Durations and rates, of frames [B, F]."""
    count = jnp.maximum(valid.sum(1), 1)
    seconds = count / _FRAME_RATE
    begun = jnp.cumsum(sounding, axis=1)
    pauses = ~sounding & (begun > 0) & (begun < begun[:, -1:])
    num_voiced, num_pauses = _stretches(voiced), _stretches(pauses)
    smooth = (
        sum(
            jnp.pad(jnp.where(valid, energy, 0), ((0, 0), (2, 2)))[
                :, shift : shift + energy.shape[1]
            ]
            for shift in range(5)
        )
        / 5
    )

    def window(reducer: Any, initial: float, sides: tuple[int, int]) -> jax.Array:
        size = sum(sides) + 1
        masked = jnp.where(valid, smooth, initial)
        return jax.lax.reduce_window(masked, initial, reducer, (1, size), (1, 1), ((0, 0), sides))

    highest = window(jax.lax.max, -jnp.inf, (_PEAK_SIDE, _PEAK_SIDE))
    lowest = window(jax.lax.min, jnp.inf, (_PEAK_SIDE, _PEAK_SIDE))
    peaks = sounding & (smooth >= highest) & (smooth - lowest > _PEAK_HEIGHT)
    return {
        "duration": jnp.log10(jnp.maximum(lengths, 1) / frontends.SAMPLE_RATE),
        "sounding": sounding.sum(1) / count,
        "voiced": voiced.sum(1) / count,
        "voiced_rate": num_voiced / seconds,
        "voiced_length": voiced.sum(1) / jnp.maximum(num_voiced, 1) / _FRAME_RATE,
        "pause_rate": num_pauses / seconds,
        "pause_length": pauses.sum(1) / jnp.maximum(num_pauses, 1) / _FRAME_RATE,
        "peak_rate": _stretches(peaks) / seconds,
    }
