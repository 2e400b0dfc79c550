"""Share a model: as a folder that loads without this package, or as a repository on the Hugging Face hub."""

from ..moved import old_names
from .export import Exported, Form, export
from .upload import Pushed, push

__all__ = ["Exported", "Form", "Pushed", "export", "push"]

__getattr__ = old_names(__name__)
