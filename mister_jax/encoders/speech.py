"""Speech encoders by one call: from where their files are to clips in, hidden states out.

A folder as the Hugging Face libraries write it holds an encoder whole. SALMONN comes in four
checkpoints, its own and those of Whisper, BEATs and Vicuna. An LLM that hears hears every clip in
the same prompt.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from flax import nnx
from jax.sharding import Mesh

from mister_jax.convert.safetensors import Checkpoint
from mister_jax.encoders import frontends, hub, salmonn
from mister_jax.encoders.audio_prompt import PromptedSpeech
from mister_jax.encoders.salmonn import Salmonn, SalmonnConfig
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig
from mister_jax.parallel import sharding
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES

SALMONN = "salmonn"
"""The `model_type` of a description of SALMONN."""

PROMPT_TOKENS = "prompt_tokens"
"""What a description holds besides, of an LLM."""

SHORTEST_SECONDS, LONGEST_SECONDS = 0.1, 3600.0
"""Of an utterance; what encoders without a longest of their own take."""

LORA_RANK = "lora_rank"
"""What it holds besides, of SALMONN."""

_WITH_SPECTROGRAM = ("whisper", "qwen2_audio", SALMONN)
_SALMONN_PROMPT = "Describe the emotion of the speaker."
_QFORMER_LAYER = r"speech_Qformer\.bert\.encoder\.layer\.(\d+)\."
_LORA = "llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"
_LORA_ALPHA = 32.0  # of all released SALMONN; no tensor tells it
_HEAD_DIM = 64  # of BERT, of which the Q-Former has the layers; no tensor tells it


@dataclasses.dataclass(frozen=True)
class SpeechFiles:
    """Where the files of a speech encoder are.

    Attributes:
      name: a folder, or a name on the Hugging Face Hub; of SALMONN the checkpoint of what it has
        learned, see `Checkpoint.open`.
      whisper: of SALMONN alone, as are the following: Whisper, a folder or a name as above.
      beats: checkpoint of BEATs, a file as released or a folder; there its `cfg` is in config.json.
      vicuna: Vicuna with its tokenizer, a folder or a name as above.
    """

    name: str
    whisper: str = ""
    beats: str = ""
    vicuna: str = ""

    def __post_init__(self):
        given = [bool(part) for part in (self.whisper, self.beats, self.vicuna)]
        if any(given) and not all(given):
            raise InputError(
                f"whisper {self.whisper!r}, beats {self.beats!r}, vicuna {self.vicuna!r}; allowed: "
                "all of them (SALMONN), or none"
            )

    @property
    def is_salmonn(self) -> bool:
        """The encoder comes in four checkpoints."""
        return bool(self.vicuna)

    def fingerprint(self) -> str:
        """See `hub.fingerprint`."""
        if self.is_salmonn:
            folders = hub.fetch(self.whisper), hub.fetch(self.vicuna)
            return hub.fingerprint(self.name, self.beats, *folders)
        return hub.fingerprint(hub.fetch(self.name))


def read_backbone_config(files: SpeechFiles, prompt: str = "") -> dict[str, Any]:
    """What a speech encoder is: JSON values, from which `make` makes it without its files.

    Args:
      files: where they are.
      prompt: of an LLM: what it is asked about every clip; its usual question if empty.

    Raises:
      InputError: files that cannot be read, an encoder of text, or a prompt it has no use for.
    """
    if files.is_salmonn:
        described = _read_salmonn_config(files)
        config = SalmonnConfig.from_parts(described)
        tokenizer = hub.load_processor(hub.fetch(files.vicuna), config.decoder)
        asked = prompt or _SALMONN_PROMPT
        return described | {PROMPT_TOKENS: salmonn.prompt_tokens(tokenizer, asked, config)}
    folder = hub.fetch(files.name)
    described = hub.read_config(folder)
    architecture = hub.architecture_of(described, files.name, "speech")
    if architecture.prompt_tokens is None:
        if prompt:
            raise InputError(f"{files.name}: prompt {prompt!r}; allowed: none, it is no LLM")
        return described
    config = architecture.config.from_huggingface(described)
    tokenizer = hub.load_processor(folder, config)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    tokens = architecture.prompt_tokens(tokenizer, prompt or architecture.prompt, config)
    return described | {PROMPT_TOKENS: tokens}


def is_llm(described: Mapping[str, Any]) -> bool:
    """A language model is part of what `read_backbone_config` described."""
    return PROMPT_TOKENS in described


def make_speech_encoder(
    described: Mapping[str, Any], *, rngs: nnx.Rngs, pool_over_prompt: bool = False, **changes: Any
) -> nnx.Module:
    """A speech encoder with random parameters; may be traced, reads no file.

    Args:
      described: of `read_backbone_config`.
      rngs: for the parameters.
      pool_over_prompt: see `PromptedSpeech`; of an LLM alone.
      **changes: further fields of the architecture's config.

    Returns:
      Called with clips [B, S] and lengths [B], it gives hidden states and which of them to read.
    """
    if described.get("model_type") == SALMONN:
        module: nnx.Module = Salmonn(SalmonnConfig.from_parts(described, **changes), rngs=rngs)
    else:
        module = hub.make(described, rngs=rngs, **changes)
    return _prompted(module, described, pool_over_prompt)


def load_speech_encoder(
    files: SpeechFiles,
    described: Mapping[str, Any],
    *,
    mesh: Mesh | None = None,
    seed: int = 0,
    pool_over_prompt: bool = False,
    adapter: str | None = None,
    **changes: Any,
) -> nnx.Module:
    """The speech encoder that `make` makes, with its weights.

    Args:
      files: where they are.
      described: of `read_backbone_config`.
      mesh: to place the parameters on; by default the first device.
      seed: of low-rank paths that no checkpoint holds.
      pool_over_prompt: see `make`.
      adapter: see `hub.load`; of all but SALMONN.
      **changes: see `make`.

    Raises:
      InputError: weights or an adapter that do not belong to it.
    """
    if not files.is_salmonn:
        folder = hub.fetch(files.name)
        module = hub.load_module(folder, mesh=mesh, adapter=adapter, seed=seed, **changes)
        return _prompted(module, described, pool_over_prompt)
    if adapter:
        raise InputError(f"{adapter}: an adapter, and SALMONN comes with its own; leave it out")
    config = SalmonnConfig.from_parts(described, **changes)
    shapes = nnx.eval_shape(lambda: Salmonn(config, rngs=nnx.Rngs(seed)))
    params = nnx.to_pure_dict(nnx.state(shapes, nnx.Param))
    shardings = None if mesh is None else sharding.shardings(params, mesh, ENCODER_SHARDING_RULES)
    module = salmonn.load_salmonn(
        shapes,
        whisper=Checkpoint.open(hub.fetch(files.whisper)),
        beats=Checkpoint.open(files.beats),
        vicuna=Checkpoint.open(hub.fetch(files.vicuna)),
        salmonn=Checkpoint.open(files.name),
        shardings=shardings,
    )
    return _prompted(module, described, pool_over_prompt)


def _read_salmonn_config(files: SpeechFiles) -> dict[str, Any]:
    """What `SalmonnConfig.from_parts` reads."""
    beats, learned = Checkpoint.open(files.beats), Checkpoint.open(files.name)
    cfg = beats.metadata.get("cfg") or hub.read_config(beats.path.parent)

    def shape(name: str) -> tuple[int, ...]:
        name = f"{salmonn.PREFIX}{name}"
        if name not in learned:
            raise InputError(f"{files.name}: not a checkpoint of SALMONN: it has no tensor {name}")
        return tuple(learned[name].shape)

    _, num_queries, hidden_size = shape("speech_query_tokens")
    layers = {match[1] for name in learned if (match := re.search(_QFORMER_LAYER, name))}
    hidden = shape("speech_Qformer.bert.encoder.layer.0.intermediate_query.dense.weight")
    return {
        "model_type": SALMONN,
        "whisper": hub.read_config(hub.fetch(files.whisper)),
        "beats": dict(cfg),
        "vicuna": hub.read_config(hub.fetch(files.vicuna)),
        LORA_RANK: shape(_LORA)[0],
        "qformer": {
            "hidden_size": hidden_size,
            "num_layers": len(layers),
            "num_heads": max(1, hidden_size // _HEAD_DIM),
            "mlp_dim": hidden[0],
            "num_queries": num_queries,
        },
    }


def _prompted(
    module: nnx.Module, described: Mapping[str, Any], pool_over_prompt: bool
) -> nnx.Module:
    if not is_llm(described):
        return module
    return PromptedSpeech(module, described[PROMPT_TOKENS], pool_over_prompt=pool_over_prompt)


def trim_kwargs(described: Mapping[str, Any], trim: bool) -> dict[str, bool]:
    """`changes` for `make` and `load` that decide on `WhisperConfig.trim`; of others, none."""
    return {"trim": trim} if described["model_type"] == "whisper" else {}


def trainable_paths(described: Mapping[str, Any]) -> dict[str, LoRAConfig]:
    """`changes` for `make` and `load` that give SALMONN the low-rank paths of its checkpoint.

    Of other encoders, none.
    """
    if described["model_type"] != SALMONN:
        return {}
    rank = described[LORA_RANK]
    return {"lora": LoRAConfig(rank=rank, alpha=_LORA_ALPHA, targets=("query", "value"))}


def check_spectrogram(described: Mapping[str, Any]) -> None:
    """Raises ValueError if an encoder reads the waveform itself, without Whisper's front end."""
    if described["model_type"] not in _WITH_SPECTROGRAM:
        raise ValueError(
            f"mask_spectrogram, and model_type {described['model_type']!r} has no spectrogram; "
            f"allowed with {', '.join(_WITH_SPECTROGRAM)}"
        )


def has_fixed_input_length(module: Any) -> bool:
    """A clip costs an encoder as much as the longest it has positions for."""
    config = module.config
    return isinstance(config, SalmonnConfig) or not getattr(config, "trim", True)


def max_seconds(module: Any) -> float | None:
    """Returns the seconds that an encoder with a fixed window reads, None for the others."""
    max_samples = getattr(module.config, "max_samples", None)
    return None if max_samples is None else max_samples / frontends.SAMPLE_RATE


def check_seconds(seconds: float, module: Any = None, *, name: str = "max_seconds") -> None:
    """Makes sure that clips may be cut at so many seconds.

    Args:
      seconds: of a clip.
      module: the encoder that is to read it, if it is known; may hold shapes in place of arrays.
      name: of the option, for the error.

    Raises:
      InputError: not from `SHORTEST_SECONDS` to `LONGEST_SECONDS`, or more than the encoder has
        positions for.
    """
    window = None if module is None else max_seconds(module)
    longest, why = (LONGEST_SECONDS, "") if window is None else (window, ", as the encoder has")
    if not SHORTEST_SECONDS <= seconds <= longest:  # of no number, neither is true
        raise InputError(f"{name}={seconds:g}; allowed: {SHORTEST_SECONDS:g} to {longest:g}{why}")
