"""Whether tasks are lost to the weights, or to data, exploration, optimizer or scale.

python -m experiments.separation --scale standard
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main("separation"))
