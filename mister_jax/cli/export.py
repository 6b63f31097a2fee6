"""Exports the fine-tuned encoder in a work directory for transformers or peft.

mister-jax export --workdir=DIR --output=FOLDER
mister-jax export --workdir=DIR --output=FOLDER --adapter     # only the LoRA adapter
"""

from absl import flags

from mister_jax.cli.app import required_workdir
from mister_jax.errors import InputError

_WORKDIR = flags.DEFINE_string("workdir", None, "work directory of a fine-tuned encoder")
_OUTPUT = flags.DEFINE_string("output", None, "folder to write")
_ADAPTER = flags.DEFINE_bool(
    "adapter", False, "write only the LoRA adapter, for peft and the same base model"
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an existing export")


def main() -> None:
    """Runs `mister-jax export`."""
    workdir = required_workdir(_WORKDIR, "a directory that `mister-jax train` has written")
    if not _OUTPUT.value:
        raise InputError("--output is needed: a folder that does not exist yet")
    from mister_jax.inference.export import export_encoder

    export_encoder(workdir, _OUTPUT.value, adapter=_ADAPTER.value, overwrite=_OVERWRITE.value)
    print(f"written to {_OUTPUT.value}")
