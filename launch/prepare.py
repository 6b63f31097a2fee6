"""Writes a corpus as a TFDS dataset, and tells what a dataset holds.

python -m launch.prepare --corpus=meld --source=MELD.Raw --data_dir=DIR [--config=text]
python -m launch.prepare --corpus=iemocap --source=IEMOCAP_full_release --config=six_session1
python -m launch.prepare --corpus=mosi --source=CMU-MOSI
python -m launch.prepare --corpus=manifest --source=my.jsonl --name=my_calls --labels=calm,angry
python -m launch.prepare --corpus=synthetic                # recordings and transcripts made up
python -m launch.prepare --corpus=features --source=features.npz --name=my_features
python -m launch.prepare --corpus=synthetic_features
python -m launch.prepare --inspect=meld/text               # a picture, and the first dialogue
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from rich.console import Console

from launch import run
from mister_jax import console as tables
from mister_jax import data
from mister_jax.data.builder import KINDS, Decoding
from mister_jax.data.inspection import inspect
from mister_jax.data.prepare import CORPORA, Preparation, prepare_corpus
from mister_jax.data.synthetic import DEFAULT_NUM_DIALOGUES
from mister_jax.errors import InputError
from mister_jax.evaluation import figures

FEATURES = ("features", "synthetic_features")

_DECODING = ("num_workers", "max_seconds", "beam_options", "partial", "overwrite", "data_dir")
_RELEASED = ("source", "config", *_DECODING)
_FLAGS = {
    "iemocap": _RELEASED,
    "meld": _RELEASED,
    "mosi": _RELEASED,
    "manifest": ("source", "name", "labels", "map_labels", "group_by", "seed", *_DECODING),
    "synthetic": ("source", "name", "seed", "num_dialogues", *_DECODING),
    "features": ("source", "name", "group_by", "seed", "overwrite", "data_dir"),
    "synthetic_features": ("name", "seed", "num_dialogues", "overwrite", "data_dir"),
}
"""Flags that go with a corpus; another would change nothing."""

_CORPUS = flags.DEFINE_string("corpus", None, f"one of {', '.join((*CORPORA, *FEATURES))}")
_SOURCE = flags.DEFINE_string("source", None, "folder of the corpus, manifest, or npz of features")
_CONFIG = flags.DEFINE_string("config", "", "of iemocap, meld, mosi; their first one by default")
_NAME = flags.DEFINE_string("name", "", "of the dataset of a manifest or of features")
_LABELS = flags.DEFINE_list("labels", [], "class names of a manifest, in their order")
_MAP_LABELS = flags.DEFINE_list(
    "map_labels", [], "OLD=NEW,... class names of a manifest; OLD= makes its rows unlabeled"
)
_GROUP_BY = flags.DEFINE_string(
    "group_by", "", "column whose values random splits keep apart; speaker by default"
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where datasets are kept; TFDS's own by default")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace a dataset of this name")
_PARTIAL = flags.DEFINE_bool("partial", False, "allow a part of a corpus")
_SEED = flags.DEFINE_integer("seed", 0, "of synthetic corpora and random splits", lower_bound=0)
_DIALOGUES = flags.DEFINE_list("num_dialogues", [], "of synthetic corpora: train,validation,test")
_WORKERS = flags.DEFINE_integer("num_workers", 2, "processes that decode recordings", lower_bound=0)
_SECONDS = flags.DEFINE_float("max_seconds", 60, "of an utterance that are kept", lower_bound=0.1)
_BEAM = flags.DEFINE_string("beam_options", None, "JSON of Apache Beam options: decode there")
_INSPECT = flags.DEFINE_string("inspect", None, "tell what the dataset of this name holds")


def main() -> None:
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if _INSPECT.value is not None:
        _check_flags(f"--inspect={_INSPECT.value}", ("inspect", "data_dir"))
        return _inspect(console)
    if _CORPUS.value not in (*CORPORA, *FEATURES):
        allowed = ", ".join((*CORPORA, *FEATURES))
        raise InputError(f"--corpus={_CORPUS.value or ''}; allowed: {allowed}")
    _check_flags(f"--corpus={_CORPUS.value}", ("corpus", *_FLAGS[_CORPUS.value]))
    if _CORPUS.value in FEATURES:
        return _prepare_features(_CORPUS.value, console)
    report = prepare_corpus(_preparation())
    console.print(tables.corpus_table(report))
    kinds = ("missing", *KINDS)
    for kind in kinds:
        for entry in report[kind][:5]:
            console.print(f"{kind}: {entry['utterance']}: {entry['file']}: {_detail(entry)}")
        if len(report[kind]) > 5:
            console.print(f"{kind}: {len(report[kind])} in all, see report.json")
    _print_notes(report["notes"], console)
    counts = ", ".join(f"{len(report[kind])} {kind}" for kind in kinds if report[kind])
    console.print(f"recordings: {counts or 'all usable, none changed'}")
    console.print(f"written to {report['directory']}")


def _detail(entry: Mapping[str, Any]) -> str:
    """Returns what a report says of a recording, in one line."""
    if "reason" in entry:
        return str(entry["reason"])
    detail = f"{entry['seconds']:.1f} s"
    if "annotated_seconds" in entry:
        detail += f", annotated {entry['annotated_seconds']:.1f} s"
    return ", ".join([detail, *entry.get("changed", ())])


def _print_notes(notes: Sequence[str], console: Console) -> None:
    for note in notes:
        console.print(note if note.startswith("WARNING") else f"note: {note}")


def _check_flags(use: str, allowed: Sequence[str]) -> None:
    for flag in flags.FLAGS.get_key_flags_for_module(__name__):
        if flag.present and flag.name not in allowed:
            names = ", ".join(f"--{name}" for name in allowed)
            raise InputError(f"--{flag.name} does not go with {use}; allowed: {names}")


def _num_dialogues() -> dict[str, int]:
    """Dialogues by split; empty where the flag is not given."""
    splits = dict(zip(data.SPLITS, _DIALOGUES.value, strict=False))
    if len(_DIALOGUES.value) not in (0, 3) or not all(map(str.isdecimal, splits.values())):
        raise InputError(f"--num_dialogues={','.join(_DIALOGUES.value)}; allowed: three numbers")
    return {split: int(count) for split, count in splits.items()}


def _label_map() -> dict[str, str]:
    pairs = [pair.partition("=") for pair in _MAP_LABELS.value]
    for old, equals, _ in pairs:
        if not old or not equals:
            raise InputError(f"--map_labels={','.join(_MAP_LABELS.value)}; allowed: OLD=NEW,...")
    return {old.strip(): new.strip() for old, _, new in pairs}


def _preparation() -> Preparation:
    return Preparation(
        corpus=_CORPUS.value or "",
        source=_SOURCE.value,
        data_dir=_DATA_DIR.value,
        config=_CONFIG.value,
        name=_NAME.value,
        labels=tuple(_LABELS.value),
        label_map=_label_map(),
        group_by=_GROUP_BY.value,
        seed=_SEED.value,
        num_dialogues=_num_dialogues(),
        decoding=Decoding(_WORKERS.value, _SECONDS.value, _BEAM.value is not None),
        beam_options=_beam_options(_BEAM.value or "{}"),
        partial=_PARTIAL.value,
        overwrite=_OVERWRITE.value,
    )


def _beam_options(text: str) -> dict[str, object]:
    try:
        options = json.loads(text)
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise InputError(f'--beam_options={text}; allowed: an object, as {{"runner": "direct"}}')
    return options


def _prepare_features(corpus: str, console: Console) -> None:
    if corpus == "synthetic_features":
        splits = data.generate(_SEED.value, _num_dialogues() or DEFAULT_NUM_DIALOGUES)
    elif _SOURCE.value:
        splits = data.read_npz(_SOURCE.value, group_by=_GROUP_BY.value, seed=_SEED.value)
    else:
        raise InputError("--source is needed with --corpus=features: an npz file")
    name = _NAME.value or corpus
    builder = data.write(splits, name, _DATA_DIR.value, overwrite=_OVERWRITE.value)
    console.print(tables.comparison_table(name, {split: it.summary() for split, it in splits.items()}))
    _print_notes(next(iter(splits.values())).metadata.get("notes", ()), console)
    console.print(f"written to {builder.data_dir}")


def _inspect(console: Console) -> None:
    seen = inspect(_INSPECT.value or "", _DATA_DIR.value)
    picture = seen.directory / "inspection.png"
    figures.plot_dataset(seen.class_counts, seen.lengths, seen.seconds, picture)
    console.print(f"first dialogue of {seen.name}:")
    for line in seen.first:
        console.print(f"  {line}")
    console.print(f"picture: {picture}")


if __name__ == "__main__":
    run(main)
