from .kmeans import kmeans
from .weight_sharing import KMeansQuantizer
from .int8 import FakeQuantizer, Quantizer
from .rounding import Rounding
from .training import Quantize, Share
from .kmeans_callback import KMeansCallback
from .quantize_callback import FakeQuantizeCallback, QuantizeCallback
from .compressed_file import CompressedFileError, compression_report, load_compressed, save_compressed
from .checkpoint import compress_checkpoint, decompress_checkpoint
from .compress import Compressed, top1
