"""Encodes the speech of each utterance as one vector, with pretrained encoders or as prosody."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx

from mister_jax.data import clips
from mister_jax.data.audio import SAMPLE_RATE
from mister_jax.data.clips import LENGTH_STEP
from mister_jax.data.padding import pad_clips
from mister_jax.data.utterances import Utterances
from mister_jax.encoders import hub, speech
from mister_jax.encoders.prosody import FEATURE_NAMES, compute_prosody
from mister_jax.errors import InputError
from mister_jax.extraction.encoder import (
    Encoder,
    compile_encoder,
    explain_load_oom,
    pretrained_metadata,
)
from mister_jax.nn import masked_mean
from mister_jax.nn.rngs import make_rngs
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, data_mesh

PROSODY = "prosody"
"""Name of `ProsodyEncoder`."""

SECONDS_BUDGET = 120
CPU_SECONDS_BUDGET = 30  # small enough that a layer's activations stay in the cache

# Seconds of audio that a device encodes while one program compiles.
_PROGRAM_COST = 2000.0
_CPU_PROGRAM_COST = 15.0  # for an encoder with 100 M parameters
_PROSODY_CPU_PROGRAM_COST = 1000.0

# Padded lengths in tenths of a second.
_LENGTHS = (
    *(5, 10, 15, 20, 25, 30, 40, 50, 60, 80, 100, 125, 150, 200, 250, 300, 400, 500, 600, 800),
    *(1000, 1500, 2000, 3000, 4500, 6000, 9000, 12000, 18000, 24000, 36000),
)

_FULL_SCALE = 2**15
_CPU_CHUNK_SAMPLES = 10 * SAMPLE_RATE  # samples per chunk for prosody on a CPU


class SpeechInput:
    """Converts speech clips to items and batches; see `Input`. A length step is 0.1 s.

    Args:
      max_seconds: Maximum length in seconds of a clip in a batch.
      pads_to_max: Whether to pad clips to `max_seconds`, for encoders with a fixed input length.
      split: Whether to split longer clips into windows of equal length, instead of truncating them.
      program_cost: Seconds of audio that a device encodes while one program compiles; by default, a
        value for encoders of typical size.
    """

    modality, unit, steps_per_unit = "speech", "s of audio", 10

    def __init__(
        self,
        max_seconds: float,
        *,
        pads_to_max: bool = False,
        split: bool = False,
        program_cost: float | None = None,
    ):
        on_cpu = jax.default_backend() == "cpu"
        self.budget = CPU_SECONDS_BUDGET if on_cpu else SECONDS_BUDGET
        if program_cost is None:
            program_cost = _CPU_PROGRAM_COST if on_cpu else _PROGRAM_COST
        self.program_cost = program_cost
        self._window_samples = round(max_seconds * SAMPLE_RATE)
        self.max_samples = None if split else self._window_samples
        self.max_length = -(-self._window_samples // LENGTH_STEP)
        self.length_steps: tuple[int, ...] = () if pads_to_max else _LENGTHS

    def load(self, dataset: str, split: str, data_dir: epath.PathLike | None) -> Utterances:
        """Loads the audible clips of a split."""
        return clips.load_clips(dataset, split, data_dir, self.max_samples)

    def items(self, utterances: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the samples [S] int16 of each clip; silent clips have no samples."""
        for clip in utterances:
            if clip.ndim != 1 or clip.dtype != np.int16:
                raise ValueError(f"clip {clip.dtype} {list(clip.shape)}; allowed: int16 [S]")
        return [clips.truncate(clip, self.max_samples) for clip in utterances]

    def windows(self, item: np.ndarray) -> list[np.ndarray]:
        """Splits a clip into windows of equal length, and drops silent windows."""
        windows = np.array_split(item, max(1, -(-len(item) // self._window_samples)))
        return [window for window in windows if clips.is_audible(window)] or windows

    def lengths(self, items: Sequence[np.ndarray]) -> np.ndarray:
        """Returns the lengths of clips in tenths of a second, [N] int."""
        sizes = np.array([len(clip) for clip in items], int)
        return clips.lengths_in_steps(sizes, self._window_samples)

    def num_units(self, items: Sequence[np.ndarray]) -> float:
        """Returns the total number of seconds."""
        return sum(map(len, items)) / SAMPLE_RATE

    def batch(self, items: Sequence[np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Returns `waveform` [B, S] int16 and `lengths` [B] int32."""
        waveform, lengths = pad_clips(list(items), length * LENGTH_STEP)
        return {"waveform": waveform, "lengths": lengths}


class PretrainedSpeech(Encoder):
    """A pretrained speech encoder. Features are the mean over time of the last hidden states.

    Args:
      name: Folder, or name on the Hugging Face Hub.
      max_seconds: Maximum length of an utterance in seconds; by default, the fixed window of
        Whisper, Qwen2-Audio and SALMONN, and one hour for other encoders.
      windows: Whether an encoder with a fixed window encodes longer utterances in windows of equal
        length. The features of the windows are averaged.
      whisper: Location of SALMONN's Whisper model; see `SpeechFiles`.
      beats: Location of SALMONN's BEATs model.
      vicuna: Location of SALMONN's Vicuna model.
      trim: Whether Whisper pads clips only to the longest clip in the batch; see `WhisperConfig`.
      prompt: Prompt for a speech LLM; if empty, the LLM's default prompt. The features are the mean
        over the positions of the audio, without those of the prompt.
      adapter: Folder of a PEFT adapter to load; none if empty.
      dtype: Dtype of the computation.
      param_dtype: Dtype of the parameters.

    Raises:
      InputError: The encoder or adapter cannot be loaded, or an option does not apply to the
        encoder.
    """

    def __init__(
        self,
        name: str,
        *,
        max_seconds: float | None = None,
        windows: bool = False,
        whisper: str = "",
        beats: str = "",
        vicuna: str = "",
        trim: bool = True,
        prompt: str = "",
        adapter: str = "",
        dtype: str = "float32",
        param_dtype: str = "float32",
    ):
        partitioner = JitPartitioner(data_mesh(), ENCODER_SHARDING_RULES)
        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        files = speech.SpeechFiles(name, whisper, beats, vicuna)
        backbone_config = speech.read_backbone_config(files, prompt)
        trim_kwargs = speech.trim_kwargs(backbone_config, trim)
        if not trim and not trim_kwargs:
            raise InputError(f"{name}: trim=False; allowed only for Whisper")
        changes = {**dtypes, **trim_kwargs, **speech.trainable_paths(backbone_config)}
        # Options are checked first, because reading the weights may take minutes.
        shapes = nnx.eval_shape(
            lambda: speech.make_speech_encoder(backbone_config, rngs=make_rngs(0), **changes)
        )
        window_seconds = speech.max_seconds(shapes)
        if windows and window_seconds is None:
            raise InputError(f"{name}: windows=True; allowed only for encoders with a fixed window")
        if max_seconds is not None:
            speech.check_seconds(max_seconds, shapes)
        with explain_load_oom(name, dtype):
            module: Any = speech.load_speech_encoder(
                files, backbone_config, mesh=partitioner.mesh, adapter=adapter or None, **changes
            )

        def encode(module: Any, batch: dict[str, Any]) -> jax.Array:
            waveform = batch["waveform"].astype(jnp.float32) / _FULL_SCALE
            hidden_states, mask = module(waveform, batch["lengths"])
            return masked_mean(hidden_states.astype(jnp.float32), mask)

        options = {"max_seconds": max_seconds, "trim": trim, "prompt": prompt, **dtypes}
        if windows:
            options["windows"] = True
        if files.is_salmonn:
            parts = {"whisper": whisper, "beats": beats, "vicuna": vicuna}
            options |= {part: hub.pinned_name(path) for part, path in parts.items()}
        super().__init__(
            SpeechInput(
                max_seconds or window_seconds or speech.LONGEST_SECONDS,
                pads_to_max=speech.has_fixed_input_length(module),
                split=windows,
            ),
            partitioner,
            pretrained_metadata("speech", name, options, files.fingerprint(), adapter),
            compile_encoder(partitioner, module, encode),
        )


class ProsodyEncoder(Encoder):
    """Computes the features of `encoders.prosody`, which needs no weights.

    Args:
      max_seconds: Maximum length of an utterance in seconds; one hour by default.

    Raises:
      InputError: `max_seconds` is out of range.
    """

    def __init__(self, *, max_seconds: float | None = None):
        if max_seconds is not None:
            speech.check_seconds(max_seconds)
        partitioner = JitPartitioner(data_mesh())
        on_cpu = jax.default_backend() == "cpu"
        on_one_cpu = on_cpu and partitioner.num_shards == 1

        def features(waveform_and_lengths: tuple[jax.Array, jax.Array]) -> jax.Array:
            waveform, lengths = waveform_and_lengths
            return compute_prosody(waveform.astype(jnp.float32) / _FULL_SCALE, lengths)[0]

        def step(_params: Any, batch: dict[str, Any], _axis_name: str | None) -> jax.Array:
            inputs = batch["waveform"], batch["lengths"]
            if not on_one_cpu:
                return features(inputs)
            # Overlapping frames take much more memory than the samples. The frames of a few clips
            # fit in a CPU's cache, which makes encoding 1.5 times as fast.
            rows, samples = batch["waveform"].shape
            max_clips = max(1, _CPU_CHUNK_SAMPLES // samples)
            num_clips = max(count for count in range(1, max_clips + 1) if rows % count == 0)
            chunks = jax.tree.map(lambda x: x.reshape(-1, num_clips, *x.shape[1:]), inputs)
            return jax.lax.map(features, chunks).reshape(rows, -1)

        metadata = {
            "kind": PROSODY,
            "name": PROSODY,
            "options": {"max_seconds": max_seconds},
            "features": list(FEATURE_NAMES),
        }
        super().__init__(
            SpeechInput(
                max_seconds or speech.LONGEST_SECONDS,
                program_cost=_PROSODY_CPU_PROGRAM_COST if on_cpu else None,
            ),
            partitioner,
            metadata,
            functools.partial(partitioner.compile_eval(step), {}),
        )
