"""MiSTER-E (stage 2) in PyTorch: the reference for tests and benchmarks.

The implementation follows arXiv 2602.23300 and its released code. Attributes have the names of the
released `state_dict`, so that the `state_dict` loads unchanged. `audio_self` is the speech expert,
and `text_self` is the text expert. As in the released code, nothing is masked: padding counts as
utterances.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from mister_jax.losses import LossWeights
from mister_jax.models import MisterEConfig

# Stream of the queries -> names of the block's query, key and value projections, attention, output
# projection and LayerNorm. Keys and values come from the other stream in the cross blocks, and from
# the same stream in the self blocks.
_CROSS_BLOCKS = {
    "speech": ("audq", "asrk", "asrv", "aud", "audio", "a"),
    "text": ("asrq", "audk", "audv", "asr", "text", "t"),
}
_SELF_BLOCKS = {
    "speech": ("audq_s", "audk_s", "audv_s", "selfaud", "aud_s", "a_s"),
    "text": ("asrq_s", "asrk_s", "asrv_s", "selfasr", "text_s", "t_s"),
}
_OTHER = {"speech": "text", "text": "speech"}


@dataclasses.dataclass(frozen=True)
class TorchOutput:
    """Outputs of `TorchMisterE`, as in `MisterEOutput`."""

    logits: torch.Tensor
    expert_logits: torch.Tensor
    gate: torch.Tensor
    speech_context: torch.Tensor
    text_context: torch.Tensor
    speech_repr: torch.Tensor
    text_repr: torch.Tensor


class _ContextExpert(nn.Module):
    """Expert of one modality: convolutions and a bidirectional GRU over the dialogue."""

    def __init__(self, features: int, config: MisterEConfig):
        super().__init__()
        context_dim = config.context_dim
        self.convolutions = []
        for size in config.kernel_sizes:
            name = "conv" if size == 1 else f"conv{size}"
            self.add_module(name, nn.Conv1d(features, context_dim, size, padding=size // 2))
            self.convolutions.append(name)
        self.rnn_1 = nn.GRU(
            context_dim,
            context_dim // 2,
            config.gru_layers,
            bidirectional=True,
            batch_first=True,
        )
        self.fc_1 = nn.Linear(features, context_dim)
        self.fc = nn.Linear(context_dim, config.num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels = x.transpose(1, 2)  # [B, D, T]
        branches = [
            functional.relu(self.get_submodule(name)(channels)) for name in self.convolutions
        ]
        recurrent, _ = self.rnn_1(functools.reduce(torch.add, branches).transpose(1, 2))
        context = recurrent + self.fc_1(x)  # [B, T, H]
        return self.fc(context), context


class _CoAttentionUnit(nn.Module):
    """Cross-attention between both streams, then self-attention within each."""

    def __init__(self, config: MisterEConfig):
        super().__init__()
        fusion_dim, attention_dim = config.fusion_dim, config.attention_dim
        for *projections, attention, out, norm in (*_CROSS_BLOCKS.values(), *_SELF_BLOCKS.values()):
            for projection in projections:
                self.add_module(f"fc_{projection}", nn.Linear(fusion_dim, attention_dim))
            multi_head = nn.MultiheadAttention(
                attention_dim,
                config.attention_heads,
                dropout=config.attention_dropout,
                batch_first=True,
            )
            self.add_module(f"multihead_attn_{attention}", multi_head)
            self.add_module(f"fc_{out}", nn.Linear(attention_dim, fusion_dim))
            self.add_module(
                f"layer_norm_{norm}", nn.LayerNorm(fusion_dim, eps=config.layer_norm_epsilon)
            )
        self.dropout = nn.Dropout(config.fusion_dropout)

    def _block(
        self, names: tuple[str, ...], queries: torch.Tensor, keys: torch.Tensor
    ) -> torch.Tensor:
        query, key, value, attention, out, norm = names
        attended, _ = self.get_submodule(f"multihead_attn_{attention}")(
            self.get_submodule(f"fc_{query}")(queries),
            self.get_submodule(f"fc_{key}")(keys),
            self.get_submodule(f"fc_{value}")(keys),
            need_weights=False,  # PyTorch then uses its fused kernels.
        )
        residual = self.dropout(self.get_submodule(f"fc_{out}")(attended))
        return self.get_submodule(f"layer_norm_{norm}")(queries + residual)

    def forward(self, streams: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        crossed = {
            name: self._block(names, streams[name], streams[_OTHER[name]])
            for name, names in _CROSS_BLOCKS.items()
        }
        return {
            name: self._block(names, crossed[name], crossed[name])
            for name, names in _SELF_BLOCKS.items()
        }


class _CrossModalExpert(nn.Module):
    """Fusion expert: co-attention units over both modalities."""

    def __init__(self, config: MisterEConfig):
        super().__init__()
        fusion_dim = config.fusion_dim
        self.fc_aud = nn.Linear(config.speech_dim, fusion_dim)
        self.fc_text = nn.Linear(config.text_dim, fusion_dim)
        self.units = nn.ModuleList(_CoAttentionUnit(config) for _ in range(config.fusion_layers))
        self.fc_aud_self = nn.Linear(config.speech_dim, fusion_dim)
        self.fc_text_self = nn.Linear(config.text_dim, fusion_dim)
        self.bn = nn.LayerNorm(2 * fusion_dim, eps=config.layer_norm_epsilon)
        self.fc = nn.Linear(2 * fusion_dim, fusion_dim)
        self.fc_2 = nn.Linear(fusion_dim, config.num_classes)

    def forward(
        self, speech: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        streams = {"speech": self.fc_aud(speech), "text": self.fc_text(text)}  # [B, T, F]
        for unit in self.units:
            streams = unit(streams)
        speech_repr = streams["speech"] + self.fc_aud_self(speech)
        text_repr = streams["text"] + self.fc_text_self(text)
        joint = self.bn(torch.cat([text_repr, speech_repr], dim=-1))  # [B, T, 2 F]
        return self.fc_2(functional.relu(self.fc(joint))), speech_repr, text_repr


class TorchMisterE(nn.Module):
    """MiSTER-E without masks: three experts and the gate.

    Args:
      config: Sizes, and dropout rates of the attention and fusion; other dropout rates are ignored.
        The config must use all experts, a gate, a GRU and convolutions.
    """

    def __init__(self, config: MisterEConfig):
        super().__init__()
        self.temperature = config.gate_temperature
        self.audio_self = _ContextExpert(config.speech_dim, config)
        self.text_self = _ContextExpert(config.text_dim, config)
        self.fusion = _CrossModalExpert(config)
        self.gate = nn.Sequential(
            nn.Linear(3 * config.num_classes, config.gate_dim),
            nn.ReLU(),
            nn.Linear(config.gate_dim, 3),
        )

    def forward(self, speech: torch.Tensor, text: torch.Tensor) -> TorchOutput:
        """Classifies the utterances with speech [B, T, Ds] and text [B, T, Dt]."""
        speech_logits, speech_context = self.audio_self(speech)
        text_logits, text_context = self.text_self(text)
        fusion_logits, speech_repr, text_repr = self.fusion(speech, text)
        expert_logits = torch.stack(
            [speech_logits, text_logits, fusion_logits], dim=2
        )  # [B, T, E, C]
        scores = self.gate(expert_logits.flatten(2)) / self.temperature
        gate = scores.softmax(-1)  # [B, T, E]
        return TorchOutput(
            logits=torch.einsum("bte,btec->btc", gate, expert_logits),
            expert_logits=expert_logits,
            gate=gate,
            speech_context=speech_context,
            text_context=text_context,
            speech_repr=speech_repr,
            text_repr=text_repr,
        )


def from_official(weights: Mapping[str, Any], config: MisterEConfig) -> TorchMisterE:
    """Returns the model with the weights of an official `state_dict`, as tensors or arrays."""
    model = TorchMisterE(config)
    model.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    return model


def _focal(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    losses = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return ((1 - torch.exp(-losses)) ** gamma * losses).mean()


def _contrastive(output: TorchOutput, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    views = torch.cat([output.speech_repr.flatten(0, 1), output.text_repr.flatten(0, 1)])
    views = functional.normalize(views, dim=-1)  # [2 N, F]
    classes = labels.flatten().repeat(2)
    diagonal = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    similarity = views @ views.T / temperature  # [2 N, 2 N]
    normalizer = similarity.masked_fill(diagonal, -torch.inf).logsumexp(1, keepdim=True)
    positive = (classes[:, None] == classes) & ~diagonal
    log_probability = (similarity - normalizer) * positive
    return -(log_probability.sum(1) / positive.sum(1).clamp(min=1)).mean()


def _agreement(expert_logits: torch.Tensor) -> torch.Tensor:
    log_probabilities = expert_logits.log_softmax(-1)  # [B, T, E, C]
    pairs = list(itertools.combinations(log_probabilities.unbind(2), 2))
    divergences = [((p.exp() - q.exp()) * (p - q)).sum() for p, q in pairs]
    return torch.stack(divergences).sum() / (len(pairs) * len(expert_logits))


def loss(
    output: TorchOutput,
    labels: torch.Tensor,
    weights: LossWeights | None = None,
    *,
    gamma: float = 3.0,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Computes `losses.mister_e` with every position valid.

    Args:
      output: Output of `TorchMisterE`.
      labels: Class of each position, [B, T] int64.
      weights: Weights of the parts; see `losses.mister_e`.
      gamma: Exponent of the focal loss.
      temperature: Temperature of the contrastive loss.

    Returns:
      The weighted total, and each part unweighted.
    """
    weights = LossWeights() if weights is None else weights
    parts = {
        "mixture": _focal(output.logits, labels, gamma),
        "speech": _focal(output.expert_logits[:, :, 0], labels, gamma),
        "text": _focal(output.expert_logits[:, :, 1], labels, gamma),
        "fusion": _focal(output.expert_logits[:, :, 2], labels, gamma),
        "contrastive": _contrastive(output, labels, temperature),
        "agreement": _agreement(output.expert_logits),
    }
    total = torch.stack([getattr(weights, name) * part for name, part in parts.items()]).sum()
    return total, parts
