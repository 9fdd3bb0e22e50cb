"""Small nets for the tests of the pruner, and the laws of analyses and of pruned nets."""

import copy
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from dnal_mini.gating import add_gates, arch_parameters, set_gates
from dnal_mini.models import MODELS
from dnal_mini.pruning.analysis import analyse
from dnal_mini.pruning.facts import CONSTANT, FIXED, ZERO, Analysis
from dnal_mini.pruning.provenance import Shadow
from dnal_mini.pruning.pruner import Pruned

SHAPE = (3, 16, 16)
NETS = {
    "vgg16": {"width": 0.125, "image_size": 16},
    "resnet56": {"width": 0.25},
    "mobilenetv2": {"width": 0.2},
}
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def make_shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet56 and MobileNetV2 with one or two blocks of each kind, while a test runs."""
    of_resnet, of_mobilenet = (
        sys.modules[f"dnal_mini.models.{name}"] for name in ("resnet", "mobilenetv2")
    )
    monkeypatch.setattr(of_resnet, "STAGES", ((16, 1, 1), (32, 2, 2), (64, 1, 2)))
    kinds = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 2, 2))
    monkeypatch.setattr(of_mobilenet, "STAGES", kinds)


def settled(net: nn.Module) -> nn.Module:
    """Norms with statistics and affines as after training, so that nothing is zero by chance."""
    for norm in (m for m in net.modules() if isinstance(m, NORMS)):
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, 0.1, 0.9)  # few dead ReLUs, or thin nets forget their input
        if not norm.track_running_stats:
            continue
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        norm.num_batches_tracked.fill_(7)
    return net


def close(norm: nn.Module, *channels: int) -> None:
    """What a closed gate leaves behind: gamma = beta = 0."""
    norm.weight.data[list(channels)] = 0
    norm.bias.data[list(channels)] = 0


def gated(name: str, keep: float, alive: bool = True, seed: int = 0) -> nn.Module:
    """A net with gates drawn at random; ``alive`` leaves every layer at least one channel."""
    torch.manual_seed(seed)
    net = add_gates(settled(MODELS[name](**NETS[name])))
    draw_gates(net, keep, alive)
    return net


def draw_gates(net: nn.Module, keep: float, alive: bool = True) -> None:
    for s in arch_parameters(net):
        s.data = torch.where(torch.rand(len(s)) < keep, 1.0, -1.0)
        if alive:
            s.data[torch.randint(len(s), ())] = 1.0


@torch.no_grad()
def outputs(net: nn.Module, images: Tensor, train: bool = False) -> list[Tensor]:
    """All tensors that a hard-gated net returns, in float64; ``train``: with batch statistics."""
    net = copy.deepcopy(net).double().eval()
    set_gates(net, mode="hard")
    for module in net.modules():
        if isinstance(module, NORMS):
            module.train(train)
    return tree_leaves(net(images.double().clone()))


def relative_difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """Largest difference of any tensor, relative to its largest value."""
    assert [x.shape for x in expected] == [x.shape for x in got]
    pairs = zip(expected, got, strict=True)
    return max(float((x - y).abs().max() / x.abs().max().clamp(min=1e-6)) for x, y in pairs)


def assert_same_function(
    net: nn.Module, small: Pruned, shape: tuple[int, ...] = SHAPE, train: bool = True
) -> None:
    """Gated and pruned output agree in float64 in eval and train mode, and see the image."""
    images = torch.randn(3, *shape)
    assert type(small.module) is type(net)
    for mode in (False, True) if train else (False,):
        expected, got = outputs(net, images, mode), outputs(small.module, images, mode)
        assert max(float(x.std(0).max()) for x in expected) > 1e-12, "it must depend on the images"
        difference = relative_difference(expected, got)
        assert difference <= 1e-10, f"train={mode}: {difference:.1e}"


def named(analysis: Analysis) -> dict[str, fx.Node]:
    """The nodes of a net's tensors by the name of their layer or module, "x" for the images."""
    graph = analysis.graph
    found = {}
    for node in analysis.facts:
        own = graph.layers[node].name if node in graph.layers else graph.sole.get(node, node.name)
        name = "x" if node.op == "placeholder" else own.replace(".", "_")
        found[name if name not in found else f"{name}_1"] = node
    return found


class Again(fx.Interpreter):
    """Runs the operations of a captured net once more, in either mode of its norms."""

    def __init__(self, analysis: Analysis, training: bool = False) -> None:
        super().__init__(fx.GraphModule(nn.Module(), analysis.graph.graph))
        self.analysis, self.training = analysis, training
        self.nodes = dict(zip(self.module.graph.nodes, analysis.graph.nodes, strict=True))

    def on(self, images: Tensor) -> Any:
        graph = self.analysis.graph
        known = {n: self.analysis.tensors[name].clone() for n, name in graph.tensors.items()}
        holders = [n for n in graph.nodes if n.op == "placeholder"]
        return self.run(*(known.get(n, graph.constants.get(n, images.clone())) for n in holders))

    def run_node(self, n: fx.Node) -> Any:
        node = self.nodes[n]
        if "batch_norm" in str(node.target) and node.args[3] is not None:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = node.target(*args[:5], self.training, *args[6:], **kwargs)
        else:
            result = super().run_node(n)
        return self.see(node, result)

    def see(self, node: fx.Node, result: Any) -> Any:
        return result


class Judge(Again):
    """Holds every fact against the numbers that come by."""

    def __init__(self, analysis: Analysis, training: bool) -> None:
        super().__init__(analysis, training)
        self.seen = [0, 0, 0, 0]

    def see(self, node: fx.Node, result: Any) -> Any:
        facts, shadow = self.analysis.facts.get(node), self.analysis.values.get(node)
        if facts is None or not isinstance(shadow, Shadow) or not isinstance(result, Tensor):
            return result
        assert tuple(result.shape) == shadow.shape
        channel = shadow.channels if shadow.raw is not None else shadow.codes() // 2**32
        state, value, steady = (v[channel] for v in (facts.state, facts.value, facts.steady))
        assert not result[state == ZERO].any(), f"{node} is not zero"
        told = (state == CONSTANT) & (steady if self.training else True)
        torch.testing.assert_close(result[told].double(), value[told], rtol=1e-9, atol=1e-9)
        if not self.training and len(result) == 2:
            fixed = (state[0] == FIXED).expand_as(result)
            torch.testing.assert_close(result[0][fixed[0]], result[1][fixed[1]])
        for kind in range(4):
            self.seen[kind] += int((facts.state == kind).sum())
        return result


def hold_the_facts(net: nn.Module, shape: Sequence[int]) -> list[int]:
    """Run a net in both modes under the eyes of ``Judge``; channels seen of each state."""
    net = copy.deepcopy(net).double()
    analysis = analyse(net, shape)
    images = torch.randn(2, *shape, dtype=torch.float64)
    for training in (False, True):
        with torch.no_grad():
            judge = Judge(analysis, training)
            judge.on(images)
    return judge.seen
