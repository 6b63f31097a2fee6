"""Writes a corpus as a dialogue dataset, with checks that enough recordings are usable."""

import contextlib
import functools
import io
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath
from tensorflow_datasets.core import shuffle

from mister_jax.console import ProgressReporter
from mister_jax.data import audio
from mister_jax.data.builder import DecodingOptions, DialogueBuilder
from mister_jax.data.corpus import Corpus
from mister_jax.data.corpus_report import make_report
from mister_jax.data.lazy import tfds
from mister_jax.data.storage import REPORT, atomic_dataset, silence_tfds
from mister_jax.errors import InputError
from mister_jax.io import write_json

_MAX_SORT_BYTES = 64 * 2**20
# At most one in this many recordings may be unusable.
_UNUSABLE_LIMIT = 10


def write_corpus(
    builder_class: type[DialogueBuilder],
    corpus: Corpus,
    name: str,
    data_dir: epath.PathLike | None = None,
    *,
    config: Any = None,
    decoding: DecodingOptions | None = None,
    beam_options: Mapping[str, Any] | None = None,
    source: str = "",
    partial: bool = False,
    overwrite: bool = False,
    reference_scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes a corpus as a dataset, atomically.

    A corpus is rejected as incomplete if more than one in ten recordings of a split cannot be used.
    Corpora have single broken clips as released (2 of MELD's 13,708), which the report lists. More
    than that indicates an interrupted copy, an archive that was not unpacked, or a wrong path.
    Missing and empty files are detected before decoding, broken files after it. In both cases
    nothing is written.

    Args:
        builder_class: Builder of the corpus.
        corpus: Corpus from its reader.
        name: Name of the dataset, `DATASET/CONFIG`.
        data_dir: Directory of all datasets; the default of TFDS if None.
        config: Config of the builder.
        decoding: Options for decoding recordings.
        beam_options: Options of the Beam pipeline if `decoding.beam` is set.
        source: Path that the corpus was read from, for the report.
        partial: Whether to allow any number of unusable recordings.
        overwrite: Whether to replace an existing dataset.
        reference_scores: Scores of known classifiers by split, for a synthetic corpus.

    Returns:
        The report, see `corpus_report.make_report`. It is also written to the dataset's directory.

    Raises:
        InputError: The dataset exists or cannot be written, the corpus is incomplete, or Beam is
            not installed or does not know an option.
    """
    decoding = decoding or DecodingOptions()
    with silence_tfds():
        pipeline_options = _parse_beam_options(beam_options or {}) if decoding.beam else None
    if not partial:
        _check_files(corpus)
    num_utterances = sum(1 for _ in corpus.utterances())
    with (
        atomic_dataset(name, data_dir, overwrite=overwrite) as (temporary, directory),
        ProgressReporter(num_utterances, unit="utterances", quiet=decoding.beam) as reporter,
        silence_tfds(),
    ):
        builder = builder_class(config=config, data_dir=temporary)
        builder.corpus, builder.decoding = corpus, decoding
        builder.on_utterance = functools.partial(reporter.advance, "decoding")
        builder.facts_dir = temporary / "facts"
        for split in corpus.splits:
            (builder.facts_dir / split).mkdir(parents=True)
        options: dict[str, Any] = {"manual_dir": temporary}
        if decoding.beam:
            options["beam_options"] = pipeline_options
        with _limit_sort_memory():
            builder.download_and_prepare(
                download_config=tfds.download.DownloadConfig(**options), download_dir=temporary
            )
        report = make_report(corpus, builder.facts_dir)
        if not partial:
            _check_decoded(corpus, report)
        report = {"dataset": name, "directory": str(directory), "source": source, **report}
        if reference_scores:
            report["reference_scores"] = dict(reference_scores)
        write_json(epath.Path(builder.data_dir) / REPORT, report)
    return report


def _parse_beam_options(options: Mapping[str, Any]) -> Any:
    """Returns the pipeline options of Beam; checks them, because Beam ignores unknown options."""
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
    """Makes TFDS sort examples on disk earlier, so that memory does not grow with the corpus.

    TFDS has no option for the size of this buffer, which is 1 GB, so its constant is replaced.
    """
    default = shuffle.MAX_MEM_BUFFER_SIZE
    shuffle.MAX_MEM_BUFFER_SIZE = _MAX_SORT_BYTES
    try:
        yield
    finally:
        shuffle.MAX_MEM_BUFFER_SIZE = default


def _check_files(corpus: Corpus) -> None:
    """Raises InputError if too many recordings of a split are missing or empty."""
    is_usable: dict[str, bool] = {}
    for split, dialogues in corpus.splits.items():
        paths = [
            utterance.recording.path
            for dialogue in dialogues
            for utterance in dialogue.utterances
            if utterance.recording is not None
        ]
        for path in dict.fromkeys(paths):
            # An impossible path raises ValueError or OSError; the decoder reports it later.
            with contextlib.suppress(OSError, ValueError):
                is_usable[path] = epath.Path(audio.existing_path(path)).stat().length > 0
        unusable = [path for path in paths if not is_usable.get(path, False)]
        if _UNUSABLE_LIMIT * len(unusable) > len(paths):
            raise InputError(
                f"{corpus.name}: {split}: {len(unusable)} of {len(paths)} recordings are missing "
                f"or empty, for example {unusable[0]}; --partial allows it"
            )


def _check_decoded(corpus: Corpus, report: Mapping[str, Any]) -> None:
    """Raises InputError if too many recordings of a split could not be decoded."""
    missing = {entry["utterance"]: entry for entry in report["missing"]}
    for split, dialogues in corpus.splits.items():
        ids = [
            utterance.id
            for dialogue in dialogues
            for utterance in dialogue.utterances
            if utterance.recording is not None
        ]
        unusable = [missing[utterance] for utterance in ids if utterance in missing]
        if _UNUSABLE_LIMIT * len(unusable) > len(ids):
            raise InputError(
                f"{corpus.name}: {split}: {len(unusable)} of {len(ids)} recordings cannot be used, "
                f"for example {unusable[0]['file']}: {unusable[0]['reason']}; --partial allows it"
            )
