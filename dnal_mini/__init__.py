"""dnal_mini: learn the width of a CNN, cut what is closed, keep the function."""

from dnal_mini.gate import ScaledSigmoid, add_gates, delta_schedule, gates, set_gates

__version__ = "0.1.0"
