"""Where an epoch stands, and the randomness that makes a resumed one go on to the same bit."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def seed_of(*words: object) -> int:
    """A seed that depends on the words only: a resumed epoch draws the same."""
    return zlib.crc32("/".join(map(str, words)).encode())


def seeded(*words: object) -> torch.Generator:
    """A CPU generator whose seed depends on the words only."""
    return torch.Generator().manual_seed(seed_of(*words))


@dataclass
class Position:
    """Where an epoch stands: what it takes to go on as if nothing had happened."""

    epoch: int
    step: int  # steps of this epoch that are done
    seconds: float  # spent in this epoch so far
    trace: Tensor  # (steps, 3): loss, price and share correct, means over all processes
    draws: Tensor  # state of the generator of order, crops and flips
    random: list[list[Tensor]]  # states of torch's own generators, of each process


@contextmanager
def own_randomness(
    device: torch.device, seed: object, epoch: int, fabric: "Fabric | None", begin: Position | None
) -> Iterator[torch.Generator]:
    """A generator for the images, and torch's own seeded for dropout; put back afterwards."""
    rank = fabric.global_rank if fabric else 0
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed_of(seed, epoch, "layers", rank))
        if begin and rank < len(begin.random):
            _set_generators(begin.random[rank], device)
        yield seeded(seed, epoch)


def generator_states(device: torch.device, fabric: "Fabric | None") -> list[list[Tensor]]:
    """States of torch's own generators, the CPU's and that of ``device``, of each process."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    if fabric is None:
        return [states]
    every: list[Any] = [None] * fabric.world_size
    distributed.all_gather_object(every, states)
    return every


def _set_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)
