"""Errors about user input and missing extras."""

import importlib.util

_ENCODERS = ("etils", "huggingface_hub", "safetensors", "transformers")
_PREDICT = (*_ENCODERS, "av", "ml_collections", "orbax.checkpoint", "pysubs2", "rich")
_TRAIN = (
    *_PREDICT,
    "google_crc32c",
    "h5py",
    "matplotlib",
    "tensorflow",
    "tensorflow_datasets",
)

EXTRAS = {
    "encoders": _ENCODERS,
    "predict": _PREDICT,
    "asr": ("faster_whisper",),
    "train": _TRAIN,
}
"""Packages that `require_extra` checks for each extra."""


class InputError(ValueError):
    """Raised if a file, value or name from the user is invalid.

    The one-line message says what is wrong, where, and what is allowed. The command line prints
    this message without a traceback.
    """


class MissingExtraError(ImportError):
    """Raised if a feature needs an extra that is not installed."""


def require_extra(extra: str, feature: str) -> None:
    """Checks that all packages of an extra are installed, without importing them.

    Raises:
      MissingExtraError: A package of the extra is missing.
    """
    missing = [package for package in EXTRAS[extra] if not _is_installed(package)]
    if missing:
        raise MissingExtraError(
            f"{feature} needs {', '.join(missing)}; install it with pip install "
            f'"mister_jax[{extra}]"'
        )


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # The parent package of a dotted name is missing.
        return False
