"""Settings of a reproduction: corpus, encoders and work directory."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from mister_jax.configs import speech_encoder, text_encoder
from mister_jax.errors import InputError

CORPORA = ("iemocap", "meld", "mosi")
CLASSES = ("six", "four")

_SALMONN = "salmonn_7b"
# Files and folders that SALMONN needs in addition to its checkpoint.
SALMONN_PARTS = ("whisper", "beats", "vicuna")


@dataclasses.dataclass(frozen=True)
class Preset:
    """A text encoder and a speech encoder of similar size.

    Attributes:
      text_encoder: Key of `configs.text_encoder.ENCODERS`.
      speech_encoder: Key of `configs.speech_encoder.ENCODERS`.
      speech_options: Changed config fields, so that training the speech encoder fits in the memory
        of one GPU. These fields do not affect the trained parameters.
    """

    text_encoder: str
    speech_encoder: str
    speech_options: tuple[str, ...] = ()


PRESETS: Mapping[str, Preset] = {
    "small": Preset("roberta_base", "wavlm_base"),
    "large": Preset("roberta_large", "wavlm_large", ("encoder.options.remat=full",)),
    "llm": Preset("llama_3_1_8b", _SALMONN),
}

# Number of gradient accumulation steps with which a batch of 30 s clips fits in the memory of one
# device.
SPEECH_ACCUMULATION = {"wavlm_base": 2, "wavlm_large": 4, "qwen2_audio_7b": 8, _SALMONN: 8}


@dataclasses.dataclass(frozen=True)
class Encoder:
    """An encoder of one modality.

    Attributes:
      recipe: Key of the config's `ENCODERS`, which sets the recipe of the fine-tuning.
      name: Name on the Hugging Face Hub, file or folder.
      parts: Other files of SALMONN by name.
      is_default: Whether the config already has this name and these parts.
    """

    recipe: str
    name: str
    parts: Mapping[str, str]
    is_default: bool

    def overrides(self) -> tuple[str, ...]:
        """Returns "FIELD=VALUE" for each field of the config that this encoder changes."""
        if self.is_default:
            return ()
        names = {"name": self.name, **self.parts}
        return tuple(f"encoder.options.{key}={value}" for key, value in names.items())


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of a reproduction.

    When the reproduction resumes, only `source`, `workdir`, `data_dir` and `partial` may change.

    Attributes:
      corpus: One of `CORPORA`.
      preset: Key of `PRESETS`.
      workdir: Folder that contains the files of all stages.
      source: Folder of the released corpus.
      data_dir: Directory of the datasets; if empty, WORKDIR/data.
      classes: Classes of IEMOCAP, one of `CLASSES`.
      num_seeds: Number of seeds of MiSTER-E.
      text_encoder: Text encoder: a key of the config's `ENCODERS`, a name or a folder; if empty,
        the preset's encoder.
      speech_encoder: Speech encoder, specified like `text_encoder`.
      salmonn_parts: New locations of SALMONN's parts by name.
      partial: Whether to allow an incomplete corpus.
      text_options: Changed fields of the text encoder's config, such as "train.epochs=5".
      speech_options: Changed fields of the speech encoder's config.
      fusion_options: Changed fields of MiSTER-E's config.
      num_devices: Number of devices that share a batch, which determines the number of gradient
        accumulation steps; 0 uses the number of steps for one device.
    """

    corpus: str
    preset: str
    workdir: str
    source: str = ""
    data_dir: str = ""
    classes: str = "six"
    num_seeds: int = 5
    text_encoder: str = ""
    speech_encoder: str = ""
    salmonn_parts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    partial: bool = False
    text_options: tuple[str, ...] = ()
    speech_options: tuple[str, ...] = ()
    fusion_options: tuple[str, ...] = ()
    num_devices: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (
            ("corpus", CORPORA),
            ("preset", tuple(PRESETS)),
            ("classes", CLASSES),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"--{name}={getattr(self, name)}; allowed: {', '.join(allowed)}")
        if self.classes != "six" and self.corpus != "iemocap":
            raise InputError(f"--classes={self.classes}: allowed only with --corpus=iemocap")
        if self.num_seeds < 1:
            raise InputError(f"--num_seeds={self.num_seeds}; allowed: 1 or more")
        if self.salmonn_parts and self.speech.recipe != _SALMONN:
            raise InputError(
                f"--{', --'.join(self.salmonn_parts)}: allowed only with SALMONN, the speech "
                "encoder of --preset=llm"
            )
        for name in ("text_options", "speech_options", "fusion_options"):
            for option in getattr(self, name):
                field, equals, _ = option.partition("=")
                if not field or not equals:
                    raise InputError(
                        f"--{name.removesuffix('s')}={option}; allowed: FIELD=VALUE, such as "
                        "train.epochs=5"
                    )

    @property
    def dataset(self) -> str:
        """Name of the dialogue dataset with speech and text."""
        configs = {"iemocap": f"{self.classes}_session1", "meld": "clips", "mosi": "binary"}
        return f"{self.corpus}/{configs[self.corpus]}"

    @property
    def features(self) -> str:
        """Name of the feature dataset with both modalities."""
        classes = "" if self.classes == "six" else "4"
        return f"{self.corpus}{classes}_{self.preset}"

    @property
    def datasets(self) -> str:
        """Directory of the datasets."""
        return self.data_dir or str(pathlib.Path(self.workdir) / "data")

    @property
    def text(self) -> Encoder:
        """Text encoder."""
        return _encoder(self.text_encoder, PRESETS[self.preset].text_encoder, text_encoder.ENCODERS)

    @property
    def speech(self) -> Encoder:
        """Speech encoder."""
        encoder = _encoder(
            self.speech_encoder, PRESETS[self.preset].speech_encoder, speech_encoder.ENCODERS
        )
        if encoder.recipe != _SALMONN:
            return encoder
        parts = {
            part: self.salmonn_parts.get(part, speech_encoder.SALMONN[part])
            for part in SALMONN_PARTS
        }
        is_default = encoder.is_default and not self.salmonn_parts
        return dataclasses.replace(encoder, parts=parts, is_default=is_default)

    def accumulation(self, batch_size: int) -> int:
        """Returns the number of gradient accumulation steps for the speech encoder.

        Batches are padded to a multiple of the number of devices times the number of steps, so too
        many steps waste time on padding.
        """
        one_device = SPEECH_ACCUMULATION.get(self.speech.recipe, 1)
        rows_per_device = -(-batch_size // max(self.num_devices, 1))
        return max(1, min(one_device // max(self.num_devices, 1), rows_per_device))

    def check_files(self) -> None:
        """Checks that all local files of the corpus and the encoders exist.

        Raises:
          InputError: A file or folder is missing.
        """
        prepared = pathlib.Path(self.datasets, self.dataset)
        if not self.source and not prepared.exists():
            raise InputError("--source is needed: the folder of the released corpus")
        if self.source and not pathlib.Path(self.source).is_dir():
            raise InputError(f"--source={self.source}: no such folder")
        for flag, name in {
            "text_encoder": self.text.name,
            "speech_encoder": self.speech.name,
            **self.speech.parts,
        }.items():
            if flag == "vicuna" and name == speech_encoder.SALMONN["vicuna"]:
                raise InputError(
                    f"--vicuna is needed: a folder with {name} in safetensors; the Hub has it only "
                    "in PyTorch's format"
                )
            if _is_local(name) and not pathlib.Path(name).exists():
                raise InputError(f"--{flag}={name}: no such file or folder")


def _encoder(value: str, preset: str, encoders: Mapping[str, str]) -> Encoder:
    if not value or value in encoders:
        recipe = value or preset
        return Encoder(recipe, encoders[recipe], {}, is_default=True)
    return Encoder(preset, value, {}, is_default=False)


def _is_local(name: str) -> bool:
    """Returns whether a name can only be a file or folder, not a name on the Hub."""
    # The Hub's names are OWNER/NAME. `minilm` comes with a package.
    path = pathlib.Path(name)
    return path.suffix in (".pt", ".pth", ".safetensors") or (
        name.startswith((".", "/", "~")) or name.count("/") > 1
    )
