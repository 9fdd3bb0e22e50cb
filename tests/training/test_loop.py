"""The training loop: what it trains, what it counts, and that it can be taken up again."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

from dnal_mini.data.imageset import Split
from dnal_mini.data.sources import toy_images
from dnal_mini.gating import add_gates, arch_parameters
from dnal_mini.training.devices import pick_device, pick_dtype
from dnal_mini.training.loop import evaluate, fit, only_training
from dnal_mini.training.position import Position, seeded
from dnal_mini.training.schedules import cosine, one_cycle
from dnal_mini.training.stage import Feed, Session, Stage, Work

DATA = toy_images(train=90, val=33, num_classes=3, image_shape=(3, 12, 10))


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 10 * 8, 3)
    )


def stage(epochs: int, lr: float, schedule: str = "constant", **fields) -> Stage:
    feed = {
        name: fields.pop(name) for name in ("batch", "crop", "flip", "compiled") if name in fields
    }
    return Stage("toy", epochs, lr, schedule, feed=Feed(**{"batch": 17} | feed), **fields)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_training_learns_the_toy_images():
    net = small_net()
    rows = list(fit(net, DATA, sgd(net), stage(8, 0.02)))
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"]
    assert rows[-1]["val_accuracy"] > 0.8
    assert rows[-1]["val_accuracy"] == evaluate(net, DATA.val, DATA)


def test_a_resumed_run_ends_where_the_whole_run_ends():
    whole = small_net()
    parts = copy.deepcopy(whole)
    list(fit(whole, DATA, sgd(whole), stage(3, 0.05, "cosine", seed="x")))
    first = sgd(parts)
    rows = fit(parts, DATA, first, stage(3, 0.05, "cosine", seed="x"))
    next(rows)
    rows.close()
    second = sgd(parts)
    second.load_state_dict(first.state_dict())
    list(fit(parts, DATA, second, stage(3, 0.05, "cosine", seed="x"), start=2))
    assert same(whole, parts)


def test_another_seed_gives_another_run():
    nets = [small_net()]
    nets.append(copy.deepcopy(nets[0]))
    for seed, net in enumerate(nets):
        list(fit(net, DATA, sgd(net), stage(1, 0.05, seed=str(seed))))
    assert not same(*nets)


def test_reset_momentum_is_a_new_optimiser_each_epoch():
    one, many = small_net(), None
    many = copy.deepcopy(one)
    list(fit(one, DATA, sgd(one), stage(3, 0.05, reset_momentum=True)))
    for epoch in (1, 2, 3):
        list(fit(many, DATA, sgd(many), stage(epoch, 0.05), start=epoch))
    assert same(one, many)


def test_evaluation_counts_every_image_once():
    net = small_net().eval()
    x = (DATA.val.images.double() / 255 - torch.tensor(DATA.mean).view(3, 1, 1)) / torch.tensor(
        DATA.std
    ).view(3, 1, 1)
    right = (net.double()(x).argmax(1) == DATA.val.labels).sum()
    net.float().train()
    for batch in (7, 33, 500):
        assert evaluate(net, DATA.val, DATA, batch=batch) == int(right) / 33
    assert all(module.training for module in net.modules())


def test_only_the_chosen_parameters_train():
    net = add_gates(small_net())
    net[4].bias.requires_grad_(False)
    before = [p.requires_grad for p in net.parameters()]
    with only_training(net, arch_parameters(net)):
        assert {id(p) for p in net.parameters() if p.requires_grad} == {
            id(s) for s in arch_parameters(net)
        }
    assert [p.requires_grad for p in net.parameters()] == before


def test_running_statistics_are_left_alone_on_request():
    for mode, moves in (("batch", True), ("running", False)):
        net = small_net()
        list(fit(net, DATA, sgd(net), stage(1, 0.01, bn_mode=mode)))
        assert bool(net[1].running_mean.any()) is moves


def test_price_enters_gradient_and_row():
    net = small_net()
    weight = net[4].weight
    work = Work(penalty=lambda: weight.sum())
    rows = list(fit(net, DATA, sgd(net), stage(1, 0.0, price=3.0), work))
    assert rows[0]["price"] == pytest.approx(3 * float(weight.detach().sum()), rel=1e-5)


def test_cosine_starts_at_the_rate_and_ends_near_zero():
    lr = cosine(0.3)
    assert [lr(0), lr(0.5), lr(1)] == pytest.approx([0.3, 0.15, 0.0], abs=1e-12)


def test_draws_depend_on_their_words_only():
    assert torch.equal(
        torch.rand(3, generator=seeded(1, "a")), torch.rand(3, generator=seeded(1, "a"))
    )
    assert not torch.equal(
        torch.rand(3, generator=seeded(1, "a")), torch.rand(3, generator=seeded(2, "a"))
    )


def test_bfloat16_is_as_near_to_float32_as_its_digits():
    net = small_net().eval()
    split = Split(DATA.train.images, DATA.train.labels)
    full = evaluate(net, split, DATA)
    half = evaluate(net, split, DATA, Feed(precision="bfloat16", channels_last=True))
    assert abs(full - half) < 0.1
    assert pick_dtype("float32", torch.device("cpu")) is torch.float32
    assert pick_dtype("auto", torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_mistakes_are_named():
    net = small_net()
    with pytest.raises(ValueError, match="need at most 90"):
        next(fit(net, DATA, sgd(net), stage(1, 0.1, batch=91)))
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        list(fit(net, DATA, sgd(net), stage(2, 1e30)))
    with pytest.raises(ValueError, match="got device 'cuda:77'"):
        pick_device("cuda:77")
    with pytest.raises(ValueError, match="got device 'gpu'"):
        pick_device("gpu")


def test_one_cycle_goes_up_in_a_line_and_down_along_a_cosine():
    lr = one_cycle(0.4, warm_up=0.25, start=0.1)
    assert [lr(0), lr(0.125), lr(0.25), lr(0.625)] == pytest.approx([0.04, 0.22, 0.4, 0.2])
    assert lr(1) == pytest.approx(0, abs=1e-12)


def test_label_smoothing_mixes_the_target_with_all_classes():
    net = small_net()
    rows = [
        next(fit(copy.deepcopy(net), DATA, sgd(net), plain))
        for plain in (stage(1, 0.0, batch=90, crop=0, flip=False, label_smoothing=share)
                      for share in (0.0, 0.3))
    ]  # fmt: skip
    x = DATA.train.images.double() / 255
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (DATA.mean, DATA.std))
    log_p = copy.deepcopy(net).double()((x - mean) / std).log_softmax(1).detach()
    right = -log_p[torch.arange(90), DATA.train.labels].mean()
    smooth = 0.7 * right - 0.3 * log_p.mean()
    assert [row["loss"] for row in rows] == pytest.approx([float(right), float(smooth)], rel=1e-5)


class Stop:
    """Says stop at the n-th question, and keeps the place it is given."""

    def __init__(self, after: int) -> None:
        self.left, self.place = after, None

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0

    def keep(self, place: Position) -> None:
        self.place = place


def with_dropout() -> nn.Sequential:
    return nn.Sequential(*small_net()[:3], nn.Dropout(0.4), *small_net()[3:])


def test_a_stage_stopped_inside_an_epoch_goes_on_to_the_same_end():
    whole = with_dropout()
    parts = copy.deepcopy(whole)
    rows = list(fit(whole, DATA, sgd(whole), stage(3, 0.05, "cosine", seed="x")))
    first, stop = sgd(parts), Stop(after=7)  # five steps an epoch: in the second one
    planned, found = stage(3, 0.05, "cosine", seed="x"), []
    session = Session(stopping=stop)
    rows_until_stop = fit(parts, DATA, first, planned, session=session, keep=stop.keep)
    found.append(next(rows_until_stop))
    with pytest.raises(KeyboardInterrupt, match="stopped in epoch 2 after step"):
        next(rows_until_stop)
    assert (stop.place.epoch, len(found)) == (2, 1)
    second = sgd(parts)
    second.load_state_dict(first.state_dict())
    found += fit(parts, DATA, second, planned, start=stop.place)
    assert same(whole, parts)
    assert [row["loss"] for row in found] == [row["loss"] for row in rows]


def test_dropout_is_seeded_and_the_callers_random_numbers_are_left_alone():
    nets = [with_dropout()]
    nets.append(copy.deepcopy(nets[0]))
    for net in nets:
        torch.rand(3)  # whatever the caller draws
        before = torch.get_rng_state()
        list(fit(net, DATA, sgd(net), stage(1, 0.05, seed="y")))
        assert torch.equal(torch.get_rng_state(), before)
    assert same(*nets)


@pytest.mark.slow
def test_a_compiled_step_trains_as_the_plain_one():
    plain = small_net()
    fast = copy.deepcopy(plain)
    rows = [
        list(fit(net, DATA, sgd(net), stage(2, 0.02, compiled=compiled)))
        for net, compiled in ((plain, False), (fast, True))
    ]
    losses = [[row["loss"] for row in each] for each in rows]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_device():
    def watched(steps, text):
        for step in steps:
            torch.cuda.set_sync_debug_mode("error" if step else "default")
            yield step
        torch.cuda.set_sync_debug_mode("default")

    device = torch.device("cuda")
    data = dataclasses.replace(DATA, train=DATA.train.to(device), val=DATA.val.to(device))
    net = add_gates(small_net()).to(device)
    (row,) = fit(net, data, sgd(net), stage(1, 0.01), session=Session(progress=watched))
    assert row["loss"] > 0


def test_after_every_step_the_work_sees_the_rate_and_may_change_the_net():
    net, rates = small_net(), []

    def shrink(rate: float) -> None:
        rates.append(rate)
        with torch.no_grad():
            net[4].weight.zero_()

    planned = stage(2, 0.04, "cosine")
    list(fit(net, DATA, sgd(net), planned, Work(after_step=shrink)))
    steps = 2 * (90 // 17)
    assert rates == pytest.approx([planned.rate(step / steps) for step in range(steps)])
    assert not bool(net[4].weight.any())
