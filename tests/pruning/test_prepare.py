"""The traced net: both modes in one graph, shapes, in-place writes, names for the reader."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from dnal_mini.pruning.prepare import (
    attribute,
    called_again,
    describe,
    graphs_of_both_modes,
    measure_shapes,
    place_of,
    settle_in_place,
    shape_of,
)


def graph_of(net: nn.Module) -> fx.GraphModule:
    """The graph of a net that does the same in both modes."""
    (graph,) = graphs_of_both_modes(net)
    return graph


class Net(nn.Module):
    """Two convolutions and whatever the test wants between them."""

    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 1), nn.Conv2d(5, 4, 1)
        self.norm, self.act = nn.BatchNorm2d(5), nn.ReLU()
        self.block = nn.Sequential(nn.Conv2d(5, 5, 1), nn.ReLU())
        self.scale = nn.Parameter(torch.ones(5, 1, 1))
        self.inner = forward

    def forward(self, x: Tensor) -> Any:
        return self.inner(self, x)


def nodes_by_name(graph: fx.GraphModule) -> dict[str, fx.Node]:
    return {node.name: node for node in graph.graph.nodes}


def only_while_training(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.second(net.norm(x) if net.training else x)


def something_else_in_each(net: Any, x: Tensor) -> Tensor:
    x = net.first(x)
    return net.second(net.norm(x) if net.training else net.act(x))


@pytest.mark.parametrize("training", [True, False])
def test_a_forward_that_calls_more_in_train_mode_gives_two_graphs(training):
    net = Net(only_while_training).train(training)
    net.norm.train(not training)
    called = [
        {n.target for n in graph.graph.nodes if n.op == "call_module"}
        for graph in graphs_of_both_modes(net)
    ]
    assert called == [{"first", "norm", "second"}, {"first", "second"}]  # best first
    assert [net.training, net.norm.training] == [training, not training]


def test_a_net_that_is_another_in_each_mode_is_refused():
    with pytest.raises(ValueError, match=r"^got a Net that calls act in eval mode only[^\n]*need"):
        graphs_of_both_modes(Net(something_else_in_each))


def test_shapes_are_those_of_the_running_net():
    graph = graph_of(Net(lambda net, x: net.second(F.max_pool2d(net.first(x), 2)).flatten(1)))
    measure_shapes(graph, (3, 9, 6))
    named = nodes_by_name(graph)
    assert shape_of(named["first"]) == (2, 5, 9, 6)
    assert shape_of(named["second"]) == (2, 4, 4, 3)
    assert shape_of(named["flatten"]) == (2, 48)


def test_a_number_has_no_shape():
    graph = graph_of(Net(lambda net, x: net.first(x).view(x.size(0), -1)))
    measure_shapes(graph, (3, 4, 2))
    assert shape_of(nodes_by_name(graph)["size"]) == ()


def test_measuring_leaves_the_modes_and_the_statistics_alone():
    net = Net(lambda net, x: net.norm(net.first(x)))
    net.first.eval()
    graph = graph_of(net)
    measure_shapes(graph, (3, 4, 2))
    assert [net.norm.training, net.first.training] == [True, False]
    assert int(net.norm.num_batches_tracked) == 0


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 8), (3,), (3, 0, 8)])
def test_an_image_that_does_not_fit_is_refused_in_one_line(shape):
    graph = graph_of(Net(lambda net, x: net.second(net.act(net.first(x))).mean((2, 3))))
    with pytest.raises(ValueError, match=r"^got image_shape [^\n]*$"):
        measure_shapes(graph, shape)


def readers(graph: fx.GraphModule, name: str) -> set[str]:
    return {user.name for user in nodes_by_name(graph)[name].users}


def test_who_reads_an_overwritten_tensor_reads_the_result():
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        y = x.abs()
        x.relu_()
        return net.second(x + y)

    graph = graph_of(Net(forward))
    assert readers(graph, "first") == {"abs_1", "relu_", "add"}
    assert settle_in_place(graph) == set()
    assert readers(graph, "first") == {"abs_1", "relu_"}
    assert readers(graph, "relu_") == {"add"}


def test_a_tensor_that_is_overwritten_through_a_view_is_left_alone():
    def forward(net: Any, x: Tensor) -> Tensor:
        x = net.first(x)
        x[:, :2].relu_()
        return net.second(x)

    graph = graph_of(Net(forward))
    assert {node.name for node in settle_in_place(graph)} == {"first"}


def test_modules_called_again_are_found_with_all_their_calls():
    net = Net(lambda net, x: net.act(net.block(net.act(net.first(x)))))
    again = called_again(graph_of(net))
    assert {name: len(nodes) for name, nodes in again.items()} == {"act": 2}


def test_a_node_is_described_by_its_operation_and_its_module():
    class Inner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(1)

    net = Net(lambda net, x: net.block(net.first(x)) * net.scale)
    net.block.append(Inner())
    graph = graph_of(net)
    named = nodes_by_name(graph)
    assert describe(named["first"], graph) == "Conv2d first"
    assert describe(named["softmax"], graph) == "softmax in block.2"
    assert describe(named["mul"], graph) == "mul with scale in forward"
    assert place_of(named["mul"]) == "forward"
    assert attribute(graph, "block.0.weight") is net.block[0].weight
