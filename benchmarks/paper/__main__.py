"""All tables of the FasterAI paper, and the page beside this file: 2,485 runs, about 9,500 seconds of one core for Fashion-MNIST

    python -m benchmarks.paper                                                            goes on where it was stopped
    python -m benchmarks.paper.table3 --data caltech-101 --path FOLDER --seeds 3          one table, with the paper's settings
"""
from .page import main

if __name__=='__main__': main(description=__doc__.partition('\n')[0])
