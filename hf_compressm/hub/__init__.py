"""What people see of a run and share: its report, its model card."""

from .environment import describe_environment
from .record import RunRecord, read_run
from .report import render_report, write_report

__all__ = ["RunRecord", "describe_environment", "read_run", "render_report", "write_report"]
