"""Fine-tunes a speech encoder on single utterances of a corpus (stage 1).

    mister-jax train --config=speech_encoder:DATASET,ENCODER --workdir=DIR

DATASET is a key of `DATASETS` or the name of a dataset from `mister-jax prepare`. ENCODER is a key
of `ENCODERS`; `--config.encoder.options.name=FOLDER` reads the encoder from a folder.

Small encoders are fully fine-tuned. LLMs are fine-tuned with LoRA, and their audio towers are
frozen. Qwen2-Audio uses the recipe of the released code: rank 16 and alpha 8, on the language
model's queries and keys. SALMONN continues from the LoRA weights in its checkpoint, which have rank
8 and alpha 32 and apply to queries and values.

In training, clips longer than `crop_seconds` are cropped at a random position. In evaluation and
extraction, clips longer than `max_seconds` are truncated at the end.

SALMONN consists of four checkpoints. Pass each checkpoint as a file or folder. Whisper and Vicuna
can also be names on the Hugging Face Hub. The Hub has Vicuna 7B v1.5 only in PyTorch's format, so
convert Vicuna to safetensors first.

    --config.encoder.options.name=salmonn_7b_v0.pth
    --config.encoder.options.whisper=openai/whisper-large-v2
    --config.encoder.options.beats=BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt
    --config.encoder.options.vicuna=FOLDER

Hardware: LLMs need eight TPU v5e or four TPU v5p chips according to XLA's memory analysis. Judging
by their size, one GPU with 80 GB should also suffice. No LLM was trained.
"""

from ml_collections import ConfigDict

from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig
from mister_jax.optim import OptimizerConfig
from mister_jax.tasks.config import config_from_dataclass
from mister_jax.tasks.encoder import EncoderLossConfig
from mister_jax.tasks.speech_encoder import SpeechEncoderOptions

DATASETS = {
    "meld": "meld/clips",
    "iemocap6": "iemocap/six_session1",
    "iemocap4": "iemocap/four_session1",
    "mosi": "mosi/binary",
    "synthetic": "manifest/synthetic",
}

SALMONN = {
    "name": "salmonn_7b_v0.pth",
    "whisper": "openai/whisper-large-v2",
    "beats": "BEATs_iter3_plus_AS2M_finetuned_on_AS2M_cpt2.pt",
    "vicuna": "lmsys/vicuna-7b-v1.5",
}
# Of the rematerialization policies that fit into memory, XLA predicts these to be fastest on a v5e.
REMAT = {"qwen2_audio_7b": "mlp", "salmonn_7b": "dots"}
LLMS = {"qwen2_audio_7b": "Qwen/Qwen2-Audio-7B", "salmonn_7b": SALMONN["name"]}
SMALL = {
    "whisper_tiny": "openai/whisper-tiny",
    "whisper_base": "openai/whisper-base",
    "whisper_small": "openai/whisper-small",
    "whisper_medium": "openai/whisper-medium",
    "whisper_large_v2": "openai/whisper-large-v2",
    "whisper_large_v3": "openai/whisper-large-v3",
    "wav2vec2_base": "facebook/wav2vec2-base",
    "wav2vec2_large": "facebook/wav2vec2-large",
    "hubert_base": "facebook/hubert-base-ls960",
    "hubert_large": "facebook/hubert-large-ll60k",
    "wavlm_base": "microsoft/wavlm-base",
    "wavlm_base_plus": "microsoft/wavlm-base-plus",
    "wavlm_large": "microsoft/wavlm-large",
}
ENCODERS = LLMS | SMALL


def get_config(argument: str = "synthetic,whisper_tiny") -> ConfigDict:
    """Returns the config for "DATASET,ENCODER"."""
    dataset, _, encoder = argument.partition(",")
    if encoder not in ENCODERS:
        raise InputError(
            f"configs/speech_encoder.py: encoder {encoder!r}; allowed: {', '.join(ENCODERS)}"
        )
    large = encoder in LLMS
    config = ConfigDict()
    config.task = "speech_encoder"
    config.seed = 0
    config.data = ConfigDict(
        {
            "name": DATASETS.get(dataset, dataset),
            "data_dir": "",
            "batch_size": 16,
            "num_buckets": 4,
            "sampling": "shuffle",
        }
    )
    dtype = "bfloat16" if large else "float32"
    config.encoder = ConfigDict(
        {
            "options": config_from_dataclass(
                SpeechEncoderOptions,
                name=ENCODERS[encoder],
                tower="frozen" if large else "lora",
                full=not large,
                dtype=dtype,
                param_dtype=dtype,
                remat=REMAT.get(encoder, "none"),
            ),
            "lora": config_from_dataclass(
                LoRAConfig, rank=16, alpha=8.0, dropout=0.05, targets=("query", "key")
            ),
        }
    )
    if encoder == "salmonn_7b":
        config.encoder.options.update(SALMONN)
        config.encoder.lora.update({"rank": 8, "alpha": 32.0, "dropout": 0.1})
        config.encoder.lora.targets = ("query", "value")
    config.head = ConfigDict({"feature_dim": 2048, "pooling": "mean", "dropout": 0.5})
    config.loss = config_from_dataclass(EncoderLossConfig)
    config.optimizer = config_from_dataclass(
        OptimizerConfig,
        name="adamw",
        learning_rate=1e-5 if large else 3e-5,
        schedule="constant" if large else "cosine",
        warmup_fraction=0.0 if large else 0.1,
        weight_decay=0.0 if large else 0.01,
    )
    config.train = ConfigDict(
        {
            "epochs": 20 if large else 5,
            "select_by": "weighted_f1",
            "init_from": "",
            "patience": 0,
            "log_every": 10,
            "save_every": 0,
            "min_save_seconds": 10.0,
            "accumulation": 8 if large else 1,
        }
    )
    config.parallel = ConfigDict({"backend": "jit", "model_parallelism": 1})
    return config
