"""Synthesizes meaningless syllables in a speaking style from harmonics, formants and noise."""

import math

import numpy as np

from mister_jax.data.audio import SAMPLE_RATE

# Means and standard deviations of the style's dimensions. Pitch and tempo are base-2 logarithms,
# because listeners perceive their ratios, not their differences.
PITCH_OCTAVE = (math.log2(165.0), 0.2)  # Hz
LEVEL = (-28.0, 2.5)  # dB relative to full scale, root mean square
TEMPO_OCTAVE = (math.log2(4.5), 0.2)  # syllables per second
TILT = (-10.0, 2.0)  # dB per octave of the voice source

_MIN_SECONDS, _MAX_SECONDS = 1.0, 3.0

# Formants of five vowels in Hz (after Peterson & Barney 1952), bandwidths of the formants in Hz,
# and the amount by which the gain of each formant exceeds 1 at its peak.
_VOWELS = np.array(
    [[730, 1090, 2440], [530, 1840, 2480], [270, 2290, 3010], [570, 840, 2410], [300, 870, 2240]]
)
_BANDWIDTHS = np.array([60, 90, 130])
_PEAK = 6.0

MIN_FORMANT_SCALE, MAX_FORMANT_SCALE = 0.88, 1.14
"""Range of the ratio of a speaker's formants to `_VOWELS`, which models vocal tract length."""

_BREATH = 0.01  # amplitude of the breath noise, relative to the root mean square of the harmonics
_ROOM_NOISE = 8.0  # root mean square in int16 units, 72 dB below full scale


def physical_style(style: np.ndarray) -> tuple[float, float, float, float]:
    """Converts a style to pitch in Hz, level in dB, syllables per second and tilt in dB/octave.

    Args:
        style: Pitch, loudness, tempo and brightness in standard deviations from the mean, [4].
    """
    pitch, level, tempo, tilt = (
        middle + deviation * float(value)
        for (middle, deviation), value in zip(
            (PITCH_OCTAVE, LEVEL, TEMPO_OCTAVE, TILT), style, strict=True
        )
    )
    return 2**pitch, level, 2**tempo, tilt


def synthesize(
    style: np.ndarray, formant_scale: float, generator: np.random.Generator
) -> np.ndarray:
    """Synthesizes an utterance from a style vector of 4 values and a scale for all formants.

    Returns:
        Samples [S] int16 at `SAMPLE_RATE`. Their geometric mean pitch matches the style exactly.
        Their root mean square and mean syllable rate match the style approximately.
    """
    pitch, level, tempo, tilt = physical_style(style)
    seconds = generator.uniform(_MIN_SECONDS, _MAX_SECONDS)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    # Fractional syllable index. Syllables differ in length, and the last syllable may be truncated.
    syllable = tempo * time
    syllable += 0.1 * np.sin(2 * np.pi * (syllable / 2.3 + generator.uniform()))
    syllable = np.maximum(syllable - syllable[0], 0)
    count = int(syllable[-1]) + 2
    stress = np.interp(syllable, np.arange(count), generator.uniform(0.6, 1.0, size=count))
    envelope = stress * (0.08 + 0.92 * np.sin(np.pi * syllable) ** 2)

    octave = np.interp(syllable, np.arange(count), generator.normal(scale=0.05, size=count))
    octave += np.linspace(0.08, -0.08, len(time))  # Pitch declines along an utterance.
    frequency = pitch * 2 ** (octave - octave.mean())
    source = envelope * _harmonics(frequency, tilt)
    source += _BREATH * _rms(source) * envelope * generator.normal(size=len(time))

    formants = formant_scale * _VOWELS[generator.integers(len(_VOWELS), size=count)]
    voice = _apply_formants(source, syllable, formants)
    voice *= 32768 * 10 ** (level / 20) / _rms(voice)
    voice += _ROOM_NOISE * generator.normal(size=len(time))
    return np.clip(np.rint(voice), -32768, 32767).astype(np.int16)


def _harmonics(frequency: np.ndarray, tilt: float) -> np.ndarray:
    """Returns the sum [S] of the harmonics of a frequency [S] in Hz, with a tilt in dB/octave."""
    angle = np.cumsum(2 * np.pi * frequency / SAMPLE_RATE)
    fundamental = np.exp(1j * (angle % (2 * np.pi))).astype(np.complex64)
    harmonic = fundamental.copy()
    total = np.zeros(len(frequency), np.float32)
    for number in range(1, int(0.48 * SAMPLE_RATE / frequency.max()) + 1):
        total += np.float32(10 ** (tilt * math.log2(number) / 20)) * harmonic.imag
        harmonic *= fundamental
    return total.astype(np.float64)


def _apply_formants(source: np.ndarray, syllable: np.ndarray, formants: np.ndarray) -> np.ndarray:
    """Filters a source [S] with formants that glide from syllable to syllable.

    `syllable` [S] is the fractional index of each sample into `formants` [syllables, 3] in Hz.
    """
    hop, frame_size = 256, 512  # Hann windows whose size is twice the hop add up to 1.
    count = -(-len(source) // hop) + 1
    padded = np.zeros((count + 1) * hop)
    padded[hop : hop + len(source)] = source
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(frame_size) / frame_size)
    frames = np.lib.stride_tricks.sliding_window_view(padded, frame_size)[::hop] * window

    centers = np.minimum(np.arange(count) * hop, len(source) - 1)
    indices = np.arange(len(formants))
    frame_formants = np.stack(
        [np.interp(syllable[centers], indices, each) for each in formants.T], axis=1
    )
    bins = np.fft.rfftfreq(2 * frame_size, 1 / SAMPLE_RATE)
    distance = bins - frame_formants[..., None]  # [frames, 3, bins]
    # The gain far from the peaks is 1, so the source's tilt remains audible.
    gain = np.prod(1 + _PEAK / (1 + (distance / _BANDWIDTHS[:, None]) ** 2), axis=1)
    spectrum = np.fft.rfft(frames, 2 * frame_size) * gain

    # The filter has zero phase, so the response extends before and after each frame.
    response = np.roll(np.fft.irfft(spectrum), frame_size // 2, axis=1)
    total = np.zeros((count + 3) * hop)
    for part in range(4):
        piece = response[:, part * hop : (part + 1) * hop]
        total[part * hop : part * hop + piece.size] += piece.ravel()
    return total[frame_size // 2 + hop :][: len(source)]


def _rms(samples: np.ndarray) -> float:
    return float(np.sqrt(np.mean(samples**2)))
