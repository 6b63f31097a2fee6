"""Finds and loads trained models in this package, in folders and on the Hugging Face Hub.

Every subfolder of this package is a bundle (see `mister_jax.bundle`) named after its model.
"""

from __future__ import annotations

import pathlib
import re

from etils import epath

from mister_jax import bundle
from mister_jax.encoders import hub
from mister_jax.errors import InputError
from mister_jax.predictor import Predictor, read_task_name

DEFAULT_MODEL = "meld-text"
"""English text model with the seven emotions of MELD."""

_FOLDER = pathlib.Path(__file__).parent
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@.+)?")


def packaged_models() -> list[str]:
    """Returns the names of the models in this package."""
    return sorted(path.parent.name for path in _FOLDER.glob(f"*/{bundle.CONFIG_FILE}"))


def find_model(name: epath.PathLike) -> epath.Path:
    """Returns the folder of a trained model, and downloads it if necessary.

    Args:
      name: Work directory of a training run, bundle, name in this package, or name on the Hugging
        Face Hub, "OWNER/NAME" or "OWNER/NAME@REVISION".

    Raises:
      InputError: There is no such model, or the model on the Hub is not a bundle.
    """
    folder = epath.Path(name)
    if folder.is_dir():
        return folder
    packaged = packaged_models()
    if str(name) in packaged:
        return epath.Path(_FOLDER / str(name))
    if not _HUB_NAME.fullmatch(str(name)):
        raise InputError(
            f"model {name}: no such folder; allowed: a directory that `mister-jax train` or "
            f"`mister-jax export` has written, {', '.join(packaged)}, or OWNER/NAME on the Hugging "
            "Face Hub"
        )
    downloaded = epath.Path(hub.download(str(name), bundle.DOWNLOADED_FILES))
    if not bundle.is_bundle(downloaded):
        raise InputError(
            f"model {name}: not a model of mister_jax; needed: a folder that `mister-jax export` "
            "has written"
        )
    return downloaded


def load_mister_e(name: epath.PathLike, *, calibrate: bool = True) -> Predictor:
    """Loads a MiSTER-E model.

    Args:
      name: See `find_model`.
      calibrate: Whether to calibrate the probabilities; ignored for a model without a
        calibration.

    Raises:
      InputError: The model does not exist, is damaged, or is an encoder.
    """
    folder = find_model(name)
    if read_task_name(folder) != "fusion":
        raise InputError(f"{name}: the work directory of an encoder; needed: a MiSTER-E model")
    return Predictor(folder, calibrate=calibrate)
