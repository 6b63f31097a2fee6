"""Prepares a dataset from a corpus, a manifest or feature files, or shows a dataset's contents.

mister-jax prepare --corpus=meld --source=MELD.Raw --data_dir=DIR [--config=text]
mister-jax prepare --corpus=iemocap --source=IEMOCAP_full_release --config=six_session1
mister-jax prepare --corpus=mosi --source=CMU-MOSI
mister-jax prepare --corpus=mosei --source=CMU-MOSEI
mister-jax prepare --corpus=emorynlp --source=emotion-detection
mister-jax prepare --corpus=emobox --source=EmoBox/data/urdu --audio_root=URDU-Dataset --fold=1
mister-jax prepare --corpus=folder --source=wav --pattern=emodb
mister-jax prepare --corpus=folder --source=wav --pattern={speaker}_{emotion}_{sentence}.wav
mister-jax prepare --corpus=manifest --source=my.jsonl --name=my_calls --labels=calm,angry
mister-jax prepare --corpus=transcripts --source=FOLDER --label_tier=emotion
mister-jax prepare --corpus=synthetic                # synthetic recordings and transcripts
mister-jax prepare --corpus=features --source=features.npz --name=my_features
mister-jax prepare --corpus=features --source=IEMOCAP_features.pkl --name=my_features
mister-jax prepare --corpus=synthetic_features
mister-jax prepare --inspect=meld/text               # writes a figure, shows the first dialogue
mister-jax prepare --inspect=IEMOCAP_features.pkl    # shows the fields of a feature file
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from absl import flags

from mister_jax.data.corpora.registry import CORPORA
from mister_jax.data.schema import SPLITS
from mister_jax.data.transcripts.utterances import UtteranceRules
from mister_jax.errors import InputError

if TYPE_CHECKING:
    from rich.table import Table

    from mister_jax.data.feature_files import FeatureFileSummary
    from mister_jax.data.prepare import PrepareOptions

_DECODING_FLAGS = ("num_workers", "max_seconds", "beam_options", "partial", "overwrite", "data_dir")
_RELEASED_FLAGS = ("source", "config", *_DECODING_FLAGS)
CORPUS_FLAGS = {
    **dict.fromkeys(CORPORA, _RELEASED_FLAGS),
    "manifest": ("source", "name", "labels", "map_labels", "group_by", "seed", *_DECODING_FLAGS),
    "transcripts": (
        *("source", "name", "labels", "map_labels", "group_by", "seed", "tier", "label_tier"),
        *("label_column", "label_suffix", "audio_channel"),
        *("join_gap", "utterance_seconds", *_DECODING_FLAGS),
    ),
    "folder": (
        *("source", "pattern", "name", "labels", "map_labels", "group_by", "seed"),
        *_DECODING_FLAGS,
    ),
    "emobox": ("source", "audio_root", "fold", "name", "map_labels", "seed", *_DECODING_FLAGS),
    "synthetic": ("source", "name", "seed", "num_dialogues", *_DECODING_FLAGS),
    "features": (
        *("source", "name", "fields", "labels", "group_by", "seed", "overwrite", "data_dir"),
    ),
    "synthetic_features": ("name", "seed", "num_dialogues", "overwrite", "data_dir"),
}
"""Flags that each corpus allows."""

_CORPUS = flags.DEFINE_string("corpus", None, f"one of {', '.join(CORPUS_FLAGS)}")
_SOURCE = flags.DEFINE_string("source", None, "corpus folder, manifest, or file of features")
_CONFIG = flags.DEFINE_string("config", "", "config of a released corpus; by default the first")
_NAME = flags.DEFINE_string("name", "", "name of the dataset to write")
_LABELS = flags.DEFINE_list(
    "labels", [], "ordered class names of a manifest, or of the label indices in a feature file"
)
_FIELDS = flags.DEFINE_list(
    "fields", [], "fields of a feature file to use, ROLE=FIELD,... such as text=3,speech=4"
)
_MAP_LABELS = flags.DEFINE_list(
    "map_labels", [], "new class names for a manifest, OLD=NEW,...; OLD= removes the label"
)
_GROUP_BY = flags.DEFINE_string(
    "group_by",
    "",
    "keep rows with equal values in this column in one random split; by default speaker",
)
_PATTERN = flags.DEFINE_string(
    "pattern", "", "pattern of the paths in a folder, such as {speaker}_{emotion}.wav, or a preset"
)
_AUDIO_ROOT = flags.DEFINE_string(
    "audio_root", None, "folder of EmoBox's recordings; by default EmoBox/downloads"
)
_FOLD = flags.DEFINE_integer("fold", None, "fold of EmoBox; by default the first", lower_bound=1)
_TIER = flags.DEFINE_string("tier", None, "tiers of the transcripts to read, separated by commas")
_LABEL_TIER = flags.DEFINE_string("label_tier", None, "tier with the emotions in transcripts")
_LABEL_COLUMN = flags.DEFINE_string("label_column", None, "column with the emotions in transcripts")
_LABEL_SUFFIX = flags.DEFINE_bool(
    "label_suffix", False, "read emotions from the end of transcript texts, such as [happy]"
)
_CHANNEL = flags.DEFINE_string(
    "audio_channel",
    "mix",
    "channel of transcribed recordings: mix, left, right, an index, or split",
)
_JOIN_GAP = flags.DEFINE_float(
    "join_gap",
    UtteranceRules.join_gap,
    "join segments of a sentence if the silence between them is shorter, in seconds; 0 joins none",
    lower_bound=0,
)
_UTTERANCE_SECONDS = flags.DEFINE_float(
    "utterance_seconds",
    UtteranceRules.utterance_seconds,
    "longest utterance in seconds that joining may create",
    lower_bound=1,
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "directory of the datasets; by default TFDS's")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an existing dataset")
_PARTIAL = flags.DEFINE_bool("partial", False, "allow an incomplete corpus")
_SEED = flags.DEFINE_integer(
    "seed", 0, "seed for synthetic corpora and random splits", lower_bound=0
)
_NUM_DIALOGUES = flags.DEFINE_list(
    "num_dialogues", [], "dialogues in a synthetic corpus: train,validation,test"
)
_WORKERS = flags.DEFINE_integer("num_workers", 2, "processes that decode recordings", lower_bound=0)
_SECONDS = flags.DEFINE_float(
    "max_seconds", 60, "maximum seconds to keep per utterance", lower_bound=0.1
)
_BEAM_OPTIONS = flags.DEFINE_string(
    "beam_options", None, "JSON object of Apache Beam options; decodes with Beam"
)
_INSPECT = flags.DEFINE_string(
    "inspect", None, "name of a dataset, or a feature file, whose contents to show"
)

_MAX_PRINTED = 5  # maximum number of recordings to print for each kind of issue


def main() -> None:
    """Runs `mister-jax prepare`."""
    if _INSPECT.value is not None:
        return _inspect(_INSPECT.value)
    corpus = _CORPUS.value or ""
    if corpus not in CORPUS_FLAGS:
        raise InputError(f"--corpus={corpus}; allowed: {', '.join(CORPUS_FLAGS)}")
    _check_flags(f"--corpus={corpus}", ("corpus", *CORPUS_FLAGS[corpus]))
    if corpus in ("features", "synthetic_features"):
        return _prepare_features(corpus)
    return _prepare_recordings(corpus)


def _prepare_recordings(corpus: str) -> None:
    preparation = _preparation(corpus)
    from mister_jax.console import corpus_table, output_console
    from mister_jax.data.corpus_report import RECORDING_ISSUES
    from mister_jax.data.prepare import prepare_corpus

    report = prepare_corpus(preparation)
    output_console().print(corpus_table(report))
    kinds = ["missing", *RECORDING_ISSUES]
    if corpus == "synthetic":
        kinds.remove("fast_text")  # Synthetic speech has random lengths.
    for kind in kinds:
        for entry in report[kind][:_MAX_PRINTED]:
            print(f"{kind}: {entry['utterance']}: {entry['file']}: {_detail(entry)}")
        if len(report[kind]) > _MAX_PRINTED:
            print(f"{kind}: {len(report[kind])} in all, see report.json")
    _print_notes(report["notes"])
    _print_missing_splits(name for name, it in report["splits"].items() if it["utterances"])
    counts = ", ".join(f"{len(report[kind])} {kind}" for kind in kinds if report[kind])
    if not counts:
        has_recordings = any(
            split["utterances"] > split["without_speech"] for split in report["splits"].values()
        )
        counts = "all usable, none changed" if has_recordings else "none"
        if corpus == "manifest" and not has_recordings:
            counts += "; the manifest has no paths of recordings in the column audio"
    print(f"recordings: {counts}")
    print(f"written to {report['directory']}")


def _prepare_features(corpus: str) -> None:
    num_dialogues = _num_dialogues()
    from mister_jax import data
    from mister_jax.console import comparison_table, output_console
    from mister_jax.data.synthetic import DEFAULT_NUM_DIALOGUES

    if corpus == "synthetic_features":
        splits = data.generate_features(_SEED.value, num_dialogues or DEFAULT_NUM_DIALOGUES)
    elif _SOURCE.value:
        splits = data.read_features(
            _feature_files(_SOURCE.value),
            group_by=_GROUP_BY.value,
            seed=_SEED.value,
            fields=_fields(),
            labels=_LABELS.value,
        )
    else:
        raise InputError(
            "--source is needed with --corpus=features: an npz file, or a file of another project"
        )
    name = _NAME.value or corpus
    builder = data.write_features(splits, name, _DATA_DIR.value, overwrite=_OVERWRITE.value)
    summaries = {split: features.summary() for split, features in splits.items()}
    output_console().print(comparison_table(name, summaries))
    _print_notes(next(iter(splits.values())).metadata.get("notes", ()))
    _print_missing_splits(splits)
    print(f"written to {builder.data_dir}")


def _inspect(name: str) -> None:
    from mister_jax.data.feature_files import is_feature_file

    is_file = is_feature_file(_feature_files(name)[0])
    allowed = ("fields", "labels", "seed") if is_file else ("data_dir",)
    _check_flags(f"--inspect={name}", ("inspect", *allowed))
    return _inspect_file(name) if is_file else _inspect_dataset(name)


def _inspect_file(path: str) -> None:
    from mister_jax.console import comparison_table, output_console
    from mister_jax.data.feature_files import summarize_file

    files = _feature_files(path)
    summary = summarize_file(files, seed=_SEED.value, fields=_fields(), labels=_LABELS.value)
    output_console().print(_field_table(summary))
    if summary.problem:
        raise InputError(summary.problem)
    output_console().print(comparison_table("splits", summary.splits))
    _print_notes(summary.notes)


def _field_table(summary: FeatureFileSummary) -> Table:
    import rich.box
    from rich.markup import escape
    from rich.table import Table

    columns = ("field", "holds", "count", "dim", "first", "used as")
    table = Table(*columns, title=escape(f"layout: {summary.layout}"), box=rich.box.SIMPLE)
    for row in summary.fields:
        table.add_row(*map(escape, row))
    return table


def _inspect_dataset(name: str) -> None:
    from mister_jax.data.inspection import inspect_dataset
    from mister_jax.evaluation.figures import plot_dataset

    inspection = inspect_dataset(name, _DATA_DIR.value)
    figure = inspection.directory / "inspection.png"
    plot_dataset(inspection.class_counts, inspection.lengths, inspection.seconds, figure)
    print(f"first dialogue of {inspection.name}:")
    for line in inspection.first_dialogue:
        print(f"  {line}")
    print(f"picture: {figure}")


def _detail(entry: Mapping[str, Any]) -> str:
    """Formats a recording's entry in the report as one line."""
    if "reason" in entry:
        return str(entry["reason"])
    detail = f"{entry['seconds']:.1f} s"
    if "annotated_seconds" in entry:
        detail += f", annotated {entry['annotated_seconds']:.1f} s"
    if "characters" in entry:
        detail += f", text of {entry['characters']} characters"
    return ", ".join([detail, *entry.get("changed", ())])


def _print_notes(notes: Sequence[str]) -> None:
    for note in notes:
        print(note if note.startswith("WARNING") else f"note: {note}")


def _print_missing_splits(splits: Iterable[str]) -> None:
    found = set(splits)
    missing = [name for name in SPLITS if name not in found]
    if missing:
        print(
            f"WARNING: no utterances in {' and '.join(missing)}; training needs the splits train "
            "and validation, or folds (see mister-jax crossval)"
        )


def _check_flags(use: str, allowed: Sequence[str]) -> None:
    """Raises InputError if a flag is set that is not allowed with the flag in `use`."""
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        if flag.present and flag.name not in allowed:
            names = ", ".join(f"--{name}" for name in allowed)
            raise InputError(f"--{flag.name} cannot be used with {use}; allowed: {names}")


def _preparation(corpus: str) -> PrepareOptions:
    from mister_jax.data.builder import DecodingOptions
    from mister_jax.data.corpora.transcripts import TranscriptOptions
    from mister_jax.data.prepare import PrepareOptions

    return PrepareOptions(
        corpus=corpus,
        source=_SOURCE.value,
        data_dir=_DATA_DIR.value,
        config=_CONFIG.value,
        name=_NAME.value,
        labels=tuple(_LABELS.value),
        label_map=_label_map(),
        group_by=_GROUP_BY.value,
        pattern=_PATTERN.value,
        audio_root=_AUDIO_ROOT.value,
        fold=_FOLD.value,
        seed=_SEED.value,
        num_dialogues=_num_dialogues(),
        decoding=DecodingOptions(_WORKERS.value, _SECONDS.value, _BEAM_OPTIONS.value is not None),
        beam_options=_beam_options(_BEAM_OPTIONS.value or "{}"),
        transcripts=TranscriptOptions(
            _TIER.value,
            _LABEL_TIER.value,
            _LABEL_COLUMN.value,
            _LABEL_SUFFIX.value,
            _CHANNEL.value,
            UtteranceRules(join_gap=_JOIN_GAP.value, utterance_seconds=_UTTERANCE_SECONDS.value),
        ),
        partial=_PARTIAL.value,
        overwrite=_OVERWRITE.value,
    )


def _num_dialogues() -> dict[str, int]:
    """Returns the number of dialogues by split, or an empty dict if the flag is not set."""
    counts = _NUM_DIALOGUES.value
    if len(counts) not in (0, 3) or not all(map(str.isdecimal, counts)):
        raise InputError(f"--num_dialogues={','.join(counts)}; allowed: three numbers")
    from mister_jax.data import SPLITS

    return {split: int(count) for split, count in zip(SPLITS, counts, strict=False)}


def _feature_files(value: str) -> list[str]:
    """Returns the paths in a flag's value, which may be a comma-separated list."""
    return [value] if pathlib.Path(value).exists() else value.split(",")


def _fields() -> dict[str, str]:
    pairs = [pair.partition("=") for pair in _FIELDS.value]
    for role, equals, _ in pairs:
        if not role or not equals:
            raise InputError(f"--fields={','.join(_FIELDS.value)}; allowed: ROLE=FIELD,...")
    return {role.strip(): key.strip() for role, _, key in pairs}


def _label_map() -> dict[str, str]:
    pairs = [pair.partition("=") for pair in _MAP_LABELS.value]
    for old, equals, _ in pairs:
        if not old or not equals:
            raise InputError(f"--map_labels={','.join(_MAP_LABELS.value)}; allowed: OLD=NEW,...")
    return {old.strip(): new.strip() for old, _, new in pairs}


def _beam_options(text: str) -> dict[str, object]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise InputError(
            f'--beam_options={text}; allowed: a JSON object, such as {{"runner": "direct"}}'
        )
    return options
