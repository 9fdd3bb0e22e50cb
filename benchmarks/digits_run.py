"""`dnal run` with its default recipe: at most 90 s on two cores, test accuracy at least 0.95, at
least 2x fewer MACs. Prints one JSON line. Run on an otherwise idle machine.
"""

import json
import tempfile
import time
from pathlib import Path

import torch

import dnal_mini as dnal

LIMIT_S, ACCURACY, RATIO = 90, 0.95, 2

with tempfile.TemporaryDirectory() as folder:
    start = time.perf_counter()
    result = dnal.run(dnal.recipes.digits(), Path(folder) / "run")
    seconds = time.perf_counter() - start

found = {
    "benchmark": "digits_run",
    "seconds": round(seconds, 1),
    "test_accuracy": result["fine_tuned_accuracy"],
    "macs_ratio": round(result["macs_ratio"], 3),
    "threads": torch.get_num_threads(),
}
found["reached"] = (
    seconds <= LIMIT_S
    and result["fine_tuned_accuracy"] >= ACCURACY
    and result["macs_ratio"] >= RATIO
)
print(json.dumps(found))
