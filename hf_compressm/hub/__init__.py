"""Trained models as folders and hub repositories that load with this package, without it, and as stock models."""

from .export import Exported, Form, export
from .upload import Pushed, push

__all__ = ["Exported", "Form", "Pushed", "export", "push"]
