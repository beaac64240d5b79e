"""Figures 2, 6 and 8 of the paper on predator-prey: rules that change, then the first again.

python -m experiments.predator_prey_drift --scale standard
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main("predator_prey_drift"))
