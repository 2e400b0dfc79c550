"""Tasks by name and their metrics: `load_task("digits")`."""

from . import aan as aan
from . import digits as digits
from . import images as images
from . import imdb as imdb
from . import listops as listops
from . import mqar as mqar
from . import pathfinder as pathfinder
from . import series as series
from . import stdlib_bytes as stdlib_bytes
from . import text as text
from . import wikitext as wikitext
from .metrics import Accuracy, Perplexity, classification_metrics
from .task import Task, check_task, describe_task, list_tasks, load_task, register_task, takes_data_dir, task_names

__all__ = [
    "Accuracy",
    "Perplexity",
    "Task",
    "check_task",
    "classification_metrics",
    "describe_task",
    "list_tasks",
    "load_task",
    "register_task",
    "takes_data_dir",
    "task_names",
]
