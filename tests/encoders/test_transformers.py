"""Checkpoints, adapters and front ends compared with transformers and peft.

`TASK_MODELS`, `ADAPTERS` and `FEATURE_EXTRACTORS` are the source of the tables in docs/encoders.md.
"""

import functools
import importlib
import itertools
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from mister_jax.convert.key_table import split_checkpoint
from mister_jax.convert.peft import save_adapter
from mister_jax.convert.safetensors import Checkpoint
from mister_jax.encoders import registry
from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig, add_lora, linear_layers

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings(
        "ignore::DeprecationWarning",
        "ignore::FutureWarning",
        # peft also adapts the decoder of Whisper, which is not in exported adapters.
        "ignore:Found missing adapter keys:UserWarning",
        "ignore:Could not find a config file:UserWarning",
    ),
]

# Model type -> task models whose backbone is loaded.
_TEXT_TASKS = (
    "MaskedLM CausalLM MultipleChoice QuestionAnswering SequenceClassification TokenClassification"
)
_DECODER_TASKS = "CausalLM QuestionAnswering SequenceClassification TokenClassification"
_SPEECH_TASKS = "AudioFrameClassification CTC SequenceClassification XVector"
TASK_MODELS = {
    "bert": (
        "BertForMaskedLM",
        "BertForMultipleChoice",
        "BertForNextSentencePrediction",
        "BertForPreTraining",
        "BertForQuestionAnswering",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertLMHeadModel",
    ),
    "roberta": tuple(f"RobertaFor{task}" for task in _TEXT_TASKS.split()),
    "xlm-roberta": tuple(f"XLMRobertaFor{task}" for task in _TEXT_TASKS.split()),
    "distilbert": tuple(
        f"DistilBertFor{task}" for task in _TEXT_TASKS.split() if task != "CausalLM"
    ),
    "llama": tuple(f"LlamaFor{task}" for task in _DECODER_TASKS.split()),
    "qwen2": tuple(f"Qwen2For{task}" for task in _DECODER_TASKS.split()),
    "whisper": ("WhisperForAudioClassification", "WhisperForConditionalGeneration"),
    "wav2vec2": (
        *(f"Wav2Vec2For{task}" for task in _SPEECH_TASKS.split()),
        "Wav2Vec2ForPreTraining",
    ),
    "hubert": ("HubertForCTC", "HubertForSequenceClassification"),
    "wavlm": tuple(f"WavLMFor{task}" for task in _SPEECH_TASKS.split()),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration",),
}
# Task models without an encoder.
WITHOUT_ENCODER = {"whisper": ("WhisperForCausalLM",)}
# Model type -> class and target modules of the adapters that a test reads. Another test reads an
# "all-linear" adapter of each bare model.
_SPEECH_TARGETS = ("q_proj", "v_proj", "intermediate_dense")
ADAPTERS = {
    "bert": (("BertForSequenceClassification", ("query", "value")),),
    "roberta": (("RobertaForSequenceClassification", ("query", "value")),),
    "xlm-roberta": (("XLMRobertaForTokenClassification", ("query", "output.dense")),),
    "distilbert": (("DistilBertForSequenceClassification", ("q_lin", "v_lin", "lin1")),),
    "llama": (
        ("LlamaForCausalLM", ("q_proj", "v_proj")),
        ("LlamaForSequenceClassification", ("q_proj", "down_proj")),
        ("LlamaForQuestionAnswering", ("q_proj",)),
    ),
    "qwen2": (("Qwen2ForSequenceClassification", ("q_proj", "v_proj")),),
    "whisper": (
        ("WhisperForAudioClassification", ("q_proj", "v_proj")),
        ("WhisperForConditionalGeneration", ("q_proj", "v_proj", "fc1")),
    ),
    "wav2vec2": (("Wav2Vec2ForSequenceClassification", _SPEECH_TARGETS),),
    "hubert": (("HubertForSequenceClassification", _SPEECH_TARGETS),),
    "wavlm": (("WavLMForSequenceClassification", ("intermediate_dense", "gru_rel_pos_linear")),),
    "qwen2_audio": (("Qwen2AudioForConditionalGeneration", ("q_proj", "v_proj", "linear")),),
}
# Model type -> layers of the adapters that are written; () for all layers.
WRITTEN_ADAPTERS = {
    **dict.fromkeys(ADAPTERS, ((),)),
    # In transformers, the other layers of WavLM ignore LoRA.
    "wavlm": (("mlp_in", "mlp_out", "projection"),),
    "qwen2_audio": ((), ("decoder/layers/layers/attention/query",), ("/projection",)),
}
# Model type, norm of the convolutions and `do_normalize` of the feature extractor.
FEATURE_EXTRACTORS = tuple(
    itertools.product(("wav2vec2", "hubert", "wavlm"), ("group", "layer"), (False, True))
)

_BERT = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}
_DECODER = {
    "vocab_size": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
_WAVLM = {
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "conv_dim": (4, 6),
    "conv_kernel": (10, 3),
    "conv_stride": (5, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 6,
    "use_weighted_layer_sum": True,
}
_XVECTOR = {
    "tdnn_dim": (4, 4, 6),
    "tdnn_kernel": (3, 2, 1),
    "tdnn_dilation": (1, 1, 1),
    "xvector_output_dim": 5,
}
_QUANTIZER = {"codevector_dim": 4, "proj_codevector_dim": 4, "num_codevectors_per_group": 4}
_WHISPER = {
    "d_model": 8,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 8,
    "max_source_positions": 50,
    "max_target_positions": 4,
    "vocab_size": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "classifier_proj_size": 6,
    "use_weighted_layer_sum": True,
}
_PLACEHOLDER = 23
CONFIGS = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": {
        "vocab_size": 24,
        "dim": 16,
        "hidden_dim": 20,
        "n_layers": 2,
        "n_heads": 2,
        "max_position_embeddings": 16,
    },
    "llama": _DECODER,
    "qwen2": _DECODER,
    "whisper": _WHISPER,
    "wav2vec2": {**_WAVLM, **_XVECTOR, **_QUANTIZER},
    "hubert": _WAVLM,
    "wavlm": {**_WAVLM, **_XVECTOR, "num_buckets": 16, "max_bucket_distance": 40},
    "qwen2_audio": {
        "audio_config": {
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "max_source_positions": 50,
        },
        "text_config": {**_DECODER, "model_type": "qwen2"},
        "audio_token_index": _PLACEHOLDER,
    },
}
LENGTH = 900
CLIP = (np.random.default_rng(0).normal(size=(1, LENGTH)) * 0.1 + 0.03).astype(np.float32)
IDS = np.array([[2, 5, 6, 7, 8, 9, 3], [2, 5, 6, 8, 3, 0, 0]])
MASK = IDS != 0
PROMPT = np.array([[3, 4, _PLACEHOLDER, 5, 6]])
TEXT = [name for name, it in registry.ARCHITECTURES.items() if it.modality == "text"]


def modeling(model_type):
    name = model_type.replace("-", "_")
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def torch_model(model_type, class_name, seed=0, **fields):
    """Returns a tiny model of transformers with random weights and biases."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(model_type, **{**CONFIGS[model_type], **fields})
    config._attn_implementation = "eager"
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter)
    return model


def bare_class(model_type):
    return next(
        name
        for name in modeling(model_type).__all__
        if name.endswith("Model") and not name.endswith(("PreTrainedModel", "LMHeadModel"))
    )


def backbone(model):
    """Returns the part of a model of transformers that corresponds to our module."""
    if model.config.model_type == "whisper":
        encoder = modeling("whisper").WhisperEncoder
        return next(module for module in model.modules() if isinstance(module, encoder))
    bare = getattr(modeling(model.config.model_type), bare_class(model.config.model_type))
    return next(module for module in model.modules() if isinstance(module, bare))


def torch_hidden(model, do_normalize=None):
    """Returns the hidden states of the backbone at valid positions, [positions, D].

    Without `do_normalize`, the input is normalized as in the published base models.
    """
    import torch
    import transformers

    part, model_type = backbone(model), model.config.model_type
    if model_type in TEXT:
        ids = np.where(MASK, IDS, model.config.pad_token_id)
        inputs = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(MASK).long()}
    elif model_type in ("whisper", "qwen2_audio"):
        bins = getattr(model.config, "audio_config", model.config).num_mel_bins
        extractor = transformers.WhisperFeatureExtractor(bins, chunk_length=1)
        mel = extractor(
            list(CLIP), sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
        )
        inputs = {"input_features": mel["input_features"]}
        if model_type == "qwen2_audio":
            frames = int(mel["attention_mask"].sum())
            count = ((frames - 1) // 2 + 1) // 2
            repeats = np.where(PROMPT[0] == _PLACEHOLDER, count, 1)
            ids = torch.tensor(np.repeat(PROMPT[0], repeats)[None])
            inputs |= {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "feature_attention_mask": mel["attention_mask"],
            }
    else:
        if do_normalize is None:
            do_normalize = model_type != "wavlm"
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize)
        features = extractor(CLIP[0], sampling_rate=16_000, return_tensors="pt")
        inputs = {"input_values": features["input_values"]}
    with torch.no_grad():
        hidden = part(**inputs).last_hidden_state.numpy()
    if model_type in TEXT:
        return hidden[MASK]
    return hidden[0]


@nnx.jit
def run(module, *inputs):
    return module(*inputs)


def module_hidden(module, model_type, pad=0):
    """Returns the hidden states of our module at valid positions, [positions, D]."""
    if model_type in TEXT:
        return np.asarray(run(module, np.where(MASK, IDS, pad), MASK))[MASK]
    lengths = np.array([LENGTH])
    if model_type == "qwen2_audio":
        output = run(module, CLIP, lengths, PROMPT, np.ones(PROMPT.shape, bool))
        return np.asarray(output.hidden_states)[np.asarray(output.mask)]
    hidden, mask = run(module, CLIP, lengths)
    return np.asarray(hidden)[np.asarray(mask)]


def assert_equal_hidden(module, model, expected=None):
    expected = torch_hidden(model) if expected is None else expected
    pad = getattr(model.config, "pad_token_id", None) or 0
    hidden = module_hidden(module, model.config.model_type, pad)
    np.testing.assert_allclose(hidden, expected[: len(hidden)], atol=3e-5, rtol=1e-5)


def load(folder, model_type, **options):
    if model_type == "whisper":
        options["trim"] = False
    return registry.load_module(folder, **options)


def expected_names(module, model_type):
    table = registry.ARCHITECTURES[model_type].key_table(module.config)
    return [name for source in table.values() for name in source.names]


def cases(table):
    """Returns all pairs of a model type and an entry of the table for this type."""
    return [(model_type, entry) for model_type, entries in table.items() for entry in entries]


def test_the_table_contains_every_task_model_of_transformers():
    import transformers

    for model_type, names in TASK_MODELS.items():
        module = modeling(model_type)
        classes = {name: getattr(module, name) for name in module.__all__}
        tasks = {
            name
            for name, task_class in classes.items()
            if isinstance(task_class, type) and issubclass(task_class, transformers.PreTrainedModel)
            if "For" in name or name.endswith("LMHeadModel")
        }
        assert tasks == {*names, *WITHOUT_ENCODER.get(model_type, ())}


@pytest.mark.parametrize(("model_type", "class_name"), cases(TASK_MODELS))
def test_the_backbone_of_a_task_model_is_loaded_without_its_head(model_type, class_name, tmp_path):
    model = torch_model(model_type, class_name)
    model.save_pretrained(tmp_path / "task")
    module = load(tmp_path / "task", model_type)
    assert_equal_hidden(module, model)
    checkpoint = Checkpoint.open(tmp_path / "task")
    rules = registry.ARCHITECTURES[model_type].name_rules
    parts = split_checkpoint(checkpoint, rules, expected_names(module, model_type))
    body = model.base_model if class_name != "WhisperForAudioClassification" else model.encoder
    body.save_pretrained(tmp_path / "body")
    assert len(parts.head) == len(checkpoint) - len(Checkpoint.open(tmp_path / "body"))


@pytest.mark.parametrize(("model_type", "class_name"), cases(WITHOUT_ENCODER))
def test_a_task_model_without_an_encoder_is_rejected(model_type, class_name, tmp_path):
    torch_model(model_type, class_name).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"missing: encoder\.conv1\.bias"):
        load(tmp_path, model_type)


@pytest.mark.parametrize("name", ["lm_head.weight", "encoder.layers.0.extra.weight"])
def test_unknown_tensors_in_the_backbone_are_rejected(name, tmp_path):
    from safetensors.numpy import load_file, save_file

    torch_model("hubert", "HubertForCTC").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {f"hubert.{name}": np.ones(3, np.float32)}, file)
    with pytest.raises(InputError, match=rf"unexpected: hubert\.{name}"):
        load(tmp_path, "hubert")


def random_adapter(model, seed=1, **options):
    """Returns the model in a `peft.PeftModel` with random LoRA."""
    import peft
    import torch

    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 2, "lora_alpha": 3, **options})
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


@functools.cache
def bare_hidden(model_type):
    return torch_hidden(torch_model(model_type, bare_class(model_type)))


@pytest.mark.parametrize("model_type", ADAPTERS)
def test_adapters_of_all_linear_layers_are_read(model_type, tmp_path):
    model = torch_model(model_type, bare_class(model_type))
    model.save_pretrained(tmp_path / "base")
    base = torch_hidden(model)
    model = random_adapter(model, target_modules="all-linear", use_rslora=model_type == "llama")
    model.save_pretrained(tmp_path / "adapter", safe_serialization=model_type != "bert")
    if model_type == "wavlm":  # In transformers, WavLM's attention ignores unmerged LoRA.
        model = model.merge_and_unload()
    expected = torch_hidden(model)
    assert np.abs(expected - base).max() > 0.05
    module = load(tmp_path / "base", model_type, adapter=tmp_path / "adapter")
    assert_equal_hidden(module, model, expected)


@pytest.mark.parametrize(("model_type", "case"), cases(ADAPTERS))
def test_adapters_of_task_models_are_read(model_type, case, tmp_path):
    class_name, targets = case
    model = torch_model(model_type, class_name)
    model.save_pretrained(tmp_path / "base")
    heads = {"classifier", "score", "qa_outputs", "projector", "pre_classifier"}
    heads &= {name for name, _ in model.named_children()}
    model = random_adapter(model, target_modules=list(targets), modules_to_save=sorted(heads))
    model.save_pretrained(tmp_path / "adapter")
    module = load(tmp_path / "base", model_type, adapter=tmp_path / "adapter")
    assert_equal_hidden(module, model)
    saved = Checkpoint.open(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(any(head in name for name in saved) for head in heads)


@pytest.mark.parametrize(("model_type", "targets"), cases(WRITTEN_ADAPTERS))
def test_peft_applies_saved_adapters(model_type, targets, tmp_path):
    import peft
    import transformers

    model = torch_model(model_type, bare_class(model_type))
    model.save_pretrained(tmp_path / "base")
    module = load(tmp_path / "base", model_type)
    targets = targets or tuple(path for path, _ in linear_layers(module))
    lora = LoRAConfig(2, 3, targets=targets, use_rslora=model_type == "llama")
    add_lora(module, lora, rngs=nnx.Rngs(0))
    for number, (_, layer) in enumerate(linear_layers(module)):
        if layer.lora is not None:
            noise = jax.random.normal(jax.random.key(number), layer.lora_b.shape)
            layer.lora_b.set_value(0.3 * noise)
    architecture = registry.ARCHITECTURES[model_type]
    table = architecture.key_table(module.config)
    save_adapter(module, tmp_path / "adapter", table, architecture.name_rules)
    bare = transformers.AutoModel.from_pretrained(tmp_path / "base", attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter").eval()
    expected = torch_hidden(model)
    assert np.abs(expected - bare_hidden(model_type)).max() > 0.05
    assert_equal_hidden(module, model, expected)


@pytest.mark.parametrize("target", ["query", "key", "value", "attention/out"])
def test_adapters_that_peft_would_ignore_are_not_saved(target, tmp_path):
    torch_model("wavlm", "WavLMModel").save_pretrained(tmp_path / "base")
    module = load(tmp_path / "base", "wavlm", lora=LoRAConfig(2, 3, targets=(target,)))
    architecture = registry.ARCHITECTURES["wavlm"]
    table = architecture.key_table(module.config)
    with pytest.raises(InputError, match=r"peft would ignore .*allowed: the merged model"):
        save_adapter(module, tmp_path / "adapter", table, architecture.name_rules)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(("model_type", "norm", "do_normalize"), FEATURE_EXTRACTORS)
def test_the_input_is_normalized_like_in_the_saved_processor(
    model_type, norm, do_normalize, tmp_path
):
    import transformers

    model = torch_model(model_type, bare_class(model_type), feat_extract_norm=norm)
    model.save_pretrained(tmp_path)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "a": 5}
    (tmp_path / "tokens.json").write_text(json.dumps(vocabulary))
    processor = transformers.Wav2Vec2Processor(
        transformers.Wav2Vec2FeatureExtractor(do_normalize=do_normalize),
        transformers.Wav2Vec2CTCTokenizer(tmp_path / "tokens.json"),
    )
    processor.save_pretrained(tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    module = load(tmp_path, model_type)
    assert module.config.normalize is do_normalize
    assert_equal_hidden(module, model, torch_hidden(model, do_normalize))


def test_the_documentation_lists_all_heads_adapters_and_front_ends():
    page = (pathlib.Path(__file__).parents[2] / "docs" / "encoders.md").read_text()
    for model_type, classes in TASK_MODELS.items():
        assert f"| `{model_type}` | {', '.join(f'`{name}`' for name in classes)} |\n" in page
    for model_type, adapters in ADAPTERS.items():
        for name, targets in adapters:
            modules = ", ".join(f"`{target}`" for target in targets)
            assert f"| `{model_type}` | `{name}` | {modules} |\n" in page
    for model_type, norm, normalizes in FEATURE_EXTRACTORS:
        assert f"| `{model_type}` | `{norm}` | {str(normalizes).lower()} |\n" in page
