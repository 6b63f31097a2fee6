"""SALMONN: Whisper and BEATs, connected to Vicuna by a window-level Q-Former (arXiv 2310.13289).

SALMONN maps waveforms and prompts to the language model's last hidden states. The language-model
head is not implemented. Clips shorter than 1 s are padded with silence, and clips longer than 30 s
are truncated. Whisper always encodes 30 s, so every clip yields 88 speech tokens.
Shape letters: B clips, S samples, T Whisper frames (20 ms), P prompt tokens, W windows, Q queries
per window, A speech tokens, which replace one prompt token, N = P - 1 + A positions, D hidden size
of the language model.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mister_jax.config_checks import invalid_field
from mister_jax.convert.key_table import KeyTable, Source, layer_names, linear, norm
from mister_jax.convert.params import load_backbone, load_params
from mister_jax.convert.safetensors import Checkpoint, Tensor
from mister_jax.encoders import beats as beats_encoder
from mister_jax.encoders import decoder, frontends
from mister_jax.encoders import whisper as whisper_encoder
from mister_jax.encoders.audio_prompt import SpeechLLM
from mister_jax.encoders.beats import Beats, BeatsConfig
from mister_jax.encoders.decoder import Decoder, DecoderConfig
from mister_jax.encoders.hf_config import SHARED_OPTIONS, TYPE_OPTIONS, select_options
from mister_jax.encoders.layers import dtypes, gelu
from mister_jax.encoders.whisper import Whisper, WhisperConfig
from mister_jax.errors import InputError
from mister_jax.nn import ScannedLayers
from mister_jax.nn.lora import LoRAConfig
from mister_jax.nn.masking import length_mask


@dataclasses.dataclass(frozen=True)
class QFormerConfig:
    """Config of `WindowQFormer`; the defaults match SALMONN.

    Attributes:
      hidden_size: Size of the queries.
      num_layers: Number of layers.
      num_heads: Number of attention heads; divides `hidden_size`.
      mlp_dim: Hidden size of the MLPs.
      num_queries: Number of queries Q per window.
      window: Number of frames per window.
      stride: Number of frames from the start of one window to the start of the next.
      layer_norm_epsilon: Epsilon of the LayerNorms in the layers.
      input_norm_epsilon: Epsilon of the LayerNorms on the inputs.
      dtype: Computation dtype.
      param_dtype: Parameter dtype.
    """

    hidden_size: int = 768
    num_layers: int = 2
    num_heads: int = 12
    mlp_dim: int = 3072
    num_queries: int = 1
    window: int = 17
    stride: int = 17
    layer_norm_epsilon: float = 1e-12
    input_norm_epsilon: float = 1e-5
    dtype: str = "float32"
    param_dtype: str = "float32"

    def __post_init__(self):
        if self.hidden_size % self.num_heads:
            raise invalid_field(self, "hidden_size", f"multiples of num_heads={self.num_heads}")

    def num_tokens(self, num_frames: int) -> int:
        """Returns the number of tokens A for T frames; an incomplete last window yields none."""
        return self.num_queries * max(0, (num_frames - self.window) // self.stride + 1)


@dataclasses.dataclass(frozen=True)
class SalmonnConfig:
    """Config of `Salmonn`.

    Attributes:
      whisper: Config of Whisper; `trim` must be False. `whisper.max_positions` limits the clip
        length.
      beats: Config of BEATs, which encodes sounds other than speech.
      qformer: Config of the Q-Former between the encoders and the language model.
      decoder: Config of the language model, with LoRA.
      min_samples: Length to which shorter clips are padded with silence.
      placeholder: Token that stands for the speech in a prompt; not in the vocabulary.
    """

    whisper: WhisperConfig
    beats: BeatsConfig
    qformer: QFormerConfig
    decoder: DecoderConfig
    min_samples: int = frontends.SAMPLE_RATE
    placeholder: int = -1

    def __post_init__(self):
        if self.whisper.trim:
            raise ValueError("SalmonnConfig.whisper.trim=True; allowed: False")
        if self.min_samples > self.max_samples:
            raise invalid_field(self, "min_samples", f"at most {self.max_samples}, Whisper's limit")

    @classmethod
    def salmonn_7b(cls, **changes: Any) -> SalmonnConfig:
        """Returns the config of SALMONN-7B: Whisper large-v2, BEATs iter3+, Vicuna 7B v1.5.

        The `changes`, such as `remat`, apply to the language model's config. `dtype` and
        `param_dtype` also apply to all other parts, and `attention_implementation` also applies to
        Whisper.
        """
        types = select_options(changes, *TYPE_OPTIONS)
        shared = select_options(changes, *SHARED_OPTIONS)
        lora = LoRAConfig(rank=8, alpha=32, dropout=0.1, targets=("query", "value"))
        return cls(
            whisper=WhisperConfig.large_v2(trim=False, **shared),
            beats=BeatsConfig.iter3_plus(**types),
            qformer=QFormerConfig(**types),
            decoder=DecoderConfig.vicuna_7b(**{"lora": lora, **changes}),
        )

    @classmethod
    def salmonn_13b(cls, **changes: Any) -> SalmonnConfig:
        """Returns the config of SALMONN-13B: `salmonn_7b` with Vicuna 13B v1.1."""
        sizes: dict[str, Any] = {
            "hidden_size": 5120,
            "mlp_dim": 13824,
            "num_layers": 40,
            "num_heads": 40,
            "num_key_value_heads": 40,
            "norm_epsilon": 1e-6,
        }
        return cls.salmonn_7b(**{**sizes, **changes})

    @classmethod
    def from_parts(
        cls,
        backbone_config: Mapping[str, Any],
        *,
        tower: Mapping[str, Any] | None = None,
        **changes: Any,
    ) -> SalmonnConfig:
        """Creates a config from the configs of the four checkpoints.

        Args:
          backbone_config: Result of `speech.read_backbone_config`, with "whisper" and "vicuna"
            (contents of their config.json files), "beats" (the `cfg` in its checkpoint) and
            "qformer" (fields of `QFormerConfig`).
          tower: Further fields of Whisper's config, such as `mask_spectrogram`.
          **changes: Changes as in `salmonn_7b`, except that `attention_implementation` applies only
            to the decoder.

        Raises:
          InputError: The value of a field is not supported.
        """
        types = select_options(changes, *TYPE_OPTIONS)
        whisper = dict(tower or {}) | types | {"trim": False}
        try:
            return cls(
                WhisperConfig.from_huggingface(backbone_config["whisper"], **whisper),
                BeatsConfig.from_checkpoint(backbone_config["beats"], **types),
                QFormerConfig(**backbone_config["qformer"], **types),
                DecoderConfig.from_huggingface(backbone_config["vicuna"], **changes),
            )
        except ValueError as error:
            raise InputError(f"SALMONN: {error}") from error

    @property
    def max_samples(self) -> int:
        """Maximum number of samples in a clip; longer clips are truncated."""
        return self.whisper.max_samples

    @property
    def hidden_size(self) -> int:
        """Hidden size D of the language model."""
        return self.decoder.hidden_size


class PostNormAttention(nnx.Module):
    """Attention over all keys, followed by a residual connection and a LayerNorm."""

    def __init__(self, key_dim: int, config: QFormerConfig, *, rngs: nnx.Rngs):
        hidden_size = config.hidden_size
        options = dtypes(config) | {"rngs": rngs}
        self.num_heads = config.num_heads
        self.query = nnx.Linear(hidden_size, hidden_size, **options)
        self.key = nnx.Linear(key_dim, hidden_size, **options)
        self.value = nnx.Linear(key_dim, hidden_size, **options)
        self.out = nnx.Linear(hidden_size, hidden_size, **options)
        self.norm = nnx.LayerNorm(hidden_size, epsilon=config.layer_norm_epsilon, **options)

    def __call__(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """Transforms queries x, [B, Q, hidden_size], by attention to `keys`, [B, T, key_dim]."""

        def split_heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*projected.shape[:2], self.num_heads, -1)

        attended = jax.nn.dot_product_attention(
            split_heads(self.query(x)), split_heads(self.key(keys)), split_heads(self.value(keys))
        )
        return self.norm(x + self.out(attended.reshape(x.shape)))


class QFormerLayer(nnx.Module):
    """Self-attention over the queries, cross-attention to a window, and an MLP."""

    def __init__(self, frame_dim: int, config: QFormerConfig, *, rngs: nnx.Rngs):
        hidden_size = config.hidden_size
        options = dtypes(config) | {"rngs": rngs}
        self.attention = PostNormAttention(hidden_size, config, rngs=rngs)
        self.cross_attention = PostNormAttention(frame_dim, config, rngs=rngs)
        self.mlp_in = nnx.Linear(hidden_size, config.mlp_dim, **options)
        self.mlp_out = nnx.Linear(config.mlp_dim, hidden_size, **options)
        self.mlp_norm = nnx.LayerNorm(hidden_size, epsilon=config.layer_norm_epsilon, **options)

    def __call__(self, x: jax.Array, frames: jax.Array, **_: Any) -> jax.Array:
        """Transforms queries x, [B W, Q, hidden_size], for windows, [B W, window, frame_dim]."""
        x = self.cross_attention(self.attention(x, x), frames)
        return self.mlp_norm(x + self.mlp_out(gelu(self.mlp_in(x))))


class WindowQFormer(nnx.Module):
    """Q-Former that applies the same queries to each window of the two encoders' outputs.

    Args:
      speech_dim: Feature size of Whisper's output frames.
      sound_dim: Feature size of BEATs' output tokens.
      out_dim: Size D of the speech tokens.
      config: Q-Former config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(
        self,
        speech_dim: int,
        sound_dim: int,
        out_dim: int,
        config: QFormerConfig,
        *,
        rngs: nnx.Rngs,
    ):
        self.config = config
        options = dtypes(config) | {"rngs": rngs}
        input_norm = {"epsilon": config.input_norm_epsilon, **options}
        self.speech_norm = nnx.LayerNorm(speech_dim, **input_norm)
        self.sound_norm = nnx.LayerNorm(sound_dim, **input_norm)
        queries = 0.02 * jax.random.normal(rngs.params(), (config.num_queries, config.hidden_size))
        self.queries = nnx.Param(queries.astype(options["param_dtype"]))
        self.query_norm = nnx.LayerNorm(
            config.hidden_size, epsilon=config.layer_norm_epsilon, **options
        )
        self.layers = ScannedLayers(
            lambda rngs: QFormerLayer(speech_dim + sound_dim, config, rngs=rngs),
            config.num_layers,
            rngs=rngs,
        )
        self.projection = nnx.Linear(config.hidden_size, out_dim, **options)

    def __call__(self, speech: jax.Array, sound: jax.Array, sound_mask: jax.Array) -> jax.Array:
        """Computes the speech tokens of clips.

        The shorter of the two inputs is zero-padded. The queries also attend to the zeros.

        Args:
          speech: Frames from Whisper, [B, T, speech_dim].
          sound: Tokens from BEATs, [B, T', sound_dim]; token n is concatenated with frame n.
          sound_mask: Valid tokens, [B, T'] bool; other tokens are replaced with zeros.

        Returns:
          Speech tokens, [B, A, D].
        """
        config = self.config
        sound = jnp.where(sound_mask[..., None], self.sound_norm(sound), 0)
        length = max(speech.shape[1], sound.shape[1])
        frames = jnp.concatenate(
            [
                jnp.pad(part, ((0, 0), (0, length - part.shape[1]), (0, 0)))
                for part in (self.speech_norm(speech), sound)
            ],
            axis=-1,
        )  # [B, T, speech_dim + sound_dim]
        starts = config.stride * np.arange(config.num_tokens(length) // config.num_queries)
        windows = frames[:, starts[:, None] + np.arange(config.window)]
        windows = windows.reshape(-1, *windows.shape[2:])  # [B W, window, speech_dim + sound_dim]
        queries = self.query_norm(self.queries[...])
        queries = jnp.broadcast_to(queries, (windows.shape[0], *queries.shape))
        hidden, _ = self.layers(queries, windows)  # [B W, Q, hidden_size]
        tokens = self.projection(hidden)  # [B W, Q, D]
        return tokens.reshape(frames.shape[0], -1, tokens.shape[-1])


class Salmonn(SpeechLLM):
    """SALMONN without the language-model head.

    Args:
      config: Model config.
      rngs: RNGs for parameter initialization.
    """

    def __init__(self, config: SalmonnConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.whisper = Whisper(config.whisper, rngs=rngs)
        self.beats = Beats(config.beats, rngs=rngs)
        self.qformer = WindowQFormer(
            config.whisper.hidden_size,
            config.beats.hidden_size,
            config.decoder.hidden_size,
            config.qformer,
            rngs=rngs,
        )
        self.decoder = Decoder(config.decoder, rngs=rngs)

    def encode_audio(
        self, waveform: jax.Array, lengths: jax.Array, **options: Any
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes clips with both encoders and the Q-Former; every clip has A valid vectors."""
        config = self.config
        valid = length_mask(lengths, waveform.shape[1])
        waveform = jnp.where(valid, waveform, 0)[:, : config.max_samples]
        padding = max(0, config.min_samples - waveform.shape[1])
        waveform = jnp.pad(waveform, ((0, 0), (0, padding)))
        # The silence after a short clip counts as part of the clip.
        lengths = jnp.clip(lengths, config.min_samples, config.max_samples)

        speech, _ = self.whisper(waveform, lengths, **options)  # [B, T, hidden_size of Whisper]
        fbank = beats_encoder.compute_fbank(waveform, config.beats)
        # A clip's mask does not depend on its batch: it equals the mask that the official code
        # computes for a batch of one clip.
        num_tokens = config.beats.num_tokens(frontends.kaldi_fbank_lengths(lengths))
        token_mask = length_mask(num_tokens, config.beats.num_tokens(fbank.shape[1]))
        tokens = self.qformer(speech, self.beats(fbank, token_mask), token_mask)  # [B, A, D]
        return tokens, jnp.full(len(tokens), tokens.shape[1])


def prompt_tokens(tokenizer: Any, prompt: str, config: SalmonnConfig) -> list[int]:
    """Tokenizes an instruction in SALMONN's prompt template.

    As in training, the texts before and after the speech are tokenized separately.

    Raises:
      InputError: The tokenizer has no beginning-of-text token.
    """
    if tokenizer.bos_token_id is None:
        raise InputError(
            "SALMONN: tokenizer without bos_token; allowed: Vicuna's tokenizer, which has <s>"
        )

    def tokenize(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    before, after = tokenize("USER: <Speech>"), tokenize(f"</Speech> {prompt}\nASSISTANT:")
    return [tokenizer.bos_token_id, *before, config.placeholder, *after]


PREFIX = "model."
"""Prefix of parameter names in the SALMONN and BEATs checkpoints."""
# Tensors that are not loaded: training state, buffers and copies of parameters.
_IGNORED = (
    r"^(optimizer|scaler|config)\.",
    r"\.position_ids$",
    r"\.rotary_emb\.inv_freq$",
    r"(^|\.)beats\.encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight$",
)
_LLM_LAYER = "llama_model.base_model.model.model.layers.{}"
_QFORMER_LAYER = "speech_Qformer.bert.encoder.layer.{}"
_HEAD_DIM = 64  # As in BERT; the checkpoint does not store the number of heads.

# These tables map the modules of the Q-Former and its layers to their names in the checkpoint.
_NORMS = {
    "speech_norm": "ln_speech",
    "sound_norm": "ln_audio",
    "query_norm": "speech_Qformer.bert.embeddings.LayerNorm",
}
_LAYER_NORMS = {
    "attention/norm": "attention.output.LayerNorm",
    "cross_attention/norm": "crossattention.output.LayerNorm",
    "mlp_norm": "output_query.LayerNorm",
}
_LAYER_LINEARS = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "cross_attention/query": "crossattention.self.query",
    "cross_attention/key": "crossattention.self.key",
    "cross_attention/value": "crossattention.self.value",
    "cross_attention/out": "crossattention.output.dense",
    "mlp_in": "intermediate_query.dense",
    "mlp_out": "output_query.dense",
}
_LORA = {"query": "q_proj", "value": "v_proj"}


def key_table(config: SalmonnConfig) -> KeyTable:
    """Returns the tensor names in SALMONN's checkpoint for the `TRAINED_PARAMS` of `Salmonn`."""
    num_layers = config.qformer.num_layers
    table = {
        "qformer/queries": Source(
            ("speech_query_tokens",),
            combine=lambda tokens: tokens[0][0],
            split=lambda tokens: [np.asarray(tokens)[None]],
        ),
        **linear("qformer/projection", "speech_llama_proj"),
    }
    for path, name in _NORMS.items():
        table |= norm(f"qformer/{path}", name)
    for path, name in _LAYER_LINEARS.items():
        table |= linear(f"qformer/layers/layers/{path}", f"{_QFORMER_LAYER}.{name}", num_layers)
    for path, name in _LAYER_NORMS.items():
        table |= norm(f"qformer/layers/layers/{path}", f"{_QFORMER_LAYER}.{name}", num_layers)
    for path, name in _LORA.items():
        for side in ("a", "b"):
            pattern = f"{_LLM_LAYER}.self_attn.{name}.lora_{side.upper()}.default.weight"
            table[f"decoder/layers/layers/attention/{path}/lora_{side}"] = Source(
                layer_names(pattern, config.decoder.num_layers), axes=(1, 0), stacked=True
            )
    return table


def read_sizes(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads the sizes of the trained parameters from SALMONN's checkpoint.

    Returns:
      "qformer" (fields of `QFormerConfig`) and "lora_rank" (rank of the LoRA).

    Raises:
      InputError: The file is not a SALMONN checkpoint.
    """

    def shape(name: str) -> tuple[int, ...]:
        name = f"{PREFIX}{name}"
        if name not in checkpoint:
            raise InputError(f"{checkpoint.path}: not a SALMONN checkpoint: no tensor {name}")
        return tuple(checkpoint[name].shape)

    _, num_queries, hidden_size = shape("speech_query_tokens")
    layer = re.escape(_QFORMER_LAYER).replace(r"\{\}", r"(\d+)")
    layers = {match[1] for name in checkpoint if (match := re.search(rf"{layer}\.", name))}
    return {
        "qformer": {
            "hidden_size": hidden_size,
            "num_layers": len(layers),
            "num_heads": max(1, hidden_size // _HEAD_DIM),
            "mlp_dim": shape(f"{_QFORMER_LAYER.format(0)}.intermediate_query.dense.weight")[0],
            "num_queries": num_queries,
        },
        "lora_rank": shape(f"{_LLM_LAYER.format(0)}.self_attn.q_proj.lora_A.default.weight")[0],
    }


def load_salmonn(
    module: Salmonn,
    *,
    whisper: Mapping[str, Tensor],
    beats: Mapping[str, Tensor],
    vicuna: Mapping[str, Tensor],
    salmonn: Mapping[str, Tensor],
    shardings: Any = None,
) -> Salmonn:
    """Fills the parameters of `Salmonn` from the checkpoints of its parts; see `load_params`.

    Args:
      module: Concrete module, or abstract module from `nnx.eval_shape`, with LoRA on queries and
        values.
      whisper: Whisper checkpoint in the transformers format, with or without a head.
      beats: BEATs checkpoint as released, with the prefix "model.".
      vicuna: Vicuna checkpoint in the transformers format, with or without a head.
      salmonn: SALMONN checkpoint as released, with the prefix "model.".
      shardings: Sharding for all parameters, or a tree of shardings for the module.

    Raises:
      InputError: Tensors of a checkpoint are missing, unexpected, mismatched or not finite.
      ValueError: The module has LoRA on layers other than queries and values.
    """
    config = module.config

    def load_part(load: Callable[..., Any], part: str, table: KeyTable, *args: Any, **kwargs: Any):
        part_table = {f"{part}/{path}": source for path, source in table.items()}
        skip = nnx.Any(nnx.Not(_is_inside(part)), nnx.LoRAParam)
        load(module, part_table, *args, shardings=shardings, skip=skip, **kwargs)

    whisper_table = whisper_encoder.key_table(config.whisper)
    load_part(load_backbone, "whisper", whisper_table, whisper, whisper_encoder.NAME_RULES)
    beats_table = beats_encoder.key_table(config.beats)
    ignored = beats_encoder.IGNORED
    load_part(load_params, "beats", beats_table, beats, prefix=PREFIX, ignore=ignored)
    decoder_table = decoder.key_table(config.decoder, "")
    load_part(load_backbone, "decoder", decoder_table, vicuna, decoder.NAME_RULES)
    return load_params(
        module,
        key_table(config),
        salmonn,
        prefix=PREFIX,
        ignore=_IGNORED,
        shardings=shardings,
        skip=nnx.Not(TRAINED_PARAMS),
    )


def _is_inside(part: str) -> Callable[[tuple[Any, ...], Any], bool]:
    """Returns an NNX filter for the variables of a part."""
    return lambda path, _: path[0] == part


TRAINED_PARAMS = nnx.Any(_is_inside("qformer"), nnx.LoRAParam)
"""NNX filter for the parameters in SALMONN's checkpoint; `key_table` maps their names."""
