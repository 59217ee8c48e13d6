from .program import to_exported
from .onnx_model import ONNXModel
from .verify import verify_onnx
from .onnx_file import ONNXFile, export_onnx
from .cpu import accelerate_model_for_cpu, optimize_for_cpu
from .sparse_cpu import sparse_for_cpu
