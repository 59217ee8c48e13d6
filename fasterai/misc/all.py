from .bn_folding import *
