"""Figures 2, 6 and 8 of the paper on SMAX: battles of one race that change, then the first again.

python -m experiments.smax_drift --scale standard
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main("smax_drift"))
