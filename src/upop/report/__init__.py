"""Reports of runs: figures, tables, pages, and the numbers behind them."""

from upop.report.figures import history_figure, kept_share_figure, save_figure
from upop.report.latency import measure_latency
from upop.report.results import ModelResult, Results, results_table
from upop.report.shares import GroupShare

__all__ = [
    "GroupShare",
    "ModelResult",
    "Results",
    "history_figure",
    "kept_share_figure",
    "measure_latency",
    "results_table",
    "save_figure",
]
