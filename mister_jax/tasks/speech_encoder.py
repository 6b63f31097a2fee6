"""Fine-tuning of a speech encoder on single utterances: stage 1 of MiSTER-E for speech."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mister_jax import data
from mister_jax.data.clips import clip_batches, lengths_in_steps, load_clips
from mister_jax.data.utterances import Utterances
from mister_jax.encoders import augment, speech
from mister_jax.models.utterance import SpeechUtterance, UtteranceHead, UtteranceOutput
from mister_jax.nn.rngs import make_rngs
from mister_jax.tasks.base import Batch, Split
from mister_jax.tasks.encoder import EncoderOptions, EncoderTask

TOWERS = ("frozen", "lora", "full")


@dataclasses.dataclass(frozen=True)
class SpeechEncoderOptions(EncoderOptions):
    """Options of a speech encoder.

    A speech LLM is a language model with an audio tower; any other encoder is a tower without a
    language model. The language model is trained with LoRA, and `tower` determines how the tower is
    trained. If `full` is set, all parameters are trained.

    Attributes:
      whisper: Location of SALMONN's Whisper model; see `SpeechFiles`.
      beats: Location of SALMONN's BEATs model.
      vicuna: Location of SALMONN's Vicuna model.
      prompt: Prompt of a speech LLM; empty for its default prompt.
      pool_prompt: Whether a speech LLM also pools over the prompt's positions.
      tower: Training mode of the tower if `full` is not set: "frozen", "lora" or "full".
      trim: Whether Whisper pads clips only to the longest clip in the batch; see `WhisperConfig`.
      max_seconds: Maximum clip length in validation, test and extraction.
      crop_seconds: Maximum clip length in training; longer clips are cropped at a random position
        in each epoch.
      gain: Whether to augment with random gain.
      noise: Whether to augment with noise.
      speed: Whether to augment with random speed.
      mask_spectrogram: Whether to mask time steps and frequency bins of the spectrogram in
        training; only for encoders with Whisper's front end.
    """

    whisper: str = ""
    beats: str = ""
    vicuna: str = ""
    prompt: str = ""
    pool_prompt: bool = False
    tower: str = "lora"
    trim: bool = True
    max_seconds: float = 30.0
    crop_seconds: float = 30.0
    gain: bool = False
    noise: bool = False
    speed: bool = False
    mask_spectrogram: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.check_seconds()
        if self.tower not in TOWERS:
            raise ValueError(f"tower {self.tower!r}; allowed: {', '.join(TOWERS)}")
        if self.tower == "full" and self.quantize:
            raise ValueError("tower=full trains the kernels and quantize freezes them; choose one")
        # SALMONN's checkpoint has LoRA weights for the language model, which `full` would not use,
        # and no LoRA weights for the tower.
        if self.files.is_salmonn and (self.full or self.tower == "lora"):
            raise ValueError(
                "SALMONN does not support full=True or tower=lora; allowed: tower=frozen or "
                "tower=full"
            )

    def check_seconds(self, backbone: Any = None) -> None:
        """Raises InputError if a maximum clip length is invalid or too long for the backbone."""
        for name in ("max_seconds", "crop_seconds"):
            speech.check_seconds(getattr(self, name), backbone, name=name)

    @property
    def files(self) -> speech.SpeechFiles:
        """Locations of the backbone's files."""
        return speech.SpeechFiles(self.name, self.whisper, self.beats, self.vicuna)


class SpeechEncoderTask(EncoderTask):
    """Trains a speech backbone and a head on labeled utterances that have speech."""

    options_class = SpeechEncoderOptions

    @classmethod
    def read_backbone_config(cls, options: SpeechEncoderOptions) -> dict[str, Any]:
        """Reads the backbone's configs; see `speech.read_backbone_config`."""
        return speech.read_backbone_config(options.files, options.prompt)

    def fingerprint(self) -> str:
        """Returns a hash of the backbone's files."""
        return self.options.files.fingerprint()

    @property
    def pads_to_max(self) -> bool:
        """Whether the backbone pads every clip to its maximum length."""
        return speech.has_fixed_input_length(self._abstract_backbone)

    def _check_backbone(self, backbone: Any) -> None:
        self.options.check_seconds(backbone)

    @property
    def trainable(self) -> Any:
        """NNX filter for the trained parameters."""
        options = self.options
        if options.full:
            return nnx.Param
        trained: list[Any] = [nnx.LoRAParam, nnx.All(nnx.Param, nnx.PathContains("head"))]
        if options.tower == "full":
            # All parameters outside the language model.
            trained.append(nnx.All(nnx.Param, nnx.Not(nnx.PathContains("decoder"))))
        return nnx.Any(*trained)

    def _config_changes(self) -> dict[str, Any]:
        options, backbone_config = self.options, self._backbone_config
        changes = super()._config_changes() | speech.trim_kwargs(backbone_config, options.trim)
        has_tower_lora = options.tower == "lora" and not options.full
        tower: dict[str, Any] = {"lora": self.lora if has_tower_lora else None}
        if options.mask_spectrogram:
            speech.check_spectrogram(backbone_config)
            tower["mask_spectrogram"] = True
        if speech.is_llm(backbone_config):
            return {**changes, "tower": {**tower, "remat": options.remat}}
        return changes | tower

    def _make_backbone(self, key: jax.Array) -> nnx.Module:
        return speech.make_speech_encoder(
            self._backbone_config,
            rngs=make_rngs(key),
            pool_over_prompt=self.options.pool_prompt,
            **self._config_changes(),
        )

    def _load_backbone(self, mesh: Mesh | None, seed: int) -> Any:
        return speech.load_speech_encoder(
            self.options.files,
            self._backbone_config,
            mesh=mesh,
            seed=seed,
            pool_over_prompt=self.options.pool_prompt,
            **self._config_changes(),
        )

    def make_model(self, backbone: Any, head: UtteranceHead) -> SpeechUtterance:
        """Combines a backbone and a head into the model."""
        return SpeechUtterance(backbone, head)

    def apply(self, model: SpeechUtterance, batch: Batch, **options: Any) -> UtteranceOutput:
        """Runs the model on a batch from `clip_batches`."""
        waveform = batch["waveform"].astype(jnp.float32) / 2**15
        return model(waveform, batch["lengths"], **options)

    def augment(self, batch: Batch, keys: jax.Array) -> Batch:
        """Applies the enabled augmentations (speed, noise and gain) to the batch."""
        options = self.options
        waveform = batch["waveform"].astype(jnp.float32) / 2**15
        lengths = batch["lengths"]
        step_keys = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)  # [3, B]
        if options.speed:
            waveform, lengths = augment.change_speed(waveform, lengths, step_keys[0])
        if options.noise:
            waveform = augment.add_noise(waveform, lengths, step_keys[1])
        if options.gain:
            waveform = augment.random_gain(waveform, step_keys[2])
        return {**batch, "waveform": waveform * 2**15, "lengths": lengths}

    def features(self, split: str, name: str | None = None) -> Utterances:
        """Loads the utterances of a split that have audible speech, truncated at `max_seconds`.

        Args:
          split: Split to load.
          name: Name of the dataset; by default the config's dataset.

        Raises:
          InputError: The dataset does not exist, or its classes differ from the model's.
        """
        name = self._data.name if name is None else name
        return self._load_clips(name, split, _num_samples(self.options.max_seconds))

    def _train_utterances(self, split: str) -> Utterances:
        # Do not truncate the clips, because training crops them at random positions.
        return self._load_clips(self._data.name, split, None)

    def _load_clips(self, name: str, split: str, max_samples: int | None) -> Utterances:
        clips = load_clips(name, split, self._data.data_dir or None, max_samples)
        return self._check_classes(clips)

    def batched(self, utterances: Utterances, *, num_shards: int, shuffle: bool = False) -> Split:
        """Returns utterances in batches whose number of rows is a multiple of `num_shards`."""
        seconds = self.options.crop_seconds if shuffle else self.options.max_seconds
        max_samples = _num_samples(seconds)
        lengths = lengths_in_steps(utterances.sizes, max_samples)
        plan = self._plan(lengths, utterances.label, num_shards, shuffle=shuffle)
        make_batches = functools.partial(clip_batches, utterances, plan, max_samples=max_samples)
        return Split(utterances, plan, make_batches, self._seed, shuffle)


def _num_samples(seconds: float) -> int:
    return round(seconds * data.SAMPLE_RATE)
