"""Pads dialogues, texts and recordings to a common length.

The functions also return a mask for dialogues and texts, and lengths for recordings. `nn.masking`
makes the masks within encoders.
"""

from collections.abc import Sequence

import numpy as np

from mister_jax.data.schema import UNLABELED, DialogueFeatures

BATCH_DTYPES = {
    "speech": np.float32,
    "text": np.float32,
    "mask": np.bool_,
    "speech_present": np.bool_,
    "text_present": np.bool_,
    "label": np.int32,
    "row": np.int32,
}
"""Dtypes of the arrays in every batch of dialogues."""

OPTIONAL_FIELDS = ("score", "ratings")
"""float32 arrays that are in a batch of dialogues only if the dataset has them."""

PADDING = {"label": UNLABELED, "row": -1, "score": np.nan}
"""Padding values in batches of dialogues; 0 for all other arrays."""


def pad_dialogues(
    features: DialogueFeatures, rows: np.ndarray, padded_length: int
) -> dict[str, np.ndarray]:
    """Pads the dialogues `rows` [B] of a split to a common length; a row of -1 stays empty.

    Returns:
        The arrays of a batch, including `mask` [B, T] bool, which is true for utterances and false
        for padding. `pipeline.batches` describes the arrays.
    """
    lengths = np.where(rows >= 0, features.lengths[rows], 0)  # [B]
    positions = np.arange(padded_length)
    mask = positions < lengths[:, None]  # [B, T]
    # Indices into the arrays of `features`, in which all dialogues are concatenated.
    utterances = (features.offsets[rows][:, None] + positions)[mask]

    def pad(values: np.ndarray, field: str) -> np.ndarray:
        dtype = BATCH_DTYPES.get(field, np.float32)
        padding = PADDING.get(field, 0)
        array: np.ndarray = np.full(mask.shape + values.shape[1:], padding, dtype)
        array[mask] = values[utterances]
        return array

    fields = ("speech", "text", "speech_present", "text_present")
    return {
        **{field: pad(getattr(features, field), field) for field in fields},
        "mask": mask,
        "label": pad(features.label, "label"),
        "row": rows,
        **{
            field: pad(values, field)
            for field in OPTIONAL_FIELDS
            if (values := getattr(features, field)) is not None
        },
    }


def pad_tokens(tokens: Sequence[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads token ids on the right. Returns the ids [B, N] int32 and their mask [B, N] bool."""
    ids = np.zeros((len(tokens), length), np.int32)
    mask = np.zeros(ids.shape, bool)
    for row, values in enumerate(tokens):
        ids[row, : len(values)] = values
        mask[row, : len(values)] = True
    return ids, mask


def pad_clips(clips: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pads or truncates B clips [S] int16 to a common length.

    Returns:
        The samples [B, length] int16, padded with zeros on the right, and the clip lengths [B]
        int32.
    """
    waveform = np.zeros((len(clips), length), np.int16)
    for row, clip in enumerate(clips):
        waveform[row, : len(clip)] = clip[:length]
    return waveform, np.array([min(len(clip), length) for clip in clips], np.int32)
