from ..core.all import *
from .compressed_file import *
