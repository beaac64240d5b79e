"""Figure 8 of ReDo: can a network with stagnant units still learn a fixed target, and does a cure give that back?

python -m experiments.distillation --scale standard
"""

import sys

from experiments.command import main
from experiments.distilling import teach

if __name__ == "__main__":
    sys.exit(main("distillation", work=teach))
