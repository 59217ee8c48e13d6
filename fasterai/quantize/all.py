from ..core.all import *
from .kmeans import *
from .weight_sharing import *
from .kmeans_callback import *
from .compressed_file import *
