"""Tasks: what is trained, and how a config becomes a model, batches, a loss and predictions."""

from typing import Any

from ml_collections import ConfigDict

from mister_jax.errors import InputError
from mister_jax.tasks.base import Batch, Split, Task
from mister_jax.tasks.config import config_from_dataclass, config_seeds, dataclass_from_config
from mister_jax.tasks.fusion import FusionTask
from mister_jax.tasks.speech_encoder import SpeechEncoderTask
from mister_jax.tasks.text_encoder import TextEncoderTask

__all__ = [
    "TASKS",
    "Batch",
    "FusionTask",
    "SpeechEncoderTask",
    "Split",
    "Task",
    "TextEncoderTask",
    "config_from_dataclass",
    "config_seeds",
    "dataclass_from_config",
    "task_class",
]

TASKS: dict[str, Any] = {
    "fusion": FusionTask,
    "speech_encoder": SpeechEncoderTask,
    "text_encoder": TextEncoderTask,
}


def task_class(config: ConfigDict) -> Any:
    """Returns the class of the config's task.

    Raises:
      InputError: The name of the task is unknown.
    """
    if config.task not in TASKS:
        raise InputError(f"config.task={config.task!r}; allowed are {', '.join(TASKS)}")
    return TASKS[config.task]
