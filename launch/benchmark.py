"""Measures speed and memory on generated data: `python -m launch.benchmark --help`."""

from benchmarks.cli import main
from launch import run

if __name__ == "__main__":
    run(main)
