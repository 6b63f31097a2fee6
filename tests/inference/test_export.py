"""Exporting a fine-tuned encoder for transformers and peft, and loading it again."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from mister_jax import extraction
from mister_jax.configs import speech_encoder
from mister_jax.encoders import registry, speech
from mister_jax.errors import InputError
from mister_jax.inference.export import export_encoder
from mister_jax.io import write_json
from mister_jax.predictor import Predictor
from tests.helpers.classifiers import WAV2VEC2_CONFIG
from tests.helpers.encoder_workdirs import write_speech_workdir, write_text_workdir

TEXT_KINDS = ("bert", "llama", "int8")
IDS = np.array([[1, 5, 6, 7, 8], [1, 9, 4, 0, 0]])
MASK = IDS > 0
WAVEFORM = np.random.default_rng(0).normal(0, 0.1, (2, 12_800)).astype(np.float32)
LENGTHS = np.array([12_800, 6400])


@pytest.fixture(scope="module")
def wavlm_folder(tmp_path_factory):
    """A tiny WavLM with random weights."""
    folder = tmp_path_factory.mktemp("tiny_wavlm")
    config = WAV2VEC2_CONFIG | {"model_type": "wavlm"}
    registry.save_pretrained(registry.create_module(config, rngs=nnx.Rngs(0)), config, folder)
    return folder


@pytest.fixture(scope="module")
def workdirs(
    tmp_path_factory, bert_folder, llama_folder, whisper_folder, qwen_folder, wavlm_folder
):
    """Returns a function that maps a kind of encoder to its base folder and a work directory."""
    root = tmp_path_factory.mktemp("workdirs")
    lora = {"full": False, "tower": "lora"}
    arguments = {
        "bert": (write_text_workdir, bert_folder, "minilm_l6", {}),
        "llama": (write_text_workdir, llama_folder, "llama_3_2_1b", {}),
        "int8": (write_text_workdir, llama_folder, "llama_3_2_1b", {"quantize": True}),
        "whisper": (write_speech_workdir, whisper_folder, "whisper_tiny", lora),
        "qwen": (write_speech_workdir, qwen_folder, "qwen2_audio_7b", {"tower": "lora"}),
        "wavlm": (write_speech_workdir, wavlm_folder, "wavlm_base", lora),
    }

    @functools.cache
    def get(kind):
        write, folder, encoder, options = arguments[kind]
        write(root / kind, folder, encoder, **options)
        return folder, root / kind

    return get


@pytest.fixture(scope="module")
def expected(workdirs):
    """Returns a function that maps a kind of encoder to its hidden states after training."""

    @functools.cache
    def get(kind):
        (model,) = Predictor(workdirs(kind)[1]).models()
        graph, state = nnx.split(model.backbone)
        return hidden_states(nnx.merge(graph, jax.device_get(state)), kind)

    return get


@nnx.jit
def call_module(module, *inputs):
    return module(*inputs)


def hidden_states(module, kind):
    """Returns the hidden states at valid positions."""
    if kind in TEXT_KINDS:
        return np.asarray(call_module(module, IDS, MASK))[MASK]
    states, mask = call_module(module, WAVEFORM, LENGTHS)
    return np.asarray(states)[np.asarray(mask)]


def load_exported(folder, kind, **options):
    if kind in TEXT_KINDS:
        return registry.load_pretrained(folder, **options)[0]
    files = speech.SpeechFiles(str(folder))
    return speech.load_speech_encoder(files, speech.read_backbone_config(files), **options)


@pytest.mark.parametrize("kind", ["int8", "qwen"])
def test_an_exported_model_gives_the_hidden_states_of_the_encoder(
    workdirs, expected, kind, tmp_path
):
    base, workdir = workdirs(kind)
    export_encoder(workdir, tmp_path / "new")
    np.testing.assert_allclose(
        hidden_states(load_exported(tmp_path / "new", kind), kind), expected(kind), atol=1e-5
    )
    for file in base.glob("*token*.json"):
        assert (tmp_path / "new" / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("kind", ["whisper", "qwen"])
def test_an_exported_adapter_on_its_base_gives_the_hidden_states_of_the_encoder(
    workdirs, expected, kind, tmp_path
):
    base, workdir = workdirs(kind)
    export_encoder(workdir, tmp_path / "new", adapter=True)
    options = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(base)
    module = load_exported(base, kind, adapter=str(tmp_path / "new"))
    np.testing.assert_allclose(hidden_states(module, kind), expected(kind), atol=1e-5)


def test_an_encoder_with_an_adapter_is_restored_from_its_metadata(workdirs, tmp_path):
    base, workdir = workdirs("llama")
    export_encoder(workdir, tmp_path / "adapter", adapter=True)
    export_encoder(workdir, tmp_path / "merged")
    texts = ["i am so happy", "you are mad"]
    encoder = extraction.load_encoder(str(base), max_tokens=12, adapter=str(tmp_path / "adapter"))
    features, _ = extraction.encode_utterances(encoder, texts)
    merged = extraction.load_encoder(str(tmp_path / "merged"), max_tokens=12)
    merged_features, _ = extraction.encode_utterances(merged, texts)
    np.testing.assert_allclose(features, merged_features, atol=1e-5)
    metadata = json.loads(json.dumps(encoder.metadata))
    restored = extraction.encoder_from_metadata(metadata)
    np.testing.assert_array_equal(extraction.encode_utterances(restored, texts)[0], features)
    (tmp_path / "adapter").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        extraction.encoder_from_metadata(metadata)
    restored = extraction.encoder_from_metadata(
        extraction.with_new_paths(metadata, {"adapter": str(tmp_path / "moved")})
    )
    np.testing.assert_array_equal(extraction.encode_utterances(restored, texts)[0], features)
    with pytest.raises(InputError, match=r"which has no beats; allowed: encoder, adapter$"):
        extraction.with_new_paths(metadata, {"beats": "there"})


def test_only_an_earlier_export_can_be_overwritten(workdirs, tmp_path):
    base, workdir = workdirs("llama")
    export_encoder(workdir, tmp_path / "new")
    with pytest.raises(InputError, match=r"new: exists; allowed: another --output, or --overwrite"):
        export_encoder(workdir, tmp_path / "new", adapter=True)
    export_encoder(workdir, tmp_path / "new", adapter=True, overwrite=True)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    (tmp_path / "other").mkdir()
    for folder, message in (
        (tmp_path / "other", "not a model"),
        (workdir, "not a model"),
        (base, "the encoder from which training started"),
    ):
        with pytest.raises(InputError, match=message):
            export_encoder(workdir, folder, overwrite=True)


def test_an_export_that_fails_keeps_the_earlier_one(workdirs, tmp_path, monkeypatch):
    _, workdir = workdirs("llama")
    export_encoder(workdir, tmp_path / "new", adapter=True)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(InputError, match="disk full"):
        export_encoder(workdir, tmp_path / "new", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "adapter_config.json").exists()


def test_an_encoder_without_lora_is_not_exported_as_an_adapter(workdirs, tmp_path):
    with pytest.raises(InputError, match="not trained with LoRA only"):
        export_encoder(workdirs("bert")[1], tmp_path / "new", adapter=True)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_peft_would_ignore_is_not_exported(workdirs, expected, tmp_path):
    _, workdir = workdirs("wavlm")
    with pytest.raises(InputError, match=r"peft would ignore .*k_proj.*without --adapter"):
        export_encoder(workdir, tmp_path / "adapter", adapter=True)
    assert not list(tmp_path.iterdir())
    export_encoder(workdir, tmp_path / "merged")
    module = load_exported(tmp_path / "merged", "wavlm")
    np.testing.assert_allclose(hidden_states(module, "wavlm"), expected("wavlm"), atol=1e-5)


def test_salmonn_is_not_exported(tmp_path):
    write_json(tmp_path / "config.json", speech_encoder.get_config("any,salmonn_7b").to_dict())
    with pytest.raises(InputError, match="SALMONN consists of four checkpoints"):
        export_encoder(tmp_path, tmp_path / "new")


def torch_hidden_states(model, kind, folder):
    """Returns the hidden states of a transformers model.

    A speech model is saved to the folder, and our modules run it.
    """
    import torch

    if kind in ("whisper", "qwen"):
        model.save_pretrained(folder)
        return hidden_states(load_exported(folder, kind), kind)
    with torch.no_grad():
        ids, mask = torch.tensor(IDS), torch.tensor(MASK).long()
        return model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state.numpy()[MASK]


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["bert", "llama", "int8", "whisper", "qwen"])
def test_transformers_opens_an_exported_model_with_equal_outputs(
    workdirs, expected, kind, tmp_path
):
    import transformers

    base, workdir = workdirs(kind)
    export_encoder(workdir, tmp_path / "new")
    model, info = transformers.AutoModel.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not info["unexpected_keys"]
    shutil.copytree(base, tmp_path / "copy")  # contains the tokenizer
    states = torch_hidden_states(model, kind, tmp_path / "copy")
    np.testing.assert_allclose(states, expected(kind), atol=1e-5)
    if kind != "whisper":
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
        assert len(tokenizer("i am so happy")["input_ids"]) > 4


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# peft also adds LoRA to the unused decoder of Whisper and warns that its tensors are missing.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize("kind", ["llama", "whisper", "qwen"])
def test_peft_opens_an_exported_adapter_with_equal_outputs(workdirs, expected, kind, tmp_path):
    import peft
    import transformers

    base, workdir = workdirs(kind)
    export_encoder(workdir, tmp_path / "new", adapter=True)
    model = transformers.AutoModel.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "new").merge_and_unload()
    shutil.copytree(base, tmp_path / "copy")
    states = torch_hidden_states(model, kind, tmp_path / "copy")
    np.testing.assert_allclose(states, expected(kind), atol=1e-5)
