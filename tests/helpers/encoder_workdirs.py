"""Work directories of encoders whose trained parameters are random."""

import jax
import numpy as np
from flax import nnx

from mister_jax.checkpoint import BEST, Checkpoints
from mister_jax.configs import speech_encoder, text_encoder
from mister_jax.encoders import hf_config, speech
from mister_jax.tasks.base import split_params
from mister_jax.tasks.speech_encoder import SpeechEncoderTask
from mister_jax.tasks.text_encoder import TextEncoderTask
from mister_jax.workdir import write_description


def write_workdir(workdir, task_class, config, backbone_config):
    """Writes a work directory of an encoder whose trained parameters are random."""
    workdir.mkdir()
    task = task_class(config, ("calm", "angry"), backbone_config)
    abstract_model = nnx.eval_shape(lambda: task.init(jax.random.key(0)))
    _, params, _ = split_params(abstract_model, task.trainable)
    random = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: random.normal(0, 0.3, leaf.shape).astype(leaf.dtype), params)
    write_description(workdir, config, task.description(), params, {})
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(BEST, 1, params, {"epoch": 1, "weighted_f1": 0.5})


def write_text_workdir(workdir, folder, encoder, **options):
    config = text_encoder.get_config(f"any,{encoder}")
    config.encoder.options.update({"name": str(folder), "max_tokens": 12, "remat": "none"})
    config.encoder.options.update({"dtype": "float32", "param_dtype": "float32", **options})
    config.head.feature_dim = 4
    write_workdir(workdir, TextEncoderTask, config, hf_config.read_config(folder))


def write_speech_workdir(workdir, folder, encoder, **options):
    config = speech_encoder.get_config(f"any,{encoder}")
    config.encoder.options.update({"name": str(folder), "max_seconds": 0.8, "crop_seconds": 0.8})
    config.encoder.options.update({"dtype": "float32", "param_dtype": "float32", "remat": "none"})
    config.encoder.options.update(options)
    config.head.feature_dim = 4
    backbone_config = speech.read_backbone_config(speech.SpeechFiles(str(folder)))
    write_workdir(workdir, SpeechEncoderTask, config, backbone_config)
