"""Figure 4 of the paper, and the replay ratios of ReDo's figure 7: units that stop learning on a task that never changes.

python -m experiments.stationary --scale standard

References:
    Sokar et al., The Dormant Neuron Phenomenon in Deep Reinforcement Learning, 2023.
"""

import sys

from experiments.command import main

if __name__ == "__main__":
    sys.exit(main("stationary"))
