"""Turns a corpus on disk into a dataset of dialogues, the stage that `launch.prepare` runs."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from mister_jax.data.builder import Decoding, DialogueBuilder, write_corpus
from mister_jax.data.corpus import Corpus
from mister_jax.data.iemocap.builder import Iemocap
from mister_jax.data.manifest import reader as manifest_reader
from mister_jax.data.manifest.builder import Manifest, ManifestConfig
from mister_jax.data.meld.builder import Meld, download
from mister_jax.data.mosi.builder import Mosi
from mister_jax.data.recordings import DEFAULT_NUM_DIALOGUES, SCORES, write_recordings
from mister_jax.data.storage import dataset_directory, quiet, settle
from mister_jax.errors import InputError

RELEASED: Mapping[str, type[DialogueBuilder]] = {"iemocap": Iemocap, "meld": Meld, "mosi": Mosi}
"""Builders of the released corpora by name."""

CORPORA = (*RELEASED, "manifest", "synthetic")


@dataclasses.dataclass(frozen=True)
class Preparation:
    """Corpus to prepare, and options.

    Attributes:
        corpus: Name of the corpus, one of `CORPORA`.
        source: Folder of the corpus, or the manifest; for `synthetic` the folder to write the
            recordings to. If None, `meld/text` is downloaded, and `synthetic` writes beside the
            dataset.
        data_dir: Directory that holds datasets; that of TFDS if None.
        config: Config of the corpus; its first one if empty.
        name: Name of a manifest's dataset `manifest/NAME`; the name of the file if empty.
        labels: Class names of a manifest in their order; those in the file, sorted, if empty.
        label_map: Names in a manifest to class names, see `manifest.reader.read`.
        group_by: Column of a manifest whose values random splits keep apart.
        seed: Seed of a manifest's random split, and of the synthetic corpus.
        num_dialogues: Numbers of dialogues of the synthetic corpus by split; its default if empty.
        decoding: Options for reading recordings.
        beam_options: Options of the Beam pipeline.
        partial: Allow an incomplete corpus.
        overwrite: Replace a dataset of this name.
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
    decoding: Decoding = dataclasses.field(default_factory=Decoding)
    beam_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    partial: bool = False
    overwrite: bool = False


def prepare_corpus(preparation: Preparation) -> dict[str, Any]:
    """Reads and checks a corpus, then writes it as a dataset.

    Returns:
        The report that `builder.write_corpus` describes.

    Raises:
        InputError: The input cannot be used; nothing is left half-written.
    """
    if preparation.corpus not in CORPORA:
        raise InputError(f"corpus {preparation.corpus!r}; allowed: {', '.join(CORPORA)}")
    if preparation.corpus in RELEASED:
        return _prepare_released(preparation)
    if preparation.config:
        raise InputError(f"{preparation.corpus} has no configs, got {preparation.config!r}")
    if preparation.corpus == "synthetic":
        return _prepare_synthetic(preparation)
    if preparation.source is None:
        raise InputError("--source is needed with --corpus=manifest: a .jsonl or .csv file")
    return _prepare_manifest(preparation)


def read_released(
    corpus: str, source: epath.PathLike | None, config: str = "", *, partial: bool = False
) -> Corpus:
    """Reads and checks a released corpus; decodes nothing.

    Args:
        corpus: Name of the corpus, one of `RELEASED`.
        source: Folder of the corpus.
        config: Config of the corpus; its first one if empty.
        partial: Allow an incomplete corpus.

    Raises:
        InputError: The corpus cannot be used.
    """
    if corpus not in RELEASED:
        raise InputError(f"corpus {corpus!r}; allowed: {', '.join(RELEASED)}")
    builder_class = RELEASED[corpus]
    if source is None:
        instructions = " ".join(builder_class.MANUAL_DOWNLOAD_INSTRUCTIONS.split())
        raise InputError(f"--source is needed with --corpus={corpus}. {instructions}")
    reader = builder_class(config=_config_name(corpus, config))
    return reader.read(pathlib.Path(source), partial=partial)


def _config_name(corpus: str, config: str) -> str:
    names = [variant.name for variant in RELEASED[corpus].BUILDER_CONFIGS]
    name = config or names[0]
    if name not in names:
        raise InputError(f"config {name!r} of {corpus}; allowed: {', '.join(names)}")
    return name


def _prepare_released(preparation: Preparation) -> dict[str, Any]:
    name = _config_name(preparation.corpus, preparation.config)
    dataset = f"{preparation.corpus}/{name}"
    _check_free(dataset, preparation)
    source = preparation.source
    if source is None and dataset == "meld/text":
        source = _downloaded(preparation)
    corpus = read_released(preparation.corpus, source, name, partial=preparation.partial)
    return _write(RELEASED[preparation.corpus], corpus, dataset, name, source or "", preparation)


def _prepare_manifest(
    preparation: Preparation,
    notes: Sequence[str] = (),
    reference_scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    assert preparation.source is not None
    path = pathlib.Path(preparation.source).expanduser()
    name = preparation.name or _name_of(path)
    dataset = f"manifest/{name}"
    _check_free(dataset, preparation)
    corpus = manifest_reader.read(
        path,
        labels=preparation.labels,
        label_map=preparation.label_map,
        group_by=preparation.group_by,
        seed=preparation.seed,
    )
    if not corpus.class_names:
        columns = dict.fromkeys(name for _, turn in corpus.utterances() for name in turn.metadata)
        further = f" (further columns: {', '.join(columns)})" if columns else ""
        raise InputError(
            f"{path}: label: no row has one{further}; needed: a column label, or --labels=A,B,..."
        )
    corpus = dataclasses.replace(corpus, notes=(*corpus.notes, *notes))
    config = ManifestConfig(
        name=name,
        file=path.name,
        labels=corpus.class_names,
        label_map=tuple(preparation.label_map.items()),
        scored=corpus.scored,
        group_by=preparation.group_by,
        seed=preparation.seed,
    )
    return _write(Manifest, corpus, dataset, config, path, preparation, reference_scores)


def _name_of(manifest: pathlib.Path) -> str:
    name = manifest.stem.lower().replace("-", "_").replace(" ", "_")
    try:
        dataset_directory(f"manifest/{name}", None)
    except InputError as error:
        raise InputError(
            f"{manifest}: {error}; --name=NAME gives another than the file's"
        ) from error
    return name


def _prepare_synthetic(preparation: Preparation) -> dict[str, Any]:
    name = preparation.name or "synthetic"
    _check_free(f"manifest/{name}", preparation)
    folder = preparation.source
    if folder is None:
        folder = dataset_directory(name, preparation.data_dir).parent.parent / f"{name}_recordings"
    notes: list[str] = []
    manifest = write_recordings(
        folder,
        seed=preparation.seed,
        num_dialogues=preparation.num_dialogues or DEFAULT_NUM_DIALOGUES,
        num_workers=preparation.decoding.num_workers,
        overwrite=preparation.overwrite,
        tell=notes.append,
    )
    scores = json.loads((manifest.parent / SCORES).read_text())
    return _prepare_manifest(
        dataclasses.replace(preparation, source=manifest, name=name),
        notes,
        reference_scores=scores,
    )


def _write(
    builder_class: type[DialogueBuilder],
    corpus: Any,
    dataset: str,
    config: Any,
    source: epath.PathLike,
    preparation: Preparation,
    reference_scores: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    return write_corpus(
        builder_class,
        corpus,
        dataset,
        preparation.data_dir,
        config=config,
        decoding=preparation.decoding,
        beam_options=preparation.beam_options,
        source=str(source),
        partial=preparation.partial,
        overwrite=preparation.overwrite,
        reference_scores=reference_scores,
    )


def _check_free(dataset: str, preparation: Preparation) -> None:
    """Raises an error before the corpus is read if its dataset exists."""
    settle(dataset, preparation.data_dir)
    directory = dataset_directory(dataset, preparation.data_dir)
    if directory.exists() and not preparation.overwrite:
        # The names of released corpora are fixed.
        other = "--data_dir" if preparation.corpus in RELEASED else "--name"
        raise InputError(f"{directory}: dataset exists; allowed: --overwrite, or another {other}")


def _downloaded(preparation: Preparation) -> pathlib.Path:
    root = dataset_directory("meld", preparation.data_dir).parent.parent
    manager = tfds.download.DownloadManager(
        download_dir=root / "downloads", dataset_name="meld", register_checksums=False
    )
    with quiet():
        return download(manager)
