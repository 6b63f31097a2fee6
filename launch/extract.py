"""Writes an encoder's features of a dataset of dialogues, as a dataset that MiSTER-E trains on.

python -m launch.extract --workdir=DIR --dataset=meld/text --output=meld_tuned
python -m launch.extract --encoder=NAME_OR_FOLDER --dataset=meld/text --output=meld_frozen
python -m launch.extract --encoder=NAME_OR_FOLDER --adapter=FOLDER --dataset=meld/text --output=x
python -m launch.extract --encoder=salmonn_7b_v0.pth --whisper=openai/whisper-large-v2 \\
    --beats=FILE --vicuna=FOLDER --dtype=bfloat16 --dataset=meld/clips --output=meld_salmonn
python -m launch.extract --encoder=prosody --dataset=meld/clips --output=meld_prosody
python -m launch.extract --speech=meld_prosody --text=meld_tuned --output=meld_both
"""

from collections.abc import Sequence
from typing import Any

from absl import flags
from rich.console import Console

from launch import run
from mister_jax import extract
from mister_jax.cli.cluster import distributed
from mister_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "of a fine-tuned encoder")
_ENCODER = flags.DEFINE_string(
    "encoder", None, "an encoder as released: a folder, a hub name, or prosody"
)
_DATASET = flags.DEFINE_string("dataset", None, "dataset of dialogues")
_SPEECH = flags.DEFINE_string("speech", None, "dataset of features whose speech is taken")
_TEXT = flags.DEFINE_string("text", None, "dataset of features whose text is taken")
_OUTPUT = flags.DEFINE_string("output", None, "name of the dataset of features")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where datasets are kept; TFDS's own by default")
_BUDGET = flags.DEFINE_integer(
    "budget", None, "tokens, or seconds of audio, in a batch on each device", lower_bound=1
)
_TOKENS = flags.DEFINE_integer(
    "max_tokens", 128, "of an utterance, with --encoder of text", lower_bound=3
)
_SECONDS = flags.DEFINE_float(
    "max_seconds",
    None,
    "seconds of an utterance that --encoder of speech reads; by default all of it, or the fixed "
    "window of Whisper, Qwen2-Audio and SALMONN",
)
_WINDOWS = flags.DEFINE_bool(
    "windows", False, "encode speech beyond a fixed window in several windows and average them"
)
_WHISPER = flags.DEFINE_string(
    "whisper", "", "with --encoder of SALMONN: folder or hub name of its Whisper"
)
_BEATS = flags.DEFINE_string("beats", "", "with --encoder of SALMONN: file of its BEATs")
_VICUNA = flags.DEFINE_string(
    "vicuna", "", "with --encoder of SALMONN: folder or hub name of its Vicuna"
)
_TRIM = flags.DEFINE_bool(
    "trim", True, "with --encoder of Whisper: do not encode 30 s of each clip, as it was trained"
)
_PROMPT = flags.DEFINE_string("prompt", "", "with --encoder of a speech LLM: what it is asked")
_ADAPTER = flags.DEFINE_string(
    "adapter", None, "with --encoder: folder of an adapter of peft that is put on it"
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "with --encoder")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace a dataset of this name")

_OF_ENCODER = (
    _TOKENS,
    _SECONDS,
    _WINDOWS,
    _WHISPER,
    _BEATS,
    _VICUNA,
    _TRIM,
    _PROMPT,
    _ADAPTER,
    _DTYPE,
)
_OF_DATASET = (_DATASET, _BUDGET)


def main() -> None:
    ways = {"workdir": _WORKDIR.value, "encoder": _ENCODER.value, "speech": _SPEECH.value}
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) != 1 or bool(_SPEECH.value) != bool(_TEXT.value):
        raise InputError("one of --workdir, --encoder, or --speech with --text is needed")
    if not _OUTPUT.value:
        raise InputError("--output is needed: a name for the dataset of features")
    useless = () if chosen == ["encoder"] else _given(_OF_ENCODER)
    if useless:
        raise InputError(
            f"--{', --'.join(useless)}: with --encoder alone; a tuned one is used as it was trained"
        )
    if chosen == ["speech"] and _given(_OF_DATASET):
        raise InputError(
            f"--{', --'.join(_given(_OF_DATASET))}: not with --speech and --text, which are read"
        )
    if chosen == ["speech"]:
        builder = extract.merge(
            _SPEECH.value or "",
            _TEXT.value or "",
            _OUTPUT.value,
            _DATA_DIR.value,
            overwrite=_OVERWRITE.value,
        )
    else:
        if not _DATASET.value:
            raise InputError("--dataset is needed: a dataset of dialogues, see launch.prepare")
        builder = extract.extract(
            _encoder(),
            _DATASET.value,
            _OUTPUT.value,
            _DATA_DIR.value,
            budget=_BUDGET.value,
            overwrite=_OVERWRITE.value,
        )
    if builder is not None:
        Console(highlight=False, markup=False, soft_wrap=True).print(
            f"written to {builder.data_dir}"
        )


def _encoder() -> extract.Encoder:
    if _WORKDIR.value:
        return extract.TunedEncoder(_WORKDIR.value)
    return extract.load_encoder(_ENCODER.value or "", **_given(_OF_ENCODER))


def _given(some: Sequence[flags.FlagHolder[Any]]) -> dict[str, Any]:
    """Values of those flags that were typed."""
    return {flag.name: flag.value for flag in some if flag.present}


if __name__ == "__main__":
    run(distributed(main))
