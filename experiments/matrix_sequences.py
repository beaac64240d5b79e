"""Whether what is found on one sequence of payoffs holds on others.

python -m experiments.matrix_sequences --scale standard
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main("matrix_sequences"))
