from .plots import *
