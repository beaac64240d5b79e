"""Whether predator-prey is lost to the weights, or to how values are bootstrapped.

python -m experiments.predator_prey_separation --scale standard
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main("predator_prey_separation"))
