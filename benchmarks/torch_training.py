"""Trains MiSTER-E in plain PyTorch, for the comparison with `mister-jax train`.

    python benchmarks/torch_training.py CONFIG.json DATA.npz RESULT.json

`benchmarks.training` runs this script. It is a typical PyTorch script: eager modules, batches of
random dialogues padded to the longest dialogue, validation after each epoch, and the best
parameters in memory. The script does not import JAX or TensorFlow, because their startup time would
count as PyTorch's time.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pathlib
import sys
import time
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

Batch = dict[str, torch.Tensor]

_FIELDS = ("speech", "text", "speech_present", "text_present", "label")


@dataclasses.dataclass(frozen=True)
class Output:
    """Output of `TorchMisterE`, as in `mister_jax.models.MisterEOutput`."""

    logits: torch.Tensor
    expert_logits: torch.Tensor
    gate: torch.Tensor
    expert_present: torch.Tensor
    speech_repr: torch.Tensor
    text_repr: torch.Tensor
    speech_present: torch.Tensor
    text_present: torch.Tensor


class ContextExpert(nn.Module):
    """Expert for one modality: convolutions, a bidirectional GRU and a skip connection."""

    def __init__(self, feature_dim: int, config: Any):
        super().__init__()
        context_dim = config.context_dim
        self.convolutions = nn.ModuleList(
            nn.Conv1d(feature_dim, context_dim, size, padding=size // 2)
            for size in config.kernel_sizes
        )
        self.gru = nn.GRU(
            context_dim,
            context_dim // 2,
            config.gru_layers,
            batch_first=True,
            dropout=config.context_dropout if config.gru_layers > 1 else 0.0,
            bidirectional=True,
        )
        self.skip = nn.Linear(feature_dim, context_dim)
        self.dropout = nn.Dropout(config.context_dropout)
        self.classifier = nn.Linear(context_dim, config.num_classes)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Computes logits [B, T, C] from vectors [B, T, D] and dialogue lengths [B]."""
        channels = x.transpose(1, 2)  # [B, D, T]
        branches = [functional.relu(convolution(channels)) for convolution in self.convolutions]
        hidden = self.dropout(torch.stack(branches).sum(0).transpose(1, 2))  # [B, T, H]
        packed = pack_padded_sequence(hidden, lengths, batch_first=True, enforce_sorted=False)
        recurrent, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True)
        return self.classifier(self.dropout(recurrent + self.skip(x)))


class AttentionBlock(nn.Module):
    """Attention, dropout, residual connection and LayerNorm."""

    def __init__(self, config: Any):
        super().__init__()
        fusion_dim, attention_dim = config.fusion_dim, config.attention_dim
        self.num_heads = config.attention_heads
        self.attention_dropout = config.attention_dropout
        self.query = nn.Linear(fusion_dim, attention_dim)
        self.key = nn.Linear(fusion_dim, attention_dim, bias=False)
        self.value = nn.Linear(fusion_dim, attention_dim)
        self.out = nn.Linear(attention_dim, fusion_dim)
        self.dropout = nn.Dropout(config.fusion_dropout)
        self.norm = nn.LayerNorm(fusion_dim, eps=config.layer_norm_epsilon)

    def forward(self, x: torch.Tensor, key: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
        """Attends from `x` [B, T, F] to `key` [B, S, F] where `key_mask` [B, S] is True."""

        def split_heads(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, K, T, D]

        attended = functional.scaled_dot_product_attention(
            split_heads(self.query(x)),
            split_heads(self.key(key)),
            split_heads(self.value(key)),
            attn_mask=key_mask[:, None, None],
            dropout_p=self.attention_dropout if self.training else 0.0,
        )
        return self.norm(x + self.dropout(self.out(attended.transpose(1, 2).flatten(2))))


class CoAttentionLayer(nn.Module):
    """Layer in which speech and text attend to each other, and then to themselves."""

    def __init__(self, config: Any):
        super().__init__()
        self.cross_attention = nn.ModuleList(AttentionBlock(config) for _ in range(2))
        self.self_attention = nn.ModuleList(AttentionBlock(config) for _ in range(2))

    def forward(
        self,
        speech: torch.Tensor,
        text: torch.Tensor,
        speech_present: torch.Tensor,
        text_present: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Updates both streams [B, T, F]."""
        speech, text = (
            self.cross_attention[0](speech, text, text_present),
            self.cross_attention[1](text, speech, speech_present),
        )
        return (
            self.self_attention[0](speech, speech, speech_present),
            self.self_attention[1](text, text, text_present),
        )


class CrossModalExpert(nn.Module):
    """Fusion expert: co-attention between speech and text, then a classifier on both streams."""

    def __init__(self, config: Any):
        super().__init__()
        fusion_dim = config.fusion_dim
        self.speech_in = nn.Linear(config.speech_dim, fusion_dim)
        self.text_in = nn.Linear(config.text_dim, fusion_dim)
        self.layers = nn.ModuleList(CoAttentionLayer(config) for _ in range(config.fusion_layers))
        self.speech_skip = nn.Linear(config.speech_dim, fusion_dim)
        self.text_skip = nn.Linear(config.text_dim, fusion_dim)
        self.norm = nn.LayerNorm(2 * fusion_dim, eps=config.layer_norm_epsilon)
        self.projection = nn.Linear(2 * fusion_dim, fusion_dim)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(fusion_dim, config.num_classes)

    def forward(
        self,
        speech: torch.Tensor,
        text: torch.Tensor,
        speech_present: torch.Tensor,
        text_present: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes logits [B, T, C] and representations of speech and text, each [B, T, F]."""
        speech_stream, text_stream = self.speech_in(speech), self.text_in(text)
        for layer in self.layers:
            speech_stream, text_stream = layer(
                speech_stream, text_stream, speech_present, text_present
            )
        speech_repr = speech_stream + self.speech_skip(speech)
        text_repr = text_stream + self.text_skip(text)
        joint = self.norm(torch.cat([text_repr, speech_repr], dim=-1))
        hidden = self.dropout(functional.relu(self.projection(joint)))
        return self.classifier(hidden), speech_repr, text_repr


class TorchMisterE(nn.Module):
    """MiSTER-E with masks, three experts and a gate.

    Args:
      config: Sizes and dropout rates, named as in `mister_jax.models.MisterEConfig`. All experts,
        convolutions and the GRU are enabled. The fusion expert has no GRU.
    """

    def __init__(self, config: Any):
        super().__init__()
        self.modality_dropout = config.modality_dropout
        self.temperature = config.gate_temperature
        self.input_dropout = nn.Dropout(config.input_dropout)
        self.speech = ContextExpert(config.speech_dim, config)
        self.text = ContextExpert(config.text_dim, config)
        self.fusion = CrossModalExpert(config)
        self.gate = nn.Sequential(
            nn.Linear(3 * config.num_classes, config.gate_dim),
            nn.ReLU(),
            nn.Linear(config.gate_dim, 3),
        )

    def forward(
        self,
        speech: torch.Tensor,
        text: torch.Tensor,
        speech_present: torch.Tensor,
        text_present: torch.Tensor,
        lengths: torch.Tensor,
    ) -> Output:
        """Classifies the utterances of padded dialogues.

        Args:
          speech: Speech vectors, [B, T, D].
          text: Text vectors, [B, T, D].
          speech_present: Whether the utterance has speech, [B, T] bool; False for padding.
          text_present: Whether the utterance has text, [B, T] bool; False for padding.
          lengths: Number of utterances in each dialogue, [B] int, on the CPU.
        """
        if self.training and self.modality_dropout:
            kept = torch.rand(2, *speech_present.shape, device=speech.device)
            kept = kept >= self.modality_dropout
            speech_present, text_present = speech_present & kept[0], text_present & kept[1]
        speech = self.input_dropout(speech * speech_present[..., None])
        text = self.input_dropout(text * text_present[..., None])
        fusion_logits, speech_repr, text_repr = self.fusion(
            speech, text, speech_present, text_present
        )
        expert_logits = torch.stack(
            [self.speech(speech, lengths), self.text(text, lengths), fusion_logits], dim=2
        )  # [B, T, E, C]
        present = torch.stack(
            [speech_present, text_present, speech_present | text_present], dim=-1
        )  # [B, T, E]
        # If an utterance lacks both modalities, all experts classify it from its context.
        present = present | ~present.any(-1, keepdim=True)
        scores = self.gate((expert_logits * present[..., None]).flatten(2)) / self.temperature
        gate = scores.masked_fill(~present, -torch.inf).softmax(-1)
        return Output(
            logits=torch.einsum("bte,btec->btc", gate, expert_logits),
            expert_logits=expert_logits,
            gate=gate,
            expert_present=present,
            speech_repr=speech_repr,
            text_repr=text_repr,
            speech_present=speech_present,
            text_present=text_present,
        )


def compute_loss(output: Output, label: torch.Tensor, config: Any) -> torch.Tensor:
    """Computes `mister_jax.losses.mister_e` without the gate loss and the score error.

    Args:
      output: Output of `TorchMisterE`.
      label: Class of each utterance, [B, T] int64; -1 if unlabeled or padding.
      config: Loss config with `gamma`, `temperature` and `weights`.
    """
    weights, labeled = config.weights, label >= 0
    logits = torch.cat([output.logits[:, :, None], output.expert_logits], dim=2)
    log_p = logits.log_softmax(-1)  # [B, T, 1 + E, C]
    present = output.expert_present & labeled[..., None]  # [B, T, E]
    counted = torch.cat([labeled[..., None], present], dim=-1)
    index = label.clamp(min=0)[..., None, None].expand(*log_p.shape[:-1], 1)
    cross_entropy = -log_p.gather(-1, index).squeeze(-1)
    focal = cross_entropy * counted
    if config.gamma:
        focal = focal * (1 - torch.exp(-cross_entropy)) ** config.gamma
    focal = focal.sum((0, 1)) / counted.sum((0, 1)).clamp(min=1)  # [1 + E]
    names = ("mixture", "speech", "text", "fusion")
    total = sum(weights[name] * part for name, part in zip(names, focal, strict=True))
    if weights["contrastive"]:
        total = total + weights["contrastive"] * _contrastive(output, label, config.temperature)
    if weights["agreement"]:
        total = total + weights["agreement"] * _agreement(log_p[:, :, 1:], present, labeled)
    return total


def _contrastive(output: Output, label: torch.Tensor, temperature: float) -> torch.Tensor:
    speech = output.speech_present & (label >= 0)
    text = output.text_present & (label >= 0)
    views = torch.cat([output.speech_repr[speech], output.text_repr[text]])  # [N, F]
    views = functional.normalize(views, dim=-1)
    classes = torch.cat([label[speech], label[text]])
    diagonal = torch.eye(len(views), dtype=torch.bool, device=views.device)
    similarity = views @ views.T / temperature
    log_sum = similarity.masked_fill(diagonal, -torch.inf).logsumexp(1)
    positive = (classes[:, None] == classes) & ~diagonal
    count = positive.sum(1)
    losses = log_sum - (similarity * positive).sum(1) / count.clamp(min=1)
    return losses[count > 0].sum() / (count > 0).sum().clamp(min=1)


def _agreement(log_p: torch.Tensor, present: torch.Tensor, labeled: torch.Tensor) -> torch.Tensor:
    p = log_p.exp()
    pairs = list(itertools.combinations(range(log_p.shape[2]), 2))
    divergences = [
        ((p[:, :, a] - p[:, :, b]) * (log_p[:, :, a] - log_p[:, :, b])).sum(-1)
        * (present[:, :, a] & present[:, :, b])
        for a, b in pairs
    ]
    num_dialogues = labeled.any(1).sum().clamp(min=1)
    return torch.stack(divergences).sum() / (len(pairs) * num_dialogues)


def load_dialogues(arrays: Mapping[str, np.ndarray], split: str) -> Any:
    """Returns the tensors [T, ...] of each dialogue in a split."""
    lengths = arrays[f"{split}/lengths"].tolist()
    fields = {name: torch.from_numpy(arrays[f"{split}/{name}"]).split(lengths) for name in _FIELDS}
    return [dict(zip(fields, values, strict=True)) for values in zip(*fields.values(), strict=True)]


def collate(dialogues: list[Batch]) -> Batch:
    """Pads dialogues to the longest dialogue and stacks them."""
    batch = {
        name: pad_sequence(
            [dialogue[name] for dialogue in dialogues],
            batch_first=True,
            padding_value=-1 if name == "label" else 0,
        )
        for name in _FIELDS
    }
    return batch | {"lengths": torch.tensor([len(dialogue["label"]) for dialogue in dialogues])}


def make_optimizer(
    model: nn.Module, config: Any, num_steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """Makes AdamW without weight decay for biases and scales, and a cosine schedule with warmup."""
    parameters = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [value for value in parameters if value.ndim > 1]},
        {"params": [value for value in parameters if value.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.b1, config.b2),
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    warmup = round(config.warmup_fraction * num_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def update_average(averaged: nn.Module, model: nn.Module, decay: float, num_updates: int) -> None:
    """Updates the parameters' moving average; see `mister_jax.optim.average_parameters`."""
    decay = min(decay, (1 + num_updates) / (10 + num_updates))
    for average, value in zip(averaged.parameters(), model.parameters(), strict=True):
        average.lerp_(value, 1 - decay)


@torch.no_grad()
def weighted_f1(model: TorchMisterE, loader: Any, num_classes: int, device: str) -> float:
    """Computes the weighted F1 of a model in evaluation mode on all labeled utterances."""
    confusion = torch.zeros(num_classes, num_classes)
    for batch in loader:
        logits = _apply(model, batch, device).logits.cpu()
        labeled = batch["label"] >= 0
        cells = batch["label"][labeled] * num_classes + logits.argmax(-1)[labeled]
        confusion += cells.bincount(minlength=num_classes**2).view(num_classes, num_classes)
    support = confusion.sum(1)
    f1 = 2 * confusion.diag() / (support + confusion.sum(0)).clamp(min=1)
    return float((f1 * support).sum() / support.sum())


def _apply(model: TorchMisterE, batch: Batch, device: str) -> Output:
    inputs = [batch[name].to(device) for name in _FIELDS[:-1]]
    return model(*inputs, batch["lengths"])


def train(config: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Trains, selects the best epoch on validation and scores the test split.

    Returns:
      A dict with these entries. Times are values of `time.monotonic`.

      - "steps": Number of steps.
      - "ends": Map from step number to end time, for the first, middle and last step.
      - "trained": End time of training.
      - "weighted_f1": Score on the test split.
    """
    torch.manual_seed(config["seed"])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model_config, loss_config, optimizer_config = (
        SimpleNamespace(**config[name]) for name in ("model", "loss", "optimizer")
    )
    loaders: dict[str, Any] = {
        split: torch.utils.data.DataLoader(
            load_dialogues(arrays, split),
            config["batch_size"],
            shuffle=split == "train",
            collate_fn=collate,
        )
        for split in ("train", "validation", "test")
    }
    num_classes = model_config.num_classes
    model = TorchMisterE(model_config).to(device)
    averaged = copy.deepcopy(model).eval()
    num_steps = config["epochs"] * len(loaders["train"])
    optimizer, schedule = make_optimizer(model, optimizer_config, num_steps)
    timed_steps = 1, num_steps // 2, num_steps
    ends: dict[int, float] = {}
    step, best_score, best_state = 0, -1.0, averaged.state_dict()
    for _ in range(config["epochs"]):
        model.train()
        for batch in loaders["train"]:
            optimizer.zero_grad()
            output = _apply(model, batch, device)
            compute_loss(output, batch["label"].to(device), loss_config).backward()
            nn.utils.clip_grad_norm_(model.parameters(), optimizer_config.clip_norm)
            optimizer.step()
            schedule.step()
            update_average(averaged, model, optimizer_config.average_decay, step)
            step += 1
            if step in timed_steps:
                if device == "cuda":
                    torch.cuda.synchronize()
                ends[step] = time.monotonic()
        score = weighted_f1(averaged, loaders["validation"], num_classes, device)
        if score >= best_score:
            best_score, best_state = score, copy.deepcopy(averaged.state_dict())
    trained = time.monotonic()
    averaged.load_state_dict(best_state)
    score = weighted_f1(averaged, loaders["test"], num_classes, device)
    return {"steps": num_steps, "ends": ends, "trained": trained, "weighted_f1": score}


if __name__ == "__main__":
    config_path, data_path, result_path = map(pathlib.Path, sys.argv[1:])
    with np.load(data_path) as data:
        result = train(json.loads(config_path.read_text()), dict(data))
    result_path.write_text(json.dumps(result))
