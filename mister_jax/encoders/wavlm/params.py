"""Key table and name rules of wav2vec 2.0, HuBERT and WavLM checkpoints."""

from __future__ import annotations

import dataclasses

from mister_jax.convert.key_table import (
    KeyTable,
    NameRules,
    Source,
    conv,
    layer_names,
    linear,
    norm,
    parameter,
    weight_norm_conv,
)
from mister_jax.encoders.wavlm.config import WavLMConfig

NAME_RULES = NameRules(
    prefixes=("", "wav2vec2.", "hubert.", "wavlm."),
    # Newer files spell the gain and the direction of weight normalization differently.
    renamed={
        r"parametrizations\.weight\.original0$": "weight_g",
        r"parametrizations\.weight\.original1$": "weight_v",
    },
    unused=(r"^masked_spec_embed$",),
    heads=(
        r"^(quantizer|project_hid|project_q)\.",
        r"^(lm_head|classifier|projector|layer_weights|objective|tdnn)\b",
    ),
)
"""Variants of the tensor names in wav2vec 2.0 and HuBERT."""
WAVLM_NAME_RULES = dataclasses.replace(
    NAME_RULES, lora_bypassed=(r"\.attention\.(q_proj|k_proj|v_proj|out_proj)$",)
)
"""Variants of the tensor names in WavLM."""

# Module of a layer -> name in transformers.
_LINEARS = {
    "attention/query": "attention.q_proj",
    "attention/key": "attention.k_proj",
    "attention/value": "attention.v_proj",
    "attention/out": "attention.out_proj",
    "mlp_in": "feed_forward.intermediate_dense",
    "mlp_out": "feed_forward.output_dense",
}
_NORMS = {"attention_norm": "layer_norm", "mlp_norm": "final_layer_norm"}


def key_table(config: WavLMConfig) -> KeyTable:
    """Returns the tensor names of a `Wav2Vec2Model`, `HubertModel` or `WavLMModel`."""
    num_layers = config.num_layers
    table = {
        **linear("projection", "feature_projection.projection"),
        **weight_norm_conv("position_convolution", "encoder.pos_conv_embed.conv"),
        **norm("norm", "encoder.layer_norm"),
    }
    if config.projection_norm:
        table |= norm("projection_norm", "feature_projection.layer_norm")
    for index in range(len(config.conv_dims)):
        path, name = "waveform_encoder", f"feature_extractor.conv_layers.{index}"
        table |= conv(f"{path}/convolutions/{index}", f"{name}.conv", bias=config.conv_bias)
        if config.conv_norm == "layer":
            table |= norm(f"{path}/norms/{index}", f"{name}.layer_norm")
        elif index == 0:
            table |= norm(f"{path}/channel_norm", f"{name}.layer_norm")
    for path, name in _LINEARS.items():
        table |= linear(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", num_layers)
    for path, name in _NORMS.items():
        table |= norm(f"layers/layers/{path}", f"encoder.layers.{{}}.{name}", num_layers)
    if config.num_buckets:
        table |= _position_bias(num_layers)
    return table


def _position_bias(num_layers: int) -> KeyTable:
    """Returns the entries of WavLM's gated relative positions."""
    gate = "encoder.layers.{}.attention.gru_rel_pos"
    return {
        "position_bias/embedding": parameter("encoder.layers.0.attention.rel_attn_embed.weight"),
        **linear("layers/layers/gate/projection", f"{gate}_linear", num_layers),
        "layers/layers/gate/scale": Source(
            layer_names(f"{gate}_const", num_layers),
            stacked=True,
            combine=lambda scales: scales[0].reshape(-1),
            split=lambda scale: [scale.reshape(1, -1, 1, 1)],
        ),
    }
