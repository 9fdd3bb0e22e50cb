"""Pruned nets against the hard-gated nets they come from, and the files they are kept in."""

import copy
import json
import struct
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dnal_mini.channels import ChannelMap
from dnal_mini.cost import cost
from dnal_mini.gate import add_gates, arch_parameters, gates, set_gates
from dnal_mini.models import MODELS
from dnal_mini.netfile import load, save
from dnal_mini.prune import drop_gates, largest_difference, prune

SHAPE = (3, 16, 16)
NETS = {
    "vgg16": {"width": 0.125, "image_size": 16},
    "resnet56": {"width": 0.25},
    "mobilenetv2": {"width": 0.2},
}


def settled(net: nn.Module) -> nn.Module:
    """Norms with statistics and affines as after training, so that nothing is zero by chance."""
    for norm in (m for m in net.modules() if isinstance(m, nn.BatchNorm2d | nn.BatchNorm1d)):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.uniform_(norm.bias, 0.1, 0.9)  # few dead ReLUs, or thin nets forget their input
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2)
    return net


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


def outputs(net: nn.Module, small: nn.Module, train: bool) -> tuple[Tensor, Tensor]:
    """Hard-gated and pruned output on the same images in float64."""
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    full, cut = copy.deepcopy(net).double().train(train), copy.deepcopy(small).double().train(train)
    set_gates(full, mode="hard")
    return full(x).detach(), cut(x).detach()


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", NETS)
def test_twenty_draws_of_gates_prune_exactly(name, residual):
    dense = cost(MODELS[name](**NETS[name]), SHAPE)
    for draw in range(20):  # twenty draws a net, ten for each way to join
        if draw % 2 != (residual == "tie"):
            continue
        keep = (0.8, 0.6, 0.4, 0.2)[draw % 4]
        net = gated(name, keep, seed=draw)
        small = prune(net, SHAPE, residual)
        for train in (False, True):
            expected, got = outputs(net, small.module, train)
            assert float(expected.std(0).max()) > 0, "the output must depend on the images"
            difference = float((expected - got).abs().max() / expected.abs().max())
            assert difference <= 1e-10, f"draw {draw}, train={train}: {difference:.1e}"
        assert cost(small.module, SHAPE).macs < dense.macs
        assert small.report.walls == []


@pytest.mark.parametrize("name", NETS)
def test_all_gates_open_keeps_the_net(name):
    net = gated(name, keep=1.1)
    small = prune(net, SHAPE)
    plain = MODELS[name](**NETS[name])
    assert small.certificate == 0
    assert cost(small.module, SHAPE) == cost(plain, SHAPE)
    assert type(small.module) is type(plain)
    assert small.module.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("residual", ["scatter", "tie"])
@pytest.mark.parametrize("name", NETS)
def test_pruning_twice_cuts_nothing_more(name, residual):
    once = prune(gated(name, keep=0.4), SHAPE, residual)
    twice = prune(once.module, SHAPE, residual)
    assert cost(twice.module, SHAPE) == cost(once.module, SHAPE)


@pytest.mark.parametrize("name", NETS)
def test_closing_one_more_gate_never_costs_more(name):
    net = gated(name, keep=0.6)
    before = prune(net, SHAPE).spec["cost"]["pruned"]
    for s in list(arch_parameters(net))[::5]:
        s.data[int(s.argmax())] = -1.0
        after = prune(net, SHAPE).spec["cost"]["pruned"]
        assert after["macs"] <= before["macs"]
        assert after["params"] <= before["params"]
        before = after


def test_tie_keeps_no_index_operation_and_scatter_fewer_macs():
    net = gated("resnet56", keep=0.6)
    tied, scattered = prune(net, SHAPE, "tie"), prune(net, SHAPE, "scatter")
    strides = [m.stride for m in tied.module.modules() if isinstance(m, ChannelMap)]
    assert strides == [2, 2]  # the two shortcuts that the plain net has, too
    assert cost(scattered.module, SHAPE).macs < cost(tied.module, SHAPE).macs


def test_vgg_params_and_macs_are_those_of_the_kept_widths():
    net = gated("vgg16", keep=0.5)
    kept = [int(gate.is_open.sum()) for gate in gates(net).values()]
    classes, hidden, before = 10, 64, [3, *kept]
    pixels = [256, 256, 64, 64, 16, 16, 16, 4, 4, 4, 1, 1, 1]
    macs = sum(9 * a * b * p for a, b, p in zip(before, kept, pixels, strict=False))
    params = sum((9 * a + 3) * b for a, b in zip(before, kept, strict=False))
    found = cost(prune(net, SHAPE).module, SHAPE)
    assert found.macs == macs + kept[-1] * hidden + hidden * classes
    assert found.params == params + (kept[-1] + 3) * hidden + (hidden + 1) * classes


def test_a_dead_expansion_goes_with_its_depthwise_gate():
    net = gated("mobilenetv2", keep=1.1)
    gate = gates(net)["blocks.3.depthwise.bn.gate"]
    gate.s.data[[0, 4, 5]] = -1.0
    small = prune(net, SHAPE).module
    block, full = small.blocks[3], len(gate.s)
    assert block.expand.conv.out_channels == block.depthwise.conv.groups == full - 3
    assert block.project.conv.in_channels == full - 3


def test_a_dead_layer_keeps_one_channel_and_says_so():
    net = gated("vgg16", keep=0.7)
    gates(net)["features.bn6.gate"].s.data.fill_(-1.0)
    small = prune(net, SHAPE)
    assert small.module.features.conv6.out_channels == 1
    assert any("features.conv7" in note and "keeps 1" in note for note in small.report.notes)


@pytest.mark.parametrize("residual", ["scatter", "tie"])
def test_a_dead_branch_goes_as_a_whole(residual):
    net = gated("resnet56", keep=1.1)
    gates(net)["blocks.9.bn2.gate"].s.data.fill_(-1.0)  # a branch with stride 2
    small = prune(net, SHAPE, residual)
    expected, got = outputs(net, small.module, train=True)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=0)
    assert isinstance(small.module.blocks[9].conv1, nn.Identity)
    assert isinstance(small.module.blocks[9].conv2, nn.Identity)
    assert "branch gone: blocks.9.bn2 adds nothing" in small.report.notes


def test_a_live_gate_behind_a_dead_layer_stays_exact():
    net = gated("resnet56", keep=0.7)
    gates(net)["blocks.4.bn1.gate"].s.data.fill_(-1.0)  # bn2 then emits a constant per channel
    small = prune(net, SHAPE)
    for train in (False, True):
        expected, got = outputs(net, small.module, train)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)
    assert small.module.blocks[4].conv2.weight.shape[1] == 1


def test_the_gate_behind_the_activation_prunes_as_well():
    net = add_gates(settled(MODELS["vgg16"](**NETS["vgg16"])), "conv-bn-relu-ss")
    draw_gates(net, 0.5)
    small = prune(net, SHAPE)
    kept = [int(gate.is_open.sum()) for gate in gates(net).values()]
    convs = [m for m in small.module.modules() if isinstance(m, nn.Conv2d)]
    assert [conv.out_channels for conv in convs] == kept
    assert small.certificate <= 1e-12


def test_the_gate_before_the_norm_cannot_be_cut_exactly_and_is_not():
    net = add_gates(settled(MODELS["vgg16"](**NETS["vgg16"])), "conv-ss-bn-relu")
    draw_gates(net, 0.5)
    small = prune(net, SHAPE)
    plain = MODELS["vgg16"](**NETS["vgg16"])
    assert small.certificate <= 1e-12
    norms = [m for m in small.module.modules() if isinstance(m, nn.BatchNorm2d)]
    beta = [bool((norm.bias.detach() != 0).all()) for norm in norms]
    assert all(beta)  # what a closed channel leaks is still there
    assert cost(small.module, SHAPE).macs > 0.5 * cost(plain, SHAPE).macs


def test_the_argument_is_left_alone():
    net = gated("mobilenetv2", keep=0.5)
    before = copy.deepcopy(net.state_dict())
    prune(net, SHAPE)
    assert not any(module.training is False for module in net.modules())
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_drop_gates_equals_hard_gates_in_both_modes():
    net = gated("resnet56", keep=0.5, alive=False, seed=3)
    plain = drop_gates(net)
    assert not gates(plain)
    for train in (False, True):
        expected, got = outputs(net, plain, train)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_pruned_net_trains():
    small = prune(gated("mobilenetv2", keep=0.5), SHAPE).module
    loss = small(torch.randn(4, *SHAPE)).square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in small.parameters())


def test_a_users_own_net_keeps_its_class():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(3, 11, 3, padding=1), nn.BatchNorm2d(11)
            self.conv2, self.bn2 = nn.Conv2d(11, 11, 5, padding=2), nn.BatchNorm2d(11)
            self.fc = nn.Linear(11, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.bn1(self.conv1(x)))
            x = F.relu(x + self.bn2(self.conv2(x)))
            return self.fc(x.mean((2, 3)))

    net = add_gates(settled(Own()))
    draw_gates(net, 0.5)
    small = prune(net, SHAPE)
    assert type(small.module) is Own
    expected, got = outputs(net, small.module, train=True)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-15)


# --- files ---------------------------------------------------------------------------------


def saved(tmp_path, name: str = "resnet56"):
    small = prune(gated(name, keep=0.4), SHAPE)
    path = tmp_path / "net.safetensors"
    save(small, path)
    return small, path


@pytest.mark.parametrize("name", NETS)
def test_a_saved_net_comes_back_bit_by_bit(tmp_path, name):
    small, path = saved(tmp_path, name)
    back = load(path, MODELS[name])
    x = torch.randn(2, *SHAPE)
    torch.testing.assert_close(back.module.eval()(x), small.module.eval()(x), rtol=0, atol=0)
    assert (back.spec, back.report, back.certificate) == (
        json.loads(json.dumps(small.spec)),
        small.report,
        small.certificate,
    )


def test_a_saved_net_loads_in_a_fresh_process_without_pickle(tmp_path):
    small, path = saved(tmp_path)
    small.module.eval()
    torch.manual_seed(5)
    expected = float(small.module(torch.randn(2, *SHAPE)).sum().detach())
    code = (
        "import sys, pickle, torch, dnal_mini as dnal\n"
        "pickle.load = pickle.loads = pickle.Unpickler = None\n"
        f"net = dnal.load({str(path)!r}, build=dnal.models.resnet56).module.eval()\n"
        f"torch.manual_seed(5); print(float(net(torch.randn(2, *{SHAPE})).sum().detach()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(expected, rel=1e-5)


def rewritten(path, change) -> None:
    """Change the JSON header of a safetensors file."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + size])
    change(header["__metadata__"])
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + size :])


def test_a_file_that_is_cut_short_or_edited_is_refused(tmp_path):
    _, path = saved(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut short or damaged"):
        load(path, MODELS["resnet56"])
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="edited"):
        load(path, MODELS["resnet56"])
    path.write_bytes(whole)
    rewritten(path, lambda about: about.update(dnal_mini=about["dnal_mini"].replace("0", "1", 1)))
    with pytest.raises(ValueError, match="edited"):
        load(path, MODELS["resnet56"])
    path.write_bytes(whole)
    rewritten(path, lambda about: about.pop("dnal_mini"))
    with pytest.raises(ValueError, match="without a dnal_mini spec"):
        load(path, MODELS["resnet56"])


def test_a_spec_of_another_architecture_is_refused(tmp_path):
    _, path = saved(tmp_path)
    with pytest.raises(ValueError, match="does not fit this VGG16"):
        load(path, MODELS["vgg16"])
    with pytest.raises(ValueError, match=r"architecture and widths|another net"):
        load(path, lambda: MODELS["resnet56"](width=0.5))
    with pytest.raises(FileNotFoundError, match="not there"):
        load(tmp_path / "none.safetensors", MODELS["vgg16"])


def test_gates_that_were_never_trained_are_refused():
    with pytest.raises(ValueError, match="s = 0"):
        prune(add_gates(MODELS["vgg16"](**NETS["vgg16"])), SHAPE)


@pytest.mark.gpu
def test_a_net_on_the_gpu_is_pruned_there():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    small = prune(gated("resnet56", keep=0.5).cuda(), SHAPE)
    assert {tensor.device.type for tensor in small.module.state_dict().values()} == {"cuda"}
    assert small.module(torch.randn(2, *SHAPE, device="cuda")).isfinite().all()


def test_an_unknown_residual_is_refused():
    with pytest.raises(ValueError, match="'scatter' or 'tie'"):
        prune(gated("vgg16", 0.5), SHAPE, residual="union")


def test_the_certificate_sees_a_wrong_cut():
    net = gated("vgg16", keep=0.5)
    small = prune(net, SHAPE)
    small.module.features.bn3.bias.data[0] += 1e-3
    assert largest_difference(net, small.module, SHAPE)[1] > 1e-8
