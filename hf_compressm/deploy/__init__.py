"""Models in other runtimes: graphs of torch.export, ONNX files and GGUF files."""

from .gguf_files import GgufExport, save_gguf, write_gguf
from .graphs import Recurrence, recurrence_inputs
from .onnx_files import OnnxExport, save_onnx, write_onnx
from .onnx_runtime import OnnxModel

__all__ = [
    "GgufExport",
    "OnnxExport",
    "OnnxModel",
    "Recurrence",
    "recurrence_inputs",
    "save_gguf",
    "save_onnx",
    "write_gguf",
    "write_onnx",
]
