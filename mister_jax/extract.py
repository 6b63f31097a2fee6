"""From a dataset of dialogues to one of features: the stage between the two trainings.

`extract` runs an encoder over all utterances and writes a dataset that stage 2 trains on; `merge`
joins the features of two modalities by utterance.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import nnx
from jax.experimental import multihost_utils

from mister_jax import data
from mister_jax.data.dialogues import DialogueDataset
from mister_jax.data.pipeline import prefetch_to_device
from mister_jax.data.utterances import UtteranceTokens, load_tokens, pad_tokens
from mister_jax.encoders import hub
from mister_jax.encoders.text import check_max_tokens, encode_texts
from mister_jax.errors import InputError
from mister_jax.evaluate import Predictor
from mister_jax.nn import masked_mean
from mister_jax.parallel import JitSpread, data_mesh, enough_memory
from mister_jax.writers import Reporter

TOKEN_BUDGET = 4096
"""Tokens in a batch on each device, padding counted."""

# Lengths are rounded up to these steps: short texts pad little, and programs are few.
_LENGTHS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)

_PART = 2048  # utterances kept together on disk, and lost at most when a run is killed


class Encoder(Protocol):
    """What extraction needs of an encoder."""

    spread: JitSpread
    max_tokens: int
    """Of the longest text."""

    def identity(self) -> dict[str, Any]:
        """What the features depend on, plain JSON values; a change starts an extraction anew."""

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of texts."""

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        """Features [B, F] float32 of a placed batch of `input_ids` and `mask`."""


class TunedEncoder:
    """The best parameters of a training of a text encoder; features are those of its head.

    Args:
      workdir: of the training.

    Raises:
      InputError: not a work directory of an encoder, or one without a best checkpoint.
    """

    def __init__(self, workdir: epath.PathLike):
        self._predictor = Predictor(workdir)
        self._workdir = epath.Path(workdir)
        task = self._predictor.task
        if not hasattr(task, "encode"):
            raise InputError(f"{workdir}: a training of MiSTER-E; needed: one of an encoder")
        self.spread = self._predictor.spread
        self.max_tokens = task.options.max_tokens
        self.encode = task.encode
        self._files = hub.fingerprint(task.folder)

    def identity(self) -> dict[str, Any]:
        return {
            "workdir": str(self._workdir),
            "config": json.loads((self._workdir / "config.json").read_text()),
            "best": self._predictor.progress,
            "files": self._files,
        }

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        return self._predictor.run(batch)["feature"][:, 0]


class PretrainedEncoder:
    """An encoder as it was released; a feature is the mean of its last hidden states.

    Args:
      name: a folder, or a name on the Hugging Face Hub.
      max_tokens: of an utterance.
      dtype: of the computation.
      param_dtype: of the parameters.

    Raises:
      InputError: an encoder that cannot be loaded.
    """

    def __init__(
        self,
        name: str,
        *,
        max_tokens: int = 128,
        dtype: str = "float32",
        param_dtype: str = "float32",
    ):
        self.spread = JitSpread(data_mesh(), hub.RULES)
        self.max_tokens = max_tokens
        folder = hub.fetch(name)
        self._identity = {
            "encoder": name,
            "max_tokens": max_tokens,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "files": hub.fingerprint(folder),
        }
        with enough_memory(name, "the encoder's parameters", "--dtype=bfloat16"):
            module, self._tokenizer = hub.load(
                folder, mesh=self.spread.mesh, dtype=dtype, param_dtype=param_dtype
            )
        check_max_tokens(module, max_tokens)
        graph, params = nnx.split(module)
        self._params = nnx.as_pure(params)

        def read(params, batch, _axis_name):
            hidden = nnx.merge(graph, params)(batch["input_ids"], batch["mask"])
            return masked_mean(hidden.astype(jnp.float32), batch["mask"])

        self._read = self.spread.program_of_reader(read)

    def identity(self) -> dict[str, Any]:
        return self._identity

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        return encode_texts(self._tokenizer, texts, self.max_tokens)

    def __call__(self, batch: dict[str, Any]) -> jax.Array:
        return self._read(self._params, batch)


def extract(
    encoder: Encoder,
    dataset: str,
    output: str,
    data_dir: epath.PathLike | None = None,
    *,
    token_budget: int = TOKEN_BUDGET,
    overwrite: bool = False,
    quiet: bool = False,
) -> Any:
    """Writes the text features of all splits of a dataset of dialogues.

    A run that was stopped goes on where it was, as long as encoder, dataset and budget are the
    same.

    Args:
      encoder: of the texts.
      dataset: of dialogues.
      output: name of the dataset of features; its speech is missing, see `merge`.
      data_dir: the directory that holds datasets.
      token_budget: tokens in a batch on each device, padding counted.
      overwrite: replace a dataset of this name.
      quiet: show no progress.

    Returns:
      The TFDS builder of the features.

    Raises:
      InputError: a dataset that is not there, or has no text in a split; an output that is there or
        cannot be written; a batch that does not fit into the devices' memory.
    """
    source = DialogueDataset(dataset, data_dir)
    target = data.dataset_directory(output, data_dir)
    if "/" in output:
        raise InputError(f"--output={output}; allowed: lower-case letters, digits and _")
    if target.exists() and not overwrite:
        raise InputError(f"{target}: dataset exists; allowed: another --output, or --overwrite")
    told = {"dataset": dataset, "token_budget": token_budget, **encoder.identity()}
    texts = {
        split: load_tokens(dataset, split, data_dir, encoder.encode) for split in source.splits
    }
    root, prefix = target.parent.parent, f".extracting.{output}."
    parts = root / f"{prefix}{_digest(told, texts)}"
    splits = {}
    total = sum(len(utterances.tokens) for utterances in texts.values())
    with Reporter(total, unit="utterances", quiet=quiet) as reporter:
        for split, utterances in texts.items():
            if not utterances.tokens:
                raise InputError(f"dataset {dataset}, split {split}: no utterance has text")
            found = _features_of(encoder, utterances.tokens, parts / split, token_budget, reporter)
            features = dict(zip(utterances.utterance_ids.tolist(), found, strict=True))
            splits[split] = _text_features(source, split, features, found.shape[1])
    # The parts are there until every process has read them.
    multihost_utils.sync_global_devices("extracted")
    if jax.process_index() != 0:
        return None
    builder = data.write(splits, output, data_dir, metadata={"text": told}, overwrite=overwrite)
    for left in root.glob(f"{prefix}*"):  # those of other encoders, too
        left.rmtree()
    return builder


def _digest(told: dict[str, Any], texts: dict[str, UtteranceTokens]) -> str:
    """Of all that the features depend on."""
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for split, utterances in texts.items():
        digest.update(json.dumps([split, utterances.utterance_ids.tolist()]).encode())
        for tokens in utterances.tokens:
            digest.update(tokens.tobytes() + b";")
    return digest.hexdigest()[:16]


def _features_of(
    encoder: Encoder,
    tokens: Sequence[np.ndarray],
    parts: epath.Path,
    token_budget: int,
    reporter: Reporter,
) -> np.ndarray:
    """Features [N, F] of token sequences, part by part, each kept on disk as soon as it is done."""
    lengths = np.array([len(values) for values in tokens])
    # Long ones first: what does not fit into memory fails at once.
    order = np.argsort(-lengths, kind="stable")
    done: list[np.ndarray] = []
    try:
        parts.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{parts.parent}: cannot be written ({error.strerror})") from error
    for number, start in enumerate(range(0, len(order), _PART)):
        rows = order[start : start + _PART]
        path = parts / f"{number:05d}.npy"
        if path.exists():
            with path.open("rb") as file:
                done.append(np.load(file))
            reporter.advance("resumed", amount=len(rows))
            continue
        found = _encode_part(encoder, [tokens[row] for row in rows], token_budget, reporter)
        if jax.process_index() == 0:
            partial = path.with_name(f"{path.name}.partial")
            with partial.open("wb") as file:
                np.save(file, found)
            partial.rename(path)
        done.append(found)
    sorted_features = np.concatenate(done)
    features = np.empty_like(sorted_features)
    features[order] = sorted_features
    return features


def _encode_part(
    encoder: Encoder, tokens: Sequence[np.ndarray], token_budget: int, reporter: Reporter
) -> np.ndarray:
    """Features [N, F] of token sequences that are sorted by length, longest first."""
    lengths = np.array([len(values) for values in tokens])
    planned = list(plan(lengths, token_budget, encoder.max_tokens, encoder.spread.num_shards))

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for rows, length in planned:
            there = np.split(rows, jax.process_count())[jax.process_index()]
            nothing = np.zeros(0, np.int32)
            ids, mask = pad_tokens([tokens[row] if row >= 0 else nothing for row in there], length)
            yield {
                "input_ids": ids,
                "mask": mask,
                "label": np.full(len(there), -1, np.int32),
                "weight": np.zeros(len(there), np.float32),
                "row": there,
            }

    features: np.ndarray | None = None
    began, read = time.perf_counter(), 0
    placed = prefetch_to_device(batches(), encoder.spread.put_batch)
    # A batch is computed while the one before it is fetched.
    pending: list[tuple[np.ndarray, jax.Array]] = []

    def take() -> None:
        nonlocal features, read
        rows, found = pending.pop(0)
        values = np.asarray(jax.device_get(found))
        if features is None:
            features = np.zeros((len(tokens), values.shape[1]), np.float32)
        kept = rows >= 0
        features[rows[kept]] = values[kept]
        read += int(lengths[rows[kept]].sum())
        rate = read / (time.perf_counter() - began)
        reporter.advance(f"{rate:,.0f} tokens/s", amount=int(kept.sum()))

    rows, length = planned[0]
    work = f"batches of {len(rows)} x {length} tokens on {jax.device_count()} devices"
    with enough_memory("extraction", work, "a smaller --token_budget, or --dtype=bfloat16"):
        for (rows, _), batch in zip(planned, placed, strict=True):
            pending.append((rows, encoder(batch)))
            if len(pending) == 2:
                take()
        while pending:
            take()
    assert features is not None
    return features


def plan(
    lengths: np.ndarray, token_budget: int, max_tokens: int, num_shards: int
) -> Iterator[tuple[np.ndarray, int]]:
    """Batches of sequences that are sorted, longest first.

    Args:
      lengths: [N] tokens of each, descending.
      token_budget: tokens on each device, padding counted; a longer sequence goes alone.
      max_tokens: no sequence is longer, and none is padded beyond it.
      num_shards: parts a batch is cut into.

    Yields:
      Rows [B], -1 for an empty one, and the padded length. All batches of one length have one B.
    """
    start = 0
    while start < len(lengths):
        longest = int(lengths[start])
        padded = min(next((step for step in _LENGTHS if step >= longest), max_tokens), max_tokens)
        size = max(1, token_budget // padded) * num_shards
        below = max((step for step in _LENGTHS if step < longest), default=0)
        # What fits a shorter step waits for it.
        end = min(start + size, start + int(np.sum(lengths[start:] > below)))
        rows = np.full(size, -1, np.int32)
        rows[: end - start] = np.arange(start, end)
        yield rows, padded
        start = end


def _text_features(
    source: DialogueDataset, split: str, features: dict[str, np.ndarray], width: int
) -> data.DialogueFeatures:
    """A split with these text features, and no speech."""
    dialogues, turns = [], []
    for dialogue in source.dialogues(split):
        dialogues.append((dialogue.id, len(dialogue.utterances)))
        turns += [(turn.id, turn.label, turn.score) for turn in dialogue.utterances]
    dialogue_ids, lengths = zip(*dialogues, strict=True)
    utterance_ids, labels, scores = zip(*turns, strict=True)
    missing = np.zeros(width, np.float32)
    return data.DialogueFeatures(
        name=source.name,
        split=split,
        class_names=source.class_names,
        dialogue_ids=dialogue_ids,
        lengths=np.array(lengths),
        utterance_ids=np.array(utterance_ids),
        speech=np.zeros((len(turns), 1), np.float32),
        text=np.stack([features.get(utterance, missing) for utterance in utterance_ids]),
        speech_present=np.zeros(len(turns), bool),
        text_present=np.array([utterance in features for utterance in utterance_ids]),
        label=np.array(labels, np.int32),
        score=np.array(scores, np.float32) if source.scored else None,
        metadata=source.known(split),
    )


def merge(
    speech: str,
    text: str,
    output: str,
    data_dir: epath.PathLike | None = None,
    *,
    overwrite: bool = False,
) -> Any:
    """Writes a dataset with the speech of one dataset of features and the text of another.

    Args:
      speech: dataset whose speech is taken.
      text: dataset whose text is taken, and the order of dialogues and utterances; both have the
        same utterances with the same labels.
      output: name of the dataset.
      data_dir: the directory that holds datasets.
      overwrite: replace a dataset of this name.

    Returns:
      The TFDS builder of the merged dataset.

    Raises:
      InputError: the two are not of the same utterances.
    """
    names = {name: sorted(data.split_names(name, data_dir)) for name in (speech, text)}
    if names[speech] != names[text]:
        raise InputError(f"{speech} has splits {names[speech]}, {text} {names[text]}")
    splits = {
        split: _joined(*(data.load(name, split, data_dir) for name in (speech, text)))
        for split in names[text]
    }
    return data.write(splits, output, data_dir, overwrite=overwrite)


def _joined(speech: data.DialogueFeatures, text: data.DialogueFeatures) -> data.DialogueFeatures:
    """A split of `merge`."""
    where = f"{speech.name} and {text.name}, split {text.split}"
    if speech.class_names != text.class_names:
        raise InputError(f"{where}: classes {speech.class_names} and {text.class_names}")
    places = {utterance: row for row, utterance in enumerate(speech.utterance_ids.tolist())}
    alone = sorted(places.keys() ^ set(text.utterance_ids.tolist()))
    if alone:
        raise InputError(
            f"{where}: {len(alone)} utterances are in one of them alone, the first is {alone[0]}"
        )
    rows = np.array([places[utterance] for utterance in text.utterance_ids.tolist()])
    differ = np.flatnonzero(speech.label[rows] != text.label)
    if len(differ):
        raise InputError(
            f"{where}: {len(differ)} labels differ, the first is that of utterance "
            f"{text.utterance_ids[differ[0]]}"
        )
    return dataclasses.replace(
        text,
        speech=speech.speech[rows],
        speech_present=speech.speech_present[rows],
        metadata={**speech.metadata, **text.metadata},
    )
