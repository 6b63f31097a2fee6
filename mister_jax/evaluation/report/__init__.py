"""The report of an evaluation: one HTML page that opens without a network.

`summary` makes the numbers, `charts` draws them, `page` puts the page together from
`template.html`, `style.css` and `script.js`.
"""

from mister_jax.evaluation.report.page import Experiment, report_html, write_report
from mister_jax.evaluation.report.summary import Score, SplitPredictions, read_utterance_texts

__all__ = [
    "Experiment",
    "Score",
    "SplitPredictions",
    "read_utterance_texts",
    "report_html",
    "write_report",
]
