"""Devices and processes: which there are, how a batch is shared, what all agree on.

Many processes share each batch (Lightning Fabric, which only this file knows): the run with N of
them is the run with one, up to rounding.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, distributed, nn

from dnal_mini.layers.syncnorm import synced_norms
from dnal_mini.refused import Refused

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Precision = Literal["auto", "float32", "bfloat16", "float64"]


ASK_EVERY = 8  # steps between two agreements of many processes on stopping and saving


def pick_device(name: str) -> torch.device:
    """The torch device of a name such as "cpu" or "cuda:0".

    Raises: ValueError if there is no such device here.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # which "meta" cannot tell
    except (RuntimeError, AssertionError) as error:
        raise Refused(f"got device {name!r}, which is not here; need e.g. 'cpu'") from error
    return device


def pick_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """What convolutions compute in: "auto" is bfloat16 where the hardware multiplies in it."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def processes(devices: int = 1, num_nodes: int = 1) -> int:
    """How many processes a run with these settings has; under torchrun, as many as it started."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return devices * num_nodes


def start_processes(
    device: torch.device, devices: int = 1, num_nodes: int = 1, strategy: str = "ddp"
) -> "Fabric | None":
    """Lightning Fabric with its processes started; None where one process is all there is.

    Under torchrun the numbers are torchrun's; under SLURM (srun) or alone, those given. Alone,
    Fabric starts the command that is running once more for each further process.

    Raises: ValueError if lightning-fabric is not installed, or the devices are not there.
    """
    count = processes(devices, num_nodes)
    if count == 1:
        return None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = count // devices
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise Refused(f"got devices {devices}; need at most {torch.cuda.device_count()} here")
    try:
        from lightning_fabric import Fabric
    except ImportError as error:
        raise Refused(
            f"got {count} processes without Lightning Fabric; need it; "
            "do pip install 'dnal-mini[devices]'"
        ) from error
    fabric = Fabric(
        accelerator=device.type, devices=devices, num_nodes=num_nodes, strategy=strategy
    )
    fabric.launch()
    return fabric


def is_first_process() -> bool:
    """True in the process that writes and prints: the only one, or the first of many."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def from_first(fabric: "Fabric | None", make: Callable[[], Any]) -> Any:
    """What ``make()`` gives in the first process, in all of them; if it raises, all do."""
    if fabric is None:
        return make()
    answer: tuple[str, Any] = ("", None)
    raised: Exception | None = None
    if fabric.global_rank == 0:
        try:
            answer = ("value", make())
        except Exception as error:  # whatever it is, the others must not wait for ever
            answer, raised = ("error", str(error)), error
    kind, value = fabric.broadcast(answer)
    if kind == "error":
        raise raised or Refused(value)
    return value


@contextmanager
def wrapped(
    net: nn.Module, optimizer: torch.optim.Optimizer, compiled: bool, fabric: "Fabric | None"
) -> Iterator[tuple[nn.Module, torch.optim.Optimizer]]:
    """Net and optimiser as the steps of one stage call them: compiled, shared by all processes."""
    if compiled:
        torch.compiler.reset()  # or the stages of a long sweep would use up what may be compiled
    model: Any = torch.compile(net) if compiled else net
    if fabric is None:
        yield model, optimizer
        return
    with synced_norms(net):
        yield fabric.setup(model, optimizer)


def share_of_batch(batch: int, fabric: "Fabric | None") -> slice:
    """The part of a batch that this process takes."""
    if fabric is None:
        return slice(None)
    size = batch // fabric.world_size
    return slice(fabric.global_rank * size, (fabric.global_rank + 1) * size)


def mean_over_processes(values: Tensor, fabric: "Fabric | None") -> Tensor:
    """The mean of a tensor over all processes, to the same bit in each."""
    if fabric is None:
        return values
    every = [torch.empty_like(values) for _ in range(fabric.world_size)]
    distributed.all_gather(every, values.contiguous())
    return torch.stack(every).mean(0)  # an all_reduce adds in an order that depends on the size


def agreed(
    stopping: Callable[[], bool] | None, late: bool, step: int, fabric: "Fabric | None"
) -> tuple[bool, bool]:
    """Whether to stop, and whether to save: one answer in every process.

    Many processes ask each other every ``ASK_EVERY`` steps, since an answer has to wait for the
    device: any of them may want to stop, and the first one's clock says whether it is ``late``.
    """
    stop = stopping is not None and stopping()
    if fabric is None:
        return stop, late
    if (step + 1) % ASK_EVERY:
        return False, False
    flags = torch.tensor([stop, late and fabric.global_rank == 0], device=fabric.device).float()
    distributed.all_reduce(flags)
    stop, late = (flags > 0).tolist()
    return stop, late
