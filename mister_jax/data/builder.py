"""Writes corpora as TFDS datasets of dialogues: sound at 16 kHz, text, labels, presence flags.

`DialogueBuilder` is the base class of the TFDS builders of the corpora. `write_corpus` runs one and
adds `report.json`. `dialogues` reads the datasets.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core import shuffle

from mister_jax.console import ProgressReporter
from mister_jax.data import audio
from mister_jax.data.clips import is_heard
from mister_jax.data.corpus import Corpus, Dialogue, Utterance
from mister_jax.data.schema import UNLABELED
from mister_jax.data.storage import REPORT, VERSION, quiet, staged
from mister_jax.errors import InputError
from mister_jax.io import write_json

# TFDS sorts the examples of a split in buckets on disk, but the first gigabyte in memory.
_SORTED_IN_MEMORY = 64 * 2**20

KINDS: Mapping[str, tuple[str, ...]] = {
    "capped": ("seconds",),
    "damaged": ("seconds",),
    "silent": ("seconds",),
    "length_mismatch": ("seconds", "annotated_seconds"),
    "changed": ("seconds", "changed"),
}
"""Kinds of recordings that a report lists, and the facts that it gives of each."""

# A recording's length is far from the annotated one if it differs by more than both.
_MISMATCH_SECONDS, _MISMATCH_SHARE = 1.0, 0.5

_NUMBER = re.compile(r"-?\d+(\.\d+)?")

# Of 128 bits, which TFDS maps to its buckets.
_KEYS = 2**128


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Options for reading recordings.

    Attributes:
        num_workers: Number of processes; 0 decodes in this one.
        max_seconds: Seconds of an utterance that are kept at most.
        beam: Decode in the workers of an Apache Beam pipeline instead.

    Raises:
        InputError: `max_seconds` is not a positive number.
    """

    num_workers: int = 2
    max_seconds: float = 60.0
    beam: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.max_seconds < math.inf:  # Nor NaN.
            raise InputError(f"max_seconds={self.max_seconds}; allowed: finite, more than 0")


class DialogueBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A TFDS builder whose examples are dialogues.

    Subclasses read their corpus, and have an entry in `BUILDER_CONFIGS` for each variant of it.
    """

    VERSION = tfds.core.Version(VERSION)
    RELEASE_NOTES: ClassVar[dict[str, str]] = {str(VERSION): "First."}
    DESCRIPTION: ClassVar[str]
    CITATION: ClassVar[str]
    LICENSE: ClassVar[str]
    HOMEPAGE: ClassVar[str]

    corpus: Corpus | None = None
    """Corpus to write; it is read from the manual directory if None."""

    decoding = Decoding()
    on_utterance: Callable[[], None] | None = None
    """Called after each utterance that is decoded in this process."""

    notes_dir: epath.Path | None = None
    """Folder for a file per dialogue with facts on its recordings; none are written if None."""

    def class_names(self) -> tuple[str, ...]:
        """Returns the emotions in the order of their labels."""
        raise NotImplementedError

    def read(self, source: pathlib.Path, *, partial: bool = False) -> Corpus:
        """Reads the corpus according to the config of this builder."""
        raise NotImplementedError

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
            "metadata": tfds.features.Text(
                doc="JSON object of further columns; no model reads it."
            ),
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
        corpus = self.corpus or self.read(pathlib.Path(dl_manager.manual_dir))
        return {
            split: self._generate_examples(split, dialogues, corpus.class_names)
            for split, dialogues in corpus.splits.items()
            if dialogues
        }

    def _generate_examples(
        self, split: str, dialogues: tuple[Dialogue, ...], class_names: tuple[str, ...]
    ) -> Any:
        write = functools.partial(
            _example,
            class_names=class_names,
            scored=self.scored,
            notes=None if self.notes_dir is None else f"{self.notes_dir}/{split}",
        )
        if self.decoding.beam:
            beam = tfds.core.lazy_imports.apache_beam
            decode = functools.partial(_decoded_example, self.decoding.max_seconds, write)
            return beam.Create(list(enumerate(dialogues))) | beam.MapTuple(decode)
        return self._decoded(dialogues, write)

    def _decoded(
        self, dialogues: tuple[Dialogue, ...], write: Callable[..., Any]
    ) -> Iterator[tuple[int, dict[str, Any]]]:
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
        for key, dialogue in zip(spread_keys(len(dialogues)), dialogues, strict=True):
            decoded = []
            for utterance in dialogue.utterances:
                decoded.append(None if utterance.recording is None else next(clips))
                if self.on_utterance is not None:
                    self.on_utterance()
            yield key, write(dialogue, decoded)


def spread_keys(count: int) -> list[int]:
    """Returns ascending keys of examples that spread evenly over the buckets of TFDS.

    Small keys would all fall into the first bucket, which TFDS then sorts in memory.
    """
    return [index * (_KEYS // count) for index in range(count)]


def write_corpus(
    builder_class: type[DialogueBuilder],
    corpus: Corpus,
    name: str,
    data_dir: epath.PathLike | None = None,
    *,
    config: Any = None,
    decoding: Decoding | None = None,
    beam_options: Mapping[str, Any] | None = None,
    source: str = "",
    partial: bool = False,
    overwrite: bool = False,
    reference_scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a corpus as a dataset; the dataset appears whole or not at all.

    A corpus is refused as incomplete if more than one in ten recordings of a split cannot be used.
    Single clips are broken in corpora as released (2 of MELD's 13,708), and the report lists them.
    More than that means an interrupted copy, an archive that was not unpacked, or a wrong path.
    Missing and empty files are detected before decoding, broken ones after it. In both cases
    nothing is written.

    Args:
        builder_class: Builder of the corpus.
        corpus: The corpus as its reader returned it.
        name: Name of the dataset, `DATASET/CONFIG`.
        data_dir: Directory that holds datasets; that of TFDS if None.
        config: Config of the builder.
        decoding: Options for reading recordings.
        beam_options: Options of the pipeline if `decoding.beam` is on.
        source: Path that the corpus was read from, for the report.
        partial: Allow any number of recordings that cannot be used.
        overwrite: Replace a dataset of this name.
        reference_scores: Scores of known classifiers by split, for a synthetic corpus.

    Returns:
        The report, see `_report`. It is also written to the dataset's directory as `report.json`.

    Raises:
        InputError: The dataset exists or cannot be written, the corpus is incomplete, or Beam is
            not installed or does not know an option.
    """
    decoding = decoding or Decoding()
    with quiet():
        pipeline_options = _beam_options(beam_options or {}) if decoding.beam else None
    if not partial:
        _check_files(corpus)
    total = sum(1 for _ in corpus.utterances())
    with (
        staged(name, data_dir, overwrite=overwrite) as (place, directory),
        ProgressReporter(total, unit="utterances", quiet=decoding.beam) as reporter,
        quiet(),
    ):
        builder = builder_class(config=config, data_dir=place)
        builder.corpus, builder.decoding = corpus, decoding
        builder.on_utterance = functools.partial(reporter.advance, "decoding")
        builder.notes_dir = place / "notes"
        for split in corpus.splits:
            (builder.notes_dir / split).mkdir(parents=True)
        options: dict[str, Any] = {"manual_dir": place}
        if decoding.beam:
            options["beam_options"] = pipeline_options
        with _small_buffer():
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(**options), download_dir=place
            )
        report = _report(corpus, builder.notes_dir)
        if not partial:
            _check_decoded(corpus, report)
        report = {"dataset": name, "directory": str(directory), "source": source, **report}
        if reference_scores:
            report["reference_scores"] = dict(reference_scores)
        write_json(epath.Path(builder.data_dir) / REPORT, report)
    return report


def _beam_options(options: Mapping[str, Any]) -> Any:
    """Returns Beam's options after checking them, since Beam ignores unknown ones."""
    try:
        import apache_beam  # noqa: F401
        from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
        from apache_beam.runners import runner
    except ImportError as error:
        raise InputError(
            f"--beam_options needs Apache Beam ({error}); pip install apache-beam"
        ) from error
    pipeline_options = PipelineOptions.from_dictionary(dict(options))
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            allowed = pipeline_options.get_all_options()
    except SystemExit as error:  # argparse's
        reason = " ".join(messages.getvalue().rpartition("error:")[2].split())
        raise InputError(f"--beam_options: {reason}; see Apache Beam's options") from error
    unknown = [name for name in options if name not in allowed]
    if unknown:
        raise InputError(f"--beam_options: {unknown[0]}: unknown; see Apache Beam's options")
    name = pipeline_options.view_as(StandardOptions).runner
    if name is not None:
        try:
            runner.create_runner(name)
        except (ImportError, AttributeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise InputError(f"--beam_options: runner {name!r}: {reason}") from error
    return pipeline_options


class _small_buffer:
    """Makes TFDS sort on disk early, so that memory does not grow with the corpus."""

    def __enter__(self) -> None:
        self._before = shuffle.MAX_MEM_BUFFER_SIZE
        shuffle.MAX_MEM_BUFFER_SIZE = _SORTED_IN_MEMORY

    def __exit__(self, *_: object) -> None:
        shuffle.MAX_MEM_BUFFER_SIZE = self._before


def _check_files(corpus: Corpus) -> None:
    """Raises an error if too many recordings are missing or empty, before any is decoded."""
    usable: dict[str, bool] = {}
    for split, dialogues in corpus.splits.items():
        paths = [
            utterance.recording.path
            for dialogue in dialogues
            for utterance in dialogue.utterances
            if utterance.recording is not None
        ]
        for path in dict.fromkeys(paths):
            # A path that no file can have raises ValueError or OSError; the decoder reports it.
            with contextlib.suppress(OSError, ValueError):
                usable[path] = epath.Path(audio.existing_path(path)).stat().length > 0
        lost = [path for path in paths if not usable.get(path, False)]
        if _too_many(len(lost), len(paths)):
            raise InputError(
                f"{corpus.name}: {split}: {len(lost)} of {len(paths)} recordings are missing or "
                f"empty, as {lost[0]}; --partial allows it"
            )


def _check_decoded(corpus: Corpus, report: Mapping[str, Any]) -> None:
    """Raises an error if too many recordings could not be used."""
    lost = {entry["utterance"]: entry for entry in report["missing"]}
    for split, dialogues in corpus.splits.items():
        named = [
            utterance.id
            for dialogue in dialogues
            for utterance in dialogue.utterances
            if utterance.recording is not None
        ]
        unusable = [lost[utterance] for utterance in named if utterance in lost]
        if _too_many(len(unusable), len(named)):
            raise InputError(
                f"{corpus.name}: {split}: {len(unusable)} of {len(named)} recordings cannot be "
                f"used, as {unusable[0]['file']}: {unusable[0]['reason']}; --partial allows it"
            )


def _too_many(lost: int, named: int) -> bool:
    return 10 * lost > named


def _request(utterance: Utterance) -> audio.Request:
    assert utterance.recording is not None
    recording = utterance.recording
    return audio.Request(recording.path, recording.start, recording.end, recording.channel)


def _decoded_example(
    max_seconds: float, write: Callable[..., Any], key: int, dialogue: Dialogue
) -> tuple[int, dict[str, Any]]:
    """Returns the example of a dialogue, whose recordings it decodes in this process."""
    requests = [_request(turn) for turn in dialogue.utterances if turn.recording is not None]
    clips = audio.decode_many(requests, num_workers=0, max_seconds=max_seconds)
    decoded = [None if turn.recording is None else next(clips) for turn in dialogue.utterances]
    return key, write(dialogue, decoded)


def _example(
    dialogue: Dialogue,
    decoded: list[audio.Clip | audio.AudioError | None],
    *,
    class_names: tuple[str, ...],
    scored: bool,
    notes: str | None,
) -> dict[str, Any]:
    """Returns the example of a dialogue; facts on its recordings go into a file of `notes`."""
    utterances: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    for utterance, clip in zip(dialogue.utterances, decoded, strict=True):
        samples = clip.samples if isinstance(clip, audio.Clip) else np.zeros(0, np.int16)
        label = UNLABELED if utterance.label is None else class_names.index(utterance.label)
        utterances.append(
            {
                "utterance": utterance.id,
                "start": np.float32(np.nan if utterance.start is None else utterance.start),
                "end": np.float32(np.nan if utterance.end is None else utterance.end),
                "audio": samples,
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
        if utterance.recording is None or clip is None:
            continue
        facts.append({"utterance": utterance.id, "file": utterance.recording.path})
        if isinstance(clip, audio.Clip):
            facts[-1] |= {
                "kept_seconds": len(samples) / audio.SAMPLE_RATE,
                "seconds": clip.seconds,
                "capped": clip.capped,
                "damaged": clip.damaged,
                "silent": not is_heard(samples),
                "length_mismatch": _differs_in_length(utterance, clip.seconds),
                "changed": list(clip.notes),
            }
            if utterance.start is not None and utterance.end is not None:
                facts[-1]["annotated_seconds"] = utterance.end - utterance.start
        else:
            facts[-1]["reason"] = str(clip.reason) + (f" ({clip.detail})" if clip.detail else "")
    if notes is not None:
        # An id may hold what a file name may not.
        name = hashlib.sha256(dialogue.id.encode()).hexdigest()
        epath.Path(notes, f"{name}.json").write_text(json.dumps(facts))
    return {"dialogue": dialogue.id, "utterances": utterances}


def _differs_in_length(utterance: Utterance, seconds: float) -> bool:
    """Returns whether a recording's length is far from the annotated one."""
    if utterance.start is None or utterance.end is None:
        return False
    annotated = utterance.end - utterance.start
    return abs(seconds - annotated) > max(_MISMATCH_SECONDS, _MISMATCH_SHARE * annotated)


def _report(corpus: Corpus, notes: epath.Path) -> dict[str, Any]:
    """Returns what was written.

    - `splits`: For each split the numbers of dialogues, utterances, each class, unlabeled,
      without speech, without text and with a text that occurs in training, the hours of speech,
      and the least, mean and greatest length of a dialogue.
    - `missing`: Utterances whose recording could not be used, with file and reason.
    - `capped`, `damaged`, `silent`, `length_mismatch`, `changed`: Utterances whose recording was
      longer than what is kept, could be decoded in part only, holds no sound, lasts much longer or
      shorter than `end` - `start`, or was changed (holes filled, scaled, a channel dropped), with
      file and seconds.
    - `notes`: Notes of the reader, and a line for each kind of change with its count.
    """
    order = {utterance.id: index for index, (_, utterance) in enumerate(corpus.utterances())}
    classes, repeated = corpus.class_counts(), corpus.train_text_overlap()
    lists: dict[str, list[dict[str, Any]]] = {"missing": [], **{kind: [] for kind in KINDS}}
    splits = {}
    for split, dialogues in corpus.splits.items():
        facts = [entry for path in (notes / split).glob("*.json") for entry in _read(path)]
        facts.sort(key=lambda entry: order[entry["utterance"]])
        present = [entry for entry in facts if "reason" not in entry]
        lists["missing"] += [entry for entry in facts if "reason" in entry]
        for kind, names in KINDS.items():
            lists[kind] += [
                {name: entry[name] for name in ("utterance", "file", *names)}
                for entry in present
                if entry[kind]
            ]
        utterances = [utterance for dialogue in dialogues for utterance in dialogue.utterances]
        lengths = [len(dialogue.utterances) for dialogue in dialogues]
        splits[split] = {
            "dialogues": len(dialogues),
            "utterances": len(utterances),
            "classes": classes[split],
            "unlabeled": sum(utterance.label is None for utterance in utterances),
            "without_speech": len(utterances) - len(present),
            "without_text": sum(not utterance.text for utterance in utterances),
            "train_text_overlap": repeated.get(split, 0),
            "hours": sum(entry["kept_seconds"] for entry in present) / 3600,
            "lengths": [min(lengths), sum(lengths) / len(lengths), max(lengths)] if lengths else [],
        }
    return {
        "splits": splits,
        **lists,
        "notes": [*corpus.notes, *_counted_changes(lists["changed"])],
    }


def _counted_changes(changed: Iterable[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each kind of change of recordings: how many, and the first as example."""
    examples: dict[str, str] = {}
    counts: collections.Counter[str] = collections.Counter()
    for entry in changed:
        for change in entry["changed"]:
            kind = _NUMBER.sub("", change)
            counts[kind] += 1
            examples.setdefault(kind, f"{entry['utterance']}: {change}")
    return [f"{count} recordings changed, as {examples[kind]}" for kind, count in counts.items()]


def _read(path: epath.Path) -> Iterable[dict[str, Any]]:
    return json.loads(path.read_text())
