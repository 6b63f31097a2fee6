"""Key table of SALMONN checkpoints, and loading of a `Salmonn` from its four checkpoints.

SALMONN's file holds the trained parameters: the Q-Former and the language model's LoRA. Whisper,
BEATs and Vicuna come from their own releases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from mister_jax.convert import decoder as decoder_table
from mister_jax.convert.key_table import KeyTable, Source, Tensor, layer_names, load_params
from mister_jax.convert.names import load_backbone
from mister_jax.encoders import beats as beats_table
from mister_jax.encoders import whisper as whisper_table
from mister_jax.encoders.salmonn.config import QFormerConfig, SalmonnConfig
from mister_jax.encoders.salmonn.modeling import Salmonn

# Further tensors of SALMONN's file: training state, buffers and copies of parameters.
IGNORED = (
    r"^(optimizer|scaler|config)\.",
    r"\.position_ids$",
    r"\.rotary_emb\.inv_freq$",
    r"(^|\.)beats\.encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$",
)
# Prefix of the parameters in the files of SALMONN and BEATs.
PREFIX = "model."

# Module of the Q-Former, or of one of its layers -> the official name.
_NORMS = {
    "speech_norm": "ln_speech",
    "sound_norm": "ln_audio",
    "query_norm": "speech_Qformer.bert.embeddings.LayerNorm",
}
_LAYER_NORMS = {
    "attention/norm": "attention.output.LayerNorm",
    "cross_attention/norm": "crossattention.output.LayerNorm",
    "mlp_norm": "output_query.LayerNorm",
}
_LAYER_LINEARS = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "cross_attention/query": "crossattention.self.query",
    "cross_attention/key": "crossattention.self.key",
    "cross_attention/value": "crossattention.self.value",
    "cross_attention/out": "crossattention.output.dense",
    "mlp_in": "intermediate_query.dense",
    "mlp_out": "output_query.dense",
}
_LORA = {"query": "q_proj", "value": "v_proj"}


def qformer_key_table(config: QFormerConfig) -> KeyTable:
    """Returns the tensor names of SALMONN's file for each parameter of a `WindowQFormer`."""

    def of_layers(name: str, axes: tuple[int, ...] | None = None) -> Source:
        pattern = f"speech_Qformer.bert.encoder.layer.{{}}.{name}"
        return Source(layer_names(pattern, config.num_layers), axes=axes, stacked=True)

    table = {
        "queries": Source(
            ("speech_query_tokens",),
            combine=lambda tokens: tokens[0][0],
            split=lambda tokens: [np.asarray(tokens)[None]],
        ),
        "projection/kernel": Source(("speech_llama_proj.weight",), axes=(1, 0)),
        "projection/bias": Source(("speech_llama_proj.bias",)),
    }
    for ours, theirs in _NORMS.items():
        table[f"{ours}/scale"] = Source((f"{theirs}.weight",))
        table[f"{ours}/bias"] = Source((f"{theirs}.bias",))
    for ours, theirs in _LAYER_LINEARS.items():
        table[f"layers/layers/{ours}/kernel"] = of_layers(f"{theirs}.weight", axes=(1, 0))
        table[f"layers/layers/{ours}/bias"] = of_layers(f"{theirs}.bias")
    for ours, theirs in _LAYER_NORMS.items():
        table[f"layers/layers/{ours}/scale"] = of_layers(f"{theirs}.weight")
        table[f"layers/layers/{ours}/bias"] = of_layers(f"{theirs}.bias")
    return table


def key_table(config: SalmonnConfig) -> KeyTable:
    """Returns the tensor names of SALMONN's file for the `TRAINED_PARAMS` parameters of a `Salmonn`."""
    table = {
        f"qformer/{path}": source for path, source in qformer_key_table(config.qformer).items()
    }
    for ours, theirs in _LORA.items():
        for side in ("a", "b"):
            names = layer_names(
                f"llama_model.base_model.model.model.layers.{{}}.self_attn.{theirs}."
                f"lora_{side.upper()}.default.weight",
                config.decoder.num_layers,
            )
            table[f"decoder/layers/layers/attention/{ours}/lora_{side}"] = Source(
                names, axes=(1, 0), stacked=True
            )
    return table


def load_salmonn(
    module: Salmonn,
    *,
    whisper: Mapping[str, Tensor],
    beats: Mapping[str, Tensor],
    vicuna: Mapping[str, Tensor],
    salmonn: Mapping[str, Tensor],
    shardings: Any = None,
) -> Salmonn:
    """Fills a `Salmonn` from the checkpoints of its parts; see `load_params`.

    Args:
      module: Concrete module, or an abstract one from `nnx.eval_shape`, with LoRA on queries and
        values.
      whisper: Whisper in transformers' format, with or without a head.
      beats: BEATs as released, with the prefix "model.".
      vicuna: Vicuna in transformers' format, with or without a head.
      salmonn: SALMONN as released, with the prefix "model.".
      shardings: One sharding for all parameters, or a tree of them for the module.

    Returns:
      The module.

    Raises:
      InputError: Tensors of a checkpoint are missing, surplus, misshapen or not finite.
      ValueError: The module has LoRA on other layers.
    """
    config = module.config

    def fill(
        part: str, table: KeyTable, load_salmonn: Callable[..., Any], *options: Any, **more: Any
    ):
        part_table = {f"{part}/{path}": source for path, source in table.items()}
        skip = nnx.Any(nnx.Not(_within(part)), nnx.LoRAParam)
        load(module, part_table, *options, shardings=shardings, skip=skip, **more)

    fill(
        "whisper",
        whisper_table.key_table(config.whisper),
        load_backbone,
        whisper,
        whisper_table.NAME_RULES,
    )
    fill(
        "beats",
        beats_table.key_table(config.beats),
        load_params,
        beats,
        prefix=PREFIX,
        ignore=beats_table.IGNORED,
    )
    fill(
        "decoder",
        decoder_table.key_table(config.decoder, ""),
        load_backbone,
        vicuna,
        decoder_table.NAME_RULES,
    )
    return load_params(
        module,
        key_table(config),
        salmonn,
        prefix=PREFIX,
        ignore=IGNORED,
        shardings=shardings,
        skip=nnx.Not(TRAINED_PARAMS),
    )


def _within(part: str) -> Callable[[tuple[Any, ...], Any], bool]:
    return lambda path, _: path[0] == part


# NNX filter of the parameters in SALMONN's file, which `key_table` describes.
TRAINED_PARAMS = nnx.Any(_within("qformer"), nnx.LoRAParam)
