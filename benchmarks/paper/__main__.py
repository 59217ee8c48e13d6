"All tables of the FasterAI paper, and the page beside this file: python -m benchmarks.paper"
from .page import main

if __name__=='__main__': main(description=__doc__)
