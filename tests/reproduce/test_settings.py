"""Settings of a reproduction, and the commands that result from them."""

import pytest

from mister_jax.configs import speech_encoder, text_encoder
from mister_jax.errors import InputError
from mister_jax.reproduce.settings import PRESETS, Settings
from mister_jax.reproduce.stages import make_stages


def commands(**settings):
    values = {"corpus": "meld", "preset": "small", "workdir": "W", "source": "MELD.Raw"}
    return {stage.name: stage.command for stage in make_stages(Settings(**{**values, **settings}))}


def test_presets_name_encoders_of_the_configs():
    for preset in PRESETS.values():
        assert preset.text_encoder in text_encoder.ENCODERS
        assert preset.speech_encoder in speech_encoder.ENCODERS


def test_commands_of_iemocap_with_llms():
    result = commands(
        corpus="iemocap",
        preset="llm",
        source="IEMOCAP full",
        speech_encoder="ckpt/salmonn.pth",
        salmonn_parts={"vicuna": "vicuna"},
        data_dir="DATA",
        text_options=("train.epochs=5",),
    )
    assert result["prepare"] == (
        "mister-jax prepare --corpus=iemocap --config=six_session1 '--source=IEMOCAP full' "
        "--data_dir=DATA"
    )
    assert result["train text"] == (
        "mister-jax train --config=text_encoder:iemocap/six_session1,llama_3_1_8b "
        "--workdir=W/text --config.data.data_dir=DATA --config.train.epochs=5"
    )
    assert result["train speech"] == (
        "mister-jax train --config=speech_encoder:iemocap/six_session1,salmonn_7b "
        "--workdir=W/speech --config.data.data_dir=DATA "
        "--config.encoder.options.name=ckpt/salmonn.pth "
        "--config.encoder.options.whisper=openai/whisper-large-v2 "
        f"--config.encoder.options.beats={speech_encoder.SALMONN['beats']} "
        "--config.encoder.options.vicuna=vicuna"
    )
    assert result["extract text"] == (
        "mister-jax extract --workdir=W/text --dataset=iemocap/six_session1 "
        "--output=iemocap_llm_text --data_dir=DATA"
    )
    assert result["train paper"] == (
        "mister-jax train --config=fusion:iemocap_llm,paper --config.num_seeds=5 "
        "--config.data.data_dir=DATA --workdir=W/paper"
    )


def test_encoders_are_names_of_configs_or_checkpoints():
    by_key = commands(preset="llm", speech_encoder="qwen2_audio_7b")
    assert "speech_encoder:meld/clips,qwen2_audio_7b " in by_key["train speech"]
    assert "options.name" not in by_key["train speech"]
    by_folder = commands(speech_encoder="my/wavlm")
    assert "speech_encoder:meld/clips,wavlm_base " in by_folder["train speech"]
    assert by_folder["train speech"].endswith(
        "--config.encoder.options.name=my/wavlm --config.train.accumulation=2"
    )


def test_accumulation_fits_the_number_of_devices():
    assert commands(preset="large")["train speech"].endswith(
        "--config.encoder.options.remat=full --config.train.accumulation=4"
    )
    llm = {"preset": "llm"}
    assert "accumulation" not in commands(**llm)["train speech"]  # The config's value is 8.
    assert "--config.train.accumulation=2" in commands(**llm, num_devices=4)["train speech"]
    assert "--config.train.accumulation=1" in commands(**llm, num_devices=8)["train speech"]
    user = commands(**llm, num_devices=8, speech_options=("train.accumulation=3",))["train speech"]
    assert user.count("accumulation") == 1 and user.endswith("--config.train.accumulation=3")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "mosei"}, "--corpus=mosei; allowed: iemocap, meld, mosi"),
        ({"preset": "huge"}, "--preset=huge; allowed: small, large, llm"),
        ({"classes": "five"}, "--classes=five; allowed: six, four"),
        ({"classes": "four"}, "--classes=four: allowed only with --corpus=iemocap"),
        ({"num_seeds": 0}, "--num_seeds=0; allowed: 1 or more"),
        ({"salmonn_parts": {"beats": "x"}}, "--beats: allowed only with SALMONN"),
        ({"text_options": ("epochs",)}, "--text_option=epochs; allowed: FIELD=VALUE"),
    ],
)
def test_invalid_settings_give_one_line(changes, message):
    with pytest.raises(InputError, match=message):
        Settings(**{"corpus": "meld", "preset": "small", "workdir": "W", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--source is needed: the folder of the released corpus"),
        ({"source": "nowhere"}, "--source=nowhere: no such folder"),
        ({"source": ".", "text_encoder": "./missing"}, "--text_encoder=./missing: no such file"),
        ({"source": ".", "preset": "llm"}, "--speech_encoder=salmonn_7b_v0.pth: no such file"),
        (
            {"source": ".", "preset": "llm", "speech_encoder": "README.md"},
            "--beats=BEATs.*: no such file or folder",
        ),
        (
            {
                "source": ".",
                "preset": "llm",
                "speech_encoder": "README.md",
                "salmonn_parts": {"beats": "README.md"},
            },
            "--vicuna is needed: a folder with lmsys/vicuna-7b-v1.5 in safetensors",
        ),
    ],
)
def test_missing_files_give_one_line(tmp_path, changes, message):
    values = {"corpus": "meld", "preset": "small", "workdir": str(tmp_path), **changes}
    with pytest.raises(InputError, match=message):
        Settings(**values).check_files()
