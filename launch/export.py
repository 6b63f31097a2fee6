"""Exports the fine-tuned encoder of a work directory for transformers or `peft`.

python -m launch.export --workdir=DIR --output=FOLDER
python -m launch.export --workdir=DIR --output=FOLDER --adapter     # only the LoRA adapter
"""

from absl import flags
from rich.console import Console

from launch import run
from mister_jax.errors import InputError
from mister_jax.inference.export import export

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a fine-tuned encoder")
_OUTPUT = flags.DEFINE_string("output", None, "folder to write")
_ADAPTER = flags.DEFINE_bool(
    "adapter", False, "write only the LoRA adapter, for peft and the same base model"
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an existing export")


def main() -> None:
    if not _WORKDIR.value:
        raise InputError("--workdir is needed: a directory that training has made")
    if not _OUTPUT.value:
        raise InputError("--output is needed: a folder that is not there yet")
    export(_WORKDIR.value, _OUTPUT.value, adapter=_ADAPTER.value, overwrite=_OVERWRITE.value)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"written to {_OUTPUT.value}")


if __name__ == "__main__":
    run(main)
