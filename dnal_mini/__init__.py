"""dnal_mini: learn the width of a CNN, cut what is closed, keep the function.

The public names; everything heavier than torch is imported when it is used.
"""

from dnal_mini import models
from dnal_mini.cost import Cost, Latency, cost, latency
from dnal_mini.data import fix_torchvision
from dnal_mini.gate import ScaledSigmoid, add_gates, delta_schedule, gates, set_gates
from dnal_mini.prune import Pruned, load, prune, save
from dnal_mini.search import SearchConfig, run
from dnal_mini import recipes

__version__ = "0.1.0"
fix_torchvision()
