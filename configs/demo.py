"""The demo: MiSTER-E on prosody and MiniLM features of the synthetic corpus.

    bash launch/demo.sh

The corpus knows its Bayes score, which `launch.evaluate` prints beside the model's.
"""

from ml_collections import ConfigDict

from configs import fusion


def get_config() -> ConfigDict:
    """The default recipe, smaller, with a gate that decides."""
    config = fusion.get_config("demo")
    config.data.num_buckets = 3
    # Prosody's features are in units of their own: octaves, decibels, seconds.
    config.data.standardise = ("speech",)
    config.model.update(
        {
            "context_width": 64,
            "fusion_width": 64,
            # Emotions last, and only both modalities tell them: both, with what came before.
            "fusion_gru_layers": 1,
            "gate_width": 32,
            "gate_temperature": 0.5,
            "input_dropout": 0.3,
            "context_dropout": 0.2,
        }
    )
    config.loss.weights.agreement = 0.0
    config.optimizer.update({"learning_rate": 2e-3, "weight_decay": 0.3})
    config.train.epochs = 10
    return config
