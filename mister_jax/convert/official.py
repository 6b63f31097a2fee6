"""Converts the released MiSTER-E weights (PyTorch, stage 2) to a `MisterE` model.

The official attention applies two consecutive linear layers to the queries, keys and values, and
two to the output. In `MisterE`, one layer replaces each pair of layers, and the kernel of this
layer is the product of the pair's kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mister_jax.convert.key_table import Source, linear, norm, parameter
from mister_jax.convert.params import load_params
from mister_jax.convert.safetensors import Checkpoint
from mister_jax.errors import InputError
from mister_jax.models import MisterE, MisterEConfig
from mister_jax.nn.rngs import make_rngs

# Parts of the official layer names in each block of a co-attention layer. The columns are the
# query, key and value projections, the attention, the output projection and the LayerNorm. The
# first row is for speech, and the second row is for text.
_BLOCKS = {
    "cross_attention": (
        ("audq", "asrk", "asrv", "aud", "audio", "a"),
        ("asrq", "audk", "audv", "asr", "text", "t"),
    ),
    "self_attention": (
        ("audq_s", "audk_s", "audv_s", "selfaud", "aud_s", "a_s"),
        ("asrq_s", "asrk_s", "asrv_s", "selfasr", "text_s", "t_s"),
    ),
}
_EXPERTS = {"speech": "audio_self", "text": "text_self"}
# For each parameter of a GRU layer: the official name, the permutation of the axes of one
# direction's tensor, and the axis along which the directions are stacked.
_GRU = {
    "input_kernel": ("weight_ih", (1, 0), 1),
    "recurrent_kernel": ("weight_hh", (1, 0), 0),
    "input_bias": ("bias_ih", None, 0),
    "recurrent_bias": ("bias_hh", None, 0),
}
_LINEARS = {
    "fusion/speech_in": "fusion.fc_aud",
    "fusion/text_in": "fusion.fc_text",
    "fusion/speech_skip": "fusion.fc_aud_self",
    "fusion/text_skip": "fusion.fc_text_self",
    "fusion/projection": "fusion.fc",
    "fusion/classifier": "fusion.fc_2",
    "gate/mlp_in": "gate.0",
    "gate/mlp_out": "gate.2",
}
# Key biases are not loaded, because they have no effect on attention.
_UNUSED = r"fusion\.units\.\d+\.fc_(asrk|audk)(_s)?\.bias"
_ALLOWED = "a mapping of arrays, .npz, .safetensors or, if PyTorch is installed, .pth or .pt"

Arrays = Mapping[str, np.ndarray]


def load_mister_e(
    source: Mapping[str, Any] | str | pathlib.Path, *, attention_heads: int = 3, **changes: Any
) -> MisterE:
    """Creates a `MisterE` model from an official `state_dict`.

    The sizes are read from the weights. The outputs equal the official model's outputs up to
    rounding.

    Args:
      source: Mapping from official names to arrays, or path of a `.npz`, `.safetensors`, `.pth` or
        `.pt` file. `.pth` and `.pt` files need PyTorch.
      attention_heads: Number of attention heads, which cannot be read from the weights; 3 in the
        released model.
      **changes: Further fields of `MisterEConfig`, such as dropout rates or `dtype`.

    Raises:
      InputError: The file cannot be read, or weights are missing, unexpected or mismatched.
    """
    weights = _read(source)
    convolutions = {match[1] for match in _matches(r"audio_self\.(conv\d*)\.weight", weights)}
    kernels = sorted(convolutions) or ["conv"]
    gru_layers = _count(r"audio_self\.rnn_1\.weight_ih_l(\d+)", weights)
    fusion_layers = _count(r"fusion\.units\.(\d+)\.", weights)
    table = _key_table(kernels, gru_layers, fusion_layers)
    _check_names(weights, table)
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
        model = MisterE(config, rngs=make_rngs(0))
    except ValueError as error:
        raise InputError(f"official weights: {error}") from error
    checkpoint = Checkpoint(pathlib.Path("official weights"), weights)
    return load_params(model, table, checkpoint, ignore=[_UNUSED])


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
        # The file is opened here, because NumPy does not close a damaged archive.
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
    """Returns a number of layers: 1 plus the largest index in names that match the pattern."""
    return 1 + max((int(match[1]) for match in _matches(pattern, names)), default=0)


def _key_table(kernels: list[str], gru_layers: int, fusion_layers: int) -> dict[str, Source]:
    """Returns the key table for a model with the given convolutions and numbers of layers."""
    table: dict[str, Source] = {}
    for path, name in _LINEARS.items():
        table |= linear(path, name)
    table |= norm("fusion/norm", "fusion.bn")
    for expert, official in _EXPERTS.items():
        table |= linear(f"{expert}/skip", f"{official}.fc_1")
        table |= linear(f"{expert}/classifier", f"{official}.fc")
        for index, name in enumerate(kernels):
            path, name = f"{expert}/convolution", f"{official}.{name}"
            table[f"{path}/kernels/{index}"] = parameter(f"{name}.weight", axes=(1, 2, 0))
            table[f"{path}/biases/{index}"] = parameter(f"{name}.bias")
        for layer in range(gru_layers):
            for name, (kind, axes, axis) in _GRU.items():
                names = tuple(f"{official}.rnn_1.{kind}_l{layer}{end}" for end in ("", "_reverse"))
                stack = functools.partial(np.stack, axis=axis)
                table[f"{expert}/gru/layers/{layer}/{name}"] = Source(names, axes, combine=stack)
    for unit in range(fusion_layers):
        for block, blocks in _BLOCKS.items():
            tables = [_attention(f"fusion.units.{unit}", *names) for names in blocks]
            for name, first in tables[0].items():
                names = tuple(itertools.chain(*(sources[name].names for sources in tables)))
                path = f"fusion/layers/{unit}/{block}/stack/{name}"
                table[path] = dataclasses.replace(first, names=names, stacked=True)
    return table


def _attention(
    unit: str, query: str, key: str, value: str, attention: str, out: str, norm_name: str
) -> dict[str, Source]:
    """Returns the key table for an attention block.

    The table merges each pair of consecutive projections into one.
    """
    query, key, value, out = (f"{unit}.fc_{name}" for name in (query, key, value, out))
    attention = f"{unit}.multihead_attn_{attention}"
    weight, bias = f"{attention}.in_proj_weight", f"{attention}.in_proj_bias"
    out_proj = f"{attention}.out_proj"
    sources = {
        "query/kernel": _kernel((query,), weight, (0,)),
        "query/bias": _bias(query, weight, bias, 0),
        "key_value/kernel": _kernel((key, value), weight, (1, 2)),
        "value_bias": _bias(value, weight, bias, 2),
        "out/kernel": _kernel((out_proj,), f"{out}.weight", (None,)),
        "out/bias": _bias(out_proj, f"{out}.weight", f"{out}.bias", None),
    }
    table = {f"attention/{name}": source for name, source in sources.items()}
    return table | norm("norm", f"{unit}.layer_norm_{norm_name}")


def _kernel(first: tuple[str, ...], second: str, thirds: tuple[int | None, ...]) -> Source:
    """Returns the source of one or more merged kernels, concatenated along the outputs.

    Each layer in `first` is merged with the layer that follows it, whose weight is in `second`. In
    the input projection of an attention, `second` stacks the query, key and value weights, and
    `thirds[i]` is the index of the weight that follows `first[i]`. If `thirds[i]` is None, the
    weight is all of `second`.
    """

    def combine(tensors: list[np.ndarray]) -> np.ndarray:
        *weights, after = (tensor.astype(np.float64) for tensor in tensors)
        products = (
            _third(after, third) @ weight for third, weight in zip(thirds, weights, strict=True)
        )
        return np.concatenate(list(products)).T

    return Source((*(f"{name}.weight" for name in first), second), combine=combine)


def _bias(first: str, weight: str, bias: str, third: int | None) -> Source:
    """Returns the source of a merged bias; see `_kernel`."""

    def combine(tensors: list[np.ndarray]) -> np.ndarray:
        inner, kernel, outer = (tensor.astype(np.float64) for tensor in tensors)
        return _third(kernel, third) @ inner + _third(outer, third)

    return Source((f"{first}.bias", weight, bias), combine=combine)


def _third(value: np.ndarray, index: int | None) -> np.ndarray:
    return value if index is None else np.split(value, 3)[index]


def _check_names(weights: Arrays, table: Mapping[str, Source]) -> None:
    """Raises InputError if weights are missing, unexpected or have a wrong number of axes."""
    expected = {name for source in table.values() for name in source.names}
    # The table omits the key biases, but every linear layer in the file has a bias.
    expected |= {re.sub("weight$", "bias", name) for name in expected if ".fc_" in name}
    missing, unexpected = sorted(expected - set(weights)), sorted(set(weights) - expected)
    if missing or unexpected:
        raise InputError(
            f"official weights: {len(missing)} missing {missing}, {len(unexpected)} unexpected "
            f"{unexpected}"
        )
    wrong = [
        f"{name} {weights[name].shape} instead of {_num_axes(name)} axes"
        for name in sorted(expected)
        if weights[name].ndim != _num_axes(name)
    ]
    if wrong:
        raise InputError(f"official weights: {len(wrong)} mismatched: {'; '.join(wrong)}")


def _num_axes(name: str) -> int:
    if "bias" in name or re.search(r"\.(layer_norm_\w+|bn)\.", name):
        return 1
    return 3 if re.search(r"\.conv\d*\.", name) else 2
