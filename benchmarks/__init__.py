"""Speed, memory and size: of MiSTER-E, of its encoders, of the preparation of a corpus.

Everything is made up on the spot, so it runs where there is no dataset; but for `throughput` and
`preparation` it runs without TensorFlow, a config library, and the Hugging Face libraries.
`launch/benchmark.py` is its command line.
"""

from benchmarks.config import PRESETS, BenchmarkConfig
from benchmarks.dialogues import LENGTHS
from benchmarks.report import Report
from benchmarks.run import benchmark

__all__ = ["LENGTHS", "PRESETS", "BenchmarkConfig", "Report", "benchmark"]
