"""dnal_mini: learn the width of a CNN, cut what is closed, keep the function.

The public names. Importing the package loads torch and nothing heavier.
"""

from dnal_mini import models, recipes
from dnal_mini.config import Budget, SearchConfig
from dnal_mini.data.torchvision import fix_torchvision
from dnal_mini.deployment.export import export
from dnal_mini.deployment.fold import deploy
from dnal_mini.gating import add_gates, delta_schedule, gates, set_gates
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.measure.compare import Comparison, compare
from dnal_mini.measure.cost import Cost, cost
from dnal_mini.measure.latency import Latency, latency
from dnal_mini.pruning.netfile import load, save
from dnal_mini.pruning.preview import analyse
from dnal_mini.pruning.pruner import Pruned, prune
from dnal_mini.search.driver import run

__all__ = [
    "Budget", "Comparison", "Cost", "Latency", "Pruned", "ScaledSigmoid", "SearchConfig",
    "add_gates", "analyse", "compare", "cost", "delta_schedule", "deploy", "export", "gates",
    "latency", "load", "models", "prune", "recipes", "run", "save", "set_gates",
]  # fmt: skip
__version__ = "0.1.0"

fix_torchvision()
