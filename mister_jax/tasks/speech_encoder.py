"""A speech encoder, fine-tuned on single utterances: stage 1 of MiSTER-E for speech."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from mister_jax import data
from mister_jax.data.clips import clip_batches, load_clips, units
from mister_jax.data.utterances import Utterances
from mister_jax.encoders import augment, speech
from mister_jax.models.utterance import SpeechUtterance, UtteranceHead, UtteranceOutput
from mister_jax.tasks.base import Batch
from mister_jax.tasks.encoder import EncoderOptions, EncoderSplit, EncoderTask

TOWERS = ("frozen", "lora", "full")


@dataclasses.dataclass(frozen=True)
class SpeechEncoderOptions(EncoderOptions):
    """Options of a speech encoder.

    An LLM that hears is trained by its low-rank paths, unless all is; `tower` is about what it
    hears through. An encoder that is no LLM is a tower as a whole.

    Attributes:
      whisper: see `SpeechFiles`; for SALMONN, as are the following.
      beats: likewise.
      vicuna: likewise.
      prompt: of an LLM: what it is asked about every clip; its usual question if empty.
      pool_prompt: of an LLM: pool over the prompt's positions, too, not the audio's alone.
      tower: "frozen", "lora" (low-rank paths) or "full", unless the option `full` trains all.
      trim: of Whisper: see `WhisperConfig`.
      max_seconds: of an utterance, that are read in validation, test and extraction.
      crop_seconds: that are read in training, at a place drawn anew in every epoch.
      gain: draw the loudness anew in training.
      noise: add noise in training.
      speed: draw the speed anew in training.
      mask_spectrogram: hide stretches of time and of bins in training; of encoders with
        Whisper's front end.
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
            raise ValueError("quantize keeps kernels as they are, tower=full trains them")
        # Its low-rank paths are part of what it has learned, and Whisper's are not in its files.
        if self.files.is_salmonn and (self.full or self.tower == "lora"):
            raise ValueError("full and tower=lora are not for SALMONN; allowed: tower=frozen, full")

    def check_seconds(self, backbone: Any = None) -> None:
        """Raises InputError if clips of so many seconds cannot be read, see `speech`."""
        for name in ("max_seconds", "crop_seconds"):
            speech.check_seconds(getattr(self, name), backbone, name=name)

    @property
    def files(self) -> speech.SpeechFiles:
        """Where the backbone's are."""
        return speech.SpeechFiles(self.name, self.whisper, self.beats, self.vicuna)


def _samples(seconds: float) -> int:
    return round(seconds * data.SAMPLE_RATE)


class SpeechEncoderTask(EncoderTask):
    """A speech backbone with a head, on utterances with sound and a label."""

    options_class = SpeechEncoderOptions

    @classmethod
    def described(cls, options: SpeechEncoderOptions) -> dict[str, Any]:
        return speech.read_backbone_config(options.files, options.prompt)

    def fingerprint(self) -> str:
        return self.options.files.fingerprint()

    @property
    def pads_to_max(self) -> bool:
        """A clip costs the backbone as much as the longest it has positions for."""
        return speech.has_fixed_input_length(self._shapes)

    def _check_backbone(self, backbone: Any) -> None:
        self.options.check_seconds(backbone)

    @property
    def trainable(self) -> Any:
        options = self.options
        if options.full:
            return nnx.Param
        trained: list[Any] = [nnx.LoRAParam, nnx.All(nnx.Param, nnx.PathContains("head"))]
        if options.tower == "full":
            # What is not of a language model.
            trained.append(nnx.All(nnx.Param, nnx.Not(nnx.PathContains("decoder"))))
        return nnx.Any(*trained)

    def _changes(self) -> dict[str, Any]:
        options, described = self.options, self._described
        changes = super()._changes() | speech.trim_kwargs(described, options.trim)
        through_lora = options.tower == "lora" and not options.full
        tower: dict[str, Any] = {"lora": self.lora if through_lora else None}
        if options.mask_spectrogram:
            speech.check_spectrogram(described)
            tower["mask_spectrogram"] = True
        if speech.is_llm(described):
            return {**changes, "tower": {**tower, "remat": options.remat}}
        return changes | tower

    def _backbone(self, key: jax.Array) -> nnx.Module:
        rngs, pool_over_prompt = nnx.Rngs(key), self.options.pool_prompt
        return speech.make_speech_encoder(
            self._described, rngs=rngs, pool_over_prompt=pool_over_prompt, **self._changes()
        )

    def _loaded_backbone(self, mesh: Mesh | None, seed: int) -> Any:
        return speech.load_speech_encoder(
            self.options.files,
            self._described,
            mesh=mesh,
            seed=seed,
            pool_over_prompt=self.options.pool_prompt,
            **self._changes(),
        )

    def model(self, backbone: Any, head: UtteranceHead) -> SpeechUtterance:
        return SpeechUtterance(backbone, head)

    def read(self, model: SpeechUtterance, batch: Batch, **options: Any) -> UtteranceOutput:
        waveform = batch["waveform"].astype(jnp.float32) / 2**15
        return model(waveform, batch["lengths"], **options)

    def augmented(self, batch: Batch, keys: jax.Array) -> Batch:
        options = self.options
        waveform = batch["waveform"].astype(jnp.float32) / 2**15
        lengths = batch["lengths"]
        draws = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys)  # 3 B
        if options.speed:
            waveform, lengths = augment.change_speed(waveform, lengths, draws[0])
        if options.noise:
            waveform = augment.add_noise(waveform, lengths, draws[1])
        if options.gain:
            waveform = augment.random_gain(waveform, draws[2])
        return {**batch, "waveform": waveform * 2**15, "lengths": lengths}

    def features(self, split: str, name: str | None = None) -> Utterances:
        """The utterances of a split of the config's dataset, or of another, cut at `max_seconds`.

        Those in which something is heard.

        Raises:
          InputError: there is none, or its classes are others.
        """
        name = self._data.name if name is None else name
        return self._clips(name, split, _samples(self.options.max_seconds))

    def _to_train_on(self, split: str) -> Utterances:
        # Whole, since crops may be from anywhere.
        return self._clips(self._data.name, split, None)

    def _clips(self, name: str, split: str, most: int | None) -> Utterances:
        return self._checked(load_clips(name, split, self._data.data_dir or None, most))

    def batched(
        self, utterances: Utterances, *, num_shards: int, shuffle: bool = False
    ) -> EncoderSplit:
        seconds = self.options.crop_seconds if shuffle else self.options.max_seconds
        most = _samples(seconds)
        plan = self._plan(units(utterances.sizes, most), num_shards, shuffle=shuffle)
        make = functools.partial(clip_batches, utterances, plan, most=most)
        return EncoderSplit(utterances, plan, make, self._seed, shuffle)
