"""Writes `whisper.npz` and `wavlm.npz` with outputs of tiny speech encoders of transformers.

    python -m tests.golden.make_speech_encoders

Requires the extra `parity`. Each file contains clips and several models with random weights, in
float32:

| name | content |
|---|---|
| `lengths` | samples of each clip |
| `waveform/0` ... | clips, float16 |
| `MODEL/config` | config.json of the model |
| `MODEL/param/...` | `state_dict` without the decoder of Whisper |
| `MODEL/hidden_states/0` ... | hidden states of each clip, encoded alone, [L + 1, N, D] |

The last hidden states are those after the final norm.
"""

import json
import pathlib

import numpy as np

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
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
_WAVLM = {
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "conv_dim": (4, 5, 6),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
_LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True}
# File -> model -> prefix of the classes in transformers, and fields of the config.
MODELS = {
    "whisper": {
        "whisper": ("Whisper", {**_WHISPER, "num_mel_bins": 80}),
        "whisper_v3": ("Whisper", {**_WHISPER, "num_mel_bins": 128}),
    },
    "wavlm": {
        "wav2vec2": ("Wav2Vec2", _WAVLM),
        "wav2vec2_large": ("Wav2Vec2", {**_WAVLM, **_LARGE, "conv_bias": True}),
        "hubert": ("Hubert", {**_WAVLM, "num_conv_pos_embeddings": 5}),
        "hubert_large": ("Hubert", {**_WAVLM, **_LARGE, "feat_proj_layer_norm": False}),
        "wavlm": ("WavLM", {**_WAVLM, "num_buckets": 16, "max_bucket_distance": 40}),
        "wavlm_large": ("WavLM", {**_WAVLM, **_LARGE}),
    },
}
LENGTHS = {"whisper": (5000, 900), "wavlm": (900, 500, 150, 41)}


def huggingface_model(file, name, seed=0):
    """Returns a model of transformers with random weights and biases."""
    import torch
    import transformers

    torch.manual_seed(seed)
    name_prefix, fields = MODELS[file][name]
    config = getattr(transformers, f"{name_prefix}Config")(**fields)
    model = getattr(transformers, f"{name_prefix}Model")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.ndim > 1 else 0.1) * torch.randn_like(parameter)
    return model


def clips(lengths, seed=0):
    """Returns noise with changing loudness and an offset, exactly representable in float16."""
    random = np.random.default_rng(seed)
    return [
        (random.normal(size=length) * np.linspace(0.02, 0.2, length) + 0.03)
        .astype(np.float16)
        .astype(np.float32)
        for length in lengths
    ]


def hidden_states(model, clip, normalize=False):
    """Returns the hidden states of a model of transformers for one clip, [L + 1, N, D]."""
    import torch
    import transformers

    if model.config.model_type == "whisper":
        seconds = model.config.max_source_positions // 50
        extractor = transformers.WhisperFeatureExtractor(
            model.config.num_mel_bins, chunk_length=seconds
        )
        model = model.encoder
    else:
        extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
    features = extractor(clip, sampling_rate=16_000, return_tensors="pt")
    inputs = features[extractor.model_input_names[0]]
    with torch.no_grad():
        output = model(inputs, output_hidden_states=True)
    states = [*output.hidden_states[:-1], output.last_hidden_state]
    return torch.cat(states).numpy()


def state_dict(model):
    """Returns the tensors by name, without the decoder of Whisper."""
    return {
        key: value.numpy().copy()
        for key, value in model.state_dict().items()
        if not key.startswith("decoder.")
    }


def main():
    for file, models in MODELS.items():
        waveforms = clips(LENGTHS[file])
        arrays = {
            f"waveform/{index}": clip.astype(np.float16) for index, clip in enumerate(waveforms)
        }
        arrays["lengths"] = np.array(LENGTHS[file], np.int32)
        for name in models:
            model = huggingface_model(file, name)
            normalize = name != "wavlm"
            arrays[f"{name}/config"] = np.array(json.dumps(model.config.to_dict()))
            for key, value in state_dict(model).items():
                arrays[f"{name}/param/{key}"] = value
            for index, clip in enumerate(waveforms):
                states = hidden_states(model, clip, normalize)
                arrays[f"{name}/hidden_states/{index}"] = states
        path = pathlib.Path(__file__).with_name(f"{file}.npz")
        np.savez_compressed(path, **arrays)
        print(path.name, path.stat().st_size, "bytes")


if __name__ == "__main__":
    main()
