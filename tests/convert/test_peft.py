"""Reading and writing of LoRA adapters of peft."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mister_jax.convert.params import load_params
from mister_jax.convert.peft import (
    load_adapter,
    read_base_model,
    read_lora_config,
    save_adapter,
)
from mister_jax.encoders import bert as bert_encoder
from mister_jax.encoders.bert import Bert, BertConfig
from mister_jax.encoders.decoder import NAME_RULES, Decoder, DecoderConfig, key_table
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig, add_lora
from tests.helpers.golden import GOLDEN

PREFIX = "base_model.model."
OPTIONS = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 6,
    "lora_dropout": 0.1,
    "bias": "none",
    "target_modules": ["v_proj", "q_proj"],
    "use_rslora": False,
    "rank_pattern": {},
}
LORA = LoRAConfig(rank=2, alpha=6, dropout=0.1, targets=("query", "value"))


class Golden:
    """Golden file with its decoder and key table."""

    def __init__(self, name):
        with np.load(GOLDEN / f"decoder_{name}.npz") as file:
            self.arrays = dict(file)
        self.config = DecoderConfig.from_huggingface(json.loads(str(self.arrays["config"])))
        self.table = key_table(self.config, prefix="")

    def group(self, start):
        return {
            key.removeprefix(start): value
            for key, value in self.arrays.items()
            if key.startswith(start)
        }

    def decoder(self, lora=None):
        decoder = nnx.eval_shape(lambda: Decoder(self.config, rngs=nnx.Rngs(0)))
        load_params(decoder, self.table, self.group("param/"))
        return decoder if lora is None else add_lora(decoder, lora, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def golden():
    return Golden("llama3")


@pytest.fixture
def write(tmp_path, golden):
    """Returns a function that writes an adapter with changed options and returns its folder."""

    def write(tensors=None, **changes):
        tensors = golden.group("lora/") if tensors is None else tensors
        save_file(tensors, tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps({**OPTIONS, **changes}))
        return tmp_path

    return write


def renamed(tensors, old, new):
    return {name.replace(old, new, 1): value for name, value in tensors.items()}


@nnx.jit
def last_and_gradients(decoder, inputs):
    """Returns the last hidden state and gradients, as `make_decoder.last_and_gradients` does."""
    mask = inputs["attention_mask"]

    def total(decoder):
        last = decoder(inputs["input_ids"], mask)
        return jnp.sum(jnp.where(mask[..., None], last * inputs["weights"], 0)), last

    wrt = nnx.DiffState(0, nnx.LoRAParam)
    gradients, last = nnx.grad(total, argnums=wrt, has_aux=True)(decoder)
    return last, gradients


def to_peft_names(gradients):
    """Returns the gradients of the stacked LoRA matrices under the names of peft."""
    layers = gradients["layers"]["layers"]["attention"]
    return {
        f"{PREFIX}layers.{layer}.self_attn.{name}.lora_{matrix}.weight": value[layer].T
        for module, name in (("query", "q_proj"), ("value", "v_proj"))
        for matrix in "AB"
        for value in [np.asarray(layers[module][f"lora_{matrix.lower()}"][...])]
        for layer in range(len(value))
    }


def assert_equal_to_peft(decoder, inputs, last, gradients):
    output, decoder_gradients = last_and_gradients(decoder, inputs)
    mask = inputs["attention_mask"]
    np.testing.assert_allclose(np.asarray(output)[mask], last[mask], atol=1e-4)
    renamed_gradients = to_peft_names(decoder_gradients)
    assert renamed_gradients.keys() == gradients.keys()
    for name, value in gradients.items():
        np.testing.assert_allclose(
            renamed_gradients[name], value, rtol=1e-3, atol=1e-3, err_msg=name
        )


@pytest.mark.parametrize("name", ["llama3", "llama2", "qwen2"])
def test_outputs_and_gradients_equal_the_golden_file(name, write):
    golden = Golden(name)
    folder = write(golden.group("lora/"))
    decoder = golden.decoder(read_lora_config(folder, golden.table))
    assert load_adapter(decoder, folder, golden.table) is decoder
    gradients = golden.group("lora_gradient/")
    expected = golden.arrays["lora_out/last"]
    assert_equal_to_peft(decoder, golden.group("in/"), expected, gradients)


def test_the_lora_config_is_read(golden, write):
    assert read_lora_config(write(), golden.table) == LORA


def test_saving_restores_the_loaded_adapter(golden, write, tmp_path):
    decoder = load_adapter(golden.decoder(LORA), write(), golden.table)
    folder = tmp_path / "new" / "folder"
    save_adapter(decoder, folder, golden.table, base_model="meta-llama/Llama-3.1-8B")
    saved = load_file(folder / "adapter_model.safetensors")
    expected = golden.group("lora/")
    assert saved.keys() == expected.keys()
    jax.tree.map(np.testing.assert_array_equal, saved, expected)
    options = json.loads((folder / "adapter_config.json").read_text())
    assert options["target_modules"] == ["q_proj", "v_proj"]
    assert (options["r"], options["lora_alpha"], options["lora_dropout"]) == (2, 6, 0.1)
    assert options["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"
    assert read_lora_config(folder, golden.table) == LORA


@pytest.mark.parametrize("prefix", NAME_RULES.prefixes)
def test_adapters_of_models_with_and_without_a_head_are_read(golden, write, prefix):
    tensors = renamed(golden.group("lora/"), PREFIX, PREFIX + prefix)
    tensors[f"{PREFIX}score.weight"] = np.ones((3, 16), np.float32)
    decoder = load_adapter(golden.decoder(LORA), write(tensors), golden.table, NAME_RULES)
    expected = golden.group("lora/")[f"{PREFIX}layers.1.self_attn.q_proj.lora_A.weight"]
    np.testing.assert_array_equal(decoder.layers.layers.attention.query.lora_a[1], expected.T)


def test_targets_are_distinguished_from_layers_with_the_same_name(golden, write, tmp_path):
    class TwoDecoders(nnx.Module):
        def __init__(self):
            self.tower, self.decoder = golden.decoder(), golden.decoder()

    model = TwoDecoders()
    table = {
        f"{part}/{path}": source
        for part in ("tower", "decoder")
        for path, source in key_table(golden.config, prefix=f"{part}.").items()
    }
    folder = write(renamed(golden.group("lora/"), PREFIX, f"{PREFIX}decoder."))
    lora = read_lora_config(folder, table)
    assert lora.targets == tuple(
        f"decoder/layers/layers/attention/{name}" for name in ("query", "value")
    )
    load_adapter(add_lora(model, lora, rngs=nnx.Rngs(0)), folder, table)
    assert model.tower.layers.layers.attention.query.lora is None
    save_adapter(model, tmp_path / "saved", table)
    options = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert options["target_modules"] == [
        f"decoder.layers.{layer}.self_attn.{name}"
        for layer in (0, 1)
        for name in ("q_proj", "v_proj")
    ]


def test_one_error_names_all_mismatched_tensors(golden, write):
    tensors = golden.group("lora/")
    first = f"{PREFIX}layers.0.self_attn."
    del tensors[f"{first}q_proj.lora_B.weight"]
    tensors[f"{first}k_proj.lora_A.weight"] = np.zeros((2, 16), np.float32)
    tensors[f"{first}v_proj.lora_A.weight"] = np.zeros((2, 15), np.float32)
    decoder = golden.decoder(LORA)
    before = np.asarray(decoder.layers.layers.attention.query.lora_a[...])
    with pytest.raises(InputError) as error:
        load_adapter(decoder, write(tensors), golden.table)
    for expected in (
        f"missing: {first}q_proj.lora_B.weight",
        f"unexpected: {first}k_proj.lora_A.weight",
        f"mismatched: {first}v_proj.lora_A.weight",
        "adapter_model.safetensors",
    ):
        assert expected in str(error.value)
    assert "\n" not in str(error.value)
    np.testing.assert_array_equal(decoder.layers.layers.attention.query.lora_a[...], before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("peft_type", "IA3"),
        ("bias", "all"),
        ("rank_pattern", {"q_proj": 3}),
        ("use_dora", True),
        ("alpha_pattern", {"q_proj": 3}),
        ("init_lora_weights", "pissa"),
    ],
)
def test_options_that_change_what_lora_computes_are_rejected(golden, write, field, value):
    with pytest.raises(InputError, match=rf"adapter_config\.json: {field}="):
        read_lora_config(write(**{field: value}), golden.table)


@pytest.mark.parametrize(("field", "value"), [("r", 0), ("r", "two"), ("lora_dropout", 1.5)])
def test_invalid_sizes_are_rejected(golden, write, field, value):
    with pytest.raises(InputError, match=r"adapter_config\.json: invalid LoRA options"):
        read_lora_config(write(**{field: value}), golden.table)


def test_an_adapter_with_another_scale_is_rejected(golden, write):
    with pytest.raises(InputError, match=r"lora_alpha / r = 4; allowed: .* 3"):
        load_adapter(golden.decoder(LORA), write(lora_alpha=8), golden.table)
    with pytest.raises(
        InputError, match=r"lora_alpha / r = 3; the module has no LoRA; call add_lora"
    ):
        load_adapter(golden.decoder(), write(), golden.table)


def test_rslora_scales_by_the_square_root_of_the_rank(golden, write, tmp_path):
    folder = write(use_rslora=True)
    lora = read_lora_config(folder, golden.table)
    assert lora == dataclasses.replace(LORA, use_rslora=True)
    np.testing.assert_allclose(lora.scale, 6 / np.sqrt(2))
    decoder = load_adapter(golden.decoder(lora), folder, golden.table)
    save_adapter(decoder, tmp_path / "saved", golden.table)
    assert json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["use_rslora"]
    assert read_lora_config(tmp_path / "saved", golden.table) == lora
    with pytest.raises(InputError, match=r"lora_alpha / sqrt\(r\) = 4.24264; allowed: .* 3"):
        load_adapter(golden.decoder(LORA), folder, golden.table)


def test_the_error_for_a_pytorch_adapter_names_pytorch(golden, write, monkeypatch):
    folder = write()
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"adapter_model\.bin: reading \.bin needs PyTorch"):
        read_lora_config(folder, golden.table)


def test_lora_of_unused_modules_is_ignored_and_of_unknown_modules_rejected(golden, write):
    tensors = golden.group("lora/")
    first = f"{PREFIX}layers.0.self_attn.q_proj"
    pair = {f"lora_{side}.weight": tensors[f"{first}.lora_{side}.weight"] for side in "AB"}
    rules = dataclasses.replace(NAME_RULES, unused=(r"^other\.",))
    others = {f"{PREFIX}other.0.{suffix}": value for suffix, value in pair.items()}
    load_adapter(golden.decoder(LORA), write(tensors | others), golden.table, rules)
    with pytest.raises(InputError, match=r"unexpected: base_model\.model\.other\.0\.lora_A"):
        load_adapter(golden.decoder(LORA), write(tensors | others), golden.table)


def test_lora_that_peft_would_ignore_is_not_saved(golden, write, tmp_path):
    decoder = load_adapter(golden.decoder(LORA), write(), golden.table)
    rules = dataclasses.replace(NAME_RULES, lora_bypassed=(r"v_proj$",))
    message = r"ignore the LoRA of layers\.\{0,1\}\.self_attn\.v_proj,.*allowed: the merged model"
    with pytest.raises(InputError, match=message):
        save_adapter(decoder, tmp_path / "saved", golden.table, rules)
    assert not (tmp_path / "saved").exists()


def test_the_base_model_is_read(golden, write):
    assert read_base_model(write(base_model_name_or_path="org/base")) == "org/base"
    assert read_base_model(write(base_model_name_or_path=None)) is None


def test_adapters_of_other_models_are_rejected(golden, write):
    folder = write(renamed(golden.group("lora/"), "self_attn", "attention"))
    with pytest.raises(InputError, match=r"no LoRA for the model's modules; allowed: .*q_proj"):
        read_lora_config(folder, golden.table)


def test_unreadable_folders_are_rejected(golden, write):
    folder = write()
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        read_lora_config(folder, golden.table)
    for damage in ("{", "[]"):
        (folder / "adapter_config.json").write_text(damage)
        with pytest.raises(InputError, match=r"adapter_config\.json: damaged"):
            read_lora_config(folder, golden.table)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(InputError, match=r"adapter_config\.json: cannot be read"):
        read_lora_config(folder, golden.table)


def test_lora_that_one_adapter_cannot_hold_is_rejected(golden, tmp_path):
    with pytest.raises(ValueError, match="needed: LoRA in at least one layer"):
        save_adapter(golden.decoder(), tmp_path, golden.table)
    decoder = golden.decoder(LORA)
    add_lora(decoder, LoRAConfig(rank=3, alpha=6, targets=("down",)), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="with equal values in all"):
        save_adapter(decoder, tmp_path, golden.table)
    table = {path: source for path, source in golden.table.items() if "query" not in path}
    with pytest.raises(ValueError, match=r"not a single PyTorch Linear: .*attention/query"):
        save_adapter(golden.decoder(LORA), tmp_path, table)


def test_a_folder_that_cannot_be_written_is_rejected(golden, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot be written"):
        save_adapter(golden.decoder(LORA), tmp_path / "file", golden.table)


@pytest.mark.parity
@pytest.mark.parametrize("name", ["llama3", "llama2", "qwen2"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_outputs_equal_peft_after_loading_and_saving(name, tmp_path):
    import peft

    from tests.golden import make_decoder

    inputs = make_decoder.batch()
    peft_model = make_decoder.with_lora(make_decoder.huggingface_model(name))
    peft_model.save_pretrained(tmp_path / "peft")
    last, gradients = make_decoder.last_and_gradients(peft_model, inputs)

    config = DecoderConfig.from_huggingface(peft_model.config.to_dict())
    table = key_table(config, prefix="")
    decoder = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    base = make_decoder.huggingface_model(name)
    tensors = {key: value.numpy() for key, value in base.state_dict().items()}
    load_params(decoder, table, tensors, ignore=NAME_RULES.unused)
    add_lora(decoder, read_lora_config(tmp_path / "peft", table), rngs=nnx.Rngs(0))
    load_adapter(decoder, tmp_path / "peft", table)
    assert_equal_to_peft(decoder, inputs, last, gradients)

    # The saved adapter is loaded onto a model with a head.
    save_adapter(decoder, tmp_path / "saved", key_table(config, "model."))
    causal_lm = make_decoder.huggingface_model(name, causal_lm=True)
    causal_lm.model.load_state_dict(base.state_dict())
    loaded = peft.PeftModel.from_pretrained(causal_lm, tmp_path / "saved")
    output = make_decoder.hidden_states(loaded.eval(), inputs)[-1]
    mask = inputs["attention_mask"]
    np.testing.assert_allclose(output[mask], last[mask], atol=1e-5)


# Adapted modules of BERT, as named in peft.
BERT_TARGETS = ("query", "value", "attention.output.dense", "intermediate.dense")
# Path of a module in mister_jax -> its name in PyTorch.
BERT_LAYERS = {
    ("attention", "query"): "attention.self.query",
    ("attention", "value"): "attention.self.value",
    ("attention", "out"): "attention.output.dense",
    ("mlp_in",): "intermediate.dense",
}


@pytest.mark.parity
@pytest.mark.parametrize("name", ["bert", "roberta"])
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_bert_outputs_equal_peft_after_loading_and_saving(name, tmp_path):
    import peft
    import torch

    from tests.golden import make_bert, make_decoder

    batch = make_bert.batch(name)
    mask, types = batch["attention_mask"], batch["token_type_ids"]
    weights = np.random.default_rng(0).normal(size=(*mask.shape, 16)).astype(np.float32)
    tensors = {key: torch.tensor(value).long() for key, value in batch.items()}
    if name == "bert":  # Positions count only valid tokens, as in the golden file.
        tensors["position_ids"] = (tensors["attention_mask"].cumsum(1) - 1).clamp(min=0)
    peft_model = make_decoder.with_lora(make_bert.huggingface_model(name), targets=BERT_TARGETS)
    peft_model.save_pretrained(tmp_path / "peft")
    expected = peft_model(**tensors).last_hidden_state
    (expected * torch.tensor(weights * mask[..., None])).sum().backward()

    config = BertConfig.from_huggingface(peft_model.config.to_dict())
    table = bert_encoder.key_table(config)
    bert = nnx.eval_shape(lambda: Bert(config, rngs=nnx.Rngs(0)))
    base = make_bert.huggingface_model(name).state_dict()
    load_params(
        bert,
        table,
        {key: value.numpy() for key, value in base.items()},
        ignore=bert_encoder.NAME_RULES.unused,
    )
    add_lora(bert, read_lora_config(tmp_path / "peft", table), rngs=nnx.Rngs(0))
    load_adapter(bert, tmp_path / "peft", table)

    @nnx.jit
    def last_and_gradients(bert):
        def total(bert):
            last = bert(batch["input_ids"], mask, token_type_ids=types)
            return jnp.sum(jnp.where(mask[..., None], last * weights, 0)), last

        wrt = nnx.DiffState(0, nnx.LoRAParam)
        gradients, last = nnx.grad(total, argnums=wrt, has_aux=True)(bert)
        return last, gradients

    last, gradients = last_and_gradients(bert)
    expected = expected.detach().numpy()[mask]
    np.testing.assert_allclose(np.asarray(last)[mask], expected, atol=1e-4)
    compared = 0
    for path, torch_name in BERT_LAYERS.items():
        module = gradients["layers"]["layers"]
        for part in path:
            module = module[part]
        for matrix in "AB":
            for layer, value in enumerate(np.asarray(module[f"lora_{matrix.lower()}"][...])):
                key = f"{PREFIX}encoder.layer.{layer}.{torch_name}.lora_{matrix}.default.weight"
                expected_gradient = peft_model.get_parameter(key).grad.numpy()
                np.testing.assert_allclose(
                    value.T, expected_gradient, rtol=1e-3, atol=1e-3, err_msg=key
                )
                compared += 1
    assert compared == sum("lora_" in key for key, _ in peft_model.named_parameters())

    save_adapter(bert, tmp_path / "saved", table)
    loaded = peft.PeftModel.from_pretrained(make_bert.huggingface_model(name), tmp_path / "saved")
    with torch.no_grad():
        output = loaded.eval()(**tensors).last_hidden_state.numpy()
    np.testing.assert_allclose(output[mask], expected, atol=1e-5)
