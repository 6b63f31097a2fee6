"""Heads of published classification checkpoints, which map hidden states to class logits.

A checkpoint of `transformers` for sequence or audio classification stores an encoder and a head.
`load_classifier` loads the encoder and the head. Shape letters: B sequences, N tokens or frames,
D hidden size, L layers, C classes.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.convert.safetensors import Checkpoint
from mister_jax.encoders.hf_config import CONFIG_FILE, read_config
from mister_jax.encoders.hub import fetch
from mister_jax.encoders.registry import find_architecture, load_module
from mister_jax.errors import InputError

_PLACEHOLDER_NAME = re.compile(r"LABEL_\d+")

Params = Mapping[str, jax.Array]
"""Parameters of a head by their names in the checkpoint."""


def _first_token_pooler(params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    pooled = jnp.tanh(_linear(params, "bert.pooler.dense", _first(x, mask)))
    return _linear(params, "classifier", pooled)


def _first_token_mlp(params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    hidden = jnp.tanh(_linear(params, "classifier.dense", _first(x, mask)))
    return _linear(params, "classifier.out_proj", hidden)


def _first_token_relu(params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    hidden = jax.nn.relu(_linear(params, "pre_classifier", _first(x, mask)))
    return _linear(params, "classifier", hidden)


def _last_token(params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return _linear(params, "score", x[jnp.arange(len(x)), last])


def _mean_of_frames(params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    projected = _linear(params, "projector", x)
    total = jnp.where(mask[..., None], projected, 0).sum(1)
    return _linear(params, "classifier", total / jnp.maximum(mask.sum(1), 1)[:, None])


def _mean_of_window(params: Params, x: jax.Array, mask: jax.Array) -> jax.Array:
    # As in transformers, the mean includes the silence after the clip.
    return _linear(params, "classifier", _linear(params, "projector", x).mean(1))


def _linear(params: Params, name: str, x: jax.Array) -> jax.Array:
    y = x @ params[f"{name}.weight"].T
    return y + params[f"{name}.bias"] if f"{name}.bias" in params else y


def _first(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the states of each sequence's first token, [B, D]; padding may be on the left."""
    return x[jnp.arange(len(x)), jnp.argmax(mask, axis=1)]


@dataclasses.dataclass(frozen=True)
class _Head:
    """Computation and tensor shapes of a head.

    Attributes:
      function: Function of (parameters, hidden states, mask) that returns the logits.
      shapes: Shape of each tensor, one letter per axis: D, C, or P (size of the projection).
      sums_normalized: Whether a weighted sum over the layers takes the last layer's states after
        the encoder's final LayerNorm instead of before it.
      options: Changes to the encoder's config that the head needs.
    """

    function: Callable[[Params, jax.Array, jax.Array], jax.Array]
    shapes: Mapping[str, str]
    sums_normalized: bool = False
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def _shapes(**layers: str) -> dict[str, str]:
    """Returns weight and bias shapes from the letters of each layer's output and input size."""
    shapes: dict[str, str] = {}
    for name, sizes in layers.items():
        path = name.replace("__", ".")
        shapes |= {f"{path}.weight": sizes, f"{path}.bias": sizes[0]}
    return shapes


_BERT = _Head(_first_token_pooler, _shapes(bert__pooler__dense="DD", classifier="CD"))
_ROBERTA = _Head(_first_token_mlp, _shapes(classifier__dense="DD", classifier__out_proj="CD"))
_DISTILBERT = _Head(_first_token_relu, _shapes(pre_classifier="DD", classifier="CD"))
_DECODER = _Head(_last_token, {"score.weight": "CD"})
_SPEECH = _Head(_mean_of_frames, _shapes(projector="PD", classifier="CP"))
_WHISPER = _Head(_mean_of_window, _SPEECH.shapes, sums_normalized=True, options={"trim": False})
_HEADS = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": _DISTILBERT,
    "llama": _DECODER,
    "qwen2": _DECODER,
    "whisper": _WHISPER,
    "wav2vec2": _SPEECH,
    "hubert": _SPEECH,
    "wavlm": _SPEECH,
}


class Classifier:
    """An encoder with the head of its checkpoint; see `load_classifier`.

    Attributes:
      module: Encoder.
      modality: "text" or "speech".
      class_names: Class names from the checkpoint, in the order of the logits.
      multi_label: Whether classes are independent, each with a sigmoid, as in GoEmotions.
    """

    def __init__(
        self,
        module: nnx.Module,
        head: _Head,
        params: Params,
        *,
        modality: str,
        class_names: tuple[str, ...],
        multi_label: bool,
    ):
        self.module = module
        self.modality = modality
        self.class_names = class_names
        self.multi_label = multi_label
        self._head, self._params = head, params

    def logits(self, inputs: jax.Array, sizes: jax.Array) -> jax.Array:
        """Returns logits, [B, C] float32.

        Args:
          inputs: Tokens, [B, N] int, or samples, [B, S] float.
          sizes: For text, whether a position has a token, [B, N] bool. For speech, the number of
            samples in each clip, [B] int.
        """
        params = dict(self._params)
        weights = params.pop("layer_weights", None)
        options = {} if weights is None else {"output_hidden_states": True}
        result: Any = self.module(inputs, sizes, **options)
        if self.modality == "text":
            x, mask = result, jnp.asarray(sizes).astype(bool)
        else:
            x, mask = result[:2]
        if weights is not None:
            # As in transformers 5, the last layer's states are taken before the final LayerNorm of
            # large models, except for Whisper. transformers 4 used the states after the LayerNorm.
            states = result[2].at[-1].set(x) if self._head.sums_normalized else result[2]
            x = jnp.einsum("l,lbnd->bnd", jax.nn.softmax(weights), states)
        return self._head.function(params, x.astype(jnp.float32), mask)

    def probabilities(self, inputs: jax.Array, sizes: jax.Array) -> jax.Array:
        """Returns the probabilities, [B, C], as a transformers pipeline does; see `logits`."""
        logits = self.logits(inputs, sizes)
        return jax.nn.sigmoid(logits) if self.multi_label else jax.nn.softmax(logits)


def load_classifier(name_or_folder: str | os.PathLike[str], **changes: Any) -> Classifier:
    """Loads the encoder and the head of a checkpoint for sequence or audio classification.

    Args:
      name_or_folder: Folder, or model name on the Hugging Face Hub; see `hub.fetch`.
      **changes: Further arguments of `registry.load_module`. Whisper always runs on clips padded to
        30 s, because Whisper's classification heads were trained with this padding.

    Raises:
      InputError: The checkpoint cannot be read, has no classification head, is a regression model,
        or is not supported.
    """
    folder = fetch(name_or_folder)
    hf_config = read_config(folder)
    architecture = find_architecture(hf_config, folder / CONFIG_FILE)
    model_type = hf_config["model_type"]
    if model_type not in _HEADS:
        raise InputError(
            f"{folder}: classification by {model_type!r} is not supported; allowed: "
            f"{', '.join(_HEADS)}"
        )
    head = _HEADS[model_type]
    try:
        config = architecture.config.from_huggingface(hf_config)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error
    params = _read_head(Checkpoint.open(folder), head, hf_config, config, folder)
    output = "score.weight" if head is _DECODER else [*head.shapes][-2]
    class_names = _class_names(hf_config, len(params[output]), folder)
    module = load_module(folder, hf_config=hf_config, **(changes | dict(head.options)))
    return Classifier(
        module,
        head,
        params,
        modality=architecture.modality,
        class_names=class_names,
        multi_label=hf_config.get("problem_type") == "multi_label_classification",
    )


def placeholder_names(class_names: tuple[str, ...]) -> list[str]:
    """Returns the class names like "LABEL_0", which transformers writes for unnamed classes."""
    return [name for name in class_names if _PLACEHOLDER_NAME.fullmatch(name)]


def _read_head(
    checkpoint: Checkpoint,
    head: _Head,
    hf_config: Mapping[str, Any],
    config: Any,
    folder: os.PathLike[str],
) -> dict[str, jax.Array]:
    shapes = dict(head.shapes)
    if "projector.weight" in shapes and hf_config.get("use_weighted_layer_sum"):
        shapes["layer_weights"] = "L"
    missing = [name for name in shapes if name not in checkpoint]
    if missing:
        raise InputError(
            f"{os.fspath(folder)}: no classification head ({', '.join(missing)} missing); needed: "
            "a checkpoint for sequence or audio classification"
        )
    params = {name: np.asarray(checkpoint[name][...], np.float32) for name in shapes}
    sizes = {"D": config.hidden_size, "L": config.num_layers + 1}
    for name, letters in shapes.items():
        shape = params[name].shape
        expected = tuple(
            sizes.setdefault(letter, size)
            for letter, size in zip(letters, shape, strict=len(letters) == len(shape))
        )
        if shape != expected:
            raise InputError(f"{os.fspath(folder)}: {name} {shape}; needed: {expected}")
        if not np.isfinite(params[name]).all():
            raise InputError(f"{os.fspath(folder)}: {name} has values that are not finite")
    return {name: jnp.asarray(value) for name, value in params.items()}


def _class_names(
    hf_config: Mapping[str, Any], num_classes: int, folder: os.PathLike[str]
) -> tuple[str, ...]:
    if hf_config.get("problem_type") == "regression" or num_classes == 1:
        raise InputError(f"{os.fspath(folder)}: a regression model; needed: a classifier")
    default = {str(index): f"LABEL_{index}" for index in range(num_classes)}
    names = {str(key): str(value) for key, value in (hf_config.get("id2label") or default).items()}
    num_names = len(set(names.values()))
    if names.keys() != default.keys() or num_names < num_classes:
        raise InputError(
            f"{os.fspath(folder)}: id2label has {len(names)} entries and {num_names} different "
            f"names; needed: {num_classes} different names for 0 to {num_classes - 1}"
        )
    return tuple(names[str(index)] for index in range(num_classes))
