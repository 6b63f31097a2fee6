"""Converts corpora to dialogue datasets, for `mister-jax prepare`."""

import contextlib
import dataclasses
import functools
import inspect
import io
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from etils import epath
from tensorflow_datasets.core import shuffle

from mister_jax.console import ProgressReporter
from mister_jax.data.audio_source import existing_path, source_name
from mister_jax.data.builder import CorpusConfig, DecodingOptions, DialogueBuilder
from mister_jax.data.corpora import emobox
from mister_jax.data.corpora.folder import read_folder
from mister_jax.data.corpora.manifest.reader import read_manifest
from mister_jax.data.corpora.registry import CORPORA, builder_class
from mister_jax.data.corpora.transcripts import TranscriptOptions, read_transcripts
from mister_jax.data.corpus import Corpus
from mister_jax.data.corpus_report import make_report
from mister_jax.data.lazy import tfds
from mister_jax.data.storage import REPORT, atomic_dataset, dataset_directory, recover, silence_tfds
from mister_jax.data.synthetic_speech import DEFAULT_NUM_DIALOGUES, SCORES, write_speech_corpus
from mister_jax.errors import InputError
from mister_jax.io import write_json

_MAX_SORT_BYTES = 64 * 2**20
# At most one in `_UNUSABLE_LIMIT` recordings per split may be unusable.
_UNUSABLE_LIMIT = 10


_SOURCES = {
    "manifest": "a .jsonl or .csv file",
    "transcripts": "a folder",
    "folder": "a folder of recordings",
    "emobox": emobox.LAYOUT,
}
"""What --source must be for the corpora that are not in `CORPORA`; "synthetic" needs no source."""


class Manifest(DialogueBuilder):
    """TFDS builder for the dialogues of a manifest, a folder or transcripts."""

    DESCRIPTION: ClassVar[str] = "Dialogues of recordings and transcripts, as listed in a manifest."
    LICENSE: ClassVar[str] = "The license of the recordings."


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Options of `prepare_corpus`. Options of a manifest also apply to "transcripts" and "folder".

    Attributes:
        corpus: Name of the corpus: a key of `registry.CORPORA`, "manifest", "transcripts",
            "folder", "emobox" or "synthetic".
        source: Folder of the corpus or path of the manifest. For "synthetic", the folder to write
            recordings to. If None, "meld" with config "text" is downloaded, and "synthetic" writes
            to the folder `NAME_recordings` in `data_dir`.
        data_dir: Directory of all datasets; if None, TFDS's default directory.
        config: Name of the corpus's config; if empty, the first config.
        name: Name of the dataset, which becomes `manifest/NAME` or, for "emobox", `emobox/NAME`. If
            empty, the name is made from `source`, or is "synthetic" for the synthetic corpus.
            Released corpora ignore this option.
        labels: Ordered class names of a manifest; if empty, the sorted names in the file.
        label_map: Map from names in a manifest, or EmoBox's class names, to class names.
        group_by: Column of a manifest. Random splits put dialogues with equal values in this column
            into one split.
        pattern: Pattern of the recordings' paths in the corpus "folder"; see `read_folder`.
        audio_root: Folder of the recordings of the corpus "emobox"; see `read_emobox`.
        fold: Fold of the corpus "emobox"; if None, the first fold.
        seed: Seed for random splits, the validation set of "emobox", and the synthetic corpus.
        num_dialogues: Number of dialogues in the synthetic corpus by split; if empty, the defaults.
        decoding: Options for decoding recordings.
        beam_options: Options of the Beam pipeline.
        transcripts: Options for reading the corpus "transcripts".
        partial: Whether to allow an incomplete corpus.
        overwrite: Whether to replace an existing dataset.
    """

    corpus: str
    source: epath.PathLike | None = None
    data_dir: epath.PathLike | None = None
    config: str = ""
    name: str = ""
    labels: Sequence[str] = ()
    label_map: Mapping[str, str] = dataclasses.field(default_factory=dict)
    group_by: str = ""
    pattern: str = ""
    audio_root: epath.PathLike | None = None
    fold: int | None = None
    seed: int = 0
    num_dialogues: Mapping[str, int] = dataclasses.field(default_factory=dict)
    decoding: DecodingOptions = dataclasses.field(default_factory=DecodingOptions)
    beam_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    transcripts: TranscriptOptions = dataclasses.field(default_factory=TranscriptOptions)
    partial: bool = False
    overwrite: bool = False


def prepare_corpus(options: PrepareOptions) -> dict[str, Any]:
    """Reads and checks a corpus, then writes a dataset atomically.

    Released corpora contain a few broken clips (2 of MELD's 13,708), and the report lists them. If
    more than one in ten recordings in a split are unusable, the corpus is rejected as incomplete:
    a copy may have been interrupted, an archive may not be unpacked, or a path may be wrong.

    Returns:
        The report; see `corpus_report.make_report`. The dataset's directory also contains the
        report.

    Raises:
        InputError: The input cannot be used, the dataset exists or cannot be written, Beam is not
            installed, or a Beam option is unknown. No partial dataset remains.
    """
    if options.corpus in CORPORA:
        return _prepare_released(options)
    if options.corpus not in (*_SOURCES, "synthetic"):
        allowed = ", ".join((*CORPORA, *_SOURCES, "synthetic"))
        raise InputError(f"corpus {options.corpus!r}; allowed: {allowed}")
    if options.config:
        raise InputError(f"{options.corpus} has no configs, got {options.config!r}")
    if options.corpus == "synthetic":
        return _prepare_synthetic(options)
    if options.source is None:
        needed = _SOURCES[options.corpus]
        raise InputError(f"--source is needed with --corpus={options.corpus}: {needed}")
    if options.corpus == "emobox":
        return _prepare_emobox(options)
    return _prepare_manifest(options)


def read_released(
    corpus: str, source: epath.PathLike | None, config: str = "", *, partial: bool = False
) -> Corpus:
    """Reads and checks a corpus in `registry.CORPORA` without decoding recordings.

    Raises:
        InputError: The corpus cannot be used.
    """
    builder = builder_class(corpus)
    variant = _find_config(corpus, config)
    if source is None:
        instructions = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
        needed = f". {instructions}" if instructions else ": the folder of the corpus"
        raise InputError(f"--source is needed with --corpus={corpus}{needed}")
    try:
        inspect.signature(builder.read).bind(source, partial=partial, **variant.options)
    except TypeError as error:
        raise InputError(
            f"config {variant.name!r} of {corpus}: {error}; needed: a reader with the arguments "
            f"{', '.join(('partial', *variant.options))}"
        ) from error
    return builder.read(pathlib.Path(source), partial=partial, **variant.options)


def _find_config(corpus: str, name: str) -> CorpusConfig:
    configs = builder_class(corpus).BUILDER_CONFIGS
    for config in configs:
        if name in ("", config.name):
            return config
    names = ", ".join(config.name for config in configs)
    raise InputError(f"config {name!r} of {corpus}; allowed: {names}")


def _prepare_released(options: PrepareOptions) -> dict[str, Any]:
    config = _find_config(options.corpus, options.config)
    builder = builder_class(options.corpus)
    dataset = f"{options.corpus}/{config.name}"
    _check_not_existing(dataset, options)
    source = options.source
    if source is None:
        root = dataset_directory(options.corpus, options.data_dir).parent.parent
        manager = tfds.download.DownloadManager(
            download_dir=root / "downloads", dataset_name=options.corpus, register_checksums=False
        )
        with silence_tfds():
            source = builder.download(manager, **config.options)
    corpus = read_released(options.corpus, source, config.name, partial=options.partial)
    return _write(options, builder, corpus, dataset, config.name, str(source or ""))


def _prepare_manifest(
    options: PrepareOptions,
    notes: Sequence[str] = (),
    reference_scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    assert options.source is not None
    path = pathlib.Path(options.source).expanduser()
    name = options.name or _dataset_name(path)
    dataset = f"manifest/{name}"
    _check_not_existing(dataset, options)
    read: Callable[..., Corpus] = read_manifest
    if options.corpus == "transcripts":
        read = functools.partial(read_transcripts, options=options.transcripts)
    elif options.corpus == "folder":
        read = functools.partial(read_folder, pattern=options.pattern)
    corpus = read(
        path,
        labels=options.labels,
        label_map=options.label_map,
        group_by=options.group_by,
        seed=options.seed,
    )
    if not corpus.class_names:
        columns = dict.fromkeys(name for _, turn in corpus.utterances() for name in turn.metadata)
        extra = f" (extra columns: {', '.join(columns)})" if columns else ""
        needed = "a column label, or --labels=A,B,..."
        if options.corpus == "transcripts":
            needed = "--label_tier, --label_column, --label_suffix, or --labels=A,B,..."
        raise InputError(f"{path}: no row has a label{extra}; needed: {needed}")
    corpus = dataclasses.replace(corpus, notes=(*corpus.notes, *notes))
    config = CorpusConfig(name=name)
    return _write(options, Manifest, corpus, dataset, config, str(path), reference_scores)


def _prepare_emobox(options: PrepareOptions) -> dict[str, Any]:
    assert options.source is not None
    path = pathlib.Path(options.source).expanduser()
    name = options.name or _dataset_name(
        path.with_name(emobox.dataset_name(path, options.fold)), "emobox"
    )
    dataset = f"emobox/{name}"
    _check_not_existing(dataset, options)
    corpus = emobox.read_emobox(
        path,
        audio_root=None if options.audio_root is None else pathlib.Path(options.audio_root),
        fold=options.fold,
        seed=options.seed,
        label_map=options.label_map,
    )
    return _write(options, emobox.Emobox, corpus, dataset, CorpusConfig(name=name), str(path))


def _dataset_name(manifest: pathlib.Path, corpus: str = "manifest") -> str:
    """Makes a dataset name from a manifest's file name."""
    name = manifest.stem.lower().replace("-", "_").replace(" ", "_")
    try:
        dataset_directory(f"{corpus}/{name}", None)
    except InputError as error:
        raise InputError(f"{manifest}: {error}; --name=NAME sets another name") from error
    return name


def _prepare_synthetic(options: PrepareOptions) -> dict[str, Any]:
    name = options.name or "synthetic"
    _check_not_existing(f"manifest/{name}", options)
    folder = options.source
    if folder is None:
        folder = dataset_directory(name, options.data_dir).parent.parent / f"{name}_recordings"
    notes: list[str] = []
    manifest = write_speech_corpus(
        folder,
        seed=options.seed,
        num_dialogues=options.num_dialogues or DEFAULT_NUM_DIALOGUES,
        num_workers=options.decoding.num_workers,
        overwrite=options.overwrite,
        log=notes.append,
    )
    scores = json.loads((manifest.parent / SCORES).read_text())
    options = dataclasses.replace(options, source=manifest, name=name)
    return _prepare_manifest(options, notes, reference_scores=scores)


def _check_not_existing(dataset: str, options: PrepareOptions) -> None:
    """Raises InputError if the dataset exists and must not be replaced."""
    recover(dataset, options.data_dir)
    directory = dataset_directory(dataset, options.data_dir)
    if directory.exists() and not options.overwrite:
        # The names of released corpora are fixed.
        other = "--data_dir" if options.corpus in CORPORA else "--name"
        raise InputError(f"{directory}: dataset exists; allowed: --overwrite, or another {other}")


def _write(
    options: PrepareOptions,
    builder_type: type[DialogueBuilder],
    corpus: Corpus,
    dataset: str,
    config: CorpusConfig | str,
    source: str,
    reference_scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a corpus to a dataset and returns the report."""
    decoding = options.decoding
    tfds_options: dict[str, Any] = {}
    if decoding.beam:
        with silence_tfds():
            tfds_options["beam_options"] = _parse_beam_options(options.beam_options)
    if not options.partial:
        _check_files(corpus)
    num_utterances = sum(1 for _ in corpus.utterances())
    with (
        atomic_dataset(dataset, options.data_dir, overwrite=options.overwrite) as temporary,
        ProgressReporter(num_utterances, unit="utterances", quiet=decoding.beam) as reporter,
        silence_tfds(),
    ):
        facts_dir = temporary / "facts"
        for split in corpus.splits:
            (facts_dir / split).mkdir(parents=True)
        builder = builder_type(
            corpus=corpus,
            decoding=decoding,
            on_utterance=functools.partial(reporter.advance, "decoding"),
            facts_dir=facts_dir,
            config=config,
            data_dir=temporary,
        )
        download_config = tfds.download.DownloadConfig(**tfds_options)
        with _limit_sort_memory():
            builder.download_and_prepare(download_config=download_config, download_dir=temporary)
        report = make_report(corpus, facts_dir)
        if not options.partial:
            _check_decoded(corpus, report)
        directory = str(dataset_directory(dataset, options.data_dir))
        report = {"dataset": dataset, "directory": directory, "source": source, **report}
        if reference_scores:
            report["reference_scores"] = dict(reference_scores)
        write_json(epath.Path(builder.data_dir) / REPORT, report)
    return report


def _parse_beam_options(options: Mapping[str, Any]) -> Any:
    """Checks and returns Beam's pipeline options. Beam itself ignores unknown options."""
    try:
        import apache_beam  # noqa: F401
        from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
        from apache_beam.runners import runner
    except ImportError as error:
        raise InputError(
            f"--beam_options needs Apache Beam ({error}); install it with pip install "
            '"mister_jax[beam]"'
        ) from error
    pipeline_options = PipelineOptions.from_dictionary(dict(options))
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            allowed = pipeline_options.get_all_options()
    except SystemExit as error:  # Raised by argparse.
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


@contextlib.contextmanager
def _limit_sort_memory() -> Iterator[None]:
    """Reduces TFDS's sort buffer, so that large corpora are sorted on disk and not in memory.

    TFDS has no option for the size of this 1 GB buffer, so this function patches TFDS's constant.
    """
    default = shuffle.MAX_MEM_BUFFER_SIZE
    shuffle.MAX_MEM_BUFFER_SIZE = _MAX_SORT_BYTES
    try:
        yield
    finally:
        shuffle.MAX_MEM_BUFFER_SIZE = default


def _check_files(corpus: Corpus) -> None:
    """Raises InputError if too many recordings in a split are missing or empty."""

    @functools.cache
    def find_problem(path: str) -> str:
        # A path that raises ValueError or OSError counts as missing. The decoder reports the error.
        with contextlib.suppress(OSError, ValueError):
            if epath.Path(existing_path(path)).stat().length > 0:
                return ""
        return path

    _check_usable(corpus, "are missing or empty", lambda _, path: find_problem(path))


def _check_decoded(corpus: Corpus, report: Mapping[str, Any]) -> None:
    """Raises InputError if too many recordings in a split could not be decoded."""
    problems = {
        entry["utterance"]: f"{entry['file']}: {entry['reason']}" for entry in report["missing"]
    }
    _check_usable(corpus, "cannot be used", lambda utterance, _: problems.get(utterance, ""))


def _check_usable(corpus: Corpus, what: str, find_problem: Callable[[str, str], str]) -> None:
    """Raises InputError if too many recordings in a split are unusable.

    `what` describes the problem in the message. `find_problem` returns the problem for an
    utterance id and a path, or "" for a usable recording.
    """
    for split, dialogues in corpus.splits.items():
        problems = [
            find_problem(utterance.id, source_name(utterance.recording.source))
            for dialogue in dialogues
            for utterance in dialogue.utterances
            if utterance.recording is not None
        ]
        unusable = [problem for problem in problems if problem]
        if _UNUSABLE_LIMIT * len(unusable) > len(problems):
            raise InputError(
                f"{corpus.name}: {split}: {len(unusable)} of {len(problems)} recordings {what}, "
                f"for example {unusable[0]}; --partial allows it"
            )
