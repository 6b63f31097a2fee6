"""Demo: trains MiSTER-E on prosody and MiniLM features of the synthetic corpus.

    bash launch/demo.sh
    mister-jax train --config=demo --workdir=DIR    # on the dataset `demo`

Hardware: two CPU cores; `launch/demo.sh` takes about 5 minutes including the installation.

Result, weighted F1, mean +- standard deviation of three seeds (480 training dialogues):

              model             Bayes classifier
    test      0.853 +- 0.003    0.883
"""

from ml_collections import ConfigDict

from mister_jax.configs import fusion


def get_config() -> ConfigDict:
    """Returns the config of a smaller model with a supervised gate."""
    config = fusion.get_config("demo")
    config.model.update(
        {
            "context_dim": 64,
            "fusion_dim": 64,
            # The emotions of a dialogue in this corpus form a Markov chain, so a GRU and a CRF
            # replace the co-attention layers.
            "fusion_layers": 0,
            "fusion_gru_layers": 1,
            "crf": True,
            "gate_dim": 32,
            "gate_temperature": 0.5,
            # The speech and text contexts show how informative each modality is.
            "gate_reads_contexts": True,
            "input_dropout": 0.3,
            "context_dropout": 0.2,
            "classifier_dropout": 0.5,
            "modality_dropout": 0.3,
        }
    )
    # With the mixture's loss alone, the gate would learn to rely on the cross-modal expert.
    config.loss.weights.gate = 1.0
    config.loss.sharpness = 4.0
    config.optimizer.update({"learning_rate": 2e-3, "weight_decay": 1.0})
    config.train.epochs = 60
    return config
