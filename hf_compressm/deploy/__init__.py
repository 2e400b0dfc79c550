"""Models in other runtimes: graphs of torch.export, and ONNX files."""

from .graphs import Recurrence, recurrence_inputs
from .onnx_files import OnnxExport, save_onnx, write_onnx
from .onnx_runtime import OnnxModel

__all__ = ["OnnxExport", "OnnxModel", "Recurrence", "recurrence_inputs", "save_onnx", "write_onnx"]
