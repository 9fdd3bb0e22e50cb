"""dnal_mini: learn the width of a CNN, cut what is closed, keep the function.

The public names. Importing the package loads torch and nothing heavier.
"""

from dnal_mini import models, recipes
from dnal_mini.compare import Comparison, compare
from dnal_mini.cost import Cost, Latency, cost, latency
from dnal_mini.data import fix_torchvision
from dnal_mini.deploy import deploy, export
from dnal_mini.gate import ScaledSigmoid, add_gates, delta_schedule, gates, set_gates
from dnal_mini.netfile import load, save
from dnal_mini.prune import Pruned, prune
from dnal_mini.search import SearchConfig, run

__all__ = [
    "Comparison", "Cost", "Latency", "Pruned", "ScaledSigmoid", "SearchConfig", "add_gates",
    "compare", "cost", "delta_schedule", "deploy", "export", "gates", "latency", "load", "models",
    "prune", "recipes", "run", "save", "set_gates",
]  # fmt: skip
__version__ = "0.1.0"

fix_torchvision()
