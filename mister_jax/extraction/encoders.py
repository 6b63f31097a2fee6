"""Utterance encoders as extraction uses them, and how one is found again by what it says it is."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from flax import nnx

from mister_jax.encoders import hf_config, hub, registry, speech
from mister_jax.encoders.frontends import SAMPLE_RATE
from mister_jax.encoders.prosody import FEATURE_NAMES, prosody
from mister_jax.encoders.tokenization import check_max_tokens, encode_texts
from mister_jax.errors import InputError
from mister_jax.extraction.inputs import Input, SpeechInput, TextInput
from mister_jax.nn import masked_mean
from mister_jax.parallel.oom import explain_oom
from mister_jax.parallel.partitioning import JitPartitioner
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, data_mesh
from mister_jax.predictor import Predictor
from mister_jax.tasks.speech_encoder import SpeechEncoderTask
from mister_jax.tasks.text_encoder import TextEncoderTask

Features = Callable[[Any, Any], jax.Array]
"""From parameters and a batch to [B, F] float32."""

_FULL_SCALE = 2**15


class Encoder(Protocol):
    """What extraction needs of an encoder."""

    input: Input
    partitioner: JitPartitioner
    oom_hint: str
    """What makes an extraction take less memory."""

    @property
    def modality(self) -> str:
        """Of what it encodes: "speech" or "text"."""

    def identity(self) -> dict[str, Any]:
        """What the features depend on, as JSON values; see `encoder_from_metadata`.

        `kind`, `name` and `options` say how it is made, the rest what it was made of. Any change
        starts an extraction anew.
        """

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        """Features [B, F] float32 of a placed batch of its input."""


class _Encoder:
    """What all kinds have."""

    input: Input
    partitioner: JitPartitioner
    oom_hint = "a smaller --budget"
    _identity: dict[str, Any]

    @property
    def modality(self) -> str:
        return self.input.modality

    def identity(self) -> dict[str, Any]:
        return self._identity


class TunedEncoder(_Encoder):
    """The best parameters of a training of an encoder; features are those of its head.

    Args:
      workdir: of the training.

    Raises:
      InputError: not a work directory of an encoder, or one without a best checkpoint.
    """

    def __init__(self, workdir: epath.PathLike):
        self._predictor = Predictor(workdir)
        task = self._predictor.task
        self.partitioner = self._predictor.partitioner
        self.input: Input
        if isinstance(task, TextEncoderTask):
            self.input = TextInput(task.encode, task.options.max_tokens)
        elif isinstance(task, SpeechEncoderTask):
            self.input = SpeechInput(task.options.max_seconds, pads_to_max=task.pads_to_max)
        else:
            raise InputError(f"{workdir}: a training of MiSTER-E; needed: one of an encoder")
        config = epath.Path(workdir) / "config.json"
        self._identity = {
            "kind": "tuned",
            "name": _place(workdir),
            "options": {},
            "config": json.loads(config.read_text()),
            "best": self._predictor.progress,
            "files": task.fingerprint(),
        }

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        return self._predictor.predict_batch(batch)["feature"][:, 0]


class _Released(_Encoder):
    """An encoder as it was released, on all devices.

    Args:
      source: its input.
      identity: see `Encoder`.
      module: with its parameters.
      features: of the module and a batch.
    """

    def __init__(
        self,
        source: Input,
        identity: dict[str, Any],
        module: nnx.Module,
        features: Callable[[Any, Any], jax.Array],
        partitioner: JitPartitioner,
    ):
        self.input = source
        self.partitioner = partitioner
        self._identity = identity
        if identity["options"]["dtype"] != "bfloat16":
            self.oom_hint += " or --dtype=bfloat16"
        graph, params = nnx.split(module)
        self._params = nnx.as_pure(params)

        def read(params, batch, _axis_name):
            return features(nnx.merge(graph, params), batch)

        self._read = partitioner.compile_eval(read)

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        return self._read(self._params, batch)


class PretrainedText(_Released):
    """A text encoder as it was released; a feature is the mean of its last hidden states.

    Args:
      name: a folder, or a name on the Hugging Face Hub.
      max_tokens: of an utterance.
      adapter: folder of an adapter of `peft` that is put on it; none if empty.
      dtype: of the computation.
      param_dtype: of the parameters.

    Raises:
      InputError: an encoder or adapter that cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        *,
        max_tokens: int = 128,
        adapter: str = "",
        dtype: str = "float32",
        param_dtype: str = "float32",
    ):
        partitioner = JitPartitioner(data_mesh(), ENCODER_SHARDING_RULES)
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        folder = hub.fetch(name)
        config = hf_config.read_config(folder)
        registry.find_architecture(config, name, "text")
        with _room_for(name, dtype):
            module, tokenizer = registry.load_pretrained(
                folder,
                hf_config=config,
                mesh=partitioner.mesh,
                adapter=adapter or None,
                **types,
            )
        check_max_tokens(module, max_tokens)

        def encode(texts: Sequence[str], *, where: str = "") -> list[np.ndarray]:
            return encode_texts(tokenizer, texts, max_tokens, where=where)

        def features(module: Any, batch: Any) -> jax.Array:
            hidden = module(batch["input_ids"], batch["mask"])
            return masked_mean(hidden.astype(jnp.float32), batch["mask"])

        identity = {
            "kind": "text",
            "name": _place(name),
            "options": {"max_tokens": max_tokens, **types},
            "files": hub.fingerprint(folder),
        }
        identity = _with_adapter(identity, adapter)
        super().__init__(TextInput(encode, max_tokens), identity, module, features, partitioner)


class PretrainedSpeech(_Released):
    """A speech encoder as it was released; a feature is the mean of its last hidden states.

    Args:
      name: a folder, or a name on the Hugging Face Hub.
      max_seconds: Seconds of an utterance that are read. By default all of it, or as much as an
        encoder with a fixed window (Whisper, Qwen2-Audio, SALMONN) has positions for.
      windows: Encode longer utterances in windows of equal length and average these, for encoders
        with a fixed window.
      whisper: of SALMONN alone: see `SpeechFiles`, as are the following.
      beats: likewise.
      vicuna: likewise.
      trim: of Whisper: see `WhisperConfig`.
      prompt: of an LLM: what it is asked about every clip; its usual question if empty. The mean
        is over the audio's positions alone.
      adapter: folder of an adapter of `peft` that is put on it; none if empty.
      dtype: of the computation.
      param_dtype: of the parameters.

    Raises:
      InputError: an encoder or adapter that cannot be loaded, or an encoder that has no positions
        for so long an utterance.
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
        types: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        files = speech.SpeechFiles(name, whisper, beats, vicuna)
        described = speech.read_backbone_config(files, prompt)
        trim_kwargs = speech.trim_kwargs(described, trim)
        if not trim and not trim_kwargs:
            raise InputError(f"{name}: trim=False; allowed: True, it is not Whisper")
        changes = {**types, **trim_kwargs, **speech.trainable_paths(described)}
        # Before its weights are read, which may take minutes.
        shapes = nnx.eval_shape(
            lambda: speech.make_speech_encoder(described, rngs=nnx.Rngs(0), **changes)
        )
        longest = speech.max_seconds(shapes)
        if windows and longest is None:
            raise InputError(f"{name}: windows; allowed for encoders with a fixed window")
        if max_seconds is not None:
            speech.check_seconds(max_seconds, shapes)
        with _room_for(name, dtype):
            module: Any = speech.load_speech_encoder(
                files, described, mesh=partitioner.mesh, adapter=adapter or None, **changes
            )

        def features(module: Any, batch: Any) -> jax.Array:
            waveform = batch["waveform"].astype(jnp.float32) / _FULL_SCALE
            hidden, mask = module(waveform, batch["lengths"])
            return masked_mean(hidden.astype(jnp.float32), mask)

        options = {"max_seconds": max_seconds, "trim": trim, "prompt": prompt, **types}
        if windows:
            options["windows"] = True
        if files.is_salmonn:
            parts = {"whisper": whisper, "beats": beats, "vicuna": vicuna}
            options |= {part: _place(place) for part, place in parts.items()}
        identity = {
            "kind": "speech",
            "name": _place(name),
            "options": options,
            "files": files.fingerprint(),
        }
        source = SpeechInput(
            max_seconds or longest or speech.LONGEST_SECONDS,
            pads_to_max=speech.has_fixed_input_length(module),
            split=windows,
        )
        identity = _with_adapter(identity, adapter)
        super().__init__(source, identity, module, features, partitioner)


class ProsodyEncoder(_Encoder):
    """The named features of `encoders.prosody`, which needs no weights.

    Args:
      max_seconds: Seconds of an utterance that are read; all of it by default.

    Raises:
      InputError: `max_seconds` is out of range.
    """

    def __init__(self, *, max_seconds: float | None = None):
        if max_seconds is not None:
            speech.check_seconds(max_seconds)
        self.input = SpeechInput(max_seconds or speech.LONGEST_SECONDS)
        self.partitioner = JitPartitioner(data_mesh())
        self._identity = {
            "kind": "prosody",
            "name": PROSODY,
            "options": {"max_seconds": max_seconds},
            "features": list(FEATURE_NAMES),
        }

        few = jax.default_backend() == "cpu" and self.partitioner.num_shards == 1

        def features(clips: tuple[jax.Array, jax.Array]) -> jax.Array:
            waveform, lengths = clips
            return prosody(waveform.astype(jnp.float32) / _FULL_SCALE, lengths)[0]

        def read(_params, batch, _axis_name):
            clips = batch["waveform"], batch["lengths"]
            if not few:
                return features(clips)
            # Frames overlap, so what is computed of a batch is much larger than it is; of a few
            # clips at a time it stays in a CPU's cache, which is half as fast again.
            rows, samples = batch["waveform"].shape
            most = max(1, _CACHED // samples)
            at_once = max(count for count in range(1, most + 1) if rows % count == 0)
            groups = jax.tree.map(lambda x: x.reshape(-1, at_once, *x.shape[1:]), clips)
            return jax.lax.map(features, groups).reshape(rows, -1)

        self._read = self.partitioner.compile_eval(read)

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        return self._read({}, batch)


_CACHED = 10 * SAMPLE_RATE  # samples of clips that are computed at once on a CPU

PROSODY = "prosody"
"""The name of the encoder without weights."""

# `kind` of an identity -> how an encoder of it is made of `name` and `options`.
_KINDS: dict[str, Callable[..., Encoder]] = {
    "tuned": TunedEncoder,
    "text": PretrainedText,
    "speech": PretrainedSpeech,
    "prosody": lambda _, **options: ProsodyEncoder(**options),
}


_SALMONN = ("whisper", "beats", "vicuna")
ENCODER_PARTS = (*_SALMONN, "adapter")
"""Options that are places of further files."""

# `kind` -> what `load_encoder` may be told of it; the encoder's class says what it means.
_OPTIONS: dict[str, tuple[str, ...]] = {
    PROSODY: ("max_seconds",),
    "text": ("max_tokens", "adapter", "dtype"),
    "speech": (
        "max_seconds",
        "windows",
        *_SALMONN,
        "trim",
        "prompt",
        "adapter",
        "dtype",
    ),
}


def load_encoder(name: str, **options: Any) -> Encoder:
    """An encoder that was not tuned: "prosody", or one of a folder or the Hugging Face Hub.

    Args:
      name: of it.
      **options: of `PretrainedText`, `PretrainedSpeech` or `ProsodyEncoder`, whichever it is;
        `dtype` is also that of the parameters.

    Raises:
      InputError: an encoder or adapter that cannot be loaded, or an option that it does not have.
    """
    if options.get("max_seconds") is not None:
        speech.check_seconds(options["max_seconds"])
    kind = _kind(name, options)
    useless = [option for option in options if option not in _OPTIONS[kind]]
    if useless:
        raise InputError(
            f"{name}: {', '.join(useless)}; allowed for an encoder of this kind ({kind}): "
            f"{', '.join(_OPTIONS[kind])}"
        )
    if "dtype" in options:
        options["param_dtype"] = options["dtype"]
    return _KINDS[kind](name, **options)


def _kind(name: str, options: Mapping[str, Any]) -> str:
    if name == PROSODY:
        return PROSODY
    if any(options.get(part) for part in _SALMONN):
        return "speech"  # SALMONN, whose own checkpoint has no config.json
    return registry.find_modality(name)


def encoder_from_metadata(identity: Mapping[str, Any]) -> Encoder:
    """The encoder that made a dataset's features, by the dataset's metadata of its modality.

    Args:
      identity: of `Encoder.identity`; more than that is ignored.

    Raises:
      InputError: an encoder that cannot be loaded any more, or is not the same any more.
    """
    kind = _KINDS.get(identity.get("kind", ""))
    if kind is None:
        raise InputError(
            f"features of kind {identity.get('kind')!r}, whose encoder is not known; allowed: "
            f"those that extraction has written, of {', '.join(_KINDS)}"
        )
    encoder = kind(identity["name"], **identity["options"])
    made_of = encoder.identity()
    changed = sorted(name for name, value in made_of.items() if identity.get(name) != value)
    if set(changed) - {"files", "name"}:
        raise InputError(
            f"{identity['name']}: not the encoder that made the features any more "
            f"({', '.join(changed)} changed); extract them anew, or use the encoder of then"
        )
    if changed:
        # The same files copied to another place look like this, too.
        logging.warning("%s: files were touched since features were made", identity["name"])
    return encoder


def with_new_paths(identity: Mapping[str, Any], places: Mapping[str, str]) -> dict[str, Any]:
    """What identifies an encoder whose files are at other places now.

    Args:
      identity: of `Encoder.identity`; more than that is kept.
      places: by "encoder", or by the name of a further file or folder that it was opened with
        ("adapter"; SALMONN's "whisper", "beats" and "vicuna"), where that is now.

    Raises:
      InputError: a place of what the encoder does not have.
    """
    options = identity.get("options", {})
    parts = [part for part in ENCODER_PARTS if options.get(part)]
    allowed = parts if identity.get("kind") == PROSODY else ["encoder", *parts]
    for part, place in places.items():
        if part not in allowed:
            raise InputError(
                f"{part}={place}: the features' encoder is {identity.get('name')}, which has "
                + (f"no {part}; allowed: {', '.join(allowed)}" if allowed else "no files")
            )
    changed = {part: _place(place) for part, place in places.items()}
    name = changed.pop("encoder", identity["name"])
    return {**identity, "name": name, "options": {**options, **changed}}


def _with_adapter(identity: dict[str, Any], adapter: str) -> dict[str, Any]:
    """The identity of an encoder that has an adapter, if it has one."""
    if not adapter:
        return identity
    options = {**identity["options"], "adapter": _place(adapter)}
    files = f"{identity['files']} {hub.fingerprint(adapter)}"
    return {**identity, "options": options, "files": files}


def _room_for(name: str, dtype: str) -> contextlib.AbstractContextManager[None]:
    remedy = "devices with more memory, or more of them"
    if dtype != "bfloat16":
        remedy = f"extraction with --dtype=bfloat16, or {remedy}"
    return explain_oom(name, "the encoder's parameters", remedy)


def _place(name: epath.PathLike) -> str:
    """The whole path of what is there, to be found from anywhere; a name on the hub as it is."""
    path = pathlib.Path(name)
    return str(path.absolute()) if path.exists() else os.fspath(name)
