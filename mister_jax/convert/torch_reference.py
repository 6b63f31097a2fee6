"""MiSTER-E's stage 2 in PyTorch, to compare numbers and speed with; nothing else uses it.

Stated anew from the facts of arXiv 2602.23300 and its released code. Attributes bear the names of
the released `state_dict`, so that it loads as it is; `audio_self` and `text_self` are the speech
and the text expert. As in the released code nothing is masked: padding is an utterance like others.
Needs PyTorch, so import it where that may be missing only on demand.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mister_jax.losses import LossWeights
from mister_jax.models import MisterEConfig

# Stream that asks (the other answers; after "_s" both are one), and the names of the block's
# projections, attention, output projection and LayerNorm.
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
    """What `TorchMisterE` gives; shapes and meanings as in `MisterEOutput`."""

    logits: torch.Tensor
    expert_logits: torch.Tensor
    gate: torch.Tensor
    speech_context: torch.Tensor
    text_context: torch.Tensor
    speech_repr: torch.Tensor
    text_repr: torch.Tensor


class _ContextExpert(nn.Module):
    def __init__(self, features: int, config: MisterEConfig):
        super().__init__()
        width = config.context_dim
        self.convolutions = []
        for size in config.kernel_sizes:
            name = "conv" if size == 1 else f"conv{size}"
            self.add_module(name, nn.Conv1d(features, width, size, padding=size // 2))
            self.convolutions.append(name)
        self.rnn_1 = nn.GRU(
            width, width // 2, config.gru_layers, bidirectional=True, batch_first=True
        )
        self.fc_1 = nn.Linear(features, width)
        self.fc = nn.Linear(width, config.num_classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        channels = x.transpose(1, 2)  # B D T
        branches = [F.relu(self.get_submodule(name)(channels)) for name in self.convolutions]
        recurrent, _ = self.rnn_1(functools.reduce(torch.add, branches).transpose(1, 2))  # B T H
        context = recurrent + self.fc_1(x)
        return self.fc(context), context


class _CoAttentionUnit(nn.Module):
    def __init__(self, config: MisterEConfig):
        super().__init__()
        width, inner = config.fusion_dim, config.attention_dim
        for *projections, attention, out, norm in (*_CROSS_BLOCKS.values(), *_SELF_BLOCKS.values()):
            for projection in projections:
                self.add_module(f"fc_{projection}", nn.Linear(width, inner))
            attends = nn.MultiheadAttention(
                inner, config.attention_heads, dropout=config.attention_dropout, batch_first=True
            )
            self.add_module(f"multihead_attn_{attention}", attends)
            self.add_module(f"fc_{out}", nn.Linear(inner, width))
            self.add_module(
                f"layer_norm_{norm}", nn.LayerNorm(width, eps=config.layer_norm_epsilon)
            )
        self.dropout = nn.Dropout(config.fusion_dropout)

    def _block(
        self, names: tuple[str, ...], asking: torch.Tensor, answering: torch.Tensor
    ) -> torch.Tensor:
        query, key, value, attention, out, norm = names
        attend = self.get_submodule(f"multihead_attn_{attention}")
        # Without the weights PyTorch takes its fused kernels.
        mixed, _ = attend(
            self.get_submodule(f"fc_{query}")(asking),
            self.get_submodule(f"fc_{key}")(answering),
            self.get_submodule(f"fc_{value}")(answering),
            need_weights=False,
        )
        added = self.dropout(self.get_submodule(f"fc_{out}")(mixed))
        return self.get_submodule(f"layer_norm_{norm}")(asking + added)

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
    def __init__(self, config: MisterEConfig):
        super().__init__()
        width = config.fusion_dim
        self.fc_aud = nn.Linear(config.speech_dim, width)
        self.fc_text = nn.Linear(config.text_dim, width)
        self.units = nn.ModuleList(_CoAttentionUnit(config) for _ in range(config.fusion_layers))
        self.fc_aud_self = nn.Linear(config.speech_dim, width)
        self.fc_text_self = nn.Linear(config.text_dim, width)
        self.bn = nn.LayerNorm(2 * width, eps=config.layer_norm_epsilon)
        self.fc = nn.Linear(2 * width, width)
        self.fc_2 = nn.Linear(width, config.num_classes)

    def forward(
        self, speech: torch.Tensor, text: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        streams = {"speech": self.fc_aud(speech), "text": self.fc_text(text)}  # B T F
        for unit in self.units:
            streams = unit(streams)
        speech_repr = streams["speech"] + self.fc_aud_self(speech)
        text_repr = streams["text"] + self.fc_text_self(text)
        joint = self.bn(torch.cat([text_repr, speech_repr], dim=-1))  # B T 2F
        return self.fc_2(F.relu(self.fc(joint))), speech_repr, text_repr


class TorchMisterE(nn.Module):
    """MiSTER-E without masks: three experts, the gate, convolutions of `config.kernel_sizes`.

    Args:
      config: sizes and the attention's and the fusion's dropout; it must use all experts, a gate, a
        GRU and convolutions, and its other dropout rates are not applied.
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
        """Reads speech [B, T, Ds] and text [B, T, Dt]."""
        speech_logits, speech_context = self.audio_self(speech)
        text_logits, text_context = self.text_self(text)
        fusion_logits, speech_repr, text_repr = self.fusion(speech, text)
        expert_logits = torch.stack([speech_logits, text_logits, fusion_logits], dim=2)  # B T E C
        scores = self.gate(expert_logits.flatten(2)) / self.temperature
        gate = scores.softmax(-1)  # B T E
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
    """The model with the weights of an official `state_dict`, as tensors or arrays."""
    model = TorchMisterE(config)
    model.load_state_dict({name: torch.as_tensor(value) for name, value in weights.items()})
    return model


def _focal(logits: torch.Tensor, labels: torch.Tensor, gamma: float) -> torch.Tensor:
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return ((1 - torch.exp(-losses)) ** gamma * losses).mean()


def _contrastive(output: TorchOutput, labels: torch.Tensor, temperature: float) -> torch.Tensor:
    both = torch.cat([output.speech_repr.flatten(0, 1), output.text_repr.flatten(0, 1)])  # 2N F
    directions = F.normalize(both, dim=-1)
    classes = labels.flatten().repeat(2)
    itself = torch.eye(len(classes), dtype=torch.bool, device=classes.device)
    similarity = directions @ directions.T / temperature  # 2N 2N
    log_share = similarity - similarity.masked_fill(itself, -torch.inf).logsumexp(1, keepdim=True)
    positive = (classes[:, None] == classes) & ~itself
    return -((log_share * positive).sum(1) / positive.sum(1).clamp(min=1)).mean()


def _agreement(expert_logits: torch.Tensor) -> torch.Tensor:
    log_p = expert_logits.log_softmax(-1)  # B T E C
    experts = log_p.unbind(2)
    pairs = list(itertools.combinations(experts, 2))
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
    """`losses.mister_e` where every position counts.

    Args:
      output: of `TorchMisterE`.
      labels: [B, T] int64, a class at every position.
      weights: see `losses.mister_e`.
      gamma: likewise.
      temperature: likewise.

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
