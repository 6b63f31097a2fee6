"""Writes an encoder's features of a dataset of dialogues, as a dataset that MiSTER-E trains on.

python -m launch.extract --workdir=DIR --dataset=meld/text --output=meld_tuned
python -m launch.extract --encoder=NAME_OR_FOLDER --dataset=meld/text --output=meld_frozen
python -m launch.extract --speech=speech_features --text=text_features --output=both
"""

from absl import flags
from rich.console import Console

from launch import run
from mister_jax import extract
from mister_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "of a fine-tuned encoder")
_ENCODER = flags.DEFINE_string("encoder", None, "an encoder as released: a folder or a hub name")
_DATASET = flags.DEFINE_string("dataset", None, "dataset of dialogues")
_SPEECH = flags.DEFINE_string("speech", None, "dataset of features whose speech is taken")
_TEXT = flags.DEFINE_string("text", None, "dataset of features whose text is taken")
_OUTPUT = flags.DEFINE_string("output", None, "name of the dataset of features", required=True)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "where datasets are kept; TFDS's own by default")
_TOKENS = flags.DEFINE_integer("max_tokens", 128, "of an utterance, with --encoder", lower_bound=3)
_BUDGET = flags.DEFINE_integer(
    "token_budget", extract.TOKEN_BUDGET, "tokens in a batch on each device", lower_bound=1
)
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "with --encoder")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace a dataset of this name")


def main() -> None:
    ways = {"workdir": _WORKDIR.value, "encoder": _ENCODER.value, "speech": _SPEECH.value}
    chosen = [name for name, value in ways.items() if value]
    if len(chosen) != 1 or bool(_SPEECH.value) != bool(_TEXT.value):
        raise InputError("one of --workdir, --encoder, or --speech with --text is needed")
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
            token_budget=_BUDGET.value,
            overwrite=_OVERWRITE.value,
        )
    if builder is not None:
        Console(highlight=False, markup=False, soft_wrap=True).print(
            f"written to {builder.data_dir}"
        )


def _encoder() -> extract.Encoder:
    if _WORKDIR.value:
        return extract.TunedEncoder(_WORKDIR.value)
    return extract.PretrainedEncoder(
        _ENCODER.value or "",
        max_tokens=_TOKENS.value,
        dtype=_DTYPE.value,
        param_dtype=_DTYPE.value,
    )


if __name__ == "__main__":
    run(main)
