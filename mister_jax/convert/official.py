"""Converts the released MiSTER-E weights (PyTorch, stage 2) to a `MisterE`.

The official attention applies two linear projections in a row, without anything in between: to
queries, keys and values, and to the output. `MisterE` has one projection for each pair, whose
weights are the products of both.
"""

from __future__ import annotations

import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.convert.safetensors import Checkpoint
from mister_jax.errors import InputError
from mister_jax.models import MisterE, MisterEConfig
from mister_jax.nn import MultiHeadAttention

# Official names of each block of a co-attention layer, in this order: query, key and value
# projections, attention, output projection, LayerNorm. The first stream is speech, the second text.
_BLOCKS = {
    "first_to_second": ("audq", "asrk", "asrv", "aud", "audio", "a"),
    "second_to_first": ("asrq", "audk", "audv", "asr", "text", "t"),
    "first_self": ("audq_s", "audk_s", "audv_s", "selfaud", "aud_s", "a_s"),
    "second_self": ("asrq_s", "asrk_s", "asrv_s", "selfasr", "text_s", "t_s"),
}
_EXPERTS = {"speech": "audio_self", "text": "text_self"}
_DIRECTIONS = ("", "_reverse")
_ALLOWED = "a mapping of arrays, .npz, .safetensors, or .pth with PyTorch installed"

Arrays = Mapping[str, np.ndarray]
_Linear = tuple[np.ndarray, np.ndarray]  # weight [out, in], bias [out]


def load_mister_e(
    source: Mapping[str, Any] | str | pathlib.Path, *, attention_heads: int = 3, **changes: Any
) -> MisterE:
    """Creates a `MisterE` from an official `state_dict`, with the sizes of its weights.

    Args:
      source: Mapping of official names to arrays, or a file: `.npz`, `.safetensors`, or with
        PyTorch installed `.pth`.
      attention_heads: Number of attention heads, which the weights do not show; 3 in the released
        model.
      **changes: Further fields of `MisterEConfig`, such as dropout rates or `dtype`.

    Returns:
      The model, whose outputs equal the official ones.

    Raises:
      InputError: The file cannot be read, or weights are missing, surplus or misshapen; one line
        names all of them.
    """
    weights = _read(source)
    convolutions = {match[1] for match in _matches(r"audio_self\.(conv\d*)\.weight", weights)}
    kernels = sorted(convolutions) or ["conv"]
    gru_layers = _count(r"audio_self\.rnn_1\.weight_ih_l(\d+)", weights)
    fusion_layers = _count(r"fusion\.units\.(\d+)\.", weights)
    _check_names(weights, _template(kernels, gru_layers, fusion_layers))

    try:
        config = MisterEConfig(
            num_classes=weights["audio_self.fc.weight"].shape[0],
            speech_dim=weights["audio_self.fc_1.weight"].shape[-1],
            text_dim=weights["text_self.fc_1.weight"].shape[-1],
            context_dim=weights["audio_self.fc_1.weight"].shape[0],
            kernel_sizes=tuple(weights[f"audio_self.{name}.weight"].shape[-1] for name in kernels),
            gru_layers=gru_layers,
            fusion_dim=weights["fusion.fc_aud.weight"].shape[0],
            fusion_layers=fusion_layers,
            attention_dim=weights["fusion.units.0.fc_audq.weight"].shape[0],
            gate_dim=weights["gate.0.weight"].shape[0],
            attention_heads=attention_heads,
            **changes,
        )
        _check_shapes(weights, _shapes(config, kernels))
        model = MisterE(config, rngs=nnx.Rngs(0))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(f"official weights: {error}") from error
    return _fill(model, weights, kernels)


def _read(source: Mapping[str, Any] | str | pathlib.Path) -> Arrays:
    if not isinstance(source, str | pathlib.Path):
        return {name: np.asarray(value) for name, value in source.items()}
    path = pathlib.Path(source)
    if not path.is_file():
        raise InputError(f"{path}: no such file; allowed: {_ALLOWED}")
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise InputError(f"{path}: unknown file type {path.suffix!r}; allowed: {_ALLOWED}")
    checkpoint = Checkpoint.open(path)
    if path.suffix != ".safetensors" and checkpoint.metadata:
        raise InputError(f"{path}: not a state_dict; allowed: a mapping of names to tensors")
    return {name: np.array(tensor[...]) for name, tensor in checkpoint.items()}


def _read_npz(path: pathlib.Path) -> Arrays:
    try:
        # Opened here, because NumPy does not close a damaged archive.
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            if not isinstance(content, np.lib.npyio.NpzFile):
                raise ValueError("a single array, not an archive")
            return dict(content)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path}: not a readable .npz file ({error})") from error


def _matches(pattern: str, names: Iterable[str]) -> Iterable[re.Match[str]]:
    return (match for name in names if (match := re.match(pattern, name)))


def _count(pattern: str, names: Iterable[str]) -> int:
    """Returns one more than the largest index that matches the pattern; 1 without a match."""
    return 1 + max((int(match[1]) for match in _matches(pattern, names)), default=0)


def _shapes(config: MisterEConfig, kernels: list[str]) -> dict[str, tuple[int, ...]]:
    """Returns the official names and shapes of a model with this config."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, out_features: int, in_features: int) -> None:
        shapes[f"{name}.weight"] = (out_features, in_features)
        shapes[f"{name}.bias"] = (out_features,)

    classes, context, width = config.num_classes, config.context_dim, config.fusion_dim
    for expert, features in (("audio_self", config.speech_dim), ("text_self", config.text_dim)):
        linear(f"{expert}.fc_1", context, features)
        linear(f"{expert}.fc", classes, context)
        for name, size in zip(kernels, config.kernel_sizes, strict=True):
            shapes[f"{expert}.{name}.weight"] = (context, features, size)
            shapes[f"{expert}.{name}.bias"] = (context,)
        hidden = context // 2
        for layer in range(config.gru_layers):
            for direction in _DIRECTIONS:
                suffix = f"l{layer}{direction}"
                shapes[f"{expert}.rnn_1.weight_ih_{suffix}"] = (3 * hidden, context)
                shapes[f"{expert}.rnn_1.weight_hh_{suffix}"] = (3 * hidden, hidden)
                shapes[f"{expert}.rnn_1.bias_ih_{suffix}"] = (3 * hidden,)
                shapes[f"{expert}.rnn_1.bias_hh_{suffix}"] = (3 * hidden,)
    linear("fusion.fc_aud", width, config.speech_dim)
    linear("fusion.fc_aud_self", width, config.speech_dim)
    linear("fusion.fc_text", width, config.text_dim)
    linear("fusion.fc_text_self", width, config.text_dim)
    for unit in range(config.fusion_layers):
        for *projections, attention, out, norm in _BLOCKS.values():
            prefix = f"fusion.units.{unit}"
            inner = config.attention_dim
            for projection in projections:
                linear(f"{prefix}.fc_{projection}", inner, width)
            shapes[f"{prefix}.multihead_attn_{attention}.in_proj_weight"] = (3 * inner, inner)
            shapes[f"{prefix}.multihead_attn_{attention}.in_proj_bias"] = (3 * inner,)
            linear(f"{prefix}.multihead_attn_{attention}.out_proj", inner, inner)
            linear(f"{prefix}.fc_{out}", width, inner)
            shapes[f"{prefix}.layer_norm_{norm}.weight"] = (width,)
            shapes[f"{prefix}.layer_norm_{norm}.bias"] = (width,)
    shapes["fusion.bn.weight"] = shapes["fusion.bn.bias"] = (2 * width,)
    linear("fusion.fc", width, 2 * width)
    linear("fusion.fc_2", classes, width)
    linear("gate.0", config.gate_dim, 3 * classes)
    linear("gate.2", 3, config.gate_dim)
    return shapes


def _template(
    kernels: list[str], gru_layers: int, fusion_layers: int
) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of a model with default sizes, to check names and ranks."""
    depths = MisterEConfig(
        gru_layers=gru_layers, fusion_layers=fusion_layers, kernel_sizes=(1,) * len(kernels)
    )
    return _shapes(depths, kernels)


def _check_names(weights: Arrays, template: dict[str, tuple[int, ...]]) -> None:
    missing, surplus = sorted(set(template) - set(weights)), sorted(set(weights) - set(template))
    if missing or surplus:
        raise InputError(
            f"official weights: {len(missing)} missing {missing}, {len(surplus)} surplus {surplus}"
        )
    _check_no_misshapen(
        f"{name} {weights[name].shape} instead of {len(shape)} axes"
        for name, shape in template.items()
        if weights[name].ndim != len(shape)
    )


def _check_shapes(weights: Arrays, expected: dict[str, tuple[int, ...]]) -> None:
    _check_no_misshapen(
        f"{name} {weights[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if weights[name].shape != shape
    )


def _check_no_misshapen(descriptions: Iterable[str]) -> None:
    misshapen = list(descriptions)
    if misshapen:
        raise InputError(f"official weights: {len(misshapen)} misshapen: {'; '.join(misshapen)}")


def _put(param: nnx.Param | None, value: np.ndarray) -> None:
    assert param is not None  # All layers here have a bias.
    param.set_value(jnp.asarray(value, param.dtype))


def _fill(model: MisterE, weights: Arrays, kernels: list[str]) -> MisterE:
    """Fills the model with the weights and returns it."""

    def linear(module: nnx.Linear, name: str) -> None:
        _put(module.kernel, weights[f"{name}.weight"].T)
        _put(module.bias, weights[f"{name}.bias"])

    def norm(module: nnx.LayerNorm, name: str) -> None:
        _put(module.scale, weights[f"{name}.weight"])
        _put(module.bias, weights[f"{name}.bias"])

    for name, official in _EXPERTS.items():
        expert = getattr(model, name)
        linear(expert.skip, f"{official}.fc_1")
        linear(expert.classifier, f"{official}.fc")
        for index, convolution in enumerate(kernels):
            kernel = weights[f"{official}.{convolution}.weight"].transpose(1, 2, 0)
            _put(expert.convolution.kernels[index], kernel)
            _put(expert.convolution.biases[index], weights[f"{official}.{convolution}.bias"])
        for depth, layer in enumerate(expert.gru.layers):

            def both_directions(kind: str, depth: int = depth, official: str = official):
                names = [f"{official}.rnn_1.{kind}_l{depth}{end}" for end in _DIRECTIONS]
                return np.stack([weights[name] for name in names])

            _put(layer.input_kernel, both_directions("weight_ih").transpose(2, 0, 1))
            _put(layer.recurrent_kernel, both_directions("weight_hh").transpose(0, 2, 1))
            _put(layer.input_bias, both_directions("bias_ih"))
            _put(layer.recurrent_bias, both_directions("bias_hh"))

    fusion = model.fusion
    linear(fusion.speech_in, "fusion.fc_aud")
    linear(fusion.text_in, "fusion.fc_text")
    linear(fusion.speech_skip, "fusion.fc_aud_self")
    linear(fusion.text_skip, "fusion.fc_text_self")
    for unit, co_attention in enumerate(fusion.layers):
        for name, (*projections, attention, out, norm_name) in _BLOCKS.items():
            block, prefix = getattr(co_attention, name), f"fusion.units.{unit}"
            _fill_attention(
                block.attention,
                weights,
                [f"{prefix}.fc_{projection}" for projection in projections],
                f"{prefix}.multihead_attn_{attention}",
                f"{prefix}.fc_{out}",
            )
            norm(block.norm, f"{prefix}.layer_norm_{norm_name}")
    norm(fusion.norm, "fusion.bn")
    linear(fusion.projection, "fusion.fc")
    linear(fusion.classifier, "fusion.fc_2")
    assert model.gate is not None  # The config has the mixture "gate".
    linear(model.gate.mlp_in, "gate.0")
    linear(model.gate.mlp_out, "gate.2")
    return model


def _fill_attention(
    module: MultiHeadAttention,
    weights: Arrays,
    projections: list[str],
    attention: str,
    out: str,
) -> None:
    """Fills an attention with the products of each pair of projections, computed in float64."""

    def product(first: _Linear, second: _Linear) -> _Linear:  # second(first(x))
        weight = second[0].astype(np.float64)
        return weight @ first[0], weight @ first[1] + second[1]

    def put(linear: nnx.Linear, projection: _Linear) -> None:
        _put(linear.kernel, projection[0].T)
        _put(linear.bias, projection[1])

    def pair(name: str) -> _Linear:
        return weights[f"{name}.weight"], weights[f"{name}.bias"]

    inner = zip(
        np.split(weights[f"{attention}.in_proj_weight"], 3),
        np.split(weights[f"{attention}.in_proj_bias"], 3),
        strict=True,
    )
    query, key, value = map(product, map(pair, projections), inner)
    put(module.query, query)
    _put(module.key_value.kernel, np.concatenate([key[0], value[0]]).T)
    _put(module.value_bias, value[1])  # The bias of the keys has no effect.
    put(module.out, product(pair(f"{attention}.out_proj"), pair(out)))
