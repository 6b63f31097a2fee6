"""Exports a fine-tuned encoder for transformers or `peft`."""

from __future__ import annotations

import pathlib
import shutil
from typing import Any

from etils import epath

from mister_jax.convert import peft
from mister_jax.data.storage import atomic_directory
from mister_jax.encoders import hf_config, hub, registry
from mister_jax.encoders.audio_prompt import PromptedSpeech
from mister_jax.errors import InputError
from mister_jax.nn.lora import linear_layers
from mister_jax.predictor import Predictor
from mister_jax.workdir import read_config, read_model_description


def export_encoder(
    workdir: epath.PathLike,
    output: epath.PathLike,
    *,
    adapter: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes the fine-tuned encoder of a training run, with its best parameters.

    The encoder is written without the head of stage 1, Whisper without its decoder. The folder can
    be opened with `transformers.AutoModel.from_pretrained`: it holds `config.json`, safetensors
    with the LoRA weights merged, and the files of the tokenizer or feature extractor. With
    `adapter`, it holds a LoRA adapter that `peft.PeftModel.from_pretrained` adds to the base model
    opened with `AutoModel`. The folder is written completely or not at all.

    Args:
      workdir: Work directory of the training run.
      output: Folder to write.
      adapter: Whether to write only the LoRA adapter.
      overwrite: Whether to replace an existing export.

    Raises:
      InputError: The work directory has no encoder or no best checkpoint, its encoder or adapter
        cannot be exported, or the output exists or cannot be written.
    """
    config = read_config(workdir)
    if config.task == "fusion":
        read_model_description(workdir)  # Raises if an older version wrote the work directory.
        raise InputError(
            f"{workdir}: the work directory of a MiSTER-E model; needed: that of an encoder"
        )
    if config.encoder.options.get("vicuna"):
        raise InputError(
            f"{workdir}: SALMONN consists of four checkpoints, and transformers has no such model; "
            "allowed: encoders with one checkpoint"
        )
    target = pathlib.Path(output).resolve()
    if target.exists():
        _check_replaceable(target, overwrite)
    predictor = Predictor(workdir)
    task = predictor.task
    if target == task.folder.resolve():
        raise InputError(
            f"{output}: the encoder from which training started; needed: another folder"
        )
    (model,) = predictor.models()
    encoder = model.backbone
    if isinstance(encoder, PromptedSpeech):
        encoder = encoder.model
    write = _write_adapter if adapter else _write_model
    where = epath.Path(target)
    with atomic_directory(where, where.parent, overwrite=overwrite) as place:
        write(pathlib.Path(place) / target.name, task, encoder)


def _check_replaceable(target: pathlib.Path, overwrite: bool) -> None:
    if not overwrite:
        raise InputError(f"{target}: exists; allowed: another --output, or --overwrite")
    is_model = (target / hf_config.CONFIG_FILE).exists() and any(target.glob("model*.safetensors"))
    if not is_model and not (target / peft.CONFIG_FILE).exists():
        raise InputError(f"{target}: not a model; --overwrite only replaces a folder with a model")


def _write_model(folder: pathlib.Path, task: Any, encoder: Any) -> None:
    registry.save_pretrained(encoder, hf_config.read_config(task.folder), folder)
    for pattern in hub.PROCESSOR_FILES:
        for file in task.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)


def _write_adapter(folder: pathlib.Path, task: Any, encoder: Any) -> None:
    name = task.options.name
    whole = task.options.full or getattr(task.options, "tower", "") == "full"
    if whole or not any(layer.lora for _, layer in linear_layers(encoder)):
        raise InputError(
            f"{name}: not only LoRA weights were trained, and an adapter holds only these; "
            "allowed: an export without --adapter"
        )
    architecture = registry.find_architecture(
        hf_config.read_config(task.folder), task.folder / hf_config.CONFIG_FILE
    )
    base = str(task.folder.resolve()) if pathlib.Path(name).is_dir() else name
    peft.save_adapter(
        encoder,
        folder,
        architecture.key_table(encoder.config),
        architecture.name_rules,
        base_model=hub.MINILM_MODEL if base == hub.MINILM else base,
    )
