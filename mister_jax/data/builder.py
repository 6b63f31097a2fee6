"""TFDS builder of dialogue datasets: audio at 16 kHz, text, labels and presence flags.

`DialogueBuilder` is the base class of the builders in `corpora`. `corpus_writer` runs a builder,
and `dialogues` reads the datasets.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import numpy as np
from etils import epath

from mister_jax.data import audio
from mister_jax.data.corpus import Corpus, Dialogue, Utterance
from mister_jax.data.corpus_report import recording_facts
from mister_jax.data.lazy import tfds
from mister_jax.data.schema import UNLABELED
from mister_jax.data.storage import VERSION
from mister_jax.errors import InputError

# TFDS distributes examples to the buckets of its disk sort by the upper bits of 128-bit keys.
_NUM_KEYS = 2**128


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """Options for decoding recordings.

    Attributes:
        num_workers: Number of processes; 0 decodes in this process.
        max_seconds: Maximum number of seconds to keep of an utterance.
        beam: Whether to decode in the workers of an Apache Beam pipeline instead.

    Raises:
        InputError: `max_seconds` is not a positive number.
    """

    num_workers: int = 2
    max_seconds: float = 60.0
    beam: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_seconds < math.inf:  # Also rejects NaN.
            raise InputError(f"max_seconds={self.max_seconds}; allowed: finite, more than 0")


class DialogueBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS builder whose examples are dialogues.

    Subclasses read a corpus. Each variant of the corpus is an entry of `BUILDER_CONFIGS`.

    Attributes:
        corpus: Corpus to write; if None, it is read from the manual directory.
        decoding: Options for decoding recordings.
        on_utterance: Function called after each utterance that this process decodes.
        facts_dir: Folder for a file per dialogue with facts about its recordings; if None, no
            facts are written.
    """

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES: ClassVar[dict[str, str]] = {str(VERSION): "First."}
    DESCRIPTION: ClassVar[str]
    CITATION: ClassVar[str]
    LICENSE: ClassVar[str]
    HOMEPAGE: ClassVar[str]

    corpus: Corpus | None = None
    decoding = DecodingOptions()
    on_utterance: Callable[[], None] | None = None
    facts_dir: epath.Path | None = None

    def class_names(self) -> tuple[str, ...]:
        """Returns the emotions in the order of their labels."""
        raise NotImplementedError

    def read(self, source: pathlib.Path, *, partial: bool = False) -> Corpus:
        """Reads the variant of the corpus that the builder's config selects.

        Args:
            source: Folder of the corpus.
            partial: Whether to allow a corpus of another size than the released one.
        """
        raise NotImplementedError

    def download(self, dl_manager: tfds.download.DownloadManager) -> pathlib.Path | None:
        """Downloads the corpus and returns its folder, or None if users must obtain it."""
        return None

    @property
    def scored(self) -> bool:
        """Whether utterances have sentiment scores."""
        return False

    def _info(self) -> tfds.core.DatasetInfo:
        utterance = {
            "utterance": tfds.features.Text(doc="Its id."),
            "start": tfds.features.Scalar(np.float32, doc="Seconds into the dialogue, or NaN."),
            "end": tfds.features.Scalar(np.float32, doc="Seconds into the dialogue, or NaN."),
            "audio": tfds.features.Tensor(
                shape=(None,), dtype=np.int16, encoding="bytes", doc="16 kHz, mono; may be empty."
            ),
            "text": tfds.features.Text(doc="The transcript; may be empty."),
            "label": tfds.features.ClassLabel(names=self.class_names(), doc="-1: unlabeled."),
            "speech_present": tfds.features.Scalar(np.bool_),
            "text_present": tfds.features.Scalar(np.bool_),
            "metadata": tfds.features.Text(doc="JSON object of extra columns; no model reads it."),
        }
        if self.scored:
            utterance["score"] = tfds.features.Scalar(np.float32, doc="Sentiment, or NaN.")
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "dialogue": tfds.features.Text(doc="Its id."),
                    "utterances": tfds.features.Dataset(utterance),
                }
            ),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            license=self.LICENSE,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        corpus = self.corpus
        if corpus is None:
            source = self.download(dl_manager) or pathlib.Path(dl_manager.manual_dir)
            corpus = self.read(source)
        return {
            split: self._generate_examples(split, dialogues, corpus.class_names)
            for split, dialogues in corpus.splits.items()
            if dialogues
        }

    def _generate_examples(
        self, split: str, dialogues: tuple[Dialogue, ...], class_names: tuple[str, ...]
    ) -> Any:
        make_example = functools.partial(
            _make_example,
            class_names=class_names,
            scored=self.scored,
            facts_dir=None if self.facts_dir is None else f"{self.facts_dir}/{split}",
        )
        if self.decoding.beam:
            beam = tfds.core.lazy_imports.apache_beam
            decode = functools.partial(_decode_example, self.decoding.max_seconds, make_example)
            return beam.Create(list(enumerate(dialogues))) | beam.MapTuple(decode)
        return self._decode_examples(dialogues, make_example)

    def _decode_examples(
        self, dialogues: tuple[Dialogue, ...], make_example: Callable[..., Any]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields the examples of dialogues; all recordings share one pool of workers."""
        requests = (
            _request(utterance)
            for dialogue in dialogues
            for utterance in dialogue.utterances
            if utterance.recording is not None
        )
        clips = audio.decode_many(
            requests,
            num_workers=self.decoding.num_workers,
            max_seconds=self.decoding.max_seconds,
        )
        for key, dialogue in zip(evenly_spaced_keys(len(dialogues)), dialogues, strict=True):
            dialogue_clips = []
            for utterance in dialogue.utterances:
                dialogue_clips.append(None if utterance.recording is None else next(clips))
                if self.on_utterance is not None:
                    self.on_utterance()
            yield key, make_example(dialogue, dialogue_clips)


def evenly_spaced_keys(count: int) -> list[int]:
    """Returns ascending example keys that fill all buckets of TFDS's disk sort evenly.

    Small keys would all fall into the first bucket, which TFDS then sorts in memory.
    """
    return [index * (_NUM_KEYS // count) for index in range(count)]


def _request(utterance: Utterance) -> audio.DecodeRequest:
    assert utterance.recording is not None
    recording = utterance.recording
    return audio.DecodeRequest(recording.path, recording.start, recording.end, recording.channel)


def _decode_example(
    max_seconds: float, make_example: Callable[..., Any], key: int, dialogue: Dialogue
) -> tuple[int, dict[str, Any]]:
    """Returns the example of a dialogue, and decodes its recordings in this process."""
    requests = [_request(turn) for turn in dialogue.utterances if turn.recording is not None]
    decoded = audio.decode_many(requests, num_workers=0, max_seconds=max_seconds)
    clips = [None if turn.recording is None else next(decoded) for turn in dialogue.utterances]
    return key, make_example(dialogue, clips)


def _make_example(
    dialogue: Dialogue,
    clips: list[audio.Clip | audio.AudioError | None],
    *,
    class_names: tuple[str, ...],
    scored: bool,
    facts_dir: str | None,
) -> dict[str, Any]:
    """Returns the example of a dialogue, and writes facts about its recordings to `facts_dir`."""
    utterances: list[dict[str, Any]] = []
    for utterance, clip in zip(dialogue.utterances, clips, strict=True):
        label = UNLABELED if utterance.label is None else class_names.index(utterance.label)
        utterances.append(
            {
                "utterance": utterance.id,
                "start": np.float32(np.nan if utterance.start is None else utterance.start),
                "end": np.float32(np.nan if utterance.end is None else utterance.end),
                "audio": clip.samples if isinstance(clip, audio.Clip) else np.zeros(0, np.int16),
                "text": utterance.text,
                "label": label,
                "speech_present": isinstance(clip, audio.Clip),
                "text_present": bool(utterance.text),
                "metadata": json.dumps(dict(utterance.metadata)),
            }
        )
        if scored:
            score = np.nan if utterance.score is None else utterance.score
            utterances[-1]["score"] = np.float32(score)
    if facts_dir is not None:
        entries = map(recording_facts, dialogue.utterances, clips)
        facts = [entry for entry in entries if entry is not None]
        # Ids may contain characters that file names may not.
        name = hashlib.sha256(dialogue.id.encode()).hexdigest()
        epath.Path(facts_dir, f"{name}.json").write_text(json.dumps(facts))
    return {"dialogue": dialogue.id, "utterances": utterances}
