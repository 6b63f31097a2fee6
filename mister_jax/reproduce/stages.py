"""Stages of a reproduction: commands, and output files that show whether a stage is complete."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

from mister_jax.configs import speech_encoder
from mister_jax.data.storage import dataset_directory
from mister_jax.errors import InputError
from mister_jax.io import read_json
from mister_jax.reproduce.settings import PRESETS, Settings

RECIPES: Mapping[str, str] = {"paper": ",paper", "default": ""}
"""Maps each recipe of MiSTER-E to what follows DATASET in `--config=fusion:DATASET`."""

SPLITS = ("validation", "test")

# Variants of `configs.fusion` with a single expert, by expert.
EXPERT_VARIANTS = {"speech": "speech_only", "text": "text_only", "fusion": "fusion_only"}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command of a reproduction.

    Attributes:
      name: Name of the stage in messages and tables.
      arguments: Arguments of `mister-jax`.
      is_done: Function that returns whether the output files of the stage exist.
      workdir: Work directory of a training stage, empty for other stages.
    """

    name: str
    arguments: tuple[str, ...]
    is_done: Callable[[], bool]
    workdir: str = ""

    @property
    def command(self) -> str:
        """Shell command that runs this stage."""
        words = (word if _is_plain(word) else f"'{word}'" for word in self.arguments)
        return " ".join(("mister-jax", *words))


def make_stages(settings: Settings) -> list[Stage]:
    """Returns the stages in the order in which they run."""
    workdir = pathlib.Path(settings.workdir)
    dataset, merged, data_dir = settings.dataset, settings.features, settings.datasets
    corpus, _, config = dataset.partition("/")
    stages = [
        Stage(
            "prepare",
            (
                *("prepare", f"--corpus={corpus}", f"--config={config}"),
                *([f"--source={settings.source}"] if settings.source else []),
                *(["--partial"] if settings.partial else []),
                f"--data_dir={data_dir}",
            ),
            lambda: _dataset_exists(dataset, data_dir),
        )
    ]
    for modality, encoder in (("text", settings.text), ("speech", settings.speech)):
        options = encoder_options(settings, modality)
        folder = workdir / modality
        stages.append(
            Stage(
                f"train {modality}",
                (
                    *("train", f"--config={modality}_encoder:{dataset},{encoder.recipe}"),
                    f"--workdir={folder}",
                    f"--config.data.data_dir={data_dir}",
                    *(f"--config.{option}" for option in options),
                ),
                _make_training_check(folder),
                workdir=str(folder),
            )
        )
    for modality in ("text", "speech"):
        folder, output = workdir / modality, f"{merged}_{modality}"
        stages.append(
            Stage(
                f"extract {modality}",
                (
                    *("extract", f"--workdir={folder}", f"--dataset={dataset}"),
                    *(f"--output={output}", f"--data_dir={data_dir}"),
                ),
                _make_features_check(output, data_dir, {modality: folder}),
            )
        )
    stages.append(
        Stage(
            "merge",
            (
                *("extract", f"--speech={merged}_speech", f"--text={merged}_text"),
                *(f"--output={merged}", f"--data_dir={data_dir}"),
            ),
            _make_features_check(
                merged, data_dir, {name: workdir / name for name in ("text", "speech")}
            ),
        )
    )
    for recipe, variants in RECIPES.items():
        stages += _fusion_stages(settings, recipe, f"fusion:{merged}{variants}")
    return stages


def _fusion_stages(settings: Settings, recipe: str, config: str) -> list[Stage]:
    """Returns the stages for one recipe: MiSTER-E, and a separate model for each expert."""
    folder, experts = fusion_folder(settings, recipe), experts_folder(settings, recipe)
    flags = (
        f"--config={config}",
        f"--config.num_seeds={settings.num_seeds}",
        f"--config.data.data_dir={settings.datasets}",
        *(f"--config.{option}" for option in settings.fusion_options),
    )
    evaluations = (
        Stage(
            f"evaluate {recipe} {split}",
            ("evaluate", f"--workdir={folder}", f"--split={split}"),
            _make_evaluation_check(folder, split),
        )
        for split in SPLITS
    )
    variants = tuple(EXPERT_VARIANTS.values())
    return [
        Stage(
            f"train {recipe}",
            ("train", *flags, f"--workdir={folder}"),
            _make_training_check(folder),
            workdir=str(folder),
        ),
        *evaluations,
        Stage(
            f"experts {recipe}",
            ("ablate", *flags, f"--variants={','.join(variants)}", f"--workdir={experts}"),
            lambda: all((experts / variant / "ablation.json").exists() for variant in variants),
            workdir=str(experts / variants[0]),
        ),
    ]


def fusion_folder(settings: Settings, recipe: str) -> pathlib.Path:
    """Returns the work directory of MiSTER-E for a recipe."""
    return pathlib.Path(settings.workdir, recipe)


def experts_folder(settings: Settings, recipe: str) -> pathlib.Path:
    """Returns the folder for a recipe's ablation, in which each model has only one expert."""
    return pathlib.Path(settings.workdir, f"{recipe}_experts")


def encoder_options(settings: Settings, modality: str) -> tuple[str, ...]:
    """Returns "FIELD=VALUE" for each field that differs from the default of an encoder's config.

    The values come from the preset and from the user. The user's values take precedence.
    """
    if modality == "text":
        options, user_options = [*settings.text.overrides()], settings.text_options
    else:
        options, user_options = _speech_options(settings), settings.speech_options
    changed = {option.partition("=")[0] for option in user_options}
    kept = (option for option in options if option.partition("=")[0] not in changed)
    return (*kept, *user_options)


def _speech_options(settings: Settings) -> list[str]:
    preset, encoder = PRESETS[settings.preset], settings.speech
    config = speech_encoder.get_config(f"any,{encoder.recipe}")
    options = [*encoder.overrides()]
    if encoder.recipe == preset.speech_encoder:
        options += preset.speech_options
    accumulation = settings.accumulation(config.data.batch_size)
    if accumulation != config.train.accumulation:
        options.append(f"train.accumulation={accumulation}")
    return options


def _is_plain(word: str) -> bool:
    return not set(word) & set(" \t\n\"'$&;|<>()*?[]{}\\`!#~")


def _dataset_exists(name: str, data_dir: str) -> bool:
    return bool((dataset_directory(name, data_dir) / "dataset_info.json").exists())


def _make_training_check(folder: pathlib.Path) -> Callable[[], bool]:
    def is_done() -> bool:
        # The curves are drawn after the last epoch, when the checkpoint of that epoch may still be
        # in a temporary folder.
        is_writing = any(folder.glob("checkpoints/*/*tmp*"))
        return (folder / "curves.png").exists() and not is_writing

    return is_done


def _make_evaluation_check(folder: pathlib.Path, split: str) -> Callable[[], bool]:
    def is_done() -> bool:
        path = folder / "metrics.json"
        return path.exists() and split in read_json(path)

    return is_done


def _make_features_check(
    name: str, data_dir: str, workdirs: Mapping[str, pathlib.Path]
) -> Callable[[], bool]:
    """Returns a function that checks whether a feature dataset exists.

    The returned function raises InputError if the dataset was not extracted with the encoders in
    `workdirs`.
    """

    def is_done() -> bool:
        if not _dataset_exists(name, data_dir):
            return False
        directory = dataset_directory(name, data_dir)
        metadata = read_json(directory / "metadata.json")
        # A merged dataset has the metadata of its encoders in each split.
        metadata |= next(iter(metadata.get("splits", {}).values()), None) or {}
        for modality, folder in workdirs.items():
            if metadata.get(modality, {}).get("config") != read_json(folder / "config.json"):
                raise InputError(
                    f"{directory}: its features come from another {modality} encoder than "
                    f"{folder}; remove the dataset, or pass another --data_dir"
                )
        return True

    return is_done
