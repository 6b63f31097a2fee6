"""Writes `qwen2_audio.npz` with outputs of a tiny Qwen2-Audio of transformers for three clips.

    python -m tests.golden.make_qwen2_audio

Requires the extra `parity`. Groups of arrays: `config` (content of config.json), `param/` (tensors
of the saved checkpoint), `in/` (inputs; waveforms are int8) and `out/` (hidden states, mask, and
positions of audio).
"""

import json
import pathlib
import tempfile

import numpy as np

FILE = pathlib.Path(__file__).with_name("qwen2_audio.npz")
PLACEHOLDER = 29
# Longer than the tower's window of one second, an odd number of positions, and very short.
SAMPLES = (17000, 9250, 1300)
PROMPTS = ((3, 4, PLACEHOLDER, 5, 6, 7), (PLACEHOLDER, 8), (9, 10, 11, PLACEHOLDER))


def clips():
    """Returns noise [B, S] int8 with zeros after each clip, and the lengths [B]."""
    random = np.random.default_rng(0)
    waveform = np.zeros((len(SAMPLES), max(SAMPLES)), np.int8)
    for row, count in enumerate(SAMPLES):
        waveform[row, :count] = random.normal(scale=20, size=count)
    return waveform, np.array(SAMPLES)


def padded(sequences):
    """Returns tokens [B, P] with zeros on the right, and their mask."""
    tokens = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    mask = np.zeros(tokens.shape, bool)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = sequence
        mask[row, : len(sequence)] = True
    return tokens, mask


def make():
    """Returns all arrays of the file."""
    import torch
    from safetensors.numpy import load_file
    from transformers import (
        Qwen2AudioConfig,
        Qwen2AudioForConditionalGeneration,
        WhisperFeatureExtractor,
    )

    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "num_mel_bins": 8,
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "max_source_positions": 50,
        },
        text_config={
            "model_type": "qwen2",
            "vocab_size": 30,
            "hidden_size": 24,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
        },
        audio_token_index=PLACEHOLDER,
    )
    torch.manual_seed(0)
    model = Qwen2AudioForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1 if "norm" in name and "weight" in name else 0, 0.3)

    waveform, lengths = clips()
    extractor = WhisperFeatureExtractor(feature_size=8, chunk_length=1)
    mel = extractor(
        [
            row[:count].astype(np.float32) / 2**7
            for row, count in zip(waveform, lengths, strict=True)
        ],
        sampling_rate=16000,
        return_attention_mask=True,
        return_tensors="pt",
    )
    # Repeat the placeholder, as the processor of transformers does.
    counts = [((frames - 1) // 2 + 1) // 2 for frames in mel["attention_mask"].sum(-1).tolist()]
    expanded = [
        [token for part in prompt for token in [part] * (count if part == PLACEHOLDER else 1)]
        for prompt, count in zip(PROMPTS, counts, strict=True)
    ]
    tokens, mask = padded(expanded)
    with torch.no_grad():
        hidden = model.model(
            input_ids=torch.tensor(tokens),
            attention_mask=torch.tensor(mask.astype(np.int64)),
            input_features=mel["input_features"],
            feature_attention_mask=mel["attention_mask"],
        ).last_hidden_state

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        weights = load_file(f"{folder}/model.safetensors")
    prompt, prompt_mask = padded(PROMPTS)
    return {
        "config": np.array(json.dumps(config.to_dict())),
        **{f"param/{name}": value for name, value in weights.items()},
        "in/waveform": waveform,
        "in/lengths": lengths,
        "in/prompt": prompt,
        "in/prompt_mask": prompt_mask,
        "out/hidden": hidden.numpy(),
        "out/mask": mask,
        "out/audio_mask": (tokens == PLACEHOLDER) & mask,
    }


if __name__ == "__main__":
    np.savez_compressed(FILE, **make())
