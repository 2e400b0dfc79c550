"""A saved model made smaller: load, calibrate, cut, evaluate, save."""

from .inspection import InspectedLayer, Inspection, inspect_model
from .job import CompressionJob, CompressionResult, run, summary
from .loading import load_model, load_tokenizer
from .source import DataSource, calibration, evaluate, load_data
from .text_files import text_task

__all__ = [
    "CompressionJob",
    "CompressionResult",
    "DataSource",
    "InspectedLayer",
    "Inspection",
    "calibration",
    "evaluate",
    "inspect_model",
    "load_data",
    "load_model",
    "load_tokenizer",
    "run",
    "summary",
    "text_task",
]
