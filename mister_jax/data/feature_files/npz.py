"""Reads utterance features from NumPy archives."""

import pathlib

import numpy as np
from etils import epath

from mister_jax.data.feature_files.table import NEEDED, OPTIONAL, REQUIRED, FeatureTable
from mister_jax.data.schema import MODALITIES, DialogueFeatures
from mister_jax.errors import InputError


def read_npz(
    path: epath.PathLike, *, group_by: str = "", seed: int = 0
) -> dict[str, DialogueFeatures]:
    """Reads and checks the utterance features of a NumPy archive.

    The archive contains one row per utterance, in any order, in these arrays:

    - `speech` [N, Ds], `text` [N, Dt]: Floats. At least one of the two arrays is required. float16
      is kept, and other dtypes become float32.
    - `label` [N]: Integers, -1 for an unlabeled utterance, otherwise an index into `class_names`.
    - `class_names` [C]: Text.
    - `utterance` [N], `dialogue` [N]: Ids, which are text or integers. Utterance ids are unique.
    - `position` [N]: Numbers that order the utterances of a dialogue.
    - `split` [N], optional: `train`, `validation` or `test`, equal for all utterances in a
      dialogue. By default, dialogues are split at random.
    - `speaker` [N], optional: Text or integers, kept as metadata. No model reads the speakers.
    - `score` [N], optional: Floats from -3 to 3, or NaN for an utterance without a score.
    - `ratings` [N, C], optional: Number of raters who chose each class; zeros if unknown.
    - `speech_present`, `text_present` [N], optional: False if an utterance lacks the modality; the
      features of that modality are then replaced by zeros. All true by default.

    Other arrays are ignored. A random split puts all dialogues with the same value in the array
    `group_by` into one split. The default for `group_by` is `speaker`, if the file contains this
    array. The array `group_by` is also kept as metadata.

    Returns:
        The nonempty splits. Dialogues are in the order of their first rows, and utterances in the
        order of their positions. The metadata contains the features' origin, and `notes` for the
        user.

    Raises:
        InputError: The file or one of its rows cannot be used.
    """
    path = pathlib.Path(path)
    table = FeatureTable(path, _read_arrays(path, (group_by,) if group_by else ()))
    return table.splits(
        group_by=group_by, seed=seed, utterance_metadata=table.metadata("speaker", group_by)
    )


def _read_arrays(path: pathlib.Path, extra_arrays: tuple[str, ...]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        # `np.load` would not close a damaged archive, so the file is opened here.
        file = path.open("rb")
    except PermissionError as error:
        raise InputError(f"{path}: no permission to read it") from error
    with file:
        # zipfile, zlib and NumPy raise many types of errors for a damaged file.
        try:
            archive = np.load(file, allow_pickle=False)
        except Exception as error:
            raise InputError(f"{path}: not an npz file, or damaged; {NEEDED}") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path}: a single array; needed: an npz file. {NEEDED}")
        missing = [name for name in (*REQUIRED, *extra_arrays) if name not in archive.files]
        if not any(name in archive.files for name in MODALITIES):
            missing.append(" or ".join(MODALITIES))
        if missing:
            raise InputError(f"{path}: no array {', '.join(missing)}; {NEEDED}")
        assert archive.zip is not None
        try:
            # A zip file stores each name twice, and opening an entry compares both copies. A
            # damaged name therefore raises an error instead of hiding an optional array.
            for member in archive.zip.namelist():
                archive.zip.open(member).close()
        except Exception as error:
            raise InputError(f"{path}: damaged; {NEEDED}") from error
        arrays = {}
        for name in (*REQUIRED, *MODALITIES, *OPTIONAL, *extra_arrays):
            try:
                if name in archive.files:
                    arrays[name] = archive[name]
            except Exception as error:
                raise InputError(
                    f"{path}: {name}: damaged, or an array of Python objects; "
                    "allowed: arrays of numbers, booleans or text"
                ) from error
    return arrays
