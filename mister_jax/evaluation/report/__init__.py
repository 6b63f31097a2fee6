"""The HTML report of an evaluation, one file that opens without a network.

`statistics` computes the numbers, `charts` draws them, `sections` renders them, and `page` puts the
sections and the dialogue view together.
"""

from mister_jax.evaluation.report.dialogue_view import read_utterance_texts
from mister_jax.evaluation.report.experiment import Experiment
from mister_jax.evaluation.report.page import report_html, write_report

__all__ = ["Experiment", "read_utterance_texts", "report_html", "write_report"]
