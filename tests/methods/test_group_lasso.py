"""Group lasso: the step is the closed form, zeros are exact, and cutting them changes nothing."""

import math

import pytest
import torch
from small_nets import make_shallow, settled
from torch import Tensor, nn

from dnal_mini.config import Budget, SearchConfig
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, gates, set_gates
from dnal_mini.methods.contract import Subject
from dnal_mini.methods.group_lasso import GroupLasso, groups_of, rows_of, shrunk
from dnal_mini.models import MODELS
from dnal_mini.pruning.pruner import prune
from dnal_mini.runs import runlog
from dnal_mini.search.budget import impose
from dnal_mini.search.driver import run
from dnal_mini.search.stages import run_stage
from dnal_mini.training.stage import Feed, Session, Stage

DATA = toy_images(seed=0, train=96, val=32, image_shape=(3, 16, 16))
CONFIG = SearchConfig().replace(
    name="toy", data="toy", val=32, width=0.07, weight_epochs=1, fine_tune_epochs=1, batch=32,
    precision="float32", channels_last=False, method="group-lasso", lasso_epochs=2,
    baseline="none",
)  # fmt: skip


class Pair(nn.Module):
    """Two convolutions with norms, one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 11, 3, bias=False), nn.BatchNorm2d(11)
        self.conv2, self.bn2 = nn.Conv2d(11, 7, 3), nn.BatchNorm2d(7)
        self.fc = nn.Linear(7, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.bn2(self.conv2(x)).relu().mean((2, 3)))


def trained(price: float, floors: dict | None = None, epochs: int = 5) -> Subject:
    """A small net after the stage at a price, always from the same start."""
    torch.manual_seed(0)
    net = add_gates(Pair())
    given = Subject(net, DATA, floors=floors or {})
    stage = Stage("lasso_stage", epochs, 0.05, price=price, feed=Feed(32, crop=0, flip=False))
    for _ in run_stage(net, DATA, stage, GroupLasso().work(stage, given), Session()):
        pass
    return given


def count(given: Subject) -> int:
    return sum(int(mask.sum()) for mask in GroupLasso().alive(given).values())


def test_the_step_minimises_its_problem_and_keeps_the_direction():
    """0 is in x - w + t x / |x| at the minimum, or |w| <= t where it is 0."""
    rows, step = torch.randn(40, 9, dtype=torch.float64) * torch.linspace(0.1, 2, 40)[:, None], 0.4
    t, x = step * 3, rows * shrunk(rows, step)[:, None]
    lengths = rows.norm(dim=1)
    gone = lengths <= t
    assert 5 < int(gone.sum()) < 35
    assert torch.equal(x.norm(dim=1) == 0, gone)
    alive = ~gone
    slope = x - rows + t * x / x.norm(dim=1, keepdim=True)
    assert float(slope[alive].abs().max()) < 1e-12
    cosine = torch.cosine_similarity(x[alive], rows[alive])
    assert float((cosine - 1).abs().max()) < 1e-12
    assert shrunk(rows, 0.0).tolist() == [1.0] * 40


def test_the_longest_groups_of_a_floor_are_spared_and_no_others():
    rows = torch.tensor([[3.0], [1.0], [2.0], [9.0]])
    assert shrunk(rows, 4.0).tolist() == [0, 0, 0, pytest.approx(5 / 9)]
    assert shrunk(rows, 4.0, floor=2).tolist() == [1, 0, 0, pytest.approx(5 / 9)]
    assert shrunk(torch.zeros(3, 2), 1.0).tolist() == [0, 0, 0]


def test_zeros_are_exact_and_a_higher_price_leaves_no_more():
    counts = [count(trained(price)) for price in (0.0, 0.16, 0.2, 0.3)]
    assert counts[0] == 18
    assert counts == sorted(counts, reverse=True)
    assert 0 < counts[2] < 18
    assert counts[3] == 0
    given = trained(0.2)
    for parts in groups_of(given.net).values():
        rows = rows_of(parts)
        dead = rows.norm(dim=1) == 0
        assert torch.equal(dead, (rows == 0).all(1)), "whole groups or nothing"


def test_a_floor_holds_a_layer_open():
    given = trained(0.3, floors={"bn1.gate": 2, "bn2.gate": 3})
    alive = {name: int(mask.sum()) for name, mask in GroupLasso().alive(given).items()}
    assert alive == {"bn1.gate": 2, "bn2.gate": 3}


def test_a_group_that_is_zero_stays_zero_whatever_momentum_does():
    net = add_gates(Pair())
    with torch.no_grad():
        for part in groups_of(net)["bn1.gate"]:
            part[4] = 0.0
    stage = Stage("lasso_stage", 2, 0.05, price=1e-4)
    work = GroupLasso().work(stage, Subject(net, DATA))
    work.before_epoch(1)
    net.conv1.weight.data[4] += 1.0  # a step that momentum alone has made
    net.bn1.bias.data[4] += 1.0
    work.after_step(0.05)
    assert not rows_of(groups_of(net)["bn1.gate"])[4].any()
    assert work.measure() == {"open": 17}


def test_the_price_rises_in_the_first_fifth_of_the_epochs():
    net = add_gates(Pair()).double()
    work = GroupLasso().work(Stage("s", 10, 0.05, price=0.1), Subject(net, DATA))
    before = rows_of(groups_of(net)["bn1.gate"])
    found = []
    for epoch in (1, 2, 3, 10):
        work.before_epoch(epoch)
        lengths = rows_of(groups_of(net)["bn1.gate"]).norm(dim=1)
        work.after_step(0.01)
        lost = lengths - rows_of(groups_of(net)["bn1.gate"]).norm(dim=1)
        found.append(float(lost.mean()) / (0.01 * 0.1 * math.sqrt(before.shape[1])))
    assert found == pytest.approx([0.5, 1, 1, 1])


@pytest.mark.parametrize("model", MODELS)
def test_a_channel_of_zeros_is_cut_and_nothing_changes(model: str, monkeypatch: pytest.MonkeyPatch):
    make_shallow(monkeypatch)
    net = add_gates(settled(MODELS[model](width=0.25))).double().eval()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(1)
    with torch.no_grad():
        for parts in groups_of(net).values():
            gone = torch.rand(len(parts[0])) < 0.4
            gone[0] = False
            for part in parts:
                part[gone] = 0.0
        set_gates(net, mode="off")
        expected = net(x)
        alive = GroupLasso().alive(Subject(net, DATA))
        impose(net, alive)
        small = prune(net, (3, 32, 32)).module
        found = small(x)
    assert float((found - expected).abs().max()) < 1e-9 * float(expected.abs().max())
    before, after = (sum(p.numel() for p in each.parameters()) for each in (net, small))
    assert after < 0.7 * before


def test_a_run_finds_the_price_of_its_budget_and_goes_on_after_a_stop(tmp_path):
    torch.manual_seed(0)
    more = toy_images(seed=0, train=640, val=32, image_shape=(3, 16, 16))
    config = CONFIG.replace(budget=Budget(macs=0.7), group_price=0.03, lasso_lr=0.1, lasso_epochs=3)
    whole = run(config, tmp_path / "whole", net=Pair(), data=more)
    assert whole["macs"][1] / whole["macs"][0] == pytest.approx(0.7, rel=0.1)
    rows = runlog.read(tmp_path / "whole")
    assert [row for row in rows if row["kind"] == "probe"], "the price was looked for"
    assert whole["group_price"] != 0.03
    config = CONFIG.replace(group_price=0.05, lasso_lr=0.1)
    whole = run(config, tmp_path / "native")

    def stop(row: dict) -> None:
        if row["kind"] == "epoch" and row["stage"] == "lasso_stage":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "stopped", on_row=stop)
    again = run(config, tmp_path / "stopped")
    files = [(tmp_path / n / "small.safetensors").read_bytes() for n in ("native", "stopped")]
    assert files[0] == files[1]
    assert again["fine_tuned_accuracy"] == whole["fine_tuned_accuracy"]


def test_a_convolution_that_makes_the_channels_of_two_gates_is_refused():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 3)
            self.one, self.two = nn.BatchNorm2d(5), nn.BatchNorm2d(5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return self.one(x).relu() + self.two(x).sigmoid()

    net = add_gates(Twice(), where=lambda name, norm: True)
    assert len(gates(net)) == 2
    with pytest.raises(ValueError, match=r"whose channels one convolution makes; need one for"):
        groups_of(net)
