"""Common interface to the pretrained speech encoders, which map waveforms to hidden states.

Most encoders are stored in one folder in the Hugging Face layout. SALMONN has four checkpoints: its
trained parameters, Whisper, BEATs and Vicuna.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from mister_jax.convert.safetensors import Checkpoint
from mister_jax.encoders import frontends, hf_config, hub, registry, salmonn
from mister_jax.encoders.audio_prompt import PromptedSpeech
from mister_jax.encoders.salmonn import Salmonn, SalmonnConfig
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig
from mister_jax.nn.rngs import make_rngs

SALMONN = "salmonn"
"""The `model_type` in SALMONN's backbone config."""
PROMPT_TOKENS = "prompt_tokens"
"""Field for the prompt's tokens in a speech LLM's backbone config."""
SHORTEST_SECONDS, LONGEST_SECONDS = 0.1, 3600.0
"""Limits for the options `max_seconds` and `crop_seconds`; an encoder may have a lower maximum."""

_WITH_SPECTROGRAM = ("whisper", "qwen2_audio", SALMONN)
_SALMONN_PROMPT = "Describe the emotion of the speaker."
_SALMONN_LORA_ALPHA = 32.0  # Not stored in the checkpoints; equal for all released models.


@dataclasses.dataclass(frozen=True)
class SpeechFiles:
    """Locations of a speech encoder's files.

    Attributes:
      name: Folder, or name on the Hugging Face Hub. For SALMONN, the path of its checkpoint, as for
        `Checkpoint.open`.
      whisper: Folder or name of Whisper. Only SALMONN needs this field and the next two.
      beats: BEATs checkpoint: a released file, or a folder whose config.json contains the `cfg` of
        the checkpoint.
      vicuna: Folder or name of Vicuna with its tokenizer.
    """

    name: str
    whisper: str = ""
    beats: str = ""
    vicuna: str = ""

    def __post_init__(self):
        parts = [bool(part) for part in (self.whisper, self.beats, self.vicuna)]
        if any(parts) and not all(parts):
            raise InputError(
                f"whisper {self.whisper!r}, beats {self.beats!r}, vicuna {self.vicuna!r}; allowed: "
                "all three (SALMONN), or none"
            )

    @property
    def is_salmonn(self) -> bool:
        """Whether the encoder is SALMONN."""
        return bool(self.vicuna)

    def fingerprint(self) -> str:
        """Returns a hash of the files; see `hub.fingerprint`."""
        if self.is_salmonn:
            folders = hub.fetch(self.whisper), hub.fetch(self.vicuna)
            return hub.fingerprint(self.name, self.beats, *folders)
        return hub.fingerprint(hub.fetch(self.name))


def read_backbone_config(files: SpeechFiles, prompt: str = "") -> dict[str, Any]:
    """Reads a speech encoder's config, from which the encoder can be created without its files.

    Args:
      files: Locations of the files.
      prompt: Prompt of a speech LLM; by default, the prompt for its architecture.

    Returns:
      JSON values: the content of config.json or, for SALMONN, the configs of its parts. The config
      of a speech LLM also contains the prompt's tokens.

    Raises:
      InputError: A file cannot be read, the encoder is a text encoder, or a prompt is given for an
        encoder that has no prompt.
    """
    if files.is_salmonn:
        backbone_config = _read_salmonn_config(files)
        config = SalmonnConfig.from_parts(backbone_config)
        tokenizer = registry.load_processor(hub.fetch(files.vicuna), config.decoder)
        tokens = salmonn.prompt_tokens(tokenizer, prompt or _SALMONN_PROMPT, config)
        return backbone_config | {PROMPT_TOKENS: tokens}
    folder = hub.fetch(files.name)
    backbone_config = hf_config.read_config(folder)
    architecture = registry.find_architecture(backbone_config, files.name, "speech")
    if architecture.prompt_tokens is None:
        if prompt:
            raise InputError(f"{files.name}: prompt {prompt!r}; allowed: none, it is not an LLM")
        return backbone_config
    config = architecture.config.from_huggingface(backbone_config)
    tokenizer = registry.load_processor(folder, config, hf_config=backbone_config)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tokens = architecture.prompt_tokens(tokenizer, prompt or architecture.prompt, config)
    return backbone_config | {PROMPT_TOKENS: tokens}


def _read_salmonn_config(files: SpeechFiles) -> dict[str, Any]:
    """Reads the configs of SALMONN's parts, for `SalmonnConfig.from_parts`."""
    beats = Checkpoint.open(files.beats)
    return {
        "model_type": SALMONN,
        "whisper": hf_config.read_config(hub.fetch(files.whisper)),
        "beats": dict(beats.metadata.get("cfg") or hf_config.read_config(beats.path.parent)),
        "vicuna": hf_config.read_config(hub.fetch(files.vicuna)),
        **salmonn.read_sizes(Checkpoint.open(files.name)),
    }


def is_llm(backbone_config: Mapping[str, Any]) -> bool:
    """Returns whether an encoder contains a language model."""
    return PROMPT_TOKENS in backbone_config


def make_speech_encoder(
    backbone_config: Mapping[str, Any],
    *,
    rngs: nnx.Rngs,
    pool_over_prompt: bool = False,
    **changes: Any,
) -> nnx.Module:
    """Creates a speech encoder with random parameters.

    JAX can trace this function, because it reads no files.

    Args:
      backbone_config: Config from `read_backbone_config`.
      rngs: RNGs for parameter initialization.
      pool_over_prompt: Whether the mask of a speech LLM includes its prompt.
      **changes: Further fields of the architecture's config.

    Returns:
      Module that maps waveforms, [B, S], and lengths, [B], to hidden states, [B, N, D], and their
      mask, [B, N].
    """
    if backbone_config.get("model_type") == SALMONN:
        config = SalmonnConfig.from_parts(backbone_config, **changes)
        module: nnx.Module = Salmonn(config, rngs=rngs)
    else:
        module = registry.create_module(backbone_config, rngs=rngs, **changes)
    return _with_prompt(module, backbone_config, pool_over_prompt)


def load_speech_encoder(
    files: SpeechFiles,
    backbone_config: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
    pool_over_prompt: bool = False,
    adapter: str | None = None,
    **changes: Any,
) -> nnx.Module:
    """Creates a speech encoder, like `make_speech_encoder`, and loads its weights.

    Args:
      files: Locations of the files.
      backbone_config: Config from `read_backbone_config`.
      mesh: Mesh on which the parameters are placed; by default, they are on the first device.
      seed: Seed for LoRA parameters that are not in a checkpoint.
      pool_over_prompt: Whether the mask of a speech LLM includes its prompt.
      adapter: Folder of a `peft` adapter; not for SALMONN.
      **changes: Further fields of the architecture's config.

    Raises:
      InputError: The weights or the adapter do not match the encoder.
    """
    if not files.is_salmonn:
        folder = hub.fetch(files.name)
        module = registry.load_module(
            folder, hf_config=backbone_config, mesh=mesh, adapter=adapter, seed=seed, **changes
        )
        return _with_prompt(module, backbone_config, pool_over_prompt)
    if adapter:
        raise InputError(f"adapter {adapter}; allowed: none for SALMONN, which already has LoRA")
    config = SalmonnConfig.from_parts(backbone_config, **changes)
    module = nnx.eval_shape(lambda: Salmonn(config, rngs=make_rngs(seed)))
    salmonn.load_salmonn(
        module,
        whisper=Checkpoint.open(hub.fetch(files.whisper)),
        beats=Checkpoint.open(files.beats),
        vicuna=Checkpoint.open(hub.fetch(files.vicuna)),
        salmonn=Checkpoint.open(files.name),
        shardings=None if mesh is None else registry.parameter_shardings(module, mesh),
    )
    return _with_prompt(module, backbone_config, pool_over_prompt)


def _with_prompt(
    module: nnx.Module, backbone_config: Mapping[str, Any], pool_over_prompt: bool
) -> nnx.Module:
    """Adds the fixed prompt to a speech LLM; returns any other module unchanged."""
    if not is_llm(backbone_config):
        return module
    return PromptedSpeech(module, backbone_config[PROMPT_TOKENS], pool_over_prompt=pool_over_prompt)


def trim_kwargs(backbone_config: Mapping[str, Any], trim: bool) -> dict[str, bool]:
    """Returns the config change that sets `WhisperConfig.trim`; empty for other encoders."""
    return {"trim": trim} if backbone_config["model_type"] == "whisper" else {}


def trainable_paths(backbone_config: Mapping[str, Any]) -> dict[str, LoRAConfig]:
    """Returns the config change that adds SALMONN's trained LoRA; empty for other encoders."""
    if backbone_config["model_type"] != SALMONN:
        return {}
    rank = backbone_config["lora_rank"]
    return {"lora": LoRAConfig(rank=rank, alpha=_SALMONN_LORA_ALPHA, targets=("query", "value"))}


def check_spectrogram(backbone_config: Mapping[str, Any]) -> None:
    """Raises ValueError if an encoder does not compute a log-mel spectrogram."""
    if backbone_config["model_type"] not in _WITH_SPECTROGRAM:
        raise ValueError(
            f"mask_spectrogram: model_type {backbone_config['model_type']!r} has no spectrogram; "
            f"allowed: {', '.join(_WITH_SPECTROGRAM)}"
        )


def has_fixed_input_length(module: Any) -> bool:
    """Returns whether an encoder pads every clip to its maximum length."""
    config = module.config
    return isinstance(config, SalmonnConfig) or not getattr(config, "trim", True)


def max_seconds(module: Any) -> float | None:
    """Returns an encoder's maximum clip length in seconds, or None if it has no limit."""
    max_samples = getattr(module.config, "max_samples", None)
    return None if max_samples is None else max_samples / frontends.SAMPLE_RATE


def check_seconds(seconds: float, module: Any = None, *, name: str = "max_seconds") -> None:
    """Checks the length to which clips are truncated.

    Args:
      seconds: Clip length in seconds.
      module: Encoder, concrete or abstract; None skips the check of the encoder's maximum.
      name: Name of the option, for the error message.

    Raises:
      InputError: The length is not between `SHORTEST_SECONDS` and `LONGEST_SECONDS`, or exceeds the
        encoder's maximum.
    """
    limit = None if module is None else max_seconds(module)
    longest, reason = (LONGEST_SECONDS, "") if limit is None else (limit, ", the encoder's limit")
    if not SHORTEST_SECONDS <= seconds <= longest:  # Also rejects NaN.
        raise InputError(
            f"{name}={seconds:g}; allowed: {SHORTEST_SECONDS:g} to {longest:g}{reason}"
        )
