"""Reads utterance features from NumPy archives."""

import pathlib

import numpy as np
from etils import epath

from mister_jax.data.feature_files.table import (
    METADATA_KINDS,
    NEEDED,
    OPTIONAL,
    REQUIRED,
    FeatureTable,
)
from mister_jax.data.schema import MODALITIES, DialogueFeatures
from mister_jax.errors import InputError

_KNOWN = (*REQUIRED, *MODALITIES, *OPTIONAL)
_METADATA = "metadata_"


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

    Other arrays [N] of text, numbers or booleans are kept as metadata; from their names, a prefix
    `metadata_` is removed. All remaining arrays are ignored. Notes list the kept and the ignored
    arrays. A random split puts all dialogues with the same value in the array `group_by` into one
    split. The default for `group_by` is `speaker`, if the file contains this array.

    Returns:
        The nonempty splits. Dialogues are in the order of their first rows, and utterances in the
        order of their positions. The `metadata` of each split contains the name ("source") and the
        hash ("sha256") of the file, and "notes" for the user.

    Raises:
        InputError: The file or one of its rows cannot be used.
    """
    path = pathlib.Path(path)
    arrays, names = _read_arrays(path, (group_by,) if group_by else ())
    table = FeatureTable(path, arrays)
    columns = {"speaker": "speaker"} if "speaker" in arrays else {}
    kept, ignored = [], []
    # An array `session` takes precedence over `metadata_session`.
    others = [name for name in names if name not in _KNOWN]
    for name in sorted(others, key=lambda name: name.startswith(_METADATA)):
        column = name.removeprefix(_METADATA)
        if name in arrays and column not in columns and table.is_metadata(name):
            columns[column] = name
            kept.append(name)
        else:
            ignored.append(name)
    notes = []
    if set(kept) - {group_by}:
        notes.append(f"arrays kept as metadata: {', '.join(kept)}")
    if ignored:
        notes.append(f"arrays ignored: {', '.join(ignored)}")
    return table.splits(
        group_by=group_by, seed=seed, notes=notes, utterance_metadata=table.metadata(columns)
    )


def _read_arrays(
    path: pathlib.Path, required: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Returns the arrays that may be used, and the names of all arrays."""
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
        missing = [name for name in (*REQUIRED, *required) if name not in archive.files]
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
        for name in archive.files:
            if name not in (*_KNOWN, *required) and not _is_vector(archive, name):
                continue
            try:
                arrays[name] = archive[name]
            except Exception as error:
                raise InputError(
                    f"{path}: {name}: damaged, or an array of Python objects; "
                    "allowed: arrays of numbers, booleans or text"
                ) from error
    return arrays, list(archive.files)


def _is_vector(archive: np.lib.npyio.NpzFile, name: str) -> bool:
    """Returns whether an array has one dimension and values that can be metadata.

    Only the header is read, because an archive may contain large arrays that are not used.
    """
    assert archive.zip is not None
    try:
        with archive.zip.open(f"{name}.npy") as file:
            if np.lib.format.read_magic(file) == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            else:
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    except Exception:  # zipfile and NumPy raise many types of errors for a damaged array.
        return False
    return len(shape) == 1 and dtype.kind in METADATA_KINDS
