"""Batches of waveforms for tests."""

import numpy as np


def pad_clips(clips, num_samples, padding=np.nan):
    """Returns clips padded or truncated to `num_samples`, and the lengths before truncation."""
    waveform = np.full((len(clips), num_samples), padding, np.float32)
    for row, samples in zip(waveform, clips, strict=True):
        row[: len(samples)] = samples[:num_samples]
    return waveform, np.array([len(samples) for samples in clips])
