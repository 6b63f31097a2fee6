"""Reproduces the paper: prepares a corpus, fine-tunes both encoders, trains and scores MiSTER-E.

mister-jax reproduce --corpus=meld --source=MELD.Raw --preset=small --workdir=DIR
mister-jax reproduce --corpus=iemocap --source=IEMOCAP_full_release --preset=large --workdir=DIR
mister-jax reproduce --corpus=mosi --preset=llm --workdir=DIR --dry_run --device=v5e-8

The presets are small (RoBERTa-base, WavLM-base), large (RoBERTa-large, WavLM-large) and llm
(Llama-3.1-8B, SALMONN-7B). Each stage runs one `mister-jax` command in a separate process. Run this
command again to resume. At the end, the command prints a table of our scores and the paper's
scores, and writes the table to `reproduce.md`.
"""

from __future__ import annotations

from absl import flags

from mister_jax.cli.app import STOPPED_BY_SIGTERM, required_workdir
from mister_jax.errors import InputError

_CORPUS = flags.DEFINE_string("corpus", None, "iemocap, meld or mosi")
_SOURCE = flags.DEFINE_string("source", "", "folder of the released corpus")
_WORKDIR = flags.DEFINE_string("workdir", None, "folder for all outputs; created if missing")
_PRESET = flags.DEFINE_string("preset", None, "size of the encoders: small, large or llm")
_DATA_DIR = flags.DEFINE_string(
    "data_dir", "", "directory of the datasets; by default WORKDIR/data"
)
_CLASSES = flags.DEFINE_string("classes", "six", "classes of IEMOCAP: six or four")
_SEEDS = flags.DEFINE_integer("num_seeds", 5, "number of seeds of MiSTER-E")
_TEXT_ENCODER = flags.DEFINE_string(
    "text_encoder", "", "encoder of configs/text_encoder.py, folder, or name on the Hub"
)
_SPEECH_ENCODER = flags.DEFINE_string(
    "speech_encoder", "", "encoder of configs/speech_encoder.py, folder or file, or name on the Hub"
)
_WHISPER = flags.DEFINE_string("whisper", "", "SALMONN's Whisper: a folder or a name on the Hub")
_BEATS = flags.DEFINE_string("beats", "", "SALMONN's BEATs: a file")
_VICUNA = flags.DEFINE_string("vicuna", "", "SALMONN's Vicuna: a folder")
_PARTIAL = flags.DEFINE_bool("partial", False, "allow an incomplete corpus")
_TEXT_OPTIONS = flags.DEFINE_multi_string(
    "text_option", [], "changed field of the text encoder's config, such as train.epochs=5"
)
_SPEECH_OPTIONS = flags.DEFINE_multi_string(
    "speech_option", [], "changed field of the speech encoder's config"
)
_FUSION_OPTIONS = flags.DEFINE_multi_string(
    "fusion_option", [], "changed field of MiSTER-E's config"
)
_DEVICE = flags.DEFINE_string(
    "device", "", "hardware to plan for: v5e-8, v5p-8 or h100; by default one device"
)
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "print the commands and the predicted hours")
_DOLLARS = flags.DEFINE_float(
    "dollars_per_hour", None, "price of the hardware, for the cost of each stage", lower_bound=0
)


def main() -> int:
    """Runs `mister-jax reproduce`."""
    workdir = required_workdir(_WORKDIR, "a folder; it is created if it does not exist")
    for flag, allowed in ((_CORPUS, "iemocap, meld, mosi"), (_PRESET, "small, large, llm")):
        if not flag.value:
            raise InputError(f"--{flag.name} is needed: {allowed}")
    if _DRY_RUN.value and not _DEVICE.value:
        raise InputError("--device is needed with --dry_run: v5e-8, v5p-8 or h100")
    from mister_jax.console import output_console
    from mister_jax.reproduce import estimate, report
    from mister_jax.reproduce.runner import run_stages
    from mister_jax.reproduce.settings import Settings
    from mister_jax.reproduce.stages import make_stages

    num_devices = estimate.find_device(_DEVICE.value).count if _DEVICE.value else 0
    parts = {"whisper": _WHISPER.value, "beats": _BEATS.value, "vicuna": _VICUNA.value}
    settings = Settings(
        corpus=_CORPUS.value or "",
        preset=_PRESET.value or "",
        workdir=workdir,
        source=_SOURCE.value or "",
        data_dir=_DATA_DIR.value or "",
        classes=_CLASSES.value,
        num_seeds=_SEEDS.value,
        text_encoder=_TEXT_ENCODER.value or "",
        speech_encoder=_SPEECH_ENCODER.value or "",
        salmonn_parts={name: value for name, value in parts.items() if value},
        partial=_PARTIAL.value,
        text_options=tuple(_TEXT_OPTIONS.value),
        speech_options=tuple(_SPEECH_OPTIONS.value),
        fusion_options=tuple(_FUSION_OPTIONS.value),
        num_devices=num_devices,
    )
    console = output_console()
    if _DRY_RUN.value:
        estimates = estimate.estimate(settings, _DEVICE.value)
        for line in report.estimate_lines(settings, estimates, _DEVICE.value):
            print(line)
        console.print(report.estimate_table(estimates, _DEVICE.value, _DOLLARS.value))
        return 0
    settings.check_files()
    record = run_stages(make_stages(settings), settings)
    if record is None:
        return STOPPED_BY_SIGTERM
    for table in report.write_report(settings, record, _DOLLARS.value):
        console.print(table)
    print(f"written to {workdir}: {report.REPORT}")
    return 0
