"""Set-up of all tests: eight CPU devices, the `--parity` option, shared fixtures."""

import json
import os
import shutil
import tempfile

# What tests and libraries leave behind is in one folder, which goes when all is well. Those of
# workers are in that of the process which starts them.
os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="mister_jax_")
# JAX reads these when it is imported, so they come first.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
# Tests and the processes they start compile a program once between them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="jax_cache_"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import functools
import gc
import multiprocessing.util
import pathlib
from collections import defaultdict

import jax
import numpy as np
import pytest

from mister_jax import MisterEConfig
from mister_jax.parallel import sharding

GOLDEN = pathlib.Path(__file__).parent / "golden"


# The dearest, in descending order, which must not begin when all others have ended.
FIRST = ("test_train", "test_distributed", "test_notebooks", "test_commands", "test_extract")


def pytest_addoption(parser):
    parser.addoption("--parity", action="store_true", help="run the tests marked parity, only")


def pytest_configure(config):
    # JAX makes so many objects that a tenth of the time went into looking for garbage.
    gc.set_threshold(20_000, 20, 50)
    if config.getoption("parity"):
        return  # These compare what users run: programs that XLA has optimised.
    # Two thirds of the time were XLA's. Here and in the processes that tests start.
    jax.config.update("jax_disable_most_optimizations", True)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
    flags = "--xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"


# To compile for eight devices and to feed them takes twice as long as one, and most tests are not
# about that.
sharding.job_devices = lambda: jax.devices()[:1]


def _spread_over_devices(request):
    """Work is spread over all eight devices in what is marked so, in all else over one."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("devices"):
            patch.setattr(sharding, "job_devices", jax.devices)
        yield


# For tests, and for the fixtures of a module that is marked.
spread_a_test = pytest.fixture(autouse=True)(_spread_over_devices)
spread_a_module = pytest.fixture(scope="module", autouse=True)(_spread_over_devices)


def pytest_sessionfinish(exitstatus):
    if exitstatus == 0 and "PYTEST_XDIST_WORKER" not in os.environ:
        # After multiprocessing's own, at -100: its folders are in it.
        remove = functools.partial(shutil.rmtree, os.environ["TMPDIR"], ignore_errors=True)
        multiprocessing.util.Finalize(None, remove, exitpriority=-200)


def pytest_collection_modifyitems(config, items):
    parity = config.getoption("parity")
    other = [item for item in items if ("parity" in item.keywords) != parity]
    if other:
        config.hook.pytest_deselected(items=other)
    order = {name: place for place, name in enumerate(FIRST)}
    items[:] = sorted(
        (item for item in items if ("parity" in item.keywords) == parity),
        key=lambda item: order.get(item.path.stem, len(order)),
    )


@pytest.fixture(scope="session")
def golden():
    """What the official model gave, as {group: {name: array}}; see golden/README.md."""
    groups = defaultdict(dict)
    with np.load(GOLDEN / "mister_e_head.npz") as file:
        for path, value in file.items():
            group, _, name = path.partition("/")
            groups[group][name] = value
    return dict(groups)


@pytest.fixture(scope="session")
def tiny_config():
    """A `MisterEConfig` with all of the model's parts, as small as they get."""
    return MisterEConfig(
        num_classes=4,
        speech_dim=6,
        text_dim=5,
        context_dim=8,
        kernel_sizes=(1, 3),
        gru_layers=1,
        fusion_dim=8,
        fusion_layers=1,
        attention_dim=6,
        attention_heads=3,
        gate_dim=5,
    )


@pytest.fixture(scope="session")
def make_batch(tiny_config):
    """Function of dialogue lengths that makes a padded batch of random dialogues.

    Some utterances miss a modality, some have no label. All vectors are random, also those in
    padding and of a missing modality.
    """

    def make(lengths, seed=0):
        random = np.random.default_rng(seed)
        mask = np.arange(max(lengths)) < np.array(lengths)[:, None]
        speech_present = mask & (random.random(mask.shape) < 0.7)
        text_present = mask & ((random.random(mask.shape) < 0.7) | ~speech_present)
        label = random.integers(tiny_config.num_classes, size=mask.shape)
        labeled = mask & (random.random(mask.shape) < 0.9)

        def vectors(width):
            return random.normal(size=(*mask.shape, width)).astype(np.float32)

        return {
            "speech": vectors(tiny_config.speech_dim),
            "text": vectors(tiny_config.text_dim),
            "mask": mask,
            "speech_present": speech_present,
            "text_present": text_present,
            "label": np.where(labeled, label, -1).astype(np.int32),
        }

    return make


@pytest.fixture
def out_of_memory():
    """Function that fails as JAX does where the devices have no memory left."""

    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes.\nHm"
        )

    return fail


MOODS = {"joy": ("glad", "happy"), "anger": ("angry", "mad")}
FILLERS = ("i", "am", "so", "very", "today", "you", "are", "we")


@pytest.fixture(scope="session")
def word_tokenizer():
    """Function that makes a tokenizer of a few words, as BERT's, or without as Llama's."""
    import tokenizers
    from tokenizers import models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    def make(bert):
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if bert else ["<unk>", "<s>", "</s>"]
        words = [*special, *FILLERS, *(word for words in MOODS.values() for word in words)]
        vocabulary = {word: number for number, word in enumerate(words)}
        unknown = special[1] if bert else special[0]
        tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        template = "[CLS] $A [SEP]" if bert else "<s> $A"
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template,
            special_tokens=[(word, vocabulary[word]) for word in template.split() if word != "$A"],
        )
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        if not bert:
            names = {"bos_token": "<s>", "eos_token": "</s>"}
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown, **names)

    return make


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory, word_tokenizer):
    """A tiny BERT with random weights and its tokenizer. Tests do not change it."""
    from flax import nnx

    from mister_jax.encoders import registry
    from mister_jax.encoders.bert import Bert, BertConfig

    folder = tmp_path_factory.mktemp("tiny_bert")
    tokenizer = word_tokenizer(bert=True)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        mlp_dim=24,
        num_layers=2,
        num_heads=4,
        num_positions=20,
    )
    registry.save_pretrained(
        Bert(config, rngs=nnx.Rngs(0)), config.to_huggingface(), folder, tokenizer
    )
    return folder


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory, word_tokenizer):
    """A tiny Llama with random weights and its tokenizer. Tests do not change it."""
    from flax import nnx

    from mister_jax.encoders import registry

    folder = tmp_path_factory.mktemp("tiny_llama")
    tokenizer = word_tokenizer(bert=False)
    config = {
        "model_type": "llama",
        "architectures": ["LlamaModel"],
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    registry.save_pretrained(
        registry.create_module(config, rngs=nnx.Rngs(0)), config, folder, tokenizer
    )
    return folder


@pytest.fixture(scope="session")
def spoken_dir(tmp_path_factory):
    """A folder with the dataset `manifest/spoken`: short dialogues whose words tell the emotion.

    Of four turns, one in three dialogues has no text in the third and no label in the fourth.
    """
    from mister_jax.data.audio import encode_wav
    from mister_jax.data.prepare import Decoding, Preparation, prepare_corpus

    root = tmp_path_factory.mktemp("spoken")
    encode_wav(root / "noise.wav", np.arange(800, dtype=np.int16))
    random = np.random.default_rng(0)
    rows = []
    for split, count in {"train": 36, "validation": 6, "test": 6}.items():
        for dialogue in range(count):
            for turn in range(4):
                row = {"dialogue": f"{split}{dialogue}", "utterance": turn, "order": turn}
                row |= {"split": split, "audio": "noise.wav", "audio_start": 0}
                label = random.choice(list(MOODS))
                words = [random.choice(MOODS[label]), *random.choice(FILLERS, 1 + turn)]
                if dialogue % 3 or turn != 2:
                    row["text"] = " ".join(random.permutation(words))
                if dialogue % 3 or turn != 3:
                    row["label"] = str(label)
                rows.append(row)
    manifest = root / "spoken.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_corpus(Preparation("manifest", manifest, root / "data", decoding=Decoding(0)))
    return root / "data"


@pytest.fixture(scope="session")
def heard_dir(tmp_path_factory):
    """A folder with the dataset `manifest/heard`: dialogues of three turns whose pitch tells.

    In one dialogue of three the second turn is silent and the third has no recording.
    """
    from mister_jax.data.audio import encode_wav
    from mister_jax.data.prepare import Decoding, Preparation, prepare_corpus

    root = tmp_path_factory.mktemp("heard")
    random = np.random.default_rng(0)
    rows = []
    for split, count in {"train": 24, "validation": 6, "test": 6}.items():
        for dialogue in range(count):
            for turn in range(3):
                label = random.choice(list(MOODS))
                seconds, pitch = random.uniform(0.2, 0.7), {"joy": 2000, "anger": 300}[label]
                time = np.arange(int(16_000 * seconds)) / 16_000
                sound = 8000 * np.sin(2 * np.pi * pitch * time) + random.normal(0, 500, time.size)
                if dialogue % 3 == 0 and turn == 1:
                    sound[:] = 0
                name = f"{split}{dialogue}_{turn}.wav"
                encode_wav(root / name, sound.astype(np.int16))
                row = {"dialogue": f"{split}{dialogue}", "utterance": turn, "order": turn}
                row |= {"split": split, "text": " ".join(random.choice(FILLERS, 2))}
                row |= {"label": str(label)}
                if dialogue % 3 or turn != 2:
                    row["audio"] = name
                rows.append(row)
    manifest = root / "heard.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare_corpus(Preparation("manifest", manifest, root / "data", decoding=Decoding(0)))
    return root / "data"


@pytest.fixture(scope="session")
def whisper_folder(tmp_path_factory):
    """A tiny Whisper of 0.8 s with random weights. Tests do not change it."""
    from flax import nnx

    from mister_jax.encoders import registry

    folder = tmp_path_factory.mktemp("tiny_whisper")
    config = {
        "model_type": "whisper",
        "num_mel_bins": 8,
        "d_model": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "max_source_positions": 40,
        # Of a decoder, which transformers makes besides.
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
    }
    registry.save_pretrained(registry.create_module(config, rngs=nnx.Rngs(0)), config, folder)
    return folder


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory, word_tokenizer):
    """A tiny Qwen2-Audio of 0.8 s with random weights. Tests do not change it."""
    from flax import nnx

    from mister_jax.encoders import registry

    folder = tmp_path_factory.mktemp("tiny_qwen")
    tokenizer = word_tokenizer(bert=False)
    tokenizer.add_tokens(["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"], special_tokens=True)
    config = {
        "model_type": "qwen2_audio",
        "audio_token_index": tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "max_source_positions": 40,
        },
        "text_config": {
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        },
    }
    registry.save_pretrained(
        registry.create_module(config, rngs=nnx.Rngs(0)), config, folder, tokenizer
    )
    return folder


@pytest.fixture(scope="session")
def salmonn_options(tmp_path_factory, llama_folder):
    """Where the four checkpoints of a tiny SALMONN of 1 s are. Tests do not change them."""
    from flax import nnx

    from mister_jax.convert.params import save_params
    from mister_jax.convert.safetensors import save
    from mister_jax.encoders import beats, hf_config, registry, salmonn
    from mister_jax.encoders.salmonn import Salmonn, SalmonnConfig
    from mister_jax.nn.lora import LoRAConfig

    root = tmp_path_factory.mktemp("tiny_salmonn")
    described = {
        "whisper": {
            "model_type": "whisper",
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 16,
            "max_source_positions": 50,
        },
        "beats": {
            "layer_norm_first": False,
            "conv_bias": False,
            "relative_position_embedding": True,
            "gru_rel_pos": True,
            "deep_norm": True,
            "activation_fn": "gelu",
            "encoder_embed_dim": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_embed_dim": 16,
            "embed_dim": 8,
            "input_patch_size": 16,
            "conv_pos": 4,
            "conv_pos_groups": 2,
            "num_buckets": 8,
            "max_distance": 16,
        },
        "vicuna": hf_config.read_config(llama_folder),
        "qformer": {"hidden_size": 64, "num_layers": 1, "num_heads": 1, "mlp_dim": 16},
    }
    lora = LoRAConfig(rank=2, alpha=8.0, targets=("query", "value"))
    config = SalmonnConfig.from_parts(described, lora=lora)
    module = Salmonn(config, rngs=nnx.Rngs(0))
    registry.save_pretrained(module.whisper, described["whisper"], root / "whisper")
    prefix = salmonn.PREFIX
    save(root / "beats", save_params(module.beats, beats.key_table(config.beats), prefix=prefix))
    (root / "beats" / "config.json").write_text(json.dumps(described["beats"]))
    table, kept = salmonn.key_table(config), nnx.Not(salmonn.TRAINED_PARAMS)
    save(root / "own", save_params(module, table, prefix=prefix, skip=kept))
    places = {name: str(root / name) for name in ("whisper", "beats")}
    return {"name": str(root / "own"), **places, "vicuna": str(llama_folder)}


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory):
    """A folder with the dataset `tiny`: a few short synthetic dialogues."""
    from tests.helpers.training import write_tiny_dataset

    folder = tmp_path_factory.mktemp("data")
    write_tiny_dataset(folder, {"train": 12, "validation": 5, "test": 6})
    return folder


@pytest.fixture(scope="session")
def finished_workdir(tiny_data_dir, tmp_path_factory):
    """The work directory of a training of two epochs on `tiny`."""
    from mister_jax.training.loop import train
    from tests.helpers.training import make_tiny_config

    workdir = tmp_path_factory.mktemp("finished") / "run"
    progress = train(make_tiny_config(tiny_data_dir), workdir, quiet=True)
    assert progress.finished and progress.epoch == 2
    return workdir
