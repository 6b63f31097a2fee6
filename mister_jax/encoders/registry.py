"""The supported architectures: config, module, checkpoint names and processor of each model type.

To add an architecture, write its config, module, `key_table` and `NAME_RULES`, and add an entry to
`ARCHITECTURES`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

from flax import nnx

from mister_jax.convert.key_table import KeyTable
from mister_jax.convert.names import NameRules
from mister_jax.encoders import bert, decoder, hub, qwen2_audio, wavlm, whisper
from mister_jax.encoders.hf_config import CONFIG_FILE, read_config
from mister_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to create, load and save the encoders of a model type.

    Attributes:
      config: Config class with `from_huggingface`.
      module: Module class, called as `module(config, rngs=...)`.
      key_table: Function from a config to the key table with the names of the bare backbone.
      names: Variants of the tensor names in checkpoints and adapters.
      processor: Name of the class in transformers that prepares the module's input: a tokenizer,
        or a feature extractor for speech. A name, because access to the class imports PyTorch
        where it is installed.
      modality: Kind of input, "text" or "speech".
      needs_cls_token: Whether the tokenizer must add a token at the start of a text.
      prompt: Default prompt of a module that encodes clips within a prompt.
      prompt_tokens: Function of such a module from (tokenizer, prompt, config) to tokens.
    """

    config: Any
    module: Callable[..., nnx.Module]
    key_table: Callable[[Any], KeyTable]
    names: NameRules
    processor: str = "AutoTokenizer"
    modality: str = "text"
    needs_cls_token: bool = False
    prompt: str = ""
    prompt_tokens: Callable[[Any, str, Any], list[int]] | None = None


_BERT = Architecture(
    bert.BertConfig, bert.Bert, bert.key_table, bert.NAME_RULES, needs_cls_token=True
)
_DECODER = Architecture(
    decoder.DecoderConfig, decoder.Decoder, decoder.key_table, decoder.NAME_RULES
)
_WAV2VEC2 = Architecture(
    wavlm.WavLMConfig,
    wavlm.WavLM,
    wavlm.key_table,
    wavlm.NAME_RULES,
    processor="AutoFeatureExtractor",
    modality="speech",
)
# `model_type` of a config.json -> architecture.
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "llama": _DECODER,
    "qwen2": _DECODER,
    "whisper": Architecture(
        whisper.WhisperConfig,
        whisper.Whisper,
        whisper.key_table,
        whisper.NAME_RULES,
        processor="AutoFeatureExtractor",
        modality="speech",
    ),
    "wav2vec2": _WAV2VEC2,
    "hubert": _WAV2VEC2,
    "wavlm": dataclasses.replace(_WAV2VEC2, names=wavlm.WAVLM_NAME_RULES),
    "qwen2_audio": Architecture(
        qwen2_audio.Qwen2AudioConfig,
        qwen2_audio.Qwen2Audio,
        qwen2_audio.key_table,
        qwen2_audio.NAME_RULES,
        modality="speech",
        prompt="<|audio_bos|><|AUDIO|><|audio_eos|>What is the emotion of the person?:",
        prompt_tokens=qwen2_audio.prompt_tokens,
    ),
}


def find_architecture(
    hf_config: Mapping[str, Any], where: str | os.PathLike[str], modality: str | None = None
) -> Architecture:
    """Returns the entry of `ARCHITECTURES` for the content of a config.json.

    Args:
      hf_config: Content of the file.
      where: Location of the file, for errors.
      modality: Required modality, "text" or "speech"; None allows both.

    Raises:
      InputError: The architecture is not supported, or has another modality.
    """
    model_type = hf_config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise InputError(f"{where}: model_type {model_type!r}; allowed: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    if modality not in (None, architecture.modality):
        allowed = [name for name, other in ARCHITECTURES.items() if other.modality == modality]
        raise InputError(
            f"{where}: model_type {model_type!r} encodes {architecture.modality}; allowed for "
            f"{modality}: {', '.join(allowed)}"
        )
    return architecture


def find_modality(name_or_folder: str | os.PathLike[str]) -> str:
    """Returns the modality of an encoder in a folder or on the Hugging Face Hub.

    Returns:
      "text" or "speech".

    Raises:
      InputError: The encoder cannot be downloaded or read, or its architecture is not supported.
    """
    folder = hub.fetch(name_or_folder)
    return find_architecture(read_config(folder), folder / CONFIG_FILE).modality
