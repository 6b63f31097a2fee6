"""Prosody: a speech encoder without weights that computes named features of each clip.

The features describe how something was said: pitch, loudness, voice quality and rhythm. There is a
frame every 10 ms. A frame is *sounding* if it is at most 40 dB below the clip's loudest frame, and
*voiced* if it is sounding and periodic. The features, in the order of `FEATURE_NAMES`, are:

- Statistics of two contours. `pitch_*` is the pitch of voiced frames in octaves above 55 Hz,
  estimated with YIN from 55 to 500 Hz. `energy_*` is log10(mean square / 1e-10) of sounding
  frames, for samples in [-1, 1]; a difference of 1 is 10 dB. The statistics are `mean`,
  `deviation` (standard deviation), percentiles `p10`, `p50`, `p90`, `range` (p90 - p10), `slope`
  (per second), `rise` (mean of the last third of the frames minus mean of the first third) and
  `change` (mean absolute difference of neighboring frames). The maximum, `energy_maximum`, exists
  only for `energy_*` and comes last.
- `mean`, `deviation` and `change` of these values over sounding frames: `periodicity` (0 for noise,
  1 for periodic frames), `zero_crossings` (per sample), `centroid`, `spread` and `rolloff` (85%) of
  the power spectrum (octaves above 1 kHz), `flatness` (log10 of the ratio of geometric and
  arithmetic mean), `tilt` (slope of the mel spectrum, log10 per octave), `alpha` (log10 of the
  ratio of the power from 50 Hz to 1 kHz and from 1 to 5 kHz), `hammarberg` (log10 of the ratio of
  the largest peaks from 0 to 2 kHz and from 2 to 5 kHz), and `mfcc_1` to `mfcc_13`.
- `flux_mean` and `flux_deviation`: statistics of the distance between the spectra of neighboring
  frames, from 0 to sqrt 2.
- `duration` (log10 of seconds), `sounding` and `voiced` (fractions of all frames), `voiced_rate`
  (voiced segments per second), `voiced_length` (mean in seconds), `pause_rate` and `pause_length`
  (for silent segments between sounding segments), `peak_rate` (loudness peaks per second, close to
  the syllable rate).

Only `energy_mean`, `energy_p10`, `energy_p50`, `energy_p90` and `energy_maximum` depend on the
recording's level. Shape letters: B clips, S samples, F frames, P features.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mister_jax.encoders import frontends
from mister_jax.nn.masking import length_mask

_CONTOUR_STATISTICS = ("mean", "deviation", "p10", "p50", "p90", "range", "slope", "rise", "change")
_SPECTRAL_STATISTICS = ("mean", "deviation", "change")
_NUM_MFCC = 13
_SPECTRAL_NAMES = (
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
_RHYTHM_NAMES = (
    "duration",
    "sounding",
    "voiced",
    "voiced_rate",
    "voiced_length",
    "pause_rate",
    "pause_length",
    "peak_rate",
)
FEATURE_NAMES: tuple[str, ...] = (
    *(f"pitch_{statistic}" for statistic in _CONTOUR_STATISTICS),
    *(f"energy_{statistic}" for statistic in _CONTOUR_STATISTICS),
    "energy_maximum",
    *(f"{name}_{statistic}" for name in _SPECTRAL_NAMES for statistic in _SPECTRAL_STATISTICS),
    "flux_mean",
    "flux_deviation",
    *_RHYTHM_NAMES,
)

_FRAME_RATE = frontends.SAMPLE_RATE / frontends.FRAME_STEP
_MIN_PITCH, _MAX_PITCH = 55.0, 500.0  # Hz
_MIN_LAG = int(frontends.SAMPLE_RATE / _MAX_PITCH)
_MAX_LAG = int(frontends.SAMPLE_RATE / _MIN_PITCH)
_PITCH_FRAME_SIZE = 800  # samples
_NUM_LAGS = 300
_PERIOD_THRESHOLD = 0.15  # The period is the first minimum of YIN's difference below this value.
_VOICED_THRESHOLD = 0.35  # Maximum of YIN's difference at the period of a voiced frame.
_SOUNDING_RANGE = 4.0  # log10 of power, relative to the loudest frame
_MIN_POWER = 1e-10  # relative to full scale
_MIN_PEAK = 1e-5  # relative to full scale; quieter clips are treated as having this peak
_NUM_MEL_BINS = 40
_PEAK_RADIUS = 6  # Number of frames on either side of a loudness peak that must not be louder.
_PEAK_HEIGHT = 0.2  # log10 of power by which a peak must exceed the lowest of these frames.


@jax.jit
def compute_prosody(waveform: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the prosodic features of clips.

    Args:
      waveform: Mono 16 kHz audio in [-1, 1], [B, S]; padding is ignored.
      lengths: Number of samples in each clip, [B] int.

    Returns:
      Features, [B, P] float32, in the order of `FEATURE_NAMES`, and whether a clip has any samples,
      [B] bool. The features of a finite clip are finite; a feature is 0 if the clip has no frames
      of the required kind, such as voiced frames.
    """
    lengths = jnp.minimum(lengths, waveform.shape[1])
    x, peak = _scale_to_unit_peak(waveform, lengths)
    num_frames = max(1, -(-x.shape[1] // frontends.FRAME_STEP))
    valid = length_mask(frontends.log_mel_lengths(lengths), num_frames)  # [B, F]

    frames = _centered_frames(x, frontends.FRAME_SIZE, num_frames)  # [B, F, 400]
    power = (frames**2).mean(-1)
    max_power = jnp.where(valid, power, 0).max(1, keepdims=True)
    sounding = valid & (power > 10**-_SOUNDING_RANGE * max_power)
    level = 2 * jnp.log10(jnp.maximum(peak, _MIN_PEAK)) - np.log10(_MIN_POWER)
    energy = jnp.log10(jnp.maximum(power, 1e-30)) + level

    pitch, difference = _estimate_pitch(x, lengths, num_frames)
    voiced = sounding & (difference < _VOICED_THRESHOLD)
    spectral, root_shares = _spectral_features(frames)
    spectral["periodicity"] = jnp.clip(1 - difference, 0, 1)

    contours = _contour_statistics(
        jnp.stack([pitch, energy], axis=-1), jnp.stack([voiced, sounding], axis=-1)
    )
    contour_features = jnp.stack([contours[name] for name in _CONTOUR_STATISTICS], axis=1)
    # The maximum starts at -inf instead of 0, because very quiet frames have negative energy.
    max_energy = energy.max(1, initial=-jnp.inf, where=sounding)
    max_energy = jnp.where(sounding.any(1), max_energy, 0)
    stacked = jnp.stack([spectral[name] for name in _SPECTRAL_NAMES], axis=-1)  # [B, F, features]
    statistics = (
        *_mean_and_deviation(stacked, sounding[..., None]),
        _mean_change(stacked, sounding[..., None]),
    )
    flux = jnp.sqrt((jnp.diff(root_shares, axis=1) ** 2).sum(-1) + 1e-12)
    flux_features = _mean_and_deviation(flux, sounding[:, 1:] & sounding[:, :-1])
    rhythm = _rhythm_features(energy, valid, sounding, voiced, lengths)
    has_samples = lengths > 0
    # Few large arrays compile faster than one array per feature.
    parts = [
        contour_features[..., 0],
        contour_features[..., 1],
        max_energy[:, None],
        jnp.stack(statistics, axis=-1).reshape(len(x), -1),
        jnp.stack(flux_features, axis=-1),
        jnp.stack([rhythm[name] for name in _RHYTHM_NAMES], axis=-1),
    ]
    vector = jnp.concatenate(parts, axis=-1)
    return jnp.where(has_samples[:, None], vector, 0), has_samples


def _scale_to_unit_peak(waveform: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns clips with zero mean and peak 1, and the peaks before scaling, [B, 1]."""
    waveform = jnp.pad(waveform, ((0, 0), (0, max(0, 1 - waveform.shape[1]))))
    mask = length_mask(lengths, waveform.shape[1])

    def peak(x: jax.Array) -> jax.Array:
        maximum = jnp.abs(x).max(1, keepdims=True)
        return jnp.where(maximum > np.finfo(np.float32).tiny, maximum, 1)

    x = jnp.where(mask, waveform, 0).astype(jnp.float32)
    # Scaling before the sum avoids overflow.
    input_peak = peak(x)
    x = x / input_peak
    mean = x.sum(1, keepdims=True) / jnp.maximum(lengths, 1)[:, None]
    x = jnp.where(mask, x - mean, 0)
    # Rounding errors of a constant signal count as silence.
    x = jnp.where(jnp.abs(x).max(1, keepdims=True) > 1e-6, x, 0)
    centered_peak = peak(x)
    return x / centered_peak, input_peak * centered_peak


def _centered_frames(x: jax.Array, size: int, num_frames: int) -> jax.Array:
    """Returns frames, [B, F, size], centered at every 160th sample and zero-padded at the ends."""
    return frontends.split_frames(
        jnp.pad(x, ((0, 0), (size // 2, 0))), size, frontends.FRAME_STEP, num_frames
    )


def _low_pass(x: jax.Array) -> jax.Array:
    """Low-pass filters x, [B, S], at 1.5 kHz, so that integer lags are enough for YIN."""
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


def _estimate_pitch(
    x: jax.Array, lengths: jax.Array, num_frames: int
) -> tuple[jax.Array, jax.Array]:
    """Estimates the pitch with YIN (de Cheveigne and Kawahara, JASA 111, 2002).

    Returns the pitch in octaves above 55 Hz and the normalized difference at the period, both
    [B, F]. The difference is near 0 for periodic frames, near 1 for noise, and 1 for silence.
    """
    x = jnp.where(length_mask(lengths, x.shape[1]), _low_pass(x), 0)
    frames = _centered_frames(x, _PITCH_FRAME_SIZE, num_frames)  # [B, F, 800]
    window = _PITCH_FRAME_SIZE - _NUM_LAGS
    # Even at the maximum lag, the shifted window is inside the frame, so the FFT does not wrap.
    start = jnp.where(np.arange(_PITCH_FRAME_SIZE) < window, frames, 0)
    spectrum = jnp.conj(jnp.fft.rfft(start)) * jnp.fft.rfft(frames)
    product = jnp.fft.irfft(spectrum, _PITCH_FRAME_SIZE)[..., :_NUM_LAGS]
    running_energy = jnp.pad(jnp.cumsum(frames**2, axis=-1), ((0, 0), (0, 0), (1, 0)))
    energy = running_energy[..., window : window + _NUM_LAGS] - running_energy[..., :_NUM_LAGS]
    difference = jnp.maximum(energy[..., :1] + energy - 2 * product, 0)[..., 1:]  # lags 1 to 299
    total = jnp.cumsum(difference, axis=-1)
    lag = np.arange(1, _NUM_LAGS, dtype=np.float32)
    # Rounding errors in an almost silent frame must not count as a period.
    audible = total > 1e-6 * running_energy[..., -1:] + 1e-20
    normalized = jnp.where(audible, difference * lag / jnp.where(audible, total, 1), 1)

    # Lags 2 to 298, with their neighbors.
    previous, current, following = normalized[..., :-2], normalized[..., 1:-1], normalized[..., 2:]
    lag = lag[1:-1]
    allowed = (lag >= _MIN_LAG) & (lag <= _MAX_LAG)
    is_minimum = (current <= previous) & (current <= following)
    dips = allowed & (current < _PERIOD_THRESHOLD) & is_minimum
    lowest = jnp.argmin(jnp.where(allowed, current, jnp.inf), axis=-1)
    period_index = jnp.where(dips.any(-1), jnp.argmax(dips, axis=-1), lowest)[..., None]

    def at_period(values: jax.Array) -> jax.Array:
        return jnp.take_along_axis(values, period_index, axis=-1)[..., 0]

    left, middle, right = at_period(previous), at_period(current), at_period(following)
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / jnp.where(curvature > 1e-9, curvature, 1)
    shift = jnp.where(curvature > 1e-9, jnp.clip(shift, -1, 1), 0)
    period = jnp.asarray(lag)[period_index[..., 0]] + shift
    return jnp.log2(frontends.SAMPLE_RATE / period / _MIN_PITCH), middle


def _spectral_features(frames: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
    """Returns features by name, [B, F], and square roots of the normalized power, [B, F, 201]."""
    hann = np.hanning(frontends.FRAME_SIZE + 1)[:-1].astype(np.float32)
    spectrum = jnp.fft.rfft(frames * hann)  # [B, F, 201]
    power = spectrum.real**2 + spectrum.imag**2
    # The constant is far below the power of any sounding frame. It keeps the features of
    # silent frames finite.
    power = power + 1e-8
    shares = power / power.sum(-1, keepdims=True)
    frequency = np.linspace(0, frontends.SAMPLE_RATE / 2, power.shape[-1]).astype(np.float32)

    def octaves(hertz: jax.Array) -> jax.Array:
        return jnp.log2(jnp.maximum(hertz, 40) / 1000)

    def log_ratio(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
        return jnp.log10(numerator) - jnp.log10(denominator)

    def band(low: float, high: float) -> jax.Array:
        return power[..., (frequency >= low) & (frequency < high)]

    centroid = (shares * frequency).sum(-1)
    variance = (shares * (frequency - centroid[..., None]) ** 2).sum(-1)
    filters = frontends.slaney_filters(_NUM_MEL_BINS)
    mel = jnp.log10(jnp.matmul(power, filters, precision=jax.lax.Precision.HIGHEST))  # [B, F, M]
    octave = np.log2(frequency @ filters / filters.sum(0))
    octave = octave - octave.mean()
    bins = np.arange(_NUM_MEL_BINS)
    cosines = np.cos(np.pi / _NUM_MEL_BINS * np.outer(bins + 0.5, np.arange(1, _NUM_MFCC + 1)))
    cosines = (cosines * np.sqrt(2 / _NUM_MEL_BINS)).astype(np.float32)
    mfcc = jnp.matmul(mel, cosines, precision=jax.lax.Precision.HIGHEST)
    signs = frames >= 0
    features = {
        "zero_crossings": (signs[..., 1:] != signs[..., :-1]).astype(jnp.float32).mean(-1),
        "centroid": octaves(centroid),
        "spread": octaves(jnp.sqrt(variance)),
        "rolloff": octaves(((jnp.cumsum(shares, -1) < 0.85) * np.diff(frequency)[0]).sum(-1)),
        "flatness": jnp.log10(power).mean(-1) - jnp.log10(power.mean(-1)),
        "tilt": (mel * (octave / (octave**2).sum()).astype(np.float32)).sum(-1),
        "alpha": log_ratio(band(50, 1000).sum(-1), band(1000, 5000).sum(-1)),
        "hammarberg": log_ratio(band(0, 2000).max(-1), band(2000, 5000).max(-1)),
    }
    features |= {f"mfcc_{index + 1}": mfcc[..., index] for index in range(_NUM_MFCC)}
    return features, jnp.sqrt(shares)


def _masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean over the frames in the mask, [B, ...], or 0 if the mask is empty."""
    return jnp.where(mask, x, 0).sum(1) / jnp.maximum(mask.sum(1), 1)


def _mean_and_deviation(x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the mean and the standard deviation over the frames in the mask."""
    mean = _masked_mean(x, mask)
    return mean, jnp.sqrt(_masked_mean((x - mean[:, None]) ** 2, mask))


def _mean_change(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean absolute difference of neighboring frames that are both in the mask."""
    return _masked_mean(jnp.abs(jnp.diff(x, axis=1)), mask[:, 1:] & mask[:, :-1])


def _masked_percentiles(x: jax.Array, mask: jax.Array, fractions: tuple[float, ...]) -> jax.Array:
    """Returns linearly interpolated percentiles over the frames in the mask; 0 for an empty mask.

    The shape of the result is [B, number of fractions, ...].
    """
    sorted_values = jnp.sort(jnp.where(mask, x, jnp.inf), axis=1)
    last = jnp.maximum(mask.sum(1, keepdims=True) - 1, 0)
    position = last * jnp.asarray(fractions, jnp.float32).reshape(1, -1, *(1,) * (x.ndim - 2))
    low = position.astype(jnp.int32)
    below = jnp.take_along_axis(sorted_values, low, axis=1)
    above = jnp.take_along_axis(sorted_values, jnp.minimum(low + 1, last), axis=1)
    value = below + (position - low) * (above - below)
    return jnp.where(mask.any(1, keepdims=True), value, 0)


def _contour_statistics(x: jax.Array, mask: jax.Array) -> dict[str, jax.Array]:
    """Returns the `_CONTOUR_STATISTICS` of x over the frames in the mask, [B, ...] each."""
    mean, deviation = _mean_and_deviation(x, mask)
    p10, p50, p90 = jnp.moveaxis(_masked_percentiles(x, mask, (0.1, 0.5, 0.9)), 1, 0)
    time = (jnp.arange(x.shape[1]) / _FRAME_RATE).reshape(1, -1, *(1,) * (x.ndim - 2))
    time = jnp.where(mask, time - _masked_mean(time, mask)[:, None], 0)
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
        "rise": jnp.where(first.any(1), _masked_mean(x, last) - _masked_mean(x, first), 0),
        "change": _mean_change(x, mask),
    }


def _count_segments(mask: jax.Array) -> jax.Array:
    """Counts the segments of consecutive frames in a mask, [B, F]; returns [B]."""
    return (mask & ~jnp.pad(mask[:, :-1], ((0, 0), (1, 0)))).sum(1)


def _rhythm_features(
    energy: jax.Array,
    valid: jax.Array,
    sounding: jax.Array,
    voiced: jax.Array,
    lengths: jax.Array,
) -> dict[str, jax.Array]:
    """Computes the features `_RHYTHM_NAMES`, [B] each, of clips.

    The arguments are the energy and masks of the frames, [B, F], and lengths, [B], in samples.
    """
    count = jnp.maximum(valid.sum(1), 1)
    seconds = count / _FRAME_RATE
    num_sounding = jnp.cumsum(sounding, axis=1)
    pauses = ~sounding & (num_sounding > 0) & (num_sounding < num_sounding[:, -1:])
    num_voiced, num_pauses = _count_segments(voiced), _count_segments(pauses)
    padded = jnp.pad(jnp.where(valid, energy, 0), ((0, 0), (2, 2)))
    smooth = sum(padded[:, shift : shift + energy.shape[1]] for shift in range(5)) / 5

    def over_neighbors(reducer: Any, initial: float) -> jax.Array:
        masked = jnp.where(valid, smooth, initial)
        padding = ((0, 0), (_PEAK_RADIUS, _PEAK_RADIUS))
        window = (1, 2 * _PEAK_RADIUS + 1)
        return jax.lax.reduce_window(masked, initial, reducer, window, (1, 1), padding)

    highest = over_neighbors(jax.lax.max, -jnp.inf)
    lowest = over_neighbors(jax.lax.min, jnp.inf)
    peaks = sounding & (smooth >= highest) & (smooth - lowest > _PEAK_HEIGHT)
    return {
        "duration": jnp.log10(jnp.maximum(lengths, 1) / frontends.SAMPLE_RATE),
        "sounding": sounding.sum(1) / count,
        "voiced": voiced.sum(1) / count,
        "voiced_rate": num_voiced / seconds,
        "voiced_length": voiced.sum(1) / jnp.maximum(num_voiced, 1) / _FRAME_RATE,
        "pause_rate": num_pauses / seconds,
        "pause_length": pauses.sum(1) / jnp.maximum(num_pauses, 1) / _FRAME_RATE,
        "peak_rate": _count_segments(peaks) / seconds,
    }
