"""Writes evaluation reports as self-contained HTML files."""

from mister_jax.evaluation.report.experiment import Experiment
from mister_jax.evaluation.report.page import read_utterance_texts, report_html, write_report

__all__ = ["Experiment", "read_utterance_texts", "report_html", "write_report"]
