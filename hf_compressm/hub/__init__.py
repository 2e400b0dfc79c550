"""Share a model: as a folder that loads without this package, or as a repository on the Hugging Face hub."""

from ..moved import old_names
from .export import ExportResult, Form, export
from .upload import PushResult, push

__all__ = ["ExportResult", "Form", "PushResult", "export", "push"]

__getattr__ = old_names(__name__)
