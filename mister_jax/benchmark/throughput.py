"""Extraction of text features beside the same encoder in PyTorch.

Both go from texts to the mean of the last hidden states. PyTorch reads one text at a time, as the
released MiSTER-E does, and, to be fair to it, sorted texts in batches.
"""

from __future__ import annotations

import importlib.util
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from mister_jax import extract
from mister_jax.benchmark.measure import Run, Timing, measure
from mister_jax.benchmark.report import Row
from mister_jax.errors import InputError
from mister_jax.writers import Reporter

BATCHES = (8, 32, 128)
"""Texts in a batch of PyTorch's."""

# Words of MELD's 13,708 utterances: quantiles of their number.
_SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
_WORDS = (1, 1, 3, 6, 11, 17, 20, 26, 69)
_VOCABULARY = """
yeah oh okay no well so what why how you I we he she they it is was are do did have had know think
want like go come get see tell look good right just really never thing time guy here there now then
and but or because with about from this that my your the a
"""

_ALONE = 200  # texts at most that PyTorch reads one by one


def meld_like_texts(count: int) -> list[str]:
    """Texts of random words whose lengths are like those of MELD's utterances."""
    random, vocabulary = np.random.default_rng(0), _VOCABULARY.split()
    lengths = np.interp(random.random(count), _SHARES, _WORDS).round().astype(int)
    return [f"{' '.join(random.choice(vocabulary, length))}." for length in lengths]


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
    """The encoder in transformers on PyTorch.

    Args:
      name: a folder, or a name on the Hugging Face Hub.
      max_tokens: of a text.
      dtype: of parameters and computation.

    Raises:
      InputError: PyTorch is missing.
    """

    def __init__(self, name: str, max_tokens: int, dtype: str):
        if importlib.util.find_spec("torch") is None:
            raise InputError("PyTorch is not installed; the comparison needs it: pip install torch")
        import torch
        import transformers

        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._options: dict[str, Any] = {"truncation": True, "max_length": max_tokens}
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        model = transformers.AutoModel.from_pretrained(name, dtype=getattr(torch, dtype))
        self._model = model.to(self._device).eval()

    def features(self, texts: Sequence[str], size: int) -> np.ndarray:
        """Features [N, D] float32 of texts, in the order of their lengths."""
        lengths = [len(ids) for ids in self._tokenizer(list(texts), **self._options)["input_ids"]]
        order = np.argsort(lengths, kind="stable") if size > 1 else np.arange(len(texts))
        found = []
        with self._torch.inference_mode():
            for start in range(0, len(texts), size):
                chosen = [texts[row] for row in order[start : start + size]]
                batch = self._tokenizer(chosen, padding=True, return_tensors="pt", **self._options)
                batch = batch.to(self._device)
                hidden = self._model(**batch).last_hidden_state.float()
                mask = batch["attention_mask"][..., None]
                found.append(((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy())
        features = np.concatenate(found)
        ordered = np.empty_like(features)
        ordered[order] = features
        return ordered


def throughput_rows(
    name: str,
    texts: Sequence[str],
    *,
    dtype: str = "float32",
    compare: bool = False,
    rounds: int = 3,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Times extraction from texts to features.

    Args:
      name: of the encoder: a folder, or a name on the Hugging Face Hub.
      texts: what is read.
      dtype: of parameters and computation.
      compare: with PyTorch, too.
      rounds: timed passes over all texts, in turns.
      tell: is given a line when something long begins.

    Returns:
      Ours first.

    Raises:
      InputError: an encoder that cannot be loaded, or PyTorch is missing.
    """
    # PyTorch first: if it is missing, that is said at once.
    max_tokens = 128
    torch = _Torch(name, max_tokens, dtype) if compare else None
    encoder = extract.PretrainedEncoder(name, max_tokens=max_tokens, dtype=dtype, param_dtype=dtype)
    counts = np.array([len(tokens) for tokens in encoder.encode(texts)])

    def ours(times: int) -> None:
        for _ in range(times):
            _features(encoder, texts)

    alone = list(texts[:: -(-len(texts) // _ALONE)])
    read: dict[tuple[str, int | None], tuple[Sequence[str], Run]] = {
        ("mister_jax", None): (texts, ours)
    }
    for size in (1, *BATCHES) if torch is not None else ():
        chosen = alone if size == 1 else texts
        read["torch", size] = (chosen, _repeat(torch, chosen, size))
    tell(f"extracting from {len(texts)} texts, {rounds + 2} times")
    labels = {f"{library} {size}": (library, size) for library, size in read}
    timings = measure({label: read[key][1] for label, key in labels.items()}, rounds)
    rows = []
    for label, key in labels.items():
        chosen = read[key][0]
        tokens = counts if key[1] != 1 else counts[:: -(-len(texts) // _ALONE)]
        rows.append(_row(key, timings[label], len(chosen), int(tokens.sum())))
    for row in rows:
        row["rate_of_ours_over_it"] = (
            rows[0]["utterances_per_second"] / row["utterances_per_second"]
        )
    return rows


def _features(encoder: Any, texts: Sequence[str]) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder, Reporter(len(texts), quiet=True) as reporter:
        return extract._features_of(
            encoder,
            encoder.encode(texts),
            epath.Path(folder) / "parts",
            extract.TOKEN_BUDGET,
            reporter,
        )


def _repeat(torch: Any, texts: Sequence[str], size: int) -> Run:
    def run(times: int) -> None:
        for _ in range(times):
            torch.features(texts, size)

    return run


def _row(key: tuple[str, int | None], timing: Timing, utterances: int, tokens: int) -> Row:
    library, size = key
    return {
        "what": "extraction",
        "library": library,
        "batch": size,
        "utterances": utterances,
        "tokens": tokens,
        "median_s": timing.median,
        "utterances_per_second": utterances / timing.median,
        "tokens_per_second": tokens / timing.median,
        "compile_s": timing.compiling if size is None else None,
    }
