"""Fine-tunes a text encoder on single utterances of a corpus (stage 1).

    mister-jax train --config=text_encoder:DATASET,ENCODER --workdir=DIR

DATASET is a key of `DATASETS` or the name of a dataset from `mister-jax prepare`. ENCODER is a key
of `ENCODERS`; `--config.encoder.options.name=FOLDER` reads the encoder from a folder.

LLMs are fine-tuned with LoRA and the recipe of the released code: rank 8 and alpha 32, on queries
and values, and AdamW with learning rate 1e-5. Small encoders are fully fine-tuned, except
`minilm_lora`, which is fine-tuned with LoRA. The packaged model `meld-text` uses `minilm_lora`.

Hardware: two CPU cores for MiniLM. LLMs need eight TPU v5e or four TPU v5p chips according to XLA's
memory analysis. Judging by their size, one GPU with 80 GB should also suffice. No LLM was trained.

Result: weighted F1 of the text expert (`fusion:NAME,text_only`) on MELD's text, one seed:

                              validation   test
    MiniLM as released        0.547        0.577
    meld,minilm_l6            0.584        0.619
    meld,minilm_lora          0.579        0.614
"""

from ml_collections import ConfigDict

from mister_jax.errors import InputError
from mister_jax.nn.lora import LoRAConfig
from mister_jax.optim import OptimizerConfig
from mister_jax.tasks.config import config_from_dataclass
from mister_jax.tasks.encoder import EncoderLossConfig
from mister_jax.tasks.text_encoder import TextEncoderOptions

DATASETS = {
    "meld": "meld/text",
    "iemocap6": "iemocap/six_session1",
    "iemocap4": "iemocap/four_session1",
    "mosi": "mosi/binary",
}

LLMS = {
    "llama_3_1_8b": "meta-llama/Llama-3.1-8B",
    "llama_3_2_1b": "meta-llama/Llama-3.2-1B",
    "qwen2_5_0_5b": "Qwen/Qwen2.5-0.5B",
    "qwen2_5_7b": "Qwen/Qwen2.5-7B",
}
SMALL = {
    "roberta_base": "FacebookAI/roberta-base",
    "roberta_large": "FacebookAI/roberta-large",
    "bert_base": "google-bert/bert-base-uncased",
    "minilm_l6": "sentence-transformers/all-MiniLM-L6-v2",
}
# Small encoders that are fine-tuned with LoRA in all layers. The adapters take a few megabytes.
ADAPTED = {"minilm_lora": "minilm"}
ENCODERS = LLMS | SMALL | ADAPTED


def get_config(argument: str = "meld,minilm_l6") -> ConfigDict:
    """Returns the config for "DATASET,ENCODER"."""
    dataset, _, encoder = argument.partition(",")
    if encoder not in ENCODERS:
        raise InputError(
            f"configs/text_encoder.py: encoder {encoder!r}; allowed: {', '.join(ENCODERS)}"
        )
    large = encoder in LLMS
    config = ConfigDict()
    config.task = "text_encoder"
    config.seed = 0
    config.data = ConfigDict(
        {
            "name": DATASETS.get(dataset, dataset),
            "data_dir": "",
            "batch_size": 8 if large else 32,
            "num_buckets": 5,
            "sampling": "shuffle",
        }
    )
    dtype = "bfloat16" if large else "float32"
    config.encoder = ConfigDict(
        {
            "options": config_from_dataclass(
                TextEncoderOptions,
                name=ENCODERS[encoder],
                full=encoder in SMALL,
                dtype=dtype,
                param_dtype=dtype,
                remat="full" if large else "none",
            ),
            "lora": config_from_dataclass(
                LoRAConfig, rank=8, alpha=32.0, dropout=0.1, targets=("query", "value")
            ),
        }
    )
    config.head = ConfigDict({"feature_dim": 2048, "pooling": "statistics", "dropout": 0.5})
    config.loss = config_from_dataclass(EncoderLossConfig)
    config.optimizer = config_from_dataclass(
        OptimizerConfig,
        name="adamw",
        learning_rate=1e-5 if large else 5e-5,
        schedule="constant" if large else "cosine",
        warmup_fraction=0.0 if large else 0.1,
        b2=0.99 if large else 0.999,
        eps=1e-6,
        weight_decay=0.0 if large else 0.01,
    )
    config.train = ConfigDict(
        {
            "epochs": 20 if large else 4,
            "select_by": "weighted_f1",
            "init_from": "",
            "patience": 0,
            "log_every": 10,
            "save_every": 0,
            "min_save_seconds": 10.0,
            "accumulation": 1,
        }
    )
    config.parallel = ConfigDict({"backend": "jit", "model_parallelism": 1})
    if encoder in ADAPTED:
        config.encoder.lora.alpha = 16.0
        config.encoder.lora.targets = ("query", "key", "value", "out", "mlp_in", "mlp_out")
        config.head.feature_dim = 256
        config.optimizer.learning_rate = 5e-4
    return config
