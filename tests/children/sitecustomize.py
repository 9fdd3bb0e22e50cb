"""Read by each Python that a test starts: runs there time their two nets for a fifth of a second,
not for two. Not in kernels, since notebooks look at the times. Costs nothing without a stopwatch.
"""

import importlib.util
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

STOPWATCH = "dnal_mini.measure.latency"


class Brief:
    """Finds the stopwatch, once, and winds it up less."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != STOPWATCH:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec: Any = importlib.util.find_spec(name)
        load = spec.loader.exec_module

        def shorten(module: ModuleType) -> None:
            load(module)
            module.latency_pair.__kwdefaults__["budget_s"] = 0.2

        spec.loader.exec_module = shorten
        return spec


if "ipykernel_launcher" not in sys.orig_argv:
    sys.meta_path.insert(0, Brief())  # type: ignore[arg-type]
