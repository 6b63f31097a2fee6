"""Synthetic sounds that voice activity detectors classify as speech."""

import numpy as np

from mister_jax.data.audio import SAMPLE_RATE

_FORMANTS = ((700, 1200, 2500), (300, 2300, 3000), (400, 800, 2400), (500, 1800, 2500))
_BANDWIDTH = 80.0  # Hz
_SYLLABLE_SECONDS = 0.18


def synthesize_speech(seconds: float, seed: int = 0, pitch: float = 120.0) -> np.ndarray:
    """Returns syllables of random vowels, [S] int16: pulses filtered by three formants."""
    random = np.random.default_rng(seed)
    size, syllable = round(seconds * SAMPLE_RATE), round(_SYLLABLE_SECONDS * SAMPLE_RATE)
    time = np.arange(size) / SAMPLE_RATE
    phase = np.cumsum(pitch * (1 + 0.1 * np.sin(6 * np.pi * time))) / SAMPLE_RATE
    pulses = np.where(phase % 1 < 0.1, 0.9, -0.1)
    sound = np.zeros(size)
    for begin in range(0, size, syllable):
        part = pulses[begin : begin + syllable]
        frequencies = np.fft.rfftfreq(len(part), 1 / SAMPLE_RATE)
        gain = np.ones(len(frequencies), complex)
        for formant in _FORMANTS[random.integers(len(_FORMANTS))]:
            gain /= formant**2 - frequencies**2 + 1j * _BANDWIDTH * frequencies
            gain *= formant**2
        envelope = np.sqrt(np.sin(np.pi * np.linspace(0, 1, len(part))))
        sound[begin : begin + syllable] = envelope * np.fft.irfft(
            np.fft.rfft(part) * gain, len(part)
        )
    sound *= 0.5 / np.abs(sound).max()
    return np.rint(32767 * (sound + 0.001 * random.normal(size=size))).astype(np.int16)
