"""Key table of SALMONN checkpoints, and loading of a `Salmonn` from its four checkpoints.

SALMONN's file holds the trained parameters: the Q-Former and the LoRA of the language model.
Whisper, BEATs and Vicuna come from their own releases.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from flax import nnx

from mister_jax.convert.key_table import KeyTable, Source, layer_names, linear, norm
from mister_jax.convert.params import load_backbone, load_params
from mister_jax.convert.safetensors import Checkpoint, Tensor
from mister_jax.encoders import beats as beats_encoder
from mister_jax.encoders import decoder
from mister_jax.encoders import whisper as whisper_encoder
from mister_jax.encoders.salmonn.config import QFormerConfig, SalmonnConfig
from mister_jax.encoders.salmonn.modeling import Salmonn
from mister_jax.errors import InputError

PREFIX = "model."
"""Prefix of the parameters in the files of SALMONN and BEATs."""
# Further tensors of SALMONN's file: training state, buffers and copies of parameters.
_IGNORED = (
    r"^(optimizer|scaler|config)\.",
    r"\.position_ids$",
    r"\.rotary_emb\.inv_freq$",
    r"(^|\.)beats\.encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$",
)
_LLM_LAYER = "llama_model.base_model.model.model.layers.{}"
_QFORMER_LAYER = "speech_Qformer.bert.encoder.layer.{}"
_HEAD_DIM = 64  # The Q-Former has BERT's layers. No tensor holds the number of heads.

# Module of the Q-Former, or of one of its layers -> official name.
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


def key_table(config: SalmonnConfig) -> KeyTable:
    """Returns the tensor names of SALMONN's file for the `TRAINED_PARAMS` of a `Salmonn`."""
    table = {f"qformer/{path}": source for path, source in _qformer_table(config.qformer).items()}
    for path, name in _LORA.items():
        for side in ("a", "b"):
            pattern = f"{_LLM_LAYER}.self_attn.{name}.lora_{side.upper()}.default.weight"
            table[f"decoder/layers/layers/attention/{path}/lora_{side}"] = Source(
                layer_names(pattern, config.decoder.num_layers), axes=(1, 0), stacked=True
            )
    return table


def _qformer_table(config: QFormerConfig) -> KeyTable:
    """Returns the tensor names of SALMONN's file for each parameter of a `WindowQFormer`."""
    table = {
        "queries": Source(
            ("speech_query_tokens",),
            combine=lambda tokens: tokens[0][0],
            split=lambda tokens: [np.asarray(tokens)[None]],
        ),
        **linear("projection", "speech_llama_proj"),
    }
    for path, name in _NORMS.items():
        table |= norm(path, name)
    for path, name in _LAYER_LINEARS.items():
        table |= linear(f"layers/layers/{path}", f"{_QFORMER_LAYER}.{name}", config.num_layers)
    for path, name in _LAYER_NORMS.items():
        table |= norm(f"layers/layers/{path}", f"{_QFORMER_LAYER}.{name}", config.num_layers)
    return table


def read_sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads the sizes of the trained parameters from SALMONN's file.

    Returns:
      Fields of the `QFormerConfig` under "qformer", and the rank of the LoRA under "lora_rank".

    Raises:
      InputError: The file is no checkpoint of SALMONN.
    """

    def shape(name: str) -> tuple[int, ...]:
        name = f"{PREFIX}{name}"
        if name not in checkpoint:
            raise InputError(f"{checkpoint.path}: not a checkpoint of SALMONN: no tensor {name}")
        return tuple(checkpoint[name].shape)

    _, num_queries, hidden_size = shape("speech_query_tokens")
    layer = re.escape(_QFORMER_LAYER).replace(r"\{\}", r"(\d+)")
    layers = {match[1] for name in checkpoint if (match := re.search(rf"{layer}\.", name))}
    return {
        "qformer": {
            "hidden_size": hidden_size,
            "num_layers": len(layers),
            "num_heads": max(1, hidden_size // _HEAD_DIM),
            "mlp_dim": shape(f"{_QFORMER_LAYER.format(0)}.intermediate_query.dense.weight")[0],
            "num_queries": num_queries,
        },
        "lora_rank": shape(f"{_LLM_LAYER.format(0)}.self_attn.q_proj.lora_A.default.weight")[0],
    }


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
      whisper: Whisper in the format of transformers, with or without a head.
      beats: BEATs as released, with the prefix "model.".
      vicuna: Vicuna in the format of transformers, with or without a head.
      salmonn: SALMONN as released, with the prefix "model.".
      shardings: One sharding for all parameters, or a tree of them for the module.

    Returns:
      The module.

    Raises:
      InputError: Tensors of a checkpoint are missing, surplus, misshapen or not finite.
      ValueError: The module has LoRA on layers other than queries and values.
    """
    config = module.config

    def load_part(load: Callable[..., Any], part: str, table: KeyTable, *args: Any, **kwargs: Any):
        part_table = {f"{part}/{path}": source for path, source in table.items()}
        skip = nnx.Any(nnx.Not(_is_inside(part)), nnx.LoRAParam)
        load(module, part_table, *args, shardings=shardings, skip=skip, **kwargs)

    whisper_table = whisper_encoder.key_table(config.whisper)
    load_part(load_backbone, "whisper", whisper_table, whisper, whisper_encoder.NAME_RULES)
    beats_table = beats_encoder.key_table(config.beats)
    ignored = beats_encoder.IGNORED
    load_part(load_params, "beats", beats_table, beats, prefix=PREFIX, ignore=ignored)
    decoder_table = decoder.key_table(config.decoder, "")
    load_part(load_backbone, "decoder", decoder_table, vicuna, decoder.NAME_RULES)
    return load_params(
        module,
        key_table(config),
        salmonn,
        prefix=PREFIX,
        ignore=_IGNORED,
        shardings=shardings,
        skip=nnx.Not(TRAINED_PARAMS),
    )


def _is_inside(part: str) -> Callable[[tuple[Any, ...], Any], bool]:
    """Returns the NNX filter of a part's variables."""
    return lambda path, _: path[0] == part


TRAINED_PARAMS = nnx.Any(_is_inside("qformer"), nnx.LoRAParam)
"""NNX filter of the parameters in SALMONN's file, which `key_table` describes."""
