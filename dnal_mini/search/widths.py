"""From widths or an architecture to a network with new weights."""

import torch

from dnal_mini.config import SearchConfig
from dnal_mini.data.imageset import ImageSet
from dnal_mini.gating import add_gates, gates
from dnal_mini.methods.contract import Architecture
from dnal_mini.models import MODELS
from dnal_mini.pruning.pruner import Pruned, prune
from dnal_mini.refused import Refused
from dnal_mini.search.budget import impose
from dnal_mini.search.inputs import asked, build, placed
from dnal_mini.training.stage import Row

WIDEST = 64  # times what a builder calls its full width


def architecture(widths: dict[str, int], config: SearchConfig, data: ImageSet) -> Architecture:
    """The narrowest net of the config's kind that has room for the widths, by gate, and the widths.

    Raises: ValueError for a width below 1, or another set of gates.
    """
    factor, wide = 1.0, config
    while True:
        net = add_gates(build(wide, data), config.order, image_shape=data.image_shape)
        have = {name: len(gate.s) for name, gate in gates(net).items()}
        if widths.keys() != have.keys() or min(widths.values()) < 1:
            odd = next(iter(widths.keys() ^ have.keys()), min(widths, key=lambda n: widths[n]))
            raise Refused(f"got widths that do not fit at {odd}; need 1 or more for every gate")
        if all(have[name] >= width for name, width in widths.items()):
            break
        factor *= max(1.01, *(width / have[name] for name, width in widths.items()))
        if config.width * factor > WIDEST:
            name = next(name for name, width in widths.items() if have[name] < width)
            raise Refused(
                f"got width {widths[name]} for {name}, which {config.model} does not reach: it has "
                f"{have[name]} at width {wide.width:.3g}; need a builder that widens all layers"
            )
        wide = config.replace(width=config.width * factor)
    made_of: dict = vars(net)["config"] if config.model in MODELS else asked(wide, data)
    arguments = {k: v for k, v in made_of.items() if k not in ("builder", "num_classes")}
    return Architecture(
        config.model, tuple(sorted(arguments.items())), tuple(sorted(widths.items()))
    )


def built(found: Architecture, config: SearchConfig, data: ImageSet) -> tuple[Pruned, Row]:
    """The network of an architecture with new weights by the run's seed, and a row that says so."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        net = placed(found.build(data.num_classes), config, data)
    if found.widths:
        net = add_gates(net, config.order, image_shape=data.image_shape)
        wanted = dict(found.widths)
        ranks = {name: torch.arange(len(gate.s)) for name, gate in gates(net).items()}
        impose(net, {name: rank < wanted[name] for name, rank in ranks.items()})
    small = prune(net.eval(), data.image_shape, config.residual)
    return small, {"architecture": found.json()}
