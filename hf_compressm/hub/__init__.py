"""What people see of a run and share: its report, its model card."""

from .card import keep_card, render_card, write_card
from .environment import describe_environment
from .record import RunRecord, read_run
from .report import render_report, write_report
from .spectra import tolerances_plot

__all__ = [
    "RunRecord",
    "describe_environment",
    "keep_card",
    "read_run",
    "render_card",
    "render_report",
    "tolerances_plot",
    "write_card",
    "write_report",
]
