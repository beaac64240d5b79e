"""Figures 1 and 6 of the paper on matrix games: five permuted payoffs, then the first again.

python -m experiments.matrix_drift --scale standard
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main("matrix_drift"))
