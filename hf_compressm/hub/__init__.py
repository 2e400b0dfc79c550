"""What people see of a run and share: its report, its model card, and models as folders and hub repositories."""

from .card import keep_card, render_card, write_card
from .environment import describe_environment
from .export import Exported, Form, export
from .record import RunRecord, read_run
from .report import render_report, write_report
from .spectra import tolerances_plot
from .upload import Pushed, push

__all__ = [
    "Exported",
    "Form",
    "Pushed",
    "RunRecord",
    "describe_environment",
    "export",
    "keep_card",
    "push",
    "read_run",
    "render_card",
    "render_report",
    "tolerances_plot",
    "write_card",
    "write_report",
]
