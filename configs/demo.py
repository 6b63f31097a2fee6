"""The demo: MiSTER-E on synthetic dialogue features.

    bash launch/demo.sh

Small enough for two cores; the dataset knows its Bayes score, which `launch.evaluate` prints.
"""

from ml_collections import ConfigDict

from configs import fusion


def get_config() -> ConfigDict:
    """The default recipe on the synthetic dataset."""
    config = fusion.get_config("synthetic_features")
    config.data.num_buckets = 4
    return config
