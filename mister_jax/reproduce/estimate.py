"""Estimates run time and memory of a reproduction without the corpus, the encoders or the devices.

The estimate of a training step is the longest of these times: its matrix products at a recorded or
assumed utilization, the transfer of the sharded weights between devices, reading the weights from
memory, and launching the programs. The paper's batches have only 2 to 16 utterances of a few
seconds, so on several devices, the transfers often determine the step time of LLMs. Start-up,
downloads and compilation are not counted.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from ml_collections import ConfigDict

from mister_jax.configs import fusion, speech_encoder, text_encoder
from mister_jax.encoders import hf_config, registry
from mister_jax.encoders.bert import Bert, BertConfig
from mister_jax.encoders.decoder import Decoder, DecoderConfig
from mister_jax.encoders.qwen2_audio import Qwen2Audio, Qwen2AudioConfig
from mister_jax.encoders.salmonn import Salmonn, SalmonnConfig
from mister_jax.encoders.wavlm import WavLM, WavLMConfig
from mister_jax.encoders.whisper import Whisper, WhisperConfig
from mister_jax.errors import InputError
from mister_jax.nn.rngs import make_rngs
from mister_jax.reproduce.settings import Encoder, Settings
from mister_jax.reproduce.stages import EXPERT_VARIANTS, RECIPES, encoder_options, make_stages

_MODULES: Mapping[Any, Any] = {
    BertConfig: Bert,
    DecoderConfig: Decoder,
    Qwen2AudioConfig: Qwen2Audio,
    SalmonnConfig: Salmonn,
    WavLMConfig: WavLM,
    WhisperConfig: Whisper,
}


@dataclasses.dataclass(frozen=True)
class Device:
    """Accelerator of a reproduction.

    Attributes:
      title: Name of the device in tables.
      count: Number of chips.
      flops: Peak bfloat16 operations per second of a chip.
      memory: Memory of a chip in bytes.
      bandwidth: Bytes per second between a chip and its memory.
      interconnect: Bytes per second that a chip receives from other chips.
    """

    title: str
    count: int
    flops: float
    memory: float
    bandwidth: float
    interconnect: float = math.inf


# The values are from the data sheets cited in benchmarks/aot.py. A v5p-8 has eight cores on four
# chips.
DEVICES: Mapping[str, Device] = {
    "v5e-8": Device("8 TPU v5e chips", 8, 197e12, 16 * 2**30, 819e9, 2 * 50e9),
    "v5p-8": Device("4 TPU v5p chips", 4, 459e12, 95 * 2**30, 2765e9, 2 * 100e9),
    "h100": Device("1 NVIDIA H100", 1, 989e12, 80e9, 3350e9),
}


@dataclasses.dataclass(frozen=True)
class CorpusSize:
    """Size of a corpus, from its publication.

    Attributes:
      train: Number of labeled training utterances.
      validation: Number of labeled validation utterances.
      total: Number of all utterances, from which features are extracted.
      dialogues: Number of training dialogues.
      seconds: Mean length of an utterance in seconds.
      tokens: Mean number of tokens of an utterance.
    """

    train: int
    validation: int
    total: int
    dialogues: int
    seconds: float
    tokens: float


_CORPUS_SIZES = {
    ("iemocap", "six"): CorpusSize(4460, 1350, 10_039, 92, 4.5, 15),
    ("iemocap", "four"): CorpusSize(3205, 1085, 10_039, 92, 4.5, 15),
    ("meld", "six"): CorpusSize(9989, 1109, 13_708, 1038, 3.6, 12),
    ("mosi", "six"): CorpusSize(1284, 229, 2199, 52, 4.2, 16),
}

# Maps (encoder, device) to XLA's estimates for TPUs in docs/benchmarks.md: utilization and GiB per
# chip, first for the LoRA step and then for extraction.
_RECORDED = {
    ("llama_3_1_8b", "v5e-8"): ((0.42, 7.6), (0.64, 3.0)),
    ("llama_3_1_8b", "v5p-8"): ((0.40, 9.2), (0.61, 4.3)),
    ("qwen2_5_7b", "v5e-8"): ((0.49, 7.4), (0.65, 3.2)),
    ("qwen2_5_7b", "v5p-8"): ((0.43, 8.7), (0.62, 4.2)),
    ("qwen2_audio_7b", "v5e-8"): ((0.47, 13.0), (0.63, 2.8)),
    ("qwen2_audio_7b", "v5p-8"): ((0.37, 26.9), (0.48, 4.6)),
    ("salmonn_7b", "v5e-8"): ((0.52, 5.3), (0.55, 3.2)),
    ("salmonn_7b", "v5p-8"): ((0.25, 7.0), (0.26, 4.8)),
}
# Assumed utilization of programs that were not analyzed, by dtype.
_ASSUMED_UTILIZATION = {"bfloat16": 0.35, "float32": 0.15}
# Ratio of all positions (tokens or audio frames) in a padded batch to positions without padding.
_PADDING = 1.3
# XLA's estimate for v5e of the seconds that a step of MiSTER-E takes at the released sizes with one
# seed.
_FUSION_STEP_SECONDS = 0.02
# Assumed minimum duration of a small encoder's step, which covers its input, launch and kernels.
_LAUNCH_SECONDS = 0.02
# Seconds of audio that `prepare` reads per second on two cores, and the seconds that one run of
# `evaluate` or `merge` takes.
_PREPARED_SECONDS, _SHORT_STAGE_SECONDS = 825.0, 60.0
_MAX_TOKENS, _MAX_SECONDS, _FRAMES_PER_SECOND = 128, 30.0, 50
_PROGRAM_BYTES = 2**30


@dataclasses.dataclass(frozen=True)
class Part:
    """Transformer in an encoder.

    Attributes:
      layers: Number of layers.
      hidden_size: Size of a layer's output.
      num_heads: Number of attention heads.
      weights: Number of parameters in the layers.
      positions: Mean number of positions (tokens or audio frames) per utterance.
      max_positions: Number of positions of the longest utterance.
      training: Training mode of the transformer: "full", "lora" or "frozen".
      extra_flops: FLOPs per utterance outside of the layers.
    """

    layers: int
    hidden_size: int
    num_heads: int
    weights: float
    positions: float
    max_positions: float
    training: str
    extra_flops: float = 0.0

    def forward_flops(self) -> float:
        """Returns the forward FLOPs per utterance: 2 per weight and position, and attention."""
        attention = 4.0 * self.layers * self.hidden_size * self.positions**2
        return 2.0 * self.weights * self.positions + attention + self.extra_flops

    def training_flops(self) -> float:
        """Returns the FLOPs of a training step per utterance.

        Each weight and position takes 6 FLOPs if all weights are trained, 4 with LoRA, and 2 if
        they are frozen.
        """
        return self.forward_flops() * {"full": 3, "lora": 2, "frozen": 1}[self.training]

    def activation_bytes(self, rows: int, bytes_per_value: int, remat: str) -> float:
        """Estimates the bytes of activations that are stored for a batch's backward pass."""
        size = rows * self.max_positions
        scores = 2.5 * self.num_heads * self.max_positions
        layer = size * bytes_per_value * (17 * self.hidden_size + scores)
        if self.training == "frozen":
            return layer
        if remat == "none":
            return self.layers * layer
        return layer + self.layers * size * bytes_per_value * self.hidden_size


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Predicted run time and memory of a stage.

    Attributes:
      stage: Name of the stage.
      command: Command of the stage.
      hours: Predicted run time in hours.
      memory: Bytes per chip; None for stages that run no encoder.
      basis: Short text on the assumptions behind the prediction.
    """

    stage: str
    command: str
    hours: float
    memory: float | None = None
    basis: str = ""


def find_device(name: str) -> Device:
    """Returns a device.

    Raises:
      InputError: The device is unknown.
    """
    if name not in DEVICES:
        raise InputError(f"--device={name}; allowed: {', '.join(DEVICES)}")
    return DEVICES[name]


def corpus_size(settings: Settings) -> CorpusSize:
    """Returns the published size of the corpus."""
    return _CORPUS_SIZES[settings.corpus, settings.classes]


def encoder_parts(encoder: Encoder, modality: str, corpus: CorpusSize) -> list[Part]:
    """Returns the transformers of an encoder; the sizes come from its folder or its release.

    Raises:
      InputError: The sizes are unknown.
    """
    config = _encoder_config(encoder)
    recipe = _recipe(encoder, modality)
    training = "full" if recipe.encoder.options.full else "lora"
    tokens = (corpus.tokens, float(_MAX_TOKENS))
    frames = (corpus.seconds * _FRAMES_PER_SECOND, _MAX_SECONDS * _FRAMES_PER_SECOND)
    if isinstance(config, SalmonnConfig):
        # Whisper and BEATs read 30 s, and the language model reads 88 queries and a prompt.
        window = (frames[1], frames[1])
        return [
            _transformer(config.whisper, window, "frozen"),
            _transformer(config.beats, window, "frozen"),
            _transformer(config.decoder, (103, 103), "lora"),
        ]
    if isinstance(config, Qwen2AudioConfig):
        # Two frames are one token, and the prompt has 16 tokens.
        prompted = (frames[0] / 2 + 16, frames[1] / 2 + 16)
        return [
            _transformer(config.tower, frames, "frozen"),
            _transformer(config.decoder, prompted, "lora"),
        ]
    part = _transformer(config, tokens if modality == "text" else frames, training)
    if isinstance(config, WavLMConfig):
        part = dataclasses.replace(part, extra_flops=_conv_flops(config, corpus.seconds))
    return [part]


def _encoder_config(encoder: Encoder) -> Any:
    """Returns the config in an encoder's folder, or the built-in config of a released encoder."""
    folder = pathlib.Path(encoder.name)
    if not encoder.is_default and (folder / "config.json").exists():
        values = hf_config.read_config(folder)
        return registry.find_architecture(values, folder).config.from_huggingface(values)
    if encoder.is_default or encoder.parts:
        whisper_size = encoder.recipe.removeprefix("whisper_")
        for config_class, name in (
            *((cls, encoder.recipe) for cls in (BertConfig, DecoderConfig, WavLMConfig)),
            *((cls, encoder.recipe) for cls in (Qwen2AudioConfig, SalmonnConfig)),
            (WhisperConfig, whisper_size),
        ):
            if hasattr(config_class, name):
                return getattr(config_class, name)()
    raise InputError(f"{encoder.name}: its size is unknown; needed for --dry_run: its folder")


def count_parameters(encoder: Encoder) -> int:
    """Returns the number of parameters of an encoder.

    Raises:
      InputError: The sizes are unknown.
    """
    config = _encoder_config(encoder)
    module = nnx.eval_shape(lambda: _MODULES[type(config)](config, rngs=make_rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def _recipe(encoder: Encoder, modality: str) -> ConfigDict:
    config = text_encoder if modality == "text" else speech_encoder
    recipe: ConfigDict = config.get_config(f"any,{encoder.recipe}")
    return recipe


def _transformer(config: Any, positions: tuple[float, float], training: str) -> Part:
    """Returns the `Part` for the transformer that a config describes."""
    hidden = config.hidden_size
    if isinstance(config, DecoderConfig):
        attention = 2 * hidden * config.head_dim * (config.num_heads + config.num_key_value_heads)
        mlp = 3 * hidden * config.mlp_dim
    else:
        attention, mlp = 4 * hidden**2, 2 * hidden * config.mlp_dim
    return Part(
        config.num_layers,
        hidden,
        config.num_heads,
        config.num_layers * (attention + mlp),
        *positions,
        training,
    )


def _conv_flops(config: WavLMConfig, seconds: float) -> float:
    """Returns the FLOPs of the convolutions on the waveform."""
    flops, rate, channels = 0.0, 16_000.0, 1
    for size, kernel, stride in zip(
        config.conv_dims, config.conv_kernels, config.conv_strides, strict=True
    ):
        rate /= stride
        flops += 2 * rate * seconds * kernel * channels * size
        channels = size
    return flops


def estimate(settings: Settings, device_name: str) -> list[Estimate]:
    """Estimates the run time in hours and the memory of each stage.

    Raises:
      InputError: The device, or the size of an encoder, is unknown.
    """
    device, corpus = find_device(device_name), corpus_size(settings)
    predictions: dict[str, tuple[float, float | None, str]] = {
        "prepare": (
            corpus.total * corpus.seconds / _PREPARED_SECONDS,
            None,
            f"{_PREPARED_SECONDS:.0f} s of audio per second on two CPU cores",
        )
    }
    for modality, encoder in (("text", settings.text), ("speech", settings.speech)):
        options = encoder_options(settings, modality)
        recipe = _changed(_recipe(encoder, modality), options)
        parts = encoder_parts(encoder, modality, corpus)
        for kind, prediction in _encoder_stages(
            encoder, parts, recipe, corpus, device, _RECORDED.get((encoder.recipe, device_name))
        ):
            predictions[f"{kind} {modality}"] = prediction
    for recipe_name, variants in RECIPES.items():
        recipe = _changed(fusion.get_config(f"any{variants}"), settings.fusion_options)
        steps = math.ceil(corpus.dialogues / recipe.data.batch_size) * recipe.train.epochs
        seconds = steps * settings.num_seeds * _FUSION_STEP_SECONDS
        basis = f"{_FUSION_STEP_SECONDS} s per step and seed"
        predictions[f"train {recipe_name}"] = (seconds, None, basis)
        predictions[f"experts {recipe_name}"] = (seconds * len(EXPERT_VARIANTS), None, basis)
    rows = []
    for stage in make_stages(settings):
        seconds, memory, basis = predictions.get(
            stage.name, (_SHORT_STAGE_SECONDS, None, "one minute")
        )
        rows.append(Estimate(stage.name, stage.command, seconds / 3600, memory, basis))
    return rows


def _changed(config: ConfigDict, options: tuple[str, ...]) -> ConfigDict:
    """Applies the options that affect the prediction to a config, and returns the config."""
    for option in options:
        field, _, value = option.partition("=")
        if field in ("train.epochs", "data.batch_size", "train.accumulation"):
            if not value.isdecimal() or int(value) < 1:
                raise InputError(f"{option}; allowed: a number above 0")
            section, name = field.split(".")
            config[section][name] = int(value)
        elif field == "encoder.options.remat":
            config.encoder.options.remat = value
    return config


def _encoder_stages(
    encoder: Encoder,
    parts: list[Part],
    recipe: ConfigDict,
    corpus: CorpusSize,
    device: Device,
    recorded: Any,
) -> Iterator[tuple[str, tuple[float, float | None, str]]]:
    """Yields "train" and "extract", each with seconds, bytes per chip, and the basis."""
    dtype = recipe.encoder.options.dtype
    bytes_per_value = 2 if dtype == "bfloat16" else 4
    if not (encoder.is_default or encoder.parts):  # SALMONN always has the released sizes.
        recorded = None
    assumed = _ASSUMED_UTILIZATION[dtype]
    (train_use, train_gib), (extract_use, extract_gib) = recorded or ((assumed, 0), (assumed, 0))
    origin = "recorded for this chip" if recorded else "assumed"
    peak = device.flops * device.count
    weight_bytes = count_parameters(encoder) * bytes_per_value
    received = weight_bytes * (device.count - 1) / device.count
    is_full = any(part.training == "full" for part in parts)

    batch = recipe.data.batch_size
    train_steps = math.ceil(corpus.train / batch)
    validation_steps = math.ceil(corpus.validation / batch)
    training_flops = _PADDING * sum(part.training_flops() for part in parts)
    forward_flops = _PADDING * sum(part.forward_flops() for part in parts)
    # The forward and the backward pass gather the weights; full training also sends gradients.
    step_times = {
        "matrix products": batch * training_flops / peak / train_use,
        "transfers between chips": (3 if is_full else 2) * received / device.interconnect,
        "reading the weights": (3 if is_full else 2) * weight_bytes / device.bandwidth,
        "launching programs": _LAUNCH_SECONDS,
    }
    validation_step = max(
        batch * forward_flops / peak / extract_use,
        received / device.interconnect,
        weight_bytes / device.bandwidth,
        _LAUNCH_SECONDS,
    )
    bound = max(step_times, key=step_times.__getitem__)
    seconds = recipe.train.epochs * (
        train_steps * step_times[bound] + validation_steps * validation_step
    )
    rows = math.ceil(math.ceil(batch / device.count) / recipe.train.accumulation)
    state = weight_bytes * (4 if is_full else 1) / device.count
    activations = sum(
        part.activation_bytes(rows, bytes_per_value, recipe.encoder.options.remat) for part in parts
    )
    memory = train_gib * 2**30 or state + activations + _PROGRAM_BYTES
    basis = f"utilization {train_use:.0%}, {origin}; bound by {bound}"
    yield "train", (seconds, memory, basis)
    seconds = corpus.total * forward_flops / peak / extract_use
    memory = extract_gib * 2**30 or weight_bytes / device.count + 2 * _PROGRAM_BYTES
    yield "extract", (seconds, memory, f"utilization {extract_use:.0%}, {origin}")
