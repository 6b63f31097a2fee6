r"""Extracts features from a dialogue dataset with an encoder, for training MiSTER-E.

mister-jax extract --workdir=DIR --dataset=meld/text --output=meld_tuned
mister-jax extract --encoder=NAME_OR_FOLDER --dataset=meld/text --output=meld_frozen
mister-jax extract --encoder=NAME_OR_FOLDER --adapter=FOLDER --dataset=meld/text --output=x
mister-jax extract --encoder=salmonn_7b_v0.pth --whisper=openai/whisper-large-v2 \
    --beats=FILE --vicuna=FOLDER --dtype=bfloat16 --dataset=meld/clips --output=meld_salmonn
mister-jax extract --encoder=prosody --dataset=meld/clips --output=meld_prosody
mister-jax extract --speech=meld_prosody --text=meld_tuned --output=meld_both
mister-jax extract --speech=meld_prosody --text=meld_tuned --output=meld_both --output=meld.csv
mister-jax extract --dataset=meld_both --output=meld.npz       # also .csv, .parquet
"""

import pathlib
import re
from collections.abc import Sequence
from typing import Any

from absl import flags

from mister_jax.cli import cluster
from mister_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a fine-tuned encoder")
_ENCODER = flags.DEFINE_string(
    "encoder",
    None,
    "pretrained encoder: prosody, minilm, a folder, or a name on the Hugging Face Hub",
)
_DATASET = flags.DEFINE_string(
    "dataset", None, "dialogue dataset, or a feature dataset to write to files"
)
_SPEECH = flags.DEFINE_string("speech", None, "feature dataset from which to take the speech")
_TEXT = flags.DEFINE_string("text", None, "feature dataset from which to take the text")
_OUTPUT = flags.DEFINE_multi_string(
    "output",
    [],
    "name of the feature dataset to write; repeat the flag to also write files (.npz, .csv, "
    ".parquet)",
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "directory of the datasets; by default TFDS's")
_BUDGET = flags.DEFINE_integer(
    "budget", None, "maximum tokens or seconds of audio per batch and device", lower_bound=1
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an existing dataset")
_ENCODER_OPTIONS = (
    flags.DEFINE_integer(
        "max_tokens", 128, "maximum tokens per utterance for a text --encoder", lower_bound=3
    ),
    flags.DEFINE_float(
        "max_seconds",
        None,
        "maximum seconds per utterance for a speech --encoder; by default 3600, or the fixed "
        "window of Whisper, Qwen2-Audio and SALMONN",
    ),
    flags.DEFINE_bool(
        "windows", False, "split long speech into several windows and average their features"
    ),
    flags.DEFINE_string("whisper", "", "SALMONN's Whisper: a folder or a name on the Hub"),
    flags.DEFINE_string("beats", "", "SALMONN's BEATs: a file"),
    flags.DEFINE_string("vicuna", "", "SALMONN's Vicuna: a folder or a name on the Hub"),
    flags.DEFINE_bool(
        "trim", True, "with Whisper, encode only the length of each clip instead of 30 s"
    ),
    flags.DEFINE_string("prompt", "", "prompt for a speech LLM"),
    flags.DEFINE_string("adapter", None, "folder of a peft adapter for the --encoder"),
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16"], "dtype of the --encoder's computation"
    ),
)
_DATASET_OPTIONS = (_DATASET, _BUDGET)


def _extract() -> None:
    source = _check_flags()
    output, files = _outputs()
    from mister_jax import extraction
    from mister_jax.data.feature_files import check_output_file

    for file in files:
        check_output_file(file, overwrite=_OVERWRITE.value)
    if source == "dataset":
        return _export(_DATASET.value or "", files)
    target: dict[str, Any] = {"data_dir": _DATA_DIR.value, "overwrite": _OVERWRITE.value}
    if source == "speech":
        speech, text = _SPEECH.value or "", _TEXT.value or ""
        builder = extraction.merge_features(speech, text, output, **target)
    else:
        dataset = _DATASET.value or ""
        print(f"extracting {dataset} with {_WORKDIR.value or _ENCODER.value}", flush=True)
        if source == "workdir":
            encoder: extraction.Encoder = extraction.TunedEncoder(_WORKDIR.value or "")
        else:
            encoder = extraction.load_encoder(_ENCODER.value or "", **_set_flags(_ENCODER_OPTIONS))
        builder = extraction.extract_features(
            encoder, dataset, output, budget=_BUDGET.value, **target
        )
    if builder is not None:
        print(f"written to {builder.data_dir}")
        if files:
            _export(output, files, times_of="" if source == "speech" else dataset)
    return None


def _export(name: str, files: Sequence[pathlib.Path], *, times_of: str = "") -> None:
    import jax

    from mister_jax import extraction

    if jax.process_index() == 0:
        extraction.export_features(name, files, _DATA_DIR.value, times_of=times_of)
        for file in files:
            print(f"written to {file}")


def _outputs() -> tuple[str, list[pathlib.Path]]:
    """Returns the name of the dataset, by default the first file's name, and the files to write.

    Raises:
        InputError: There are several names, or the file's name is not a valid dataset name.
    """
    files = [pathlib.Path(output) for output in _OUTPUT.value if _is_file(output)]
    names = [output for output in _OUTPUT.value if not _is_file(output)]
    if len(names) > 1:
        raise InputError(f"--output={names[0]} and --output={names[1]}; allowed: one dataset")
    if names:
        return names[0], files
    name = files[0].stem
    if not re.fullmatch("[a-z][a-z0-9_]*", name) and not _reads_dataset():
        raise InputError(
            f"--output={files[0]}: {name!r} cannot be the name of the feature dataset; add "
            "--output=NAME with lower-case letters, digits and _"
        )
    return name, files


def _is_file(output: str) -> bool:
    """Returns whether an output names a file. Dataset names contain no dot, unlike file names."""
    return "." in pathlib.Path(output).name


def _reads_dataset() -> bool:
    """Returns whether --dataset must contain the features, as no flag names another source."""
    return not any(flag.value for flag in (_WORKDIR, _ENCODER, _SPEECH, _TEXT))


def _check_flags() -> str:
    """Checks combinations of flags; returns the flag that sets the source of the features."""
    sources = {"workdir": _WORKDIR.value, "encoder": _ENCODER.value, "speech": _SPEECH.value}
    chosen = [name for name, value in sources.items() if value]
    writes_files = bool(_OUTPUT.value) and all(map(_is_file, _OUTPUT.value))
    if _reads_dataset() and _DATASET.value and writes_files:
        if options := _set_flags((*_ENCODER_OPTIONS, _BUDGET)):
            raise InputError(f"--{', --'.join(options)}: allowed only with an encoder")
        return "dataset"
    if len(chosen) != 1 or bool(_SPEECH.value) != bool(_TEXT.value):
        raise InputError("one of --workdir, --encoder, or --speech with --text is needed")
    if not _OUTPUT.value:
        raise InputError("--output is needed: a name for the feature dataset")
    (source,) = chosen
    if source != "encoder" and (options := _set_flags(_ENCODER_OPTIONS)):
        raise InputError(
            f"--{', --'.join(options)}: allowed only with --encoder; a fine-tuned encoder keeps "
            "its training options"
        )
    if source == "speech" and (options := _set_flags(_DATASET_OPTIONS)):
        raise InputError(f"--{', --'.join(options)}: not allowed with --speech and --text")
    if source != "speech" and not _DATASET.value:
        raise InputError("--dataset is needed: a dialogue dataset, see mister-jax prepare")
    return source


def _set_flags(holders: Sequence[flags.FlagHolder[Any]]) -> dict[str, Any]:
    """Returns the values of the flags that are set on the command line."""
    return {holder.name: holder.value for holder in holders if holder.present}


main = cluster.distributed(_extract)
