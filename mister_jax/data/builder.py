"""TFDS builder for dialogue datasets with 16 kHz audio, text, labels and presence flags.

`DialogueBuilder` is the base class of the builders in `corpora`. `prepare` runs a builder, and
`dialogues` reads the datasets.
"""

import dataclasses
import functools
import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from mister_jax.data import audio
from mister_jax.data.corpus import Corpus, Dialogue
from mister_jax.data.corpus_report import recording_facts
from mister_jax.data.lazy import tfds
from mister_jax.data.schema import UNLABELED
from mister_jax.data.storage import VERSION
from mister_jax.errors import InputError

# TFDS sorts examples on disk, in buckets by the upper bits of their 128-bit keys.
_NUM_KEYS = 2**128


@dataclasses.dataclass(frozen=True)
class DecodingOptions:
    """Options for decoding recordings.

    Attributes:
        num_workers: Number of processes; 0 decodes in this process.
        max_seconds: Maximum number of seconds to keep from each utterance.
        beam: Whether the workers of an Apache Beam pipeline decode, instead of local processes.

    Raises:
        InputError: `max_seconds` is not positive and finite.
    """

    num_workers: int = 2
    max_seconds: float = 60.0
    beam: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_seconds < math.inf:  # Also rejects NaN.
            raise InputError(f"max_seconds={self.max_seconds}; allowed: finite, more than 0")


@dataclasses.dataclass(eq=False)
class CorpusConfig(tfds.core.BuilderConfig):
    """Variant of a corpus, such as one with text only.

    Attributes:
        options: Arguments of the corpus's reader.
    """

    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


class DialogueBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS builder whose examples are dialogues.

    Each corpus has a subclass that defines the reader, variants (`BUILDER_CONFIGS`), origin and
    license of the corpus. The name of the subclass determines the name of the dataset; see
    `corpora.registry`.

    Args:
        corpus: Corpus to write.
        decoding: Options for decoding recordings.
        on_utterance: Function to call after each utterance. With Beam, it is not called.
        facts_dir: Folder for facts about the recordings, with one file per dialogue.
        **options: Arguments of the TFDS builder.
    """

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES: ClassVar[dict[str, str]] = {str(VERSION): "First."}
    BUILDER_CONFIGS: ClassVar[list[tfds.core.BuilderConfig]] = []
    DESCRIPTION: ClassVar[str]
    CITATION: ClassVar[str] = ""
    LICENSE: ClassVar[str]
    HOMEPAGE: ClassVar[str] = ""

    read: ClassVar[Callable[..., Corpus]]
    """Function that reads the corpus. Its arguments are a folder, a config's options and `partial`.
    """

    def __init__(
        self,
        corpus: Corpus,
        decoding: DecodingOptions,
        on_utterance: Callable[[], None],
        facts_dir: epath.Path,
        **options: Any,
    ) -> None:
        self.corpus = corpus
        self.decoding = decoding
        self.on_utterance = on_utterance
        self.facts_dir = facts_dir
        super().__init__(**options)

    @staticmethod
    def download(dl_manager: tfds.download.DownloadManager, **options: Any) -> pathlib.Path | None:
        """Downloads a corpus variant and returns its folder, or None if no download exists."""
        return None

    def _info(self) -> tfds.core.DatasetInfo:
        utterance = {
            "utterance": tfds.features.Text(doc="Id of the utterance."),
            "start": tfds.features.Scalar(np.float32, doc="Seconds into the dialogue, or NaN."),
            "end": tfds.features.Scalar(np.float32, doc="Seconds into the dialogue, or NaN."),
            "audio": tfds.features.Tensor(
                shape=(None,), dtype=np.int16, encoding="bytes", doc="16 kHz, mono; may be empty."
            ),
            "text": tfds.features.Text(doc="The transcript; may be empty."),
            "label": tfds.features.ClassLabel(names=self.corpus.class_names, doc="-1: unlabeled."),
            "speech_present": tfds.features.Scalar(np.bool_),
            "text_present": tfds.features.Scalar(np.bool_),
            "metadata": tfds.features.Text(doc="JSON object of extra columns; no model reads it."),
        }
        if self.corpus.scored:
            utterance["score"] = tfds.features.Scalar(np.float32, doc="Sentiment, or NaN.")
        if self.corpus.rated:
            utterance["ratings"] = tfds.features.Tensor(
                shape=(len(self.corpus.class_names),), dtype=np.float32, doc="Raters per class."
            )
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            features=tfds.features.FeaturesDict(
                {
                    "dialogue": tfds.features.Text(doc="Id of the dialogue."),
                    "utterances": tfds.features.Dataset(utterance),
                }
            ),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            license=self.LICENSE,
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {
            split: self._generate_examples(split, dialogues)
            for split, dialogues in self.corpus.splits.items()
            if dialogues
        }

    def _generate_examples(self, split: str, dialogues: Sequence[Dialogue]) -> Any:
        make_example = functools.partial(
            _make_example,
            class_names=self.corpus.class_names,
            scored=self.corpus.scored,
            rated=self.corpus.rated,
            facts_dir=f"{self.facts_dir}/{split}",
        )
        if self.decoding.beam:
            beam = tfds.core.lazy_imports.apache_beam
            decode = functools.partial(_decode_example, self.decoding.max_seconds, make_example)
            return beam.Create(list(enumerate(dialogues))) | beam.MapTuple(decode)
        keys = evenly_spaced_keys(len(dialogues))
        clips = _decode_dialogues(
            dialogues, self.decoding.num_workers, self.decoding.max_seconds, self.on_utterance
        )
        return zip(keys, map(make_example, dialogues, clips), strict=True)


def evenly_spaced_keys(count: int) -> list[int]:
    """Returns ascending keys of examples, which fill all buckets of TFDS's disk sort evenly.

    Consecutive small keys would all be in the first bucket, and TFDS sorts each bucket in memory.
    """
    return [index * (_NUM_KEYS // count) for index in range(count)]


def _decode_dialogues(
    dialogues: Sequence[Dialogue],
    num_workers: int,
    max_seconds: float,
    on_utterance: Callable[[], None] = lambda: None,
) -> Iterator[list[audio.Clip | audio.AudioError | None]]:
    """Yields the clips of each dialogue. One pool of workers decodes all recordings."""
    requests = (
        utterance.recording
        for dialogue in dialogues
        for utterance in dialogue.utterances
        if utterance.recording is not None
    )
    decoded = audio.decode_many(requests, num_workers=num_workers, max_seconds=max_seconds)
    for dialogue in dialogues:
        clips = []
        for utterance in dialogue.utterances:
            clips.append(None if utterance.recording is None else next(decoded))
            on_utterance()
        yield clips


def _decode_example(
    max_seconds: float, make_example: Callable[..., Any], key: int, dialogue: Dialogue
) -> tuple[int, dict[str, Any]]:
    """Decodes a dialogue's recordings in this process, and returns its key and example."""
    (clips,) = _decode_dialogues([dialogue], 0, max_seconds)
    return key, make_example(dialogue, clips)


def _make_example(
    dialogue: Dialogue,
    clips: list[audio.Clip | audio.AudioError | None],
    *,
    class_names: tuple[str, ...],
    scored: bool,
    rated: bool,
    facts_dir: str,
) -> dict[str, Any]:
    """Returns a dialogue's example, and writes facts about its recordings to `facts_dir`."""
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
        if rated:
            ratings = [utterance.ratings.get(name, 0) for name in class_names]
            utterances[-1]["ratings"] = np.array(ratings, np.float32)
    entries = map(recording_facts, dialogue.utterances, clips)
    facts = [entry for entry in entries if entry is not None]
    # Ids may contain characters that are not allowed in file names.
    name = hashlib.sha256(dialogue.id.encode()).hexdigest()
    epath.Path(facts_dir, f"{name}.json").write_text(json.dumps(facts))
    return {"dialogue": dialogue.id, "utterances": utterances}
