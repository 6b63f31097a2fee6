"""Tiny encoders with random weights, in folders like those on the Hugging Face Hub."""

import json

import tokenizers
from flax import nnx
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mister_jax.convert.params import save_params
from mister_jax.convert.safetensors import save_tensors
from mister_jax.encoders import beats, hf_config, registry, salmonn
from mister_jax.encoders.bert import Bert, BertConfig
from mister_jax.encoders.salmonn import Salmonn, SalmonnConfig
from mister_jax.nn.initialization import create_in_one_program
from mister_jax.nn.lora import LoRAConfig
from tests.helpers.tiny_datasets import EMOTION_WORDS, NEUTRAL_WORDS

LLAMA_CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaModel"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# Reads windows of 0.8 s.
WHISPER_CONFIG = {
    "model_type": "whisper",
    "num_mel_bins": 8,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "max_source_positions": 40,
    # transformers also creates the decoder, which needs these fields.
    "decoder_layers": 1,
    "decoder_attention_heads": 2,
}
# Reads windows of 0.8 s.
QWEN_CONFIG = {
    "model_type": "qwen2_audio",
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
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    },
}
WAVLM_CONFIG = {
    "model_type": "wavlm",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "conv_dim": [8, 8],
    "conv_kernel": [20, 20],
    "conv_stride": [16, 20],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_proj_dropout": 0.1,
}
# The parts of SALMONN other than its language model. Its Whisper reads windows of 1 s.
SALMONN_CONFIGS = {
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
    "qformer": {"hidden_size": 64, "num_layers": 1, "num_heads": 1, "mlp_dim": 16},
}


def make_word_tokenizer(bert):
    """Returns a tokenizer of a few words with the special tokens of BERT or of Llama."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"] if bert else ["<unk>", "<s>", "</s>"]
    words = [*special, *NEUTRAL_WORDS, *(word for pair in EMOTION_WORDS.values() for word in pair)]
    vocabulary = {word: index for index, word in enumerate(words)}
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


def save_bert(folder):
    tokenizer = make_word_tokenizer(bert=True)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        mlp_dim=24,
        num_layers=2,
        num_heads=4,
        num_positions=20,
    )
    module = create_in_one_program(lambda rngs: Bert(config, rngs=rngs), nnx.Rngs(0))
    registry.save_pretrained(module, config.to_huggingface(), folder, tokenizer)


def save_llama(folder):
    tokenizer = make_word_tokenizer(bert=False)
    save_encoder(folder, {**LLAMA_CONFIG, "vocab_size": len(tokenizer)}, tokenizer)


def save_qwen2_audio(folder):
    tokenizer = make_word_tokenizer(bert=False)
    tokenizer.add_tokens(["<|audio_bos|>", "<|AUDIO|>", "<|audio_eos|>"], special_tokens=True)
    config = {
        **QWEN_CONFIG,
        "audio_token_index": tokenizer.convert_tokens_to_ids("<|AUDIO|>"),
        "text_config": {**QWEN_CONFIG["text_config"], "vocab_size": len(tokenizer)},
    }
    save_encoder(folder, config, tokenizer)


def save_encoder(folder, config, tokenizer=None):
    """Saves an encoder with random weights from seed 0."""
    module = registry.create_module(config, rngs=nnx.Rngs(0))
    registry.save_pretrained(module, config, folder, tokenizer)


def save_salmonn(folder, llama_folder):
    """Saves the checkpoints of a SALMONN with a Llama; returns SALMONN's encoder options."""
    configs = {**SALMONN_CONFIGS, "vicuna": hf_config.read_config(llama_folder)}
    lora = LoRAConfig(rank=2, alpha=8.0, targets=("query", "value"))
    config = SalmonnConfig.from_parts(configs, lora=lora)
    module = create_in_one_program(lambda rngs: Salmonn(config, rngs=rngs), nnx.Rngs(0))
    registry.save_pretrained(module.whisper, configs["whisper"], folder / "whisper")
    beats_table = beats.key_table(config.beats)
    save_tensors(folder / "beats", save_params(module.beats, beats_table, prefix=salmonn.PREFIX))
    (folder / "beats" / "config.json").write_text(json.dumps(configs["beats"]))
    trained = save_params(
        module,
        salmonn.key_table(config),
        prefix=salmonn.PREFIX,
        skip=nnx.Not(salmonn.TRAINED_PARAMS),
    )
    save_tensors(folder / "trained", trained)
    return {
        "name": str(folder / "trained"),
        "whisper": str(folder / "whisper"),
        "beats": str(folder / "beats"),
        "vicuna": str(llama_folder),
    }
