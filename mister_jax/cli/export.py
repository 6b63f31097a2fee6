"""Exports a model as a folder to share, or a fine-tuned encoder for transformers or peft.

mister-jax export --model=RUN --output=FOLDER                # MiSTER-E with its encoders
mister-jax export --model=RUN --output=FOLDER --format=stablehlo    # MiSTER-E, for JAX alone
mister-jax export --model=TUNED --output=FOLDER              # encoder, for transformers
mister-jax export --model=TUNED --output=FOLDER --adapter    # only its LoRA adapter, for peft
"""

from absl import flags

from mister_jax.cli.app import required_workdir
from mister_jax.errors import InputError

_MODEL = flags.DEFINE_string(
    "model", None, "work directory of a training run, or an exported folder"
)
_OUTPUT = flags.DEFINE_string("output", None, "folder to write")
_ADAPTER = flags.DEFINE_bool(
    "adapter", False, "write only the LoRA adapter of an encoder, for peft and the same base model"
)
_INCLUDE = flags.DEFINE_bool(
    "include_encoders", False, "also copy encoders from the Hugging Face Hub into the folder"
)
_FORMAT = flags.DEFINE_enum(
    "format", "bundle", ["bundle", "stablehlo"], "format of a MiSTER-E model"
)
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "replace an existing export")


def main() -> None:
    """Runs `mister-jax export`."""
    model = required_workdir(_MODEL, "a work directory or an exported folder")
    if not _OUTPUT.value:
        raise InputError("--output is needed: a folder that does not exist yet")
    from mister_jax.inference.export import export_encoder, export_model
    from mister_jax.predictor import read_task_name

    is_encoder = read_task_name(model) != "fusion"
    for flag, for_encoders in ((_ADAPTER, True), (_INCLUDE, False), (_FORMAT, False)):
        if flag.present and for_encoders != is_encoder:
            kind = "an encoder" if is_encoder else "a MiSTER-E model"
            raise InputError(f"--{flag.name}: cannot be used with {model}, {kind}")
    if is_encoder:
        export_encoder(model, _OUTPUT.value, adapter=_ADAPTER.value, overwrite=_OVERWRITE.value)
    elif _FORMAT.value == "stablehlo":
        from mister_jax.inference.portable import export_program

        export_program(model, _OUTPUT.value, overwrite=_OVERWRITE.value)
    else:
        export_model(
            model,
            _OUTPUT.value,
            include_encoders=_INCLUDE.value,
            overwrite=_OVERWRITE.value,
        )
    print(f"written to {_OUTPUT.value}")
