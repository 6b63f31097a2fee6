"""Task classes by name."""

import importlib
from typing import Any

from ml_collections import ConfigDict

from mister_jax.errors import InputError

# The modules are imported on first use, because training MiSTER-E does not need the encoders.
TASKS = {
    "fusion": ("mister_jax.tasks.fusion", "FusionTask"),
    "speech_encoder": ("mister_jax.tasks.speech_encoder", "SpeechEncoderTask"),
    "text_encoder": ("mister_jax.tasks.text_encoder", "TextEncoderTask"),
}
"""Module and class of each task, by the name in `config.task`."""


def task_class(config: ConfigDict) -> Any:
    """Returns the class of the config's task.

    Raises:
      InputError: The task's name is unknown.
    """
    if config.task not in TASKS:
        raise InputError(f"config.task={config.task!r}; allowed: {', '.join(TASKS)}")
    module, name = TASKS[config.task]
    return getattr(importlib.import_module(module), name)
