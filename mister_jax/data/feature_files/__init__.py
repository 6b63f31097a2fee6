"""Imports utterance features from files of other programs, and exports feature datasets.

- `npz` reads NumPy archives with named arrays.
- `reader` reads pickles and JSON files of other projects. `dialogue_fields`, `padded_arrays`,
  `mmsa` and `records` recognize the layouts of these files, and `unpickling` reads pickles without
  executing their code.
- `table` checks the arrays that these modules have read.
- `export` writes npz, CSV and Parquet files.
"""

from mister_jax.data.feature_files.export import (
    FILE_TYPES,
    check_output_file,
    write_feature_file,
)
from mister_jax.data.feature_files.npz import read_npz
from mister_jax.data.feature_files.reader import (
    FeatureFileSummary,
    is_feature_file,
    read_features,
    summarize_file,
)

__all__ = [
    "FILE_TYPES",
    "FeatureFileSummary",
    "check_output_file",
    "is_feature_file",
    "read_features",
    "read_npz",
    "summarize_file",
    "write_feature_file",
]
