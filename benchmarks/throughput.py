"""Extraction of features beside the same encoder in PyTorch.

Both go from texts, or from clips of sound, to the mean of the last hidden states. PyTorch reads
one utterance at a time, as the released MiSTER-E does, and, to be fair to it, sorted ones in
batches. Whisper is ours in two ways, trimmed to the clips and padded to 30 s as in PyTorch; how far
ours lie from PyTorch's is told beside the times.
"""

from __future__ import annotations

import importlib.util
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.measure import Run, Timing, measure
from benchmarks.report import Row
from mister_jax import extract
from mister_jax.data import SAMPLE_RATE
from mister_jax.encoders import hf_config, hub, registry
from mister_jax.errors import InputError

# Words of MELD's 13,708 utterances: quantiles of their number.
_SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
_WORDS = (1, 1, 3, 6, 11, 17, 20, 26, 69)
_VOCABULARY = """
yeah oh okay no well so what why how you I we he she they it is was are do did have had know think
want like go come get see tell look good right just really never thing time guy here there now then
and but or because with about from this that my your the a
"""
_SECONDS = (1.0, 5.0)  # of a clip
_FRAME = 320  # samples of a position of Whisper's encoder

# Utterances that are read, PyTorch's batches, and how many of each size it reads at most.
_COUNT = {"text": 2000, "speech": 64}
_BATCHES = {"text": (1, 8, 32, 128), "speech": (1, 4, 16)}
_MOST = {"text": 200, "speech": 8}
# What rates are told in besides utterances, and how many units of the encoder's input one is.
_AMOUNT = {"text": ("tokens", 1), "speech": ("audio_hours", 3600)}


def meld_like_texts(count: int) -> list[str]:
    """Texts of random words whose lengths are like those of MELD's utterances."""
    random, vocabulary = np.random.default_rng(0), _VOCABULARY.split()
    lengths = np.interp(random.random(count), _SHARES, _WORDS).round().astype(int)
    return [f"{' '.join(random.choice(vocabulary, length))}." for length in lengths]


def noise_clips(count: int) -> list[np.ndarray]:
    """Clips [s] int16 of noise, of 1 to 5 seconds each."""
    random = np.random.default_rng(0)
    lengths = (random.uniform(*_SECONDS, count) * SAMPLE_RATE).astype(int)
    return [random.normal(0, 2**12, length).astype(np.int16) for length in lengths]


def read_texts(path: str | pathlib.Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
      InputError: it cannot be read, or there are none.
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise InputError(f"{path}: no text; needed: one a line")
    return texts


class _Torch:
    """An encoder in transformers on PyTorch.

    Args:
      folder: of the encoder.
      dtype: of parameters and computation.

    Raises:
      InputError: PyTorch is missing.
    """

    def __init__(self, folder: pathlib.Path, dtype: str):
        if importlib.util.find_spec("torch") is None:
            raise InputError("PyTorch is not installed; the comparison needs it: pip install torch")
        import torch
        import transformers

        self._torch, self._transformers = torch, transformers
        self._dtype = getattr(torch, dtype)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        model = transformers.AutoModel.from_pretrained(folder, dtype=self._dtype)
        self._model = model.to(self._device).eval()

    def _lengths(self, utterances: Sequence[Any]) -> list[int]:
        raise NotImplementedError

    def _read(self, utterances: Sequence[Any]) -> Any:
        """Features of one batch."""
        raise NotImplementedError

    def features(self, utterances: Sequence[Any], size: int) -> np.ndarray:
        """Features [N, D] float32, read in batches of `size`, in the order of their lengths."""
        order = np.arange(len(utterances))
        if size > 1:
            order = np.argsort(self._lengths(utterances), kind="stable")
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        with self._torch.inference_mode():
            found = [self._read([utterances[row] for row in rows]).cpu() for rows in batches]
        features = np.concatenate([values.float().numpy() for values in found])
        ordered = np.empty_like(features)
        ordered[order] = features
        return ordered


class _TorchText(_Torch):
    def __init__(self, folder: pathlib.Path, dtype: str, max_tokens: int):
        super().__init__(folder, dtype)
        self._options: dict[str, Any] = {"truncation": True, "max_length": max_tokens}
        self._tokenizer = self._transformers.AutoTokenizer.from_pretrained(folder)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token

    def _lengths(self, utterances: Sequence[Any]) -> list[int]:
        return list(map(len, self._tokenizer(list(utterances), **self._options)["input_ids"]))

    def _read(self, utterances: Sequence[Any]) -> Any:
        batch = self._tokenizer(utterances, padding=True, return_tensors="pt", **self._options)
        batch = batch.to(self._device)
        hidden = self._model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)


class _TorchWhisper(_Torch):
    """Every clip is padded to the 30 s that transformers' Whisper reads; the mean is the clip's."""

    def __init__(self, folder: pathlib.Path, dtype: str):
        super().__init__(folder, dtype)
        self._model = self._model.get_encoder()
        self._extractor = self._transformers.AutoFeatureExtractor.from_pretrained(folder)

    def _lengths(self, utterances: Sequence[Any]) -> list[int]:
        return list(map(len, utterances))

    def _read(self, utterances: Sequence[Any]) -> Any:
        clips = [clip.astype(np.float32) / 2**15 for clip in utterances]
        batch = self._extractor(clips, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        features = batch["input_features"].to(self._device, self._dtype)
        hidden = self._model(features).last_hidden_state.float()
        lengths = self._torch.tensor([-(-len(clip) // _FRAME) for clip in clips])
        places = self._torch.arange(hidden.shape[1])
        mask = (places < lengths[:, None])[..., None].to(self._device)
        return (hidden * mask).sum(1) / mask.sum(1)


def _torch_of(name: str, dtype: str, encoder: extract.Encoder) -> _Torch:
    folder = hub.fetch(name)
    if encoder.modality == "text":
        return _TorchText(folder, dtype, encoder.input.longest)
    kind = hf_config.read_config(folder)["model_type"]
    if kind != "whisper":
        raise InputError(f"{name}: model_type {kind!r}; compared with PyTorch are text and whisper")
    return _TorchWhisper(folder, dtype)


def throughput_rows(
    name: str,
    texts: Sequence[str] = (),
    *,
    max_tokens: int = 128,
    dtype: str = "float32",
    compare: bool = False,
    rounds: int = 3,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Times extraction from utterances to features.

    Args:
      name: of the encoder: a folder, or a name on the Hugging Face Hub.
      texts: what an encoder of text reads; random ones by default. One of speech reads noise.
      max_tokens: of a text.
      dtype: of parameters and computation.
      compare: with PyTorch, too.
      rounds: timed passes over all utterances, in turns.
      tell: is given a line when something long begins.

    Returns:
      Ours first.

    Raises:
      InputError: an encoder that cannot be loaded, or PyTorch is missing.
    """
    options = {"max_tokens": max_tokens} if registry.find_modality(name) == "text" else {}
    encoder = extract.load_encoder(name, dtype=dtype, **options)
    modality = encoder.modality
    utterances: Sequence[Any] = texts
    if modality == "speech":
        utterances = noise_clips(_COUNT[modality])
    elif not texts:
        utterances = meld_like_texts(_COUNT[modality])
    ours = {"mister_jax": encoder}
    torch = None
    if compare:
        torch = _torch_of(name, dtype, encoder)
        if isinstance(torch, _TorchWhisper):
            ours["mister_jax, padded to 30 s"] = extract.load_encoder(name, trim=False, dtype=dtype)
    read: dict[str, tuple[Sequence[Any], Run]] = {
        label: (utterances, _ours(one, utterances)) for label, one in ours.items()
    }
    if torch is not None:
        for size in _BATCHES[modality]:
            some = utterances[:: -(-len(utterances) // (_MOST[modality] * size))]
            read[f"torch, batches of {size}"] = (some, _theirs(torch, some, size))
    tell(f"extracting from {len(utterances)} utterances, {rounds + 2} times")
    timings = measure({label: run for label, (_, run) in read.items()}, rounds)
    rows = [_row(label, timings[label], encoder, some) for label, (some, _) in read.items()]
    for row in rows[: len(ours)]:
        row["compile_s"] = timings[row["library"]].compiling
    if torch is not None:
        some = utterances[:: -(-len(utterances) // _MOST[modality])]
        theirs = torch.features(some, 1)
        for row, one in zip(rows, ours.values(), strict=False):
            row |= _distance(extract.features_of(one, some)[0], theirs)
    for row in rows:
        row["rate_of_ours_over_it"] = (
            rows[0]["utterances_per_second"] / row["utterances_per_second"]
        )
    return rows


def _ours(encoder: extract.Encoder, utterances: Sequence[Any]) -> Run:
    def run(times: int) -> None:
        for _ in range(times):
            extract.features_of(encoder, utterances)

    return run


def _distance(ours: np.ndarray, theirs: np.ndarray) -> Row:
    """How far features [N, D] lie from PyTorch's: at most, and as a share of their length."""
    difference = ours - theirs
    return {
        "largest_difference": float(np.abs(difference).max()),
        "relative_difference": float(np.linalg.norm(difference) / np.linalg.norm(theirs)),
    }


def _theirs(torch: _Torch, utterances: Sequence[Any], size: int) -> Run:
    def run(times: int) -> None:
        for _ in range(times):
            torch.features(utterances, size)

    return run


def _row(label: str, timing: Timing, encoder: extract.Encoder, utterances: Sequence[Any]) -> Row:
    unit, size = _AMOUNT[encoder.modality]
    amount = encoder.input.amount(encoder.input.items(utterances)) / size
    return {
        "library": label,
        "utterances": len(utterances),
        unit: amount,
        "median_s": timing.median,
        "utterances_per_second": len(utterances) / timing.median,
        f"{unit}_per_second": amount / timing.median,
    }
