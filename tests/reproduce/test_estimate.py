"""Predicted sizes and times of a dry run."""

import pytest

from benchmarks import aot
from benchmarks.encoders import EXTRACTION, FINE_TUNING, model_flops
from mister_jax.data.corpora import meld, mosi
from mister_jax.errors import InputError
from mister_jax.reproduce import estimate
from mister_jax.reproduce.settings import CORPORA, PRESETS, Settings
from tests.helpers.tiny_encoders import WAVLM_CONFIG, save_encoder


def make_settings(preset, corpus="meld", **changes):
    return Settings(corpus=corpus, preset=preset, workdir="W", **changes)


def test_devices_are_those_of_the_benchmarks():
    kinds = {"v5e-8": "TPU v5 lite", "v5p-8": "TPU v5", "h100": "NVIDIA H100 80GB HBM3"}
    assert estimate.DEVICES.keys() == kinds.keys()
    for name, kind in kinds.items():
        device, chip = estimate.DEVICES[name], aot.CHIPS[kind]
        assert (device.flops, device.memory, device.bandwidth) == chip[:3]
        if device.count > 1:
            assert device.interconnect == chip.interconnect


def test_corpus_sizes_are_those_of_the_releases():
    for corpus, released in (("meld", meld.RELEASED), ("mosi", mosi.RELEASED)):
        size = estimate.corpus_size(make_settings("small", corpus))
        assert (size.dialogues, size.train) == released["train"]
        assert size.validation == released["validation"][1]
        assert size.total == sum(utterances for _, utterances in released.values())


@pytest.mark.parametrize("encoder", ["llama_3_1_8b", "salmonn_7b", "qwen2_audio_7b"])
def test_flops_agree_with_the_traced_programs(encoder):
    corpus = estimate.CorpusSize(1, 1, 1, 1, seconds=30.0, tokens=128)
    modality = "text" if encoder == "llama_3_1_8b" else "speech"
    settings = make_settings("llm", **{f"{modality}_encoder": encoder})
    parts = estimate.encoder_parts(getattr(settings, modality), modality, corpus)
    flops = model_flops(encoder, 128)
    training = sum(part.training_flops() for part in parts)
    forward = sum(part.forward_flops() for part in parts)
    assert training == pytest.approx(flops[FINE_TUNING], rel=0.03)
    assert forward == pytest.approx(flops[EXTRACTION], rel=0.03)


@pytest.mark.parametrize("device", estimate.DEVICES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_every_device(preset, device):
    num_devices = estimate.DEVICES[device].count
    for corpus in CORPORA:
        settings = make_settings(preset, corpus, num_devices=num_devices)
        rows = estimate.estimate(settings, device)
        assert all(row.hours > 0 for row in rows)
        memory = [row.memory for row in rows if row.memory is not None]
        assert len(memory) == 4 and max(memory) < estimate.DEVICES[device].memory


def test_more_epochs_and_seeds_take_longer():
    def hours(stage, **changes):
        rows = estimate.estimate(make_settings("small", **changes), "h100")
        return next(row.hours for row in rows if row.stage == stage)

    assert hours("train text", text_options=("train.epochs=8",)) == pytest.approx(
        2 * hours("train text")
    )
    assert hours("train paper", num_seeds=10) == pytest.approx(2 * hours("train paper"))


def test_the_size_of_a_local_encoder_is_read(tmp_path):
    save_encoder(tmp_path / "wavlm", WAVLM_CONFIG)
    settings = make_settings("small", speech_encoder=str(tmp_path / "wavlm"))
    small = estimate.count_parameters(settings.speech)
    assert small < 10_000 < estimate.count_parameters(make_settings("small").speech)
    with pytest.raises(InputError, match="somebody/wavlm: its size is unknown"):
        estimate.estimate(make_settings("small", speech_encoder="somebody/wavlm"), "h100")


def test_commands_of_the_dry_run(tmp_path, command_runner):
    flags = "reproduce --workdir=DIR/work --preset=llm --corpus=iemocap"
    commands = [
        f"{flags} --dry_run --device=v5e-8",
        f"{flags} --dry_run --device=h100 --dollars_per_hour=3 --num_seeds=1",
        f"{flags} --dry_run --device=v9",
        f"{flags} --dry_run",
        f"{flags} --source=DIR/missing",
        "reproduce --workdir=DIR/work --preset=huge --corpus=meld",
        "reproduce --workdir=DIR/work --preset=small",
        "reproduce --preset=small --corpus=meld",
    ]
    command_runner.results.clear()
    for command in commands:
        command_runner(command.replace("DIR", str(tmp_path)).split())
    dry, priced, *errors = command_runner.results
    assert dry.status == 0, dry.stderr
    work = tmp_path / "work"
    assert (
        f"  mister-jax train --config=text_encoder:iemocap/six_session1,llama_3_1_8b "
        f"--workdir={work}/text --config.data.data_dir={work}/data\n"
        f"  mister-jax train --config=speech_encoder:iemocap/six_session1,salmonn_7b "
        f"--workdir={work}/speech --config.data.data_dir={work}/data "
        "--config.train.accumulation=1\n"
    ) in dry.stdout
    assert "text encoder: meta-llama/Llama-3.1-8B, 7.5 billion parameters" in dry.stdout
    assert "utilization 42%, recorded for this chip" in dry.stdout
    assert priced.status == 0 and "$" in priced.stdout and "assumed" in priced.stdout
    assert not work.exists()
    messages = (
        "--device=v9; allowed: v5e-8, v5p-8, h100",
        "--device is needed with --dry_run: v5e-8, v5p-8 or h100",
        f"--source={tmp_path}/missing: no such folder",
        "--preset=huge; allowed: small, large, llm",
        "--corpus is needed: iemocap, meld, mosi",
        "--workdir is needed: a folder; it is created if it does not exist",
    )
    for result, message in zip(errors, messages, strict=True):
        assert result.status == 2
        assert result.stderr == f"error: {message}\n"
