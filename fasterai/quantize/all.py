from .kmeans import kmeans
from .weight_sharing import KMeansQuantizer
from .int8 import FakeQuantizer, Quantizer
from .training import Share
from .kmeans_callback import KMeansCallback
from .compressed_file import CompressedFileError, compression_report, load_compressed, save_compressed
