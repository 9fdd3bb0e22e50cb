"""torchvision where the package index pairs it with a torch that its library does not fit."""

import importlib.util
import os
import sys
from pathlib import Path

import torch


def fix_torchvision() -> None:
    """Make ``import torchvision`` work where its compiled library cannot be loaded.

    The package index pairs a CPU-only torch with a torchvision built for CUDA. Its import then
    stops at operators that only its library declares. Here that library is loaded exactly as
    torchvision would load it; if (and only if) this fails, the operators are declared, without code
    behind them. Never imports torchvision; may be called any number of times.
    """
    if "torchvision" in sys.modules or hasattr(torch.ops.torchvision, "nms"):
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or os.name == "nt":  # Windows' index pairs CPU with CPU
        return
    kinds = (importlib.machinery.ExtensionFileLoader, importlib.machinery.EXTENSION_SUFFIXES)
    library = importlib.machinery.FileFinder(str(Path(spec.origin).parent), kinds).find_spec("_C")
    try:
        if library is not None and library.origin is not None:
            torch.ops.load_library(library.origin)
            return
    except OSError:
        pass  # the broken pair: libraries that this one stands on are not there
    for name in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{name}", schema)
