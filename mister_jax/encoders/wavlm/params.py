"""Key table and name rules of wav2vec 2.0, HuBERT and WavLM checkpoints, for `WavLM`.

transformers splits the positional convolution's weight into gain and direction; here it is one.
"""

from __future__ import annotations

import dataclasses

from mister_jax.convert.key_table import KeyTable, Source, layer_names
from mister_jax.convert.names import NameRules
from mister_jax.convert.weight_norm import merge_weight_norm, split_weight_norm
from mister_jax.encoders.wavlm.config import WavLMConfig

NAME_RULES = NameRules(
    prefixes=("", "wav2vec2.", "hubert.", "wavlm."),
    # New files spell the gain and the direction of weight normalization differently.
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

# Module of a layer -> its name in transformers.
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

    def of_layers(name: str, axes: tuple[int, ...] | None = None, **how) -> Source:
        return Source(
            layer_names(f"encoder.layers.{{}}.{name}", config.num_layers), axes, True, **how
        )

    convolution = "encoder.pos_conv_embed.conv"
    table = {
        "position_convolution/kernel": Source(
            (f"{convolution}.weight_g", f"{convolution}.weight_v"),
            combine=merge_weight_norm,
            split=split_weight_norm,
        ),
        "position_convolution/bias": Source((f"{convolution}.bias",)),
        "projection/kernel": Source(("feature_projection.projection.weight",), (1, 0)),
        "projection/bias": Source(("feature_projection.projection.bias",)),
        "norm/scale": Source(("encoder.layer_norm.weight",)),
        "norm/bias": Source(("encoder.layer_norm.bias",)),
    }
    if config.projection_norm:
        table["projection_norm/scale"] = Source(("feature_projection.layer_norm.weight",))
        table["projection_norm/bias"] = Source(("feature_projection.layer_norm.bias",))
    for index in range(len(config.conv_dims)):
        ours, theirs = "waveform_encoder", f"feature_extractor.conv_layers.{index}"
        table[f"{ours}/convolutions/{index}/kernel"] = Source((f"{theirs}.conv.weight",), (2, 1, 0))
        if config.conv_bias:
            table[f"{ours}/convolutions/{index}/bias"] = Source((f"{theirs}.conv.bias",))
        if config.conv_norm == "layer":
            table[f"{ours}/norms/{index}/scale"] = Source((f"{theirs}.layer_norm.weight",))
            table[f"{ours}/norms/{index}/bias"] = Source((f"{theirs}.layer_norm.bias",))
        elif index == 0:
            table[f"{ours}/channel_norm/scale"] = Source((f"{theirs}.layer_norm.weight",))
            table[f"{ours}/channel_norm/bias"] = Source((f"{theirs}.layer_norm.bias",))
    for ours, theirs in _LINEARS.items():
        table[f"layers/layers/{ours}/kernel"] = of_layers(f"{theirs}.weight", (1, 0))
        table[f"layers/layers/{ours}/bias"] = of_layers(f"{theirs}.bias")
    for ours, theirs in _NORMS.items():
        table[f"layers/layers/{ours}/scale"] = of_layers(f"{theirs}.weight")
        table[f"layers/layers/{ours}/bias"] = of_layers(f"{theirs}.bias")
    if config.num_buckets:
        first_layer = "encoder.layers.0.attention.rel_attn_embed.weight"
        gate = "attention.gru_rel_pos"
        table["position_bias/embedding"] = Source((first_layer,))
        table["layers/layers/gate/projection/kernel"] = of_layers(f"{gate}_linear.weight", (1, 0))
        table["layers/layers/gate/projection/bias"] = of_layers(f"{gate}_linear.bias")
        table["layers/layers/gate/scale"] = of_layers(
            f"{gate}_const",
            combine=lambda scales: scales[0].reshape(-1),
            split=lambda scale: [scale.reshape(1, -1, 1, 1)],
        )
    return table
