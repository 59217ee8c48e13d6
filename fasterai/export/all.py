from .program import to_exported
from .onnx_model import ONNXModel
from .verify import qdq_stats, verify_onnx, verify_qdq
from .onnx_file import ONNXFile, export_onnx, export_qdq
from .cpu import accelerate_model_for_cpu, optimize_for_cpu
from .runtimes import in_runtimes, runtimes
from .sparse_cpu import sparse_for_cpu
