from .plots import *
from .tables import *
