"""From a tuned encoder to a folder of transformers or of peft, and back."""

import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx
from mister_jax.configs import speech_encoder, text_encoder

from mister_jax import extraction
from mister_jax.checkpoint import BEST, Checkpoints
from mister_jax.encoders import hf_config, registry, speech
from mister_jax.errors import InputError
from mister_jax.inference.export import export
from mister_jax.io import write_json
from mister_jax.predictor import Predictor
from mister_jax.tasks.base import split_params
from mister_jax.tasks.speech_encoder import SpeechEncoderTask
from mister_jax.tasks.text_encoder import TextEncoderTask

IDS = np.array([[1, 5, 6, 7, 8], [1, 9, 4, 0, 0]])
MASK = IDS > 0
WAVEFORM = np.random.default_rng(0).normal(0, 0.1, (2, 12_800)).astype(np.float32)
LENGTHS = np.array([12_800, 6400])


def tuned(workdir, kind, config, described):
    """A work directory as a training leaves it, whose trained parameters are random."""
    workdir.mkdir()
    task = kind(config, ("calm", "angry"), described)
    shapes = nnx.eval_shape(lambda: task.init(jax.random.key(0)))
    _, params, _ = split_params(shapes, task.trainable)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(leaf.dtype), params)
    write_json(workdir / "model.json", task.description())
    write_json(workdir / "config.json", config.to_dict())
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(BEST, 1, params, {"epoch": 1, "weighted_f1": 0.5})
    return workdir


def text(folder, workdir, encoder, **options):
    config = text_encoder.get_config(f"any,{encoder}")
    config.encoder.options.update({"name": str(folder), "max_tokens": 12, "remat": "none"})
    config.encoder.options.update({"dtype": "float32", "param_dtype": "float32", **options})
    config.head.feature_dim = 4
    return tuned(workdir, TextEncoderTask, config, hf_config.read_config(folder))


def sound(folder, workdir, encoder, **options):
    config = speech_encoder.get_config(f"any,{encoder}")
    config.encoder.options.update({"name": str(folder), "max_seconds": 0.8, "crop_seconds": 0.8})
    config.encoder.options.update({"dtype": "float32", "param_dtype": "float32", "remat": "none"})
    config.encoder.options.update(options)
    config.head.feature_dim = 4
    described = speech.read_backbone_config(speech.SpeechFiles(str(folder)))
    return tuned(workdir, SpeechEncoderTask, config, described)


@pytest.fixture(scope="module")
def wavlm_folder(tmp_path_factory):
    """A tiny WavLM with random weights."""
    folder = tmp_path_factory.mktemp("tiny_wavlm")
    config = {
        "model_type": "wavlm",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "conv_dim": [4],
        "conv_kernel": [400],
        "conv_stride": [320],
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
    }
    registry.save_pretrained(registry.create_module(config, rngs=nnx.Rngs(0)), config, folder)
    return folder


@pytest.fixture(scope="module")
def workdirs(
    tmp_path_factory, bert_folder, llama_folder, whisper_folder, qwen_folder, wavlm_folder
):
    """Function of a kind of encoder: its base, and a work directory of it tuned."""
    root = tmp_path_factory.mktemp("workdirs")
    make = {
        "bert": lambda to: (bert_folder, text(bert_folder, to, "minilm_l6")),
        "llama": lambda to: (llama_folder, text(llama_folder, to, "llama_3_2_1b")),
        "int8": lambda to: (
            llama_folder,
            text(llama_folder, to, "llama_3_2_1b", quantize=True),
        ),
        "whisper": lambda to: (
            whisper_folder,
            sound(whisper_folder, to, "whisper_tiny", full=False, tower="lora"),
        ),
        "qwen": lambda to: (qwen_folder, sound(qwen_folder, to, "qwen2_audio_7b", tower="lora")),
        "wavlm": lambda to: (
            wavlm_folder,
            sound(wavlm_folder, to, "wavlm_base", full=False, tower="lora"),
        ),
    }
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = make[kind](root / kind)
        return made[kind]

    return get


@pytest.fixture(scope="module")
def expected(workdirs):
    """Function of a kind of encoder: hidden states with the best parameters."""

    @functools.cache
    def get(kind):
        (model,) = Predictor(workdirs(kind)[1]).models()
        graph, state = nnx.split(model.backbone)
        return hidden(nnx.merge(graph, jax.device_get(state)), kind)

    return get


@nnx.jit
def read(module, *inputs):
    return module(*inputs)


def hidden(module, kind):
    """Hidden states where they are valid."""
    if kind in ("bert", "llama", "int8"):
        return np.asarray(read(module, IDS, MASK))[MASK]
    states, mask = read(module, WAVEFORM, LENGTHS)
    return np.asarray(states)[np.asarray(mask)]


def loaded(folder, kind, **options):
    """What our own reader makes of a folder."""
    if kind in ("bert", "llama", "int8"):
        return registry.load_pretrained(folder, **options)[0]
    files = speech.SpeechFiles(str(folder))
    return speech.load_speech_encoder(files, speech.read_backbone_config(files), **options)


@pytest.mark.parametrize("kind", ["int8", "qwen"])
def test_an_exported_model_gives_what_the_tuned_encoder_gives(workdirs, expected, kind, tmp_path):
    base, workdir = workdirs(kind)
    export(workdir, tmp_path / "new")
    np.testing.assert_allclose(
        hidden(loaded(tmp_path / "new", kind), kind), expected(kind), atol=1e-5
    )
    for file in base.glob("*token*.json"):
        assert (tmp_path / "new" / file.name).read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("kind", ["whisper", "qwen"])
def test_an_exported_adapter_does_on_the_base_what_the_tuned_encoder_does(
    workdirs, expected, kind, tmp_path
):
    base, workdir = workdirs(kind)
    export(workdir, tmp_path / "new", adapter=True)
    options = json.loads((tmp_path / "new" / "adapter_config.json").read_text())
    assert options["base_model_name_or_path"] == str(base)
    module = loaded(base, kind, adapter=str(tmp_path / "new"))
    np.testing.assert_allclose(hidden(module, kind), expected(kind), atol=1e-5)


def test_an_encoder_with_an_adapter_is_found_by_what_it_says_it_is(workdirs, tmp_path):
    base, workdir = workdirs("llama")
    export(workdir, tmp_path / "adapter", adapter=True)
    export(workdir, tmp_path / "merged")
    texts = ["i am so happy", "you are mad"]
    encoder = extraction.load_encoder(str(base), max_tokens=12, adapter=str(tmp_path / "adapter"))
    found, _ = extraction.encode_utterances(encoder, texts)
    merged = extraction.load_encoder(str(tmp_path / "merged"), max_tokens=12)
    np.testing.assert_allclose(found, extraction.encode_utterances(merged, texts)[0], atol=1e-5)
    identity = json.loads(json.dumps(encoder.identity()))
    again = extraction.encoder_from_metadata(identity)
    np.testing.assert_array_equal(extraction.encode_utterances(again, texts)[0], found)
    (tmp_path / "adapter").rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        extraction.encoder_from_metadata(identity)
    again = extraction.encoder_from_metadata(
        extraction.with_new_paths(identity, {"adapter": str(tmp_path / "moved")})
    )
    np.testing.assert_array_equal(extraction.encode_utterances(again, texts)[0], found)
    with pytest.raises(InputError, match=r"which has no beats; allowed: encoder, adapter$"):
        extraction.with_new_paths(identity, {"beats": "there"})


def test_what_is_there_is_replaced_where_asked_and_if_it_was_exported(workdirs, tmp_path):
    base, workdir = workdirs("llama")
    export(workdir, tmp_path / "new")
    with pytest.raises(InputError, match=r"new: exists; allowed: another --output, or --overwrite"):
        export(workdir, tmp_path / "new", adapter=True)
    export(workdir, tmp_path / "new", adapter=True, overwrite=True)
    names = {path.name for path in (tmp_path / "new").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}
    (tmp_path / "mine").mkdir()
    for folder, message in (
        (tmp_path / "mine", "holds no model"),
        (workdir, "holds no model"),
        (base, "what the training started from"),
    ):
        with pytest.raises(InputError, match=message):
            export(workdir, folder, overwrite=True)


def test_a_folder_that_cannot_be_written_whole_is_not_begun(workdirs, tmp_path, monkeypatch):
    _, workdir = workdirs("llama")
    export(workdir, tmp_path / "new", adapter=True)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copyfile", fail)
    with pytest.raises(InputError, match="disk full"):
        export(workdir, tmp_path / "new", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
    assert (tmp_path / "new" / "adapter_config.json").exists()


def test_what_an_adapter_cannot_hold_is_not_exported_as_one(workdirs, tmp_path):
    with pytest.raises(InputError, match="more or less than low-rank paths"):
        export(workdirs("bert")[1], tmp_path / "new", adapter=True)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_peft_would_ignore_is_not_exported(workdirs, expected, tmp_path):
    _, workdir = workdirs("wavlm")
    with pytest.raises(InputError, match=r"peft would ignore .*k_proj.*without --adapter"):
        export(workdir, tmp_path / "adapter", adapter=True)
    assert not list(tmp_path.iterdir())
    export(workdir, tmp_path / "merged")
    hidden_states = hidden(loaded(tmp_path / "merged", "wavlm"), "wavlm")
    np.testing.assert_allclose(hidden_states, expected("wavlm"), atol=1e-5)


def test_salmonn_is_refused(tmp_path):
    write_json(tmp_path / "config.json", speech_encoder.get_config("any,salmonn_7b").to_dict())
    with pytest.raises(InputError, match="SALMONN is four checkpoints"):
        export(tmp_path, tmp_path / "new")


def given_by(model, kind, folder):
    """What a model of transformers gives; of sound, what ours gives with its weights."""
    import torch

    if kind in ("whisper", "qwen"):
        model.save_pretrained(folder)
        return hidden(loaded(folder, kind), kind)
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
    export(workdir, tmp_path / "new")
    model, told = transformers.AutoModel.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not told["unexpected_keys"]
    shutil.copytree(base, tmp_path / "again")  # for the tokenizer
    given = given_by(model, kind, tmp_path / "again")
    np.testing.assert_allclose(given, expected(kind), atol=1e-5)
    if kind != "whisper":
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
        assert len(tokenizer("i am so happy")["input_ids"]) > 4


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
# In Whisper's decoder peft makes paths that do nothing, and says that they have no tensors.
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize("kind", ["llama", "whisper", "qwen"])
def test_peft_opens_an_exported_adapter_with_equal_outputs(workdirs, expected, kind, tmp_path):
    import peft
    import transformers

    base, workdir = workdirs(kind)
    export(workdir, tmp_path / "new", adapter=True)
    model = transformers.AutoModel.from_pretrained(base)
    model = peft.PeftModel.from_pretrained(model, tmp_path / "new").merge_and_unload()
    shutil.copytree(base, tmp_path / "again")
    given = given_by(model, kind, tmp_path / "again")
    np.testing.assert_allclose(given, expected(kind), atol=1e-5)
