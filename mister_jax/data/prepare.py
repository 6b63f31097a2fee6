"""Prepares a corpus as a dialogue dataset, the stage that `mister-jax prepare` runs."""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mister_jax.data.builder import DecodingOptions
from mister_jax.data.corpora.manifest import reader as manifest_reader
from mister_jax.data.corpora.manifest.builder import Manifest, ManifestConfig
from mister_jax.data.corpora.registry import CORPORA, builder_class
from mister_jax.data.corpus import Corpus
from mister_jax.data.corpus_writer import write_corpus
from mister_jax.data.lazy import tfds
from mister_jax.data.storage import dataset_directory, recover, silence_tfds
from mister_jax.data.synthetic_speech import DEFAULT_NUM_DIALOGUES, SCORES, write_speech_corpus
from mister_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class PrepareOptions:
    """Corpus to prepare, and options.

    Attributes:
        corpus: Name of the corpus: one of `registry.CORPORA`, "manifest" or "synthetic".
        source: Folder of the corpus, or path of the manifest; for "synthetic" the folder to write
            the recordings to. If None, "meld" with the config "text" is downloaded, and "synthetic"
            writes to a folder next to the dataset.
        data_dir: Directory of all datasets; the default of TFDS if None.
        config: Config of the corpus; its first config if empty.
        name: Name of a manifest's dataset `manifest/NAME`; the name of the file if empty.
        labels: Class names of a manifest in their order; the sorted names in the file if empty.
        label_map: Map from names in a manifest to class names, see `read_manifest`.
        group_by: Column of a manifest whose values random splits keep apart.
        seed: Seed of a manifest's random split, and of the synthetic corpus.
        num_dialogues: Number of dialogues of the synthetic corpus by split; its default if empty.
        decoding: Options for decoding recordings.
        beam_options: Options of the Beam pipeline.
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
    seed: int = 0
    num_dialogues: Mapping[str, int] = dataclasses.field(default_factory=dict)
    decoding: DecodingOptions = dataclasses.field(default_factory=DecodingOptions)
    beam_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    partial: bool = False
    overwrite: bool = False


def prepare_corpus(options: PrepareOptions) -> dict[str, Any]:
    """Reads and checks a corpus, then writes it as a dataset.

    Returns:
        The report, see `corpus_report.make_report`.

    Raises:
        InputError: The input cannot be used; no partial dataset remains.
    """
    if options.corpus in CORPORA:
        return _prepare_released(options)
    if options.corpus not in ("manifest", "synthetic"):
        allowed = ", ".join((*CORPORA, "manifest", "synthetic"))
        raise InputError(f"corpus {options.corpus!r}; allowed: {allowed}")
    if options.config:
        raise InputError(f"{options.corpus} has no configs, got {options.config!r}")
    if options.corpus == "synthetic":
        return _prepare_synthetic(options)
    if options.source is None:
        raise InputError("--source is needed with --corpus=manifest: a .jsonl or .csv file")
    return _prepare_manifest(options)


def read_released(
    corpus: str, source: epath.PathLike | None, config: str = "", *, partial: bool = False
) -> Corpus:
    """Reads and checks a released corpus without decoding recordings.

    Args:
        corpus: Name of the corpus, one of `registry.CORPORA`.
        source: Folder of the corpus.
        config: Config of the corpus; its first config if empty.
        partial: Whether to allow an incomplete corpus.

    Raises:
        InputError: The corpus cannot be used.
    """
    builder = builder_class(corpus)(config=_config_name(corpus, config))
    if source is None:
        instructions = " ".join((builder.MANUAL_DOWNLOAD_INSTRUCTIONS or "").split())
        raise InputError(f"--source is needed with --corpus={corpus}. {instructions}")
    return builder.read(pathlib.Path(source), partial=partial)


def _config_name(corpus: str, config: str) -> str:
    names = [variant.name for variant in builder_class(corpus).BUILDER_CONFIGS]
    name = config or names[0]
    if name not in names:
        raise InputError(f"config {name!r} of {corpus}; allowed: {', '.join(names)}")
    return name


def _prepare_released(options: PrepareOptions) -> dict[str, Any]:
    name = _config_name(options.corpus, options.config)
    dataset = f"{options.corpus}/{name}"
    _check_not_existing(dataset, options)
    source = options.source
    if source is None:
        source = _download(options, name)
    corpus = read_released(options.corpus, source, name, partial=options.partial)
    write = _corpus_writer(options)
    return write(
        builder_class(options.corpus), corpus, dataset, config=name, source=str(source or "")
    )


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
    corpus = manifest_reader.read_manifest(
        path,
        labels=options.labels,
        label_map=options.label_map,
        group_by=options.group_by,
        seed=options.seed,
    )
    if not corpus.class_names:
        columns = dict.fromkeys(name for _, turn in corpus.utterances() for name in turn.metadata)
        extra = f" (extra columns: {', '.join(columns)})" if columns else ""
        raise InputError(
            f"{path}: label: no row has one{extra}; needed: a column label, or --labels=A,B,..."
        )
    corpus = dataclasses.replace(corpus, notes=(*corpus.notes, *notes))
    config = ManifestConfig(
        name=name,
        file=path.name,
        labels=corpus.class_names,
        label_map=tuple(options.label_map.items()),
        scored=corpus.scored,
        group_by=options.group_by,
        seed=options.seed,
    )
    write = _corpus_writer(options)
    return write(
        Manifest,
        corpus,
        dataset,
        config=config,
        source=str(path),
        reference_scores=reference_scores,
    )


def _dataset_name(manifest: pathlib.Path) -> str:
    """Returns the name of a manifest file as a dataset name."""
    name = manifest.stem.lower().replace("-", "_").replace(" ", "_")
    try:
        dataset_directory(f"manifest/{name}", None)
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


def _corpus_writer(options: PrepareOptions) -> functools.partial[dict[str, Any]]:
    """Returns `write_corpus` with the options that all corpora share."""
    return functools.partial(
        write_corpus,
        data_dir=options.data_dir,
        decoding=options.decoding,
        beam_options=options.beam_options,
        partial=options.partial,
        overwrite=options.overwrite,
    )


def _check_not_existing(dataset: str, options: PrepareOptions) -> None:
    """Raises InputError if the dataset exists, before its corpus is read."""
    recover(dataset, options.data_dir)
    directory = dataset_directory(dataset, options.data_dir)
    if directory.exists() and not options.overwrite:
        # The names of released corpora are fixed.
        other = "--data_dir" if options.corpus in CORPORA else "--name"
        raise InputError(f"{directory}: dataset exists; allowed: --overwrite, or another {other}")


def _download(options: PrepareOptions, config: str) -> pathlib.Path | None:
    """Downloads a corpus and returns its folder, or None if users must obtain it."""
    root = dataset_directory(options.corpus, options.data_dir).parent.parent
    manager = tfds.download.DownloadManager(
        download_dir=root / "downloads", dataset_name=options.corpus, register_checksums=False
    )
    with silence_tfds():
        return builder_class(options.corpus)(config=config).download(manager)
