"""Show a training run to people: its record, charts, HTML page and model card."""

from .card import keep_card, render_card, write_card
from .environment import describe_environment
from .loading import readdressed
from .page import render_report, write_report
from .record import RunRecord, read_run
from .spectra import tolerances_plot

__all__ = [
    "RunRecord",
    "describe_environment",
    "keep_card",
    "read_run",
    "readdressed",
    "render_card",
    "render_report",
    "tolerances_plot",
    "write_card",
    "write_report",
]
