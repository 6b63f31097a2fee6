"""Speech encoders from their files, LLMs in their prompts, and what cannot be opened."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from mister_jax.convert.safetensors import Checkpoint, save
from mister_jax.encoders import hub, speech
from mister_jax.errors import InputError
from mister_jax.nn import masked_mean
from mister_jax.nn.lora import LoRAConfig
from mister_jax.parallel.sharding import data_mesh

LENGTHS = np.array([9000, 12_800, 400])
LORA = LoRAConfig(rank=2, alpha=8.0, targets=("query", "value"))


@pytest.fixture(scope="module")
def waveform():
    noise = np.random.default_rng(0).normal(0, 0.1, (3, 12_800)).astype(np.float32)
    return np.where(np.arange(12_800) < LENGTHS[:, None], noise, np.nan)


@pytest.fixture(params=["qwen2_audio", "salmonn"])
def files(request, qwen_folder, salmonn_options):
    options = {"name": str(qwen_folder)} if request.param == "qwen2_audio" else salmonn_options
    return speech.SpeechFiles(**options)


@nnx.jit
def run(module, *inputs):
    return module(*inputs)


def test_an_llm_hears_every_clip_in_its_prompt(files, waveform):
    described = json.loads(json.dumps(speech.read_backbone_config(files)))
    module = speech.load_speech_encoder(files, described, lora=LORA)
    hidden, mask = run(module, waveform, LENGTHS)
    prompt = np.tile(described["prompt_tokens"], (3, 1))
    expected = run(module.model, waveform, LENGTHS, prompt, np.ones(prompt.shape, bool))
    np.testing.assert_array_equal(mask, expected.audio_mask)
    np.testing.assert_allclose(hidden[mask], expected.hidden[mask], atol=1e-5)
    whole = speech.load_speech_encoder(files, described, pool_over_prompt=True, lora=LORA)
    _, all_of_it = run(whole, waveform, LENGTHS)
    np.testing.assert_array_equal(all_of_it.sum(1), mask.sum(1) + prompt.shape[1] - 1)
    assert mask.any(1).all()
    if not files.is_salmonn:  # 40 ms a vector; of SALMONN all clips have as many
        np.testing.assert_array_equal(mask.sum(1), [14, 20, 1])


def test_another_question_gives_other_hidden_states(files, waveform):
    usual = speech.read_backbone_config(files)
    placeholder = "" if files.is_salmonn else "<|AUDIO|>"
    other = speech.read_backbone_config(files, f"{placeholder}are you happy")
    assert usual["prompt_tokens"] != other["prompt_tokens"]
    if files.is_salmonn:
        return
    with pytest.raises(InputError, match=r"0 tokens .* allowed is one"):
        speech.read_backbone_config(files, "are you happy")


def test_padding_and_batch_mates_do_not_change_features(files, waveform):
    described = speech.read_backbone_config(files)
    module = speech.load_speech_encoder(files, described, lora=LORA)
    together = masked_mean(*run(module, waveform, LENGTHS))
    assert np.isfinite(together).all()
    wider = np.pad(waveform[:1], ((0, 0), (0, 1600)), constant_values=np.nan)
    alone = masked_mean(*run(module, wider, LENGTHS[:1]))
    np.testing.assert_allclose(alone[0], together[0], atol=1e-5)


@pytest.mark.devices
def test_what_is_described_is_what_is_loaded(files):
    """Of the same structure, so that a checkpoint of a training fits; and spread over devices."""
    described = json.loads(json.dumps(speech.read_backbone_config(files)))
    changes = {"lora": LORA, "tower": {"mask_spectrogram": True}}
    made = nnx.eval_shape(
        lambda: speech.make_speech_encoder(described, rngs=nnx.Rngs(0), **changes)
    )
    loaded = speech.load_speech_encoder(files, described, mesh=data_mesh(2), **changes)
    assert nnx.graphdef(made) == nnx.graphdef(loaded)
    assert speech.is_llm(described) and made.config.hidden_size == 16
    assert speech.has_fixed_input_length(made) == files.is_salmonn
    longest = made.config.max_samples / 16_000
    speech.check_seconds(longest, made)
    with pytest.raises(InputError, match=f"allowed: 0.1 to {longest:g}, the encoder's limit"):
        speech.check_seconds(longest + 0.1, made)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.05, -1.0, 1e308])
def test_seconds_that_cannot_be_are_refused(seconds):
    with pytest.raises(InputError, match=f"{seconds:g}; allowed: 0.1 to 3600$".replace("+", ".")):
        speech.check_seconds(seconds)


def test_released_low_rank_paths_of_salmonn_are_loaded(salmonn_options):
    files = speech.SpeechFiles(**salmonn_options)
    module = speech.load_speech_encoder(files, speech.read_backbone_config(files), lora=LORA)
    own = Checkpoint.open(salmonn_options["name"])
    name = (
        "model.llama_model.base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    )
    first = module.model.decoder.layers.layers.attention.query.lora_a[...]
    np.testing.assert_array_equal(first[1], own[name][...].T)


@pytest.mark.parity
def test_salmonn_is_read_from_files_of_pytorch(salmonn_options, tmp_path):
    import torch

    def write(path, folder, **others):
        tensors = {
            name.removeprefix("model."): torch.tensor(tensor[...])
            for name, tensor in Checkpoint.open(folder).items()
        }
        torch.save({"model": tensors, **others}, path)
        return str(path)

    cfg = json.loads((pathlib.Path(salmonn_options["beats"]) / "config.json").read_text())
    beats = write(tmp_path / "beats.pt", salmonn_options["beats"], cfg=cfg)
    own = write(tmp_path / "own.pth", salmonn_options["name"], epoch=3)
    released = speech.SpeechFiles(**salmonn_options | {"name": own, "beats": beats})
    files = speech.SpeechFiles(**salmonn_options)
    assert speech.read_backbone_config(released) == speech.read_backbone_config(files)
    modules = [
        speech.load_speech_encoder(some, speech.read_backbone_config(some), lora=LORA)
        for some in (released, files)
    ]
    for one, other in zip(*(jax.tree.leaves(nnx.state(module)) for module in modules), strict=True):
        np.testing.assert_array_equal(one, other)


def test_files_of_salmonn_that_cannot_be_used_are_said(salmonn_options, whisper_folder, tmp_path):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message) as error:
            files = speech.SpeechFiles(**salmonn_options | changes)
            speech.load_speech_encoder(files, speech.read_backbone_config(files), lora=LORA)
        assert "\n" not in str(error.value)

    refused("gone: no such file or folder", name=str(tmp_path / "gone"))
    refused("not a checkpoint of SALMONN: no tensor", name=salmonn_options["beats"])
    copy = shutil.copytree(salmonn_options["beats"], tmp_path / "beats")
    (copy / "config.json").unlink()
    refused("config.json: cannot be read", beats=str(copy))
    refused("missing: .*encoder", vicuna=salmonn_options["vicuna"], whisper=str(other(tmp_path)))
    with pytest.raises(ValueError, match=r"allowed: all three \(SALMONN\), or none"):
        speech.SpeechFiles("own", whisper="whisper")


def other(tmp_path):
    """A folder of Whisper with another's weights."""
    folder = tmp_path / "other"
    config = {
        "model_type": "whisper",
        "num_mel_bins": 8,
        "d_model": 16,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 16,
        "max_source_positions": 50,
    }
    save(folder, {"model.decoder.weight": np.zeros(3, np.float32)})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_whisper_may_hear_whole_windows(whisper_folder, waveform):
    files = speech.SpeechFiles(str(whisper_folder))
    described = speech.read_backbone_config(files)
    assert not speech.is_llm(described)
    for trim in (True, False):
        changes = speech.trim_kwargs(described, trim)
        module = speech.load_speech_encoder(files, described, **changes)
        assert speech.has_fixed_input_length(module) != trim
        hidden, _ = run(module, waveform[:1, :9000], LENGTHS[:1])
        assert hidden.shape[1] == (29 if trim else 40)
    assert hub.fingerprint(whisper_folder) == files.fingerprint()
