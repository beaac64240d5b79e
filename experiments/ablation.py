"""Figure 7 of the paper: which parts of KNIFE matter.

python -m experiments.ablation --scale standard
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main("ablation"))
