"""Speech encoders loaded from files, speech LLMs with fixed prompts, and errors of loading."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from mister_jax.convert.safetensors import Checkpoint, save_tensors
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


@nnx.jit
def run_pooled(module, *inputs):
    return masked_mean(*module(*inputs))


def test_speech_llm_encodes_every_clip_with_its_prompt(files, waveform):
    backbone_config = json.loads(json.dumps(speech.read_backbone_config(files)))
    module = speech.load_speech_encoder(files, backbone_config, lora=LORA)
    hidden, mask = map(np.asarray, run(module, waveform, LENGTHS))
    prompt = np.tile(backbone_config["prompt_tokens"], (3, 1))
    expected = run(module.model, waveform, LENGTHS, prompt, np.ones(prompt.shape, bool))
    np.testing.assert_array_equal(mask, expected.audio_mask)
    np.testing.assert_allclose(hidden[mask], np.asarray(expected.hidden_states)[mask], atol=1e-5)
    pooled = speech.load_speech_encoder(files, backbone_config, pool_over_prompt=True, lora=LORA)
    full_mask = np.asarray(run(pooled, waveform, LENGTHS)[1])
    np.testing.assert_array_equal(full_mask.sum(1), mask.sum(1) + prompt.shape[1] - 1)
    assert mask.any(1).all()
    # Qwen2-Audio has one vector per 40 ms. SALMONN has a fixed number of vectors per clip.
    if not files.is_salmonn:
        np.testing.assert_array_equal(mask.sum(1), [14, 20, 1])


def test_prompt_changes_the_prompt_tokens(files, waveform):
    default_config = speech.read_backbone_config(files)
    placeholder = "" if files.is_salmonn else "<|AUDIO|>"
    other_config = speech.read_backbone_config(files, f"{placeholder}are you happy")
    assert default_config["prompt_tokens"] != other_config["prompt_tokens"]
    if files.is_salmonn:
        return
    with pytest.raises(InputError, match=r"0 tokens .* allowed: one"):
        speech.read_backbone_config(files, "are you happy")


def test_batch_and_padding_do_not_change_features(files, waveform):
    backbone_config = speech.read_backbone_config(files)
    module = speech.load_speech_encoder(files, backbone_config, lora=LORA)
    batched = run_pooled(module, waveform, LENGTHS)
    assert np.isfinite(batched).all()
    wider = np.pad(waveform[:1], ((0, 0), (0, 1600)), constant_values=np.nan)
    single = run_pooled(module, wider, LENGTHS[:1])
    np.testing.assert_allclose(single[0], batched[0], atol=1e-5)


@pytest.mark.devices
def test_created_and_loaded_encoders_have_the_same_structure(files):
    """Checks on eight devices that the structures are equal, so that a training checkpoint fits."""
    backbone_config = json.loads(json.dumps(speech.read_backbone_config(files)))
    changes = {"lora": LORA, "tower": {"mask_spectrogram": True}}
    created = nnx.eval_shape(
        lambda: speech.make_speech_encoder(backbone_config, rngs=nnx.Rngs(0), **changes)
    )
    loaded = speech.load_speech_encoder(files, backbone_config, mesh=data_mesh(2), **changes)
    assert nnx.graphdef(created) == nnx.graphdef(loaded)
    assert speech.is_llm(backbone_config) and created.config.hidden_size == 16
    assert speech.has_fixed_input_length(created) == files.is_salmonn
    longest = created.config.max_samples / 16_000
    speech.check_seconds(longest, created)
    with pytest.raises(InputError, match=f"allowed: 0.1 to {longest:g}, the encoder's limit"):
        speech.check_seconds(longest + 0.1, created)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.05, -1.0, 1e308])
def test_invalid_seconds_raise_an_error(seconds):
    with pytest.raises(InputError, match=f"{seconds:g}; allowed: 0.1 to 3600$".replace("+", ".")):
        speech.check_seconds(seconds)


def test_released_lora_of_salmonn_is_loaded(salmonn_options):
    files = speech.SpeechFiles(**salmonn_options)
    module = speech.load_speech_encoder(files, speech.read_backbone_config(files), lora=LORA)
    checkpoint = Checkpoint.open(salmonn_options["name"])
    name = (
        "model.llama_model.base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"
    )
    first = module.model.decoder.layers.layers.attention.query.lora_a[...]
    np.testing.assert_array_equal(first[1], checkpoint[name][...].T)


@pytest.mark.parity
def test_salmonn_loads_from_pytorch_files(salmonn_options, tmp_path):
    import torch

    def write(path, folder, **metadata):
        tensors = {
            name.removeprefix("model."): torch.tensor(tensor[...])
            for name, tensor in Checkpoint.open(folder).items()
        }
        torch.save({"model": tensors, **metadata}, path)
        return str(path)

    cfg = json.loads((pathlib.Path(salmonn_options["beats"]) / "config.json").read_text())
    beats = write(tmp_path / "beats.pt", salmonn_options["beats"], cfg=cfg)
    salmonn_path = write(tmp_path / "salmonn.pth", salmonn_options["name"], epoch=3)
    released = speech.SpeechFiles(**salmonn_options | {"name": salmonn_path, "beats": beats})
    files = speech.SpeechFiles(**salmonn_options)
    assert speech.read_backbone_config(released) == speech.read_backbone_config(files)
    modules = [
        speech.load_speech_encoder(paths, speech.read_backbone_config(paths), lora=LORA)
        for paths in (released, files)
    ]
    for one, other in zip(*(jax.tree.leaves(nnx.state(module)) for module in modules), strict=True):
        np.testing.assert_array_equal(one, other)


def test_unusable_files_of_salmonn_raise_a_one_line_error(
    salmonn_options, whisper_folder, tmp_path
):
    def check_error(message, **changes):
        with pytest.raises(InputError, match=message) as error:
            files = speech.SpeechFiles(**salmonn_options | changes)
            speech.load_speech_encoder(files, speech.read_backbone_config(files), lora=LORA)
        assert "\n" not in str(error.value)

    check_error("gone: no such file or folder", name=str(tmp_path / "gone"))
    check_error("not a SALMONN checkpoint: no tensor", name=salmonn_options["beats"])
    copy = shutil.copytree(salmonn_options["beats"], tmp_path / "beats")
    (copy / "config.json").unlink()
    check_error("config.json: cannot be read", beats=str(copy))
    check_error(
        "missing: .*encoder",
        vicuna=salmonn_options["vicuna"],
        whisper=str(write_other_whisper(tmp_path)),
    )
    with pytest.raises(ValueError, match=r"allowed: all three \(SALMONN\), or none"):
        speech.SpeechFiles("salmonn", whisper="whisper")


def write_other_whisper(tmp_path):
    """Writes a folder whose config and weights do not match."""
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
    save_tensors(folder, {"model.decoder.weight": np.zeros(3, np.float32)})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_whisper_without_trim_has_a_fixed_input_length(whisper_folder, waveform):
    files = speech.SpeechFiles(str(whisper_folder))
    backbone_config = speech.read_backbone_config(files)
    assert not speech.is_llm(backbone_config)
    for trim in (True, False):
        changes = speech.trim_kwargs(backbone_config, trim)
        module = speech.load_speech_encoder(files, backbone_config, **changes)
        assert speech.has_fixed_input_length(module) != trim
        hidden, _ = run(module, waveform[:1, :9000], LENGTHS[:1])
        assert hidden.shape[1] == (29 if trim else 40)
    assert hub.fingerprint(whisper_folder) == files.fingerprint()
