"""Registry of encoders in the Hugging Face layout; functions to create, load and save them.

`ARCHITECTURES` maps the `model_type` in a config.json to the config class, module class, tensor
names and processor. To add an architecture, implement the classes and key table, and add an entry.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
from absl import logging
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mister_jax.convert.key_table import KeyTable, NameRules
from mister_jax.convert.params import load_backbone, save_params, summarize
from mister_jax.convert.peft import load_adapter, read_base_model, read_lora_config
from mister_jax.convert.safetensors import Checkpoint, save_tensors
from mister_jax.encoders import bert, decoder, distilbert, qwen2_audio, wavlm, whisper
from mister_jax.encoders.hf_config import CONFIG_FILE, read_config
from mister_jax.encoders.hub import fetch
from mister_jax.encoders.tokenization import check_tokenizer
from mister_jax.errors import InputError
from mister_jax.io import write_text
from mister_jax.nn.initialization import create_in_one_program
from mister_jax.nn.lora import LoRAConfig, add_lora, dequantize, linear_layers, merge_lora
from mister_jax.nn.rngs import make_rngs
from mister_jax.parallel import sharding
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES

_DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Entry of the registry: classes and names for one model type.

    Attributes:
      config: Config class with `from_huggingface`.
      module: Module class, called as `module(config, rngs=...)`.
      key_table: Function that returns the key table for a config, with the tensor names of a
        checkpoint without a head.
      name_rules: Variants of tensor names in checkpoints and adapters.
      processor: Name of the class in transformers that prepares the module's input: a tokenizer,
        or a feature extractor for speech. A name is stored, because accessing the class would
        import PyTorch if PyTorch is installed.
      modality: Input modality, "text" or "speech".
      needs_cls_token: Whether the tokenizer must add a token at the start of a text.
      prompt: Default prompt of a speech LLM.
      prompt_tokens: Function of (tokenizer, prompt, config) that returns the prompt's tokens.
    """

    config: Any
    module: Callable[..., nnx.Module]
    key_table: Callable[[Any], KeyTable]
    name_rules: NameRules
    processor: str = "AutoTokenizer"
    modality: str = "text"
    needs_cls_token: bool = False
    prompt: str = ""
    prompt_tokens: Callable[[Any, str, Any], list[int]] | None = None


_BERT = Architecture(
    bert.BertConfig, bert.Bert, bert.key_table, bert.NAME_RULES, needs_cls_token=True
)
_DISTILBERT = Architecture(
    distilbert.DistilBertConfig,
    bert.Bert,
    distilbert.key_table,
    distilbert.NAME_RULES,
    needs_cls_token=True,
)
_DECODER = Architecture(
    decoder.DecoderConfig, decoder.Decoder, decoder.key_table, decoder.NAME_RULES
)
_SPEECH: dict[str, Any] = {"processor": "AutoFeatureExtractor", "modality": "speech"}
_WAV2VEC2 = Architecture(
    wavlm.WavLMConfig, wavlm.WavLM, wavlm.key_table, wavlm.NAME_RULES, **_SPEECH
)
ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": _DISTILBERT,
    "llama": _DECODER,
    "qwen2": _DECODER,
    "whisper": Architecture(
        whisper.WhisperConfig, whisper.Whisper, whisper.key_table, whisper.NAME_RULES, **_SPEECH
    ),
    "wav2vec2": _WAV2VEC2,
    "hubert": _WAV2VEC2,
    "wavlm": dataclasses.replace(_WAV2VEC2, name_rules=wavlm.WAVLM_NAME_RULES),
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
    """Returns the entry of `ARCHITECTURES` for a config.json.

    Args:
      hf_config: Content of the config.json.
      where: Location of the config.json, for error messages.
      modality: Required modality, "text" or "speech"; None allows both.

    Raises:
      InputError: The architecture is not supported, or has the wrong modality.
    """
    model_type = hf_config.get("model_type")
    allowed = [
        name
        for name, architecture in ARCHITECTURES.items()
        if modality in (None, architecture.modality)
    ]
    if model_type not in ARCHITECTURES:
        raise InputError(f"{where}: model_type {model_type!r}; allowed: {', '.join(allowed)}")
    architecture = ARCHITECTURES[model_type]
    if modality not in (None, architecture.modality):
        raise InputError(
            f"{where}: model_type {model_type!r} encodes {architecture.modality}; allowed for "
            f"{modality}: {', '.join(allowed)}"
        )
    return architecture


def find_modality(name_or_folder: str | os.PathLike[str]) -> str:
    """Returns an encoder's modality, "text" or "speech".

    Raises:
      InputError: The encoder cannot be downloaded or read, or its architecture is not supported.
    """
    folder = fetch(name_or_folder)
    return find_architecture(read_config(folder), folder / CONFIG_FILE).modality


def create_module(hf_config: Mapping[str, Any], *, rngs: nnx.Rngs, **changes: Any) -> nnx.Module:
    """Creates an encoder with random parameters.

    JAX can trace this function, because it reads no files.

    Args:
      hf_config: Content of the encoder's config.json.
      rngs: RNGs for parameter initialization.
      **changes: Fields of the architecture's config, which replace the values from `hf_config`.

    Raises:
      InputError: The architecture, or the name or value of a field, is not supported.
    """
    architecture = find_architecture(hf_config, CONFIG_FILE)
    _check_dtypes(changes)
    config = architecture.config.from_huggingface(hf_config, **changes)
    return create_in_one_program(lambda rngs: architecture.module(config, rngs=rngs), rngs)


def load_pretrained(
    name_or_folder: str | os.PathLike[str],
    *,
    hf_config: Mapping[str, Any] | None = None,
    **options: Any,
) -> tuple[nnx.Module, Any]:
    """Loads an encoder and its tokenizer or feature extractor.

    Args:
      name_or_folder: Folder, or model name on the Hugging Face Hub; see `hub.fetch`.
      hf_config: Content of the model's config.json; by default read from its folder.
      **options: Further arguments of `load_module`.

    Returns:
      Encoder, and its tokenizer (for text) or feature extractor (for speech).

    Raises:
      InputError: The model cannot be downloaded or read, is not supported, or does not match its
        weights, tokenizer, adapter or options.
    """
    folder = fetch(name_or_folder)
    hf_config = read_config(folder) if hf_config is None else hf_config
    module = load_module(folder, hf_config=hf_config, **options)
    return module, load_processor(folder, getattr(module, "config", None), hf_config=hf_config)


def load_module(
    folder: str | os.PathLike[str],
    *,
    hf_config: Mapping[str, Any] | None = None,
    mesh: Mesh | None = None,
    adapter: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **changes: Any,
) -> nnx.Module:
    """Loads an encoder without its tokenizer; see `load_pretrained`.

    If the checkpoint is a task model, its head is ignored and a message is logged.

    Args:
      folder: Folder of the model.
      hf_config: Content of the folder's config.json; by default read from the folder.
      mesh: Mesh on which the parameters are placed; by default, they are on the first device.
      adapter: Folder of a `peft` adapter. Its LoRA replaces the LoRA of the option `lora`, which
        may target only layers that the adapter also targets.
      seed: Seed for LoRA parameters that are not in a checkpoint.
      **changes: Fields of the architecture's config, such as `dtype`, `param_dtype` and `lora`,
        which replace the values from `hf_config`.

    Raises:
      InputError: The architecture is not supported, or does not match the weights or the adapter;
        or a name or value in `changes` is not allowed.
    """
    folder = pathlib.Path(folder)
    hf_config = read_config(folder) if hf_config is None else hf_config
    architecture = find_architecture(hf_config, folder / CONFIG_FILE)

    def create() -> nnx.Module:
        return architecture.module(config, rngs=make_rngs(seed))

    try:
        _check_dtypes(changes)
        config = architecture.config.from_huggingface(hf_config, **changes)
        module = nnx.eval_shape(create)
    except ValueError as error:
        raise InputError(f"{folder}: {error}") from error
    table = architecture.key_table(config)
    shardings = None if mesh is None else parameter_shardings(module, mesh)
    checkpoint = Checkpoint.open(folder)
    load_backbone(module, table, checkpoint, architecture.name_rules, shardings=shardings)
    # Variables that are not in the checkpoint, such as LoRA parameters, are initialized as in a new
    # module. The compiler drops all other variables, so that no parameter is allocated twice.
    others = nnx.Any(nnx.LoRAParam, nnx.Not(nnx.Param))
    replicated = None if mesh is None else NamedSharding(mesh, P())
    if jax.tree.leaves(nnx.state(module, others)):
        initial = jax.jit(lambda: nnx.state(create(), others), out_shardings=replicated)()
        nnx.update(module, initial)
    if adapter is not None:
        _warn_of_other_base_model(adapter, folder, hf_config)
        lora = read_lora_config(adapter, table, architecture.name_rules)
        add_lora(module, lora, rngs=make_rngs(seed))
        _check_lora_layers(module, lora, adapter)
        load_adapter(module, adapter, table, architecture.name_rules)
        nnx.update(module, jax.device_put(nnx.state(module, nnx.LoRAParam), replicated))
    return module


def parameter_shardings(module: nnx.Module, mesh: Mesh) -> Any:
    """Returns the shardings of an encoder's parameters on a mesh."""
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return sharding.shardings(params, mesh, ENCODER_SHARDING_RULES)


def _check_dtypes(changes: Mapping[str, Any]) -> None:
    for name in ("dtype", "param_dtype"):
        if name in changes and changes[name] not in _DTYPES:
            raise InputError(f"{name}={changes[name]!r}; allowed: {', '.join(_DTYPES)}")


def _check_lora_layers(
    module: nnx.Module, lora: LoRAConfig, adapter: str | os.PathLike[str]
) -> None:
    """Raises an `InputError` if layers have a LoRA other than the adapter's."""
    others = [path for path, layer in linear_layers(module) if layer.lora not in (None, lora)]
    if others:
        raise InputError(
            f"{adapter}: has no LoRA for {summarize(others)}, which the option lora targets; "
            f"allowed targets: {', '.join(lora.targets)}"
        )


def _warn_of_other_base_model(
    adapter: str | os.PathLike[str], folder: pathlib.Path, hf_config: Mapping[str, Any]
) -> None:
    """Warns if the name of an adapter's base model does not match the encoder.

    The last part of the base model's name is compared with all parts of the encoder's path and of
    the name in the encoder's config. The comparison recognizes copies of a model and folders in the
    Hub's cache.
    """
    base_model = read_base_model(adapter)
    name = _alphanumeric(pathlib.PurePath(base_model or "").name)
    stored_name = pathlib.PurePath(str(hf_config.get("_name_or_path")))
    parts = (*folder.resolve().parts, *stored_name.parts)
    if name and name not in {_alphanumeric(part.rpartition("--")[2]) for part in parts}:
        logging.warning(
            "%s: trained on %s, but the encoder is %s. Unless these are the same model, results "
            "are wrong",
            adapter,
            base_model,
            folder,
        )


def _alphanumeric(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def load_processor(
    folder: str | os.PathLike[str],
    module_config: Any,
    *,
    hf_config: Mapping[str, Any] | None = None,
) -> Any:
    """Loads the tokenizer of a text model or the feature extractor of a speech model.

    Args:
      folder: Folder of the model.
      module_config: Config of the module that reads the tokens.
      hf_config: Content of the folder's config.json; by default read from the folder.

    Raises:
      InputError: Files are missing, or do not match the module's vocabulary or config.json.
    """
    import transformers  # Imported here, because importing it takes a second.

    folder = pathlib.Path(folder)
    hf_config = read_config(folder) if hf_config is None else hf_config
    architecture = find_architecture(hf_config, folder / CONFIG_FILE)
    processor_class = getattr(transformers, architecture.processor)
    try:
        processor = processor_class.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # The exception type depends on the tokenizer and file format.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{folder}: no readable tokenizer or processor ({reason})") from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if hasattr(tokenizer, "get_vocab"):
        check_tokenizer(
            tokenizer,
            folder,
            hf_config,
            vocab_size=getattr(module_config, "vocab_size", None),
            needs_cls_token=architecture.needs_cls_token,
        )
    return processor


def save_pretrained(
    module: nnx.Module,
    hf_config: Mapping[str, Any],
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
) -> None:
    """Saves an encoder in a folder that `load_pretrained` and transformers can read.

    In the files, LoRA is merged into the kernels and int8 kernels are dequantized. The module
    itself does not change.

    Args:
      module: Encoder with a `config`.
      hf_config: Content of the encoder's config.json, from `read_config` or `to_huggingface`.
      folder: Output folder; created if missing.
      tokenizer: Tokenizer or feature extractor to save with the encoder.

    Raises:
      InputError: The architecture is not supported, or the folder cannot be written.
      ValueError: The config belongs to another model.
    """
    folder = pathlib.Path(folder)
    architecture = find_architecture(hf_config, folder / CONFIG_FILE)
    merged = dequantize(merge_lora(nnx.merge(*nnx.split(module))))
    config = architecture.config.from_huggingface(hf_config)
    expected = nnx.eval_shape(lambda: architecture.module(config, rngs=make_rngs(0)))
    if _param_shapes(expected) != _param_shapes(merged):
        raise ValueError("save_pretrained: the config belongs to a model with other parameters")
    tensors = save_params(
        merged, architecture.key_table(config), prefix=architecture.name_rules.prefixes[0]
    )
    save_tensors(folder, tensors)
    # transformers loads the weights in this dtype.
    dtype = max((tensor.dtype for tensor in tensors.values()), key=lambda dtype: dtype.itemsize)
    fields = {name: value for name, value in hf_config.items() if name != "torch_dtype"}
    text = json.dumps(fields | {"dtype": dtype.name}, indent=2, sort_keys=True)
    try:
        write_text(folder / CONFIG_FILE, f"{text}\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error})") from error


def _param_shapes(module: nnx.Module) -> dict[str, Any]:
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return jax.tree.map(lambda leaf: leaf.shape, params)
