"""Loads utterance encoders by name or folder, from a work directory, or from metadata."""

from __future__ import annotations

import difflib
import inspect
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mister_jax.encoders import hub, registry
from mister_jax.encoders.hub import MINILM
from mister_jax.encoders.speech import check_seconds
from mister_jax.errors import InputError
from mister_jax.extraction.encoder import Encoder, Input
from mister_jax.extraction.speech import PROSODY, PretrainedSpeech, ProsodyEncoder, SpeechInput
from mister_jax.extraction.text import PretrainedText, TextInput
from mister_jax.predictor import Predictor
from mister_jax.tasks.speech_encoder import SpeechEncoderTask
from mister_jax.tasks.text_encoder import TextEncoderTask

_SALMONN_PARTS = ("whisper", "beats", "vicuna")
ENCODER_PARTS = (*_SALMONN_PARTS, "adapter")
"""Encoder options that are paths to additional files."""


class TunedEncoder(Encoder):
    """A fine-tuned encoder with its best parameters.

    Features are the output of the head's first linear layer.

    Raises:
      InputError: The directory is not the work directory of a fine-tuned encoder, or has no best
        checkpoint.
    """

    def __init__(self, workdir: epath.PathLike):
        predictor = Predictor(workdir)
        task = predictor.task
        input_: Input
        if isinstance(task, TextEncoderTask):
            input_ = TextInput(task.encode, task.options.max_tokens)
        elif isinstance(task, SpeechEncoderTask):
            input_ = SpeechInput(task.options.max_seconds, pads_to_max=task.pads_to_max)
        else:
            raise InputError(
                f"{workdir}: a work directory of MiSTER-E; needed: the work directory of an encoder"
            )
        metadata = {
            "kind": "tuned",
            "name": hub.pinned_name(workdir),
            "options": {},
            "config": json.loads((epath.Path(workdir) / "config.json").read_text()),
            "best": predictor.progress,
            "files": task.fingerprint(),
        }
        super().__init__(
            input_,
            predictor.partitioner,
            metadata,
            lambda batch: predictor.predict_batch(batch)["feature"][:, 0],
        )


# Maps `kind` in the metadata to a function of `name` and `options` that creates the encoder.
_CONSTRUCTORS: dict[str, Callable[..., Encoder]] = {
    "tuned": TunedEncoder,
    "text": PretrainedText,
    "speech": PretrainedSpeech,
    PROSODY: lambda _, max_seconds=None: ProsodyEncoder(max_seconds=max_seconds),
}


def load_encoder(name: str, **options: Any) -> Encoder:
    """Loads a pretrained encoder, or `ProsodyEncoder` for the name "prosody".

    Args:
      name: Folder, name on the Hugging Face Hub, or "prosody".
      **options: Arguments of `PretrainedText`, `PretrainedSpeech` or `ProsodyEncoder`. `dtype` also
        sets `param_dtype`.

    Raises:
      InputError: The encoder or adapter cannot be loaded, or an option does not apply to the
        encoder.
    """
    if options.get("max_seconds") is not None:
        check_seconds(options["max_seconds"])
    if name == PROSODY:
        kind = PROSODY
    elif any(options.get(part) for part in _SALMONN_PARTS):
        kind = "speech"  # SALMONN's checkpoint has no config.json, which `find_modality` reads.
    else:
        similar = difflib.get_close_matches(name, (PROSODY, MINILM), cutoff=0.8)
        if similar and name not in similar and not pathlib.Path(name).exists():
            raise InputError(f"{name}: no such encoder; did you mean {similar[0]}?")
        kind = registry.find_modality(name)
    allowed = list(inspect.signature(_CONSTRUCTORS[kind]).parameters)[1:]  # without `name`
    if "param_dtype" in allowed:
        allowed.remove("param_dtype")
    unsupported = [option for option in options if option not in allowed]
    if unsupported:
        raise InputError(
            f"{name}: {', '.join(unsupported)}; allowed for an encoder of this kind ({kind}): "
            f"{', '.join(allowed)}"
        )
    if "dtype" in options:
        options["param_dtype"] = options["dtype"]
    return _CONSTRUCTORS[kind](name, **options)


def encoder_from_metadata(metadata: Mapping[str, Any]) -> Encoder:
    """Loads the encoder that extracted a dataset's features.

    `metadata` is the dataset's metadata for one modality, which includes `Encoder.metadata`.

    Raises:
      InputError: The encoder cannot be loaded, or has changed since the extraction.
    """
    constructor = _CONSTRUCTORS.get(metadata.get("kind", ""))
    if constructor is None:
        raise InputError(
            f"features of kind {metadata.get('kind')!r}, whose encoder is unknown; allowed: "
            f"extracted features, of kind {', '.join(_CONSTRUCTORS)}"
        )
    name = metadata["name"]
    encoder = constructor(name, **metadata["options"])
    changed = sorted(key for key, value in encoder.metadata.items() if metadata.get(key) != value)
    if set(changed) - {"name"}:
        raise InputError(
            f"{name}: the encoder has changed since the features were extracted "
            f"({', '.join(changed)}); extract them again, or use the previous encoder"
        )
    return encoder


def with_new_paths(metadata: Mapping[str, Any], new_paths: Mapping[str, str]) -> dict[str, Any]:
    """Returns an encoder's metadata with new paths, for an encoder whose files have moved.

    Args:
      metadata: Metadata that includes `Encoder.metadata`.
      new_paths: New paths by part: "encoder", "adapter", or SALMONN's "whisper", "beats" and
        "vicuna".

    Raises:
      InputError: The encoder has no such part.
    """
    options = metadata.get("options", {})
    parts = [part for part in ENCODER_PARTS if options.get(part)]
    allowed = parts if metadata.get("kind") == PROSODY else ["encoder", *parts]
    for part, path in new_paths.items():
        if part not in allowed:
            raise InputError(
                f"{part}={path}: the features' encoder is {metadata.get('name')}, which has "
                + (f"no {part}; allowed: {', '.join(allowed)}" if allowed else "no files")
            )
    changed = {
        part: str(pathlib.Path(path).absolute()) if pathlib.Path(path).exists() else path
        for part, path in new_paths.items()
    }
    name = changed.pop("encoder", metadata["name"])
    return {**metadata, "name": name, "options": {**options, **changed}}
