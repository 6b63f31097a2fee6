"""Benchmarks feature extraction in this library, PyTorch and ONNX Runtime with one encoder.

All libraries compute the mean of the last hidden states. PyTorch (with transformers) and ONNX
Runtime (with a text encoder that PyTorch exports) are measured with one utterance at a time, as in
the released MiSTER-E, and with batches of utterances sorted by length. In a comparison with
PyTorch, this library runs Whisper twice: trimmed to the clips' lengths, and padded to 30 s, as
PyTorch requires.
"""

from __future__ import annotations

import functools
import pathlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.measure import Timing, repeated, require_onnx, require_torch, time_runs
from benchmarks.report import Row
from mister_jax import extraction
from mister_jax.data import SAMPLE_RATE
from mister_jax.encoders import hf_config, hub, registry
from mister_jax.errors import InputError

# Quantiles of the number of words per utterance in MELD (13,708 utterances).
_QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
_WORDS_PER_TEXT = (1, 1, 3, 6, 11, 17, 20, 26, 69)
_VOCABULARY = """
yeah oh okay no well so what why how you I we he she they it is was are do did have had know think
want like go come get see tell look good right just really never thing time guy here there now then
and but or because with about from this that my your the a
"""
_CLIP_SECONDS = (1.0, 5.0)
_FRAME = 320  # samples per output frame of Whisper's encoder

_COUNT = {"text": 2000, "speech": 64}  # utterances
# Batch sizes for the other libraries, and number of batches per size.
_BATCH_SIZES = {"text": (1, 8, 32, 128), "speech": (1, 4, 16)}
_NUM_BATCHES = {"text": 200, "speech": 8}
# Additional unit of throughput for each modality, and the unit's size in tokens or seconds.
_UNITS = {"text": ("tokens", 1), "speech": ("audio_hours", 3600)}


def meld_like_texts(count: int) -> list[str]:
    """Returns texts of random words whose lengths are distributed as in MELD."""
    random, vocabulary = np.random.default_rng(0), _VOCABULARY.split()
    lengths = np.interp(random.random(count), _QUANTILES, _WORDS_PER_TEXT).round().astype(int)
    return [f"{' '.join(random.choice(vocabulary, length))}." for length in lengths]


def noise_clips(count: int) -> list[np.ndarray]:
    """Returns clips [S] int16 with 1 to 5 seconds of noise."""
    random = np.random.default_rng(0)
    lengths = (random.uniform(*_CLIP_SECONDS, count) * SAMPLE_RATE).astype(int)
    return [random.normal(0, 2**12, length).astype(np.int16) for length in lengths]


def read_texts(path: str | pathlib.Path) -> list[str]:
    """Returns the nonempty lines of a file.

    Raises:
      InputError: The file cannot be read, or has no text.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{path}: no text; needed: one text per line")
    return texts


class _TorchEncoder:
    """An encoder from transformers, in PyTorch."""

    def __init__(self, folder: pathlib.Path, dtype: str):
        require_torch()
        import torch
        import transformers

        self._torch, self._transformers = torch, transformers
        self._dtype = getattr(torch, dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = transformers.AutoModel.from_pretrained(folder, dtype=self._dtype)
        self._model = model.to(self._device).eval()

    def _lengths(self, utterances: Sequence[Any]) -> list[int]:
        raise NotImplementedError

    def _hidden_states(self, utterances: Sequence[Any]) -> tuple[Any, Any]:
        """Returns the last hidden states [B, N, D] of a batch, and their mask [B, N]."""
        raise NotImplementedError

    def features(self, utterances: Sequence[Any], batch_size: int) -> np.ndarray:
        """Computes features [N, D] float32 in batches sorted by length."""
        order = np.arange(len(utterances))
        if batch_size > 1:
            order = np.argsort(self._lengths(utterances), kind="stable")
        sorted_features = []
        with self._torch.inference_mode():
            for start in range(0, len(order), batch_size):
                batch = [utterances[row] for row in order[start : start + batch_size]]
                hidden, mask = self._hidden_states(batch)
                mask = mask[..., None]
                sorted_features.append((hidden * mask).sum(1) / mask.sum(1))
            stacked = self._torch.cat(sorted_features).float().cpu().numpy()
        features = np.empty_like(stacked)
        features[order] = stacked
        return features


class _TorchText(_TorchEncoder):
    def __init__(self, folder: pathlib.Path, dtype: str, max_tokens: int):
        super().__init__(folder, dtype)
        self._options: dict[str, Any] = {"truncation": True, "max_length": max_tokens}
        self._tokenizer = self._transformers.AutoTokenizer.from_pretrained(folder)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def _lengths(self, utterances: Sequence[Any]) -> list[int]:
        return list(map(len, self._tokenizer(list(utterances), **self._options)["input_ids"]))

    def _hidden_states(self, utterances: Sequence[Any]) -> tuple[Any, Any]:
        batch = self._tokenizer(utterances, padding=True, return_tensors="pt", **self._options)
        batch = batch.to(self._device)
        return self._model(**batch).last_hidden_state.float(), batch["attention_mask"]


class _OnnxText(_TorchText):
    """A float32 text encoder that is exported to ONNX and runs in ONNX Runtime on the CPU."""

    def __init__(self, folder: pathlib.Path, max_tokens: int):
        require_onnx()
        super().__init__(folder, "float32", max_tokens)
        import onnxruntime

        self._device = "cpu"
        inputs = dict(self._tokenizer(["one", "two words"], padding=True, return_tensors="pt"))
        dynamic = self._torch.export.Dim.DYNAMIC
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's exporter uses deprecated functions.
            program = self._torch.onnx.export(
                self._model.cpu(),
                kwargs=inputs,
                dynamic_shapes={name: {0: dynamic, 1: dynamic} for name in inputs},
                dynamo=True,
                verbose=False,
            )
        self._session = onnxruntime.InferenceSession(
            program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"]
        )

    def _hidden_states(self, utterances: Sequence[Any]) -> tuple[Any, Any]:
        batch = self._tokenizer(utterances, padding=True, return_tensors="np", **self._options)
        hidden = self._session.run(None, dict(batch))[0]
        mask = self._torch.from_numpy(batch["attention_mask"])
        return self._torch.from_numpy(hidden), mask


class _TorchWhisper(_TorchEncoder):
    """Whisper in transformers, which needs clips padded to 30 s. The mask excludes padding."""

    def __init__(self, folder: pathlib.Path, dtype: str):
        super().__init__(folder, dtype)
        self._model = self._model.get_encoder()
        self._extractor = self._transformers.AutoFeatureExtractor.from_pretrained(folder)

    def _lengths(self, utterances: Sequence[Any]) -> list[int]:
        return list(map(len, utterances))

    def _hidden_states(self, utterances: Sequence[Any]) -> tuple[Any, Any]:
        clips = [clip.astype(np.float32) / 2**15 for clip in utterances]
        batch = self._extractor(clips, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features = batch["input_features"].to(self._device, self._dtype)
        hidden = self._model(features).last_hidden_state.float()
        lengths = self._torch.tensor([-(-len(clip) // _FRAME) for clip in clips])
        mask = self._torch.arange(hidden.shape[1]) < lengths[:, None]
        return hidden, mask.to(self._device)


def _load_torch_encoder(name: str, dtype: str, encoder: extraction.Encoder) -> _TorchEncoder:
    folder = hub.fetch(name)
    if encoder.modality == "text":
        return _TorchText(folder, dtype, encoder.input.max_length)
    model_type = hf_config.read_config(folder)["model_type"]
    if model_type != "whisper":
        raise InputError(f"{name}: model_type {model_type!r}; --torch allows text and whisper")
    return _TorchWhisper(folder, dtype)


def _load_onnx_encoder(name: str, dtype: str, encoder: extraction.Encoder) -> _OnnxText:
    if encoder.modality != "text" or dtype != "float32":
        raise InputError(
            f"{name}: {encoder.modality} encoder, {dtype}; --onnx allows text encoders in float32"
        )
    return _OnnxText(hub.fetch(name), encoder.input.max_length)


def measure_extraction(
    name: str,
    texts: Sequence[str] = (),
    *,
    max_tokens: int = 128,
    dtype: str = "float32",
    compare: bool = False,
    onnx: bool = False,
    rounds: int = 3,
    log: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Times extraction from utterances to features.

    Args:
      name: Folder of the encoder, or its name on the Hugging Face Hub.
      texts: Texts for a text encoder; random by default. Speech encoders encode noise.
      max_tokens: Maximum number of tokens per text.
      dtype: Dtype of parameters and computation.
      compare: Whether to also measure PyTorch. Its rows follow the rows of this library.
      onnx: Whether to also measure ONNX Runtime. Its rows come last.
      rounds: Number of timed runs.
      log: Function called with a message before each long step.

    Raises:
      InputError: The encoder cannot be loaded, or a library is missing or does not support it.
    """
    options = {"max_tokens": max_tokens} if registry.find_modality(name) == "text" else {}
    encoder = extraction.load_encoder(name, dtype=dtype, **options)
    modality = encoder.modality
    if modality == "speech":
        utterances: Sequence[Any] = noise_clips(_COUNT[modality])
    else:
        utterances = texts or meld_like_texts(_COUNT[modality])
    encoders = {"mister_jax": encoder}
    others: dict[str, _TorchEncoder] = {}
    if onnx:
        others["onnxruntime"] = _load_onnx_encoder(name, dtype, encoder)
    if compare:
        others = {"torch": _load_torch_encoder(name, dtype, encoder), **others}
    if isinstance(others.get("torch"), _TorchWhisper):
        padded = extraction.load_encoder(name, trim=False, dtype=dtype)
        encoders["mister_jax, padded to 30 s"] = padded
    subsets: dict[str, Sequence[Any]] = dict.fromkeys(encoders, utterances)
    runs = {
        label: repeated(functools.partial(extraction.encode_utterances, one, utterances))
        for label, one in encoders.items()
    }
    for library, other in others.items():
        for size in _BATCH_SIZES[modality]:
            label = f"{library}, batches of {size}"
            subsets[label] = _every_nth(utterances, _NUM_BATCHES[modality] * size)
            runs[label] = repeated(functools.partial(other.features, subsets[label], size))
    log(f"extracting from {len(utterances)} utterances, {rounds + 2} times")
    timings = time_runs(runs, rounds)
    rows = [_row(label, timings[label], encoder, subsets[label]) for label in runs]
    for row in rows[: len(encoders)]:
        row["compile_s"] = timings[row["library"]].compile_seconds
    if others:
        subset = _every_nth(utterances, _NUM_BATCHES[modality])
        expected = next(iter(others.values())).features(subset, 1)
        for row, one in zip(rows, encoders.values(), strict=False):
            difference = extraction.encode_utterances(one, subset)[0] - expected
            row["largest_difference"] = float(np.abs(difference).max())
            relative = np.linalg.norm(difference) / np.linalg.norm(expected)
            row["relative_difference"] = float(relative)
    fastest = rows[0]["utterances_per_second"]
    for row in rows:
        row["speedup_of_mister_jax"] = fastest / row["utterances_per_second"]
    return rows


def _every_nth(utterances: Sequence[Any], count: int) -> Sequence[Any]:
    """Returns at most `count` utterances, evenly spaced."""
    return utterances[:: -(-len(utterances) // count)]


def _row(label: str, timing: Timing, encoder: extraction.Encoder, utterances: Sequence[Any]) -> Row:
    unit, size = _UNITS[encoder.modality]
    amount = encoder.input.num_units(encoder.input.items(utterances)) / size
    return {
        "library": label,
        "utterances": len(utterances),
        unit: amount,
        "median_s": timing.median,
        "utterances_per_second": len(utterances) / timing.median,
        f"{unit}_per_second": amount / timing.median,
    }
