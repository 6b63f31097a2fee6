"""A speech encoder, fine-tuned on single utterances: stage 1 of MiSTER-E for speech."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from mister_jax import data
from mister_jax.data.clips import UtteranceClips, clip_batches, load_clips
from mister_jax.encoders import augment
from mister_jax.models.utterance import SpeechUtterance, UtteranceHead, UtteranceOutput
from mister_jax.tasks.base import Batch
from mister_jax.tasks.encoder import EncoderOptions, EncoderSplit, EncoderTask


@dataclasses.dataclass(frozen=True)
class SpeechEncoderOptions(EncoderOptions):
    """Options of a speech encoder.

    Attributes:
      max_seconds: of an utterance, that are read in validation, test and extraction.
      crop_seconds: that are read in training, at a place drawn anew in every epoch.
      gain: draw the loudness anew in training.
      noise: add noise in training.
      speed: draw the speed anew in training.
    """

    max_seconds: float = 30.0
    crop_seconds: float = 30.0
    gain: bool = False
    noise: bool = False
    speed: bool = False

    def __post_init__(self):
        super().__post_init__()
        if min(self.max_seconds, self.crop_seconds) < 0.1:
            raise ValueError(
                f"max_seconds {self.max_seconds}, crop_seconds {self.crop_seconds}; allowed: 0.1 "
                "or more"
            )


class SpeechEncoderTask(EncoderTask):
    """A speech backbone with a head, on utterances with sound and a label."""

    options_class = SpeechEncoderOptions

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

    def features(self, split: str, name: str | None = None) -> UtteranceClips:
        """The utterances with sound of a split of the config's dataset, or of another.

        Raises:
          InputError: there is none, or its classes are others.
        """
        name = self._data.name if name is None else name
        return self._checked(load_clips(name, split, self._data.data_dir or None))

    def batched(
        self, utterances: UtteranceClips, *, num_shards: int, shuffle: bool = False
    ) -> EncoderSplit:
        seconds = self.options.crop_seconds if shuffle else self.options.max_seconds
        most = round(seconds * data.SAMPLE_RATE)
        plan = self._plan(utterances.units(most), num_shards)
        make = functools.partial(clip_batches, utterances, plan, most=most)
        return EncoderSplit(plan, make, self._seed, shuffle)
