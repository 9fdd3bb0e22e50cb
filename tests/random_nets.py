"""Random small CNNs with real forward code, as an adversary for the pruner.

A program is a list of steps ``(kind, number)``; the number seeds all choices inside its step, so a
program can be shrunk by leaving steps out. ``program(seed)`` draws one, ``programs`` is the
hypothesis strategy, ``build`` turns it into an nn.Module whose ``source`` is the text of its
forward. ``settle`` gives it statistics as after training, ``draw_gates`` closes gates at random.
``python tests/random_nets.py SEED`` prints the forward of a seed.
"""

import random
import sys
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

Step = tuple[str, int]
SHAPE = (3, 12, 10)
ORDERS = ("conv-bn-ss-relu", "conv-bn-relu-ss", "conv-ss-bn-relu")


class StandardisedConv(nn.Conv2d):
    """A user's own convolution: torch.fx looks inside and sees a functional call."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


class Draft:
    """A net in the making: every line runs as it is written, so that shapes are known."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.net: Any = type("RandomNet", (nn.Module,), {})()
        self.env: dict[str, Any] = {"self": self.net, "torch": torch, "F": F}
        self.env["x0"] = torch.randn(2, *shape)
        self.lines: list[str] = []
        self.pool = ["x0"]  # feature maps that a later step may read
        self.count = 0
        self.rng = random.Random()

    def line(self, text: str) -> None:
        with torch.no_grad():
            exec(text, self.env)
        self.lines.append(text)

    def run(self, expression: str) -> str:
        """Write ``xN = expression`` and return ``xN``."""
        self.count += 1
        self.line(f"x{self.count} = {expression}")
        return f"x{self.count}"

    def own(self, kind: str, thing: nn.Module | nn.Parameter) -> str:
        """Make a module or parameter an attribute of the net and return how to write it."""
        self.count += 1
        name = f"{kind}{self.count}"
        setattr(self.net, name, thing.eval() if isinstance(thing, nn.Module) else thing)
        return f"self.{name}"

    def shape(self, x: str) -> tuple[int, ...]:
        return tuple(self.env[x].shape[1:])

    def pick(self, smallest: int = 1, largest: int = 200) -> str:
        """A feature map to go on from, mostly the latest; sides within the limits (else x0)."""
        fits = [
            x
            for x in self.pool
            if min(self.shape(x)[1:]) >= smallest and self.shape(x)[1] * self.shape(x)[2] <= largest
        ] or ["x0"]
        return fits[-1] if self.rng.random() < 0.7 else self.rng.choice(fits)

    def like(self, x: str) -> list[str]:
        """All feature maps with the sides of ``x``."""
        return [y for y in self.pool if self.shape(y)[1:] == self.shape(x)[1:]]

    def chance(self, share: float) -> bool:
        return self.rng.random() < share


def divisors(*numbers: int) -> list[int]:
    return [d for d in range(1, min(numbers) + 1) if all(n % d == 0 for n in numbers)]


# --- building blocks -------------------------------------------------------------------------

MODULES: list[Callable[[int], nn.Module]] = [
    *[lambda c, i=i: nn.ReLU(inplace=i) for i in (False, True, False, True)],
    lambda c: nn.ReLU6(), lambda c: nn.LeakyReLU(0.2), lambda c: nn.SiLU(inplace=True),
    lambda c: nn.GELU(), lambda c: nn.ELU(0.7), lambda c: nn.Hardswish(), lambda c: nn.Sigmoid(),
    lambda c: nn.Hardsigmoid(), lambda c: nn.Tanh(), lambda c: nn.Softplus(), lambda c: nn.PReLU(),
    lambda c: nn.PReLU(c), lambda c: nn.Mish(), lambda c: nn.Hardtanh(-0.5, 2.0),
    lambda c: nn.Softshrink(0.1), lambda c: nn.Threshold(0.1, 0.3),
]  # fmt: skip
FUNCTIONS = [
    "F.relu({})", "torch.relu({})", "F.relu({}, inplace=True)", "{}.relu()", "{}.relu_()",
    "F.silu({})", "F.gelu({})", "torch.sigmoid({})", "{}.sigmoid()", "torch.tanh({})",
    "F.hardswish({})", "F.leaky_relu({}, 0.2)", "F.softplus({})", "F.elu({}, alpha=0.5)",
    "torch.clamp({}, 0, 6)", "{}.clamp(min=0.05)", "F.relu6({})", "F.hardsigmoid({})",
    "F.hardtanh({}, -1, 2)", "{}.abs()", "F.relu_({})", "torch.relu_({})",
]  # fmt: skip


def activate(d: Draft, x: str) -> str:
    if d.chance(0.5):
        return d.run(d.rng.choice(FUNCTIONS).format(x))
    return d.run(f"{d.own('act', d.rng.choice(MODULES)(d.shape(x)[0]))}({x})")


def norm_layer(d: Draft, channels: int, pixels: int) -> nn.BatchNorm2d:
    affine, track = not d.chance(0.05), not d.chance(0.03) or pixels == 1
    return nn.BatchNorm2d(channels, affine=affine, track_running_stats=track)


def norm_like(d: Draft, x: str) -> nn.BatchNorm2d:
    """A BatchNorm2d for a feature map, with statistics of its own if it is a single pixel."""
    channels, height, width = d.shape(x)
    return norm_layer(d, channels, height * width)


def norm_and_activation(d: Draft, x: str) -> str:
    """Mostly a BatchNorm and an activation; sometimes only one of them, or none."""
    if d.chance(0.88):
        x = d.run(f"{d.own('bn', norm_like(d, x))}({x})")
    return activate(d, x) if d.chance(0.75) else x


def conv_layer(d: Draft, x: str, out: int, same_size: bool, groups: int = 0) -> nn.Module:
    channels, height, width = d.shape(x)
    side = min(height, width)
    kernel = d.rng.choice([1, 1, 3, 3, 3, 5, 2])
    kernel = min(kernel, 3) if side < 6 else kernel
    kernel = 1 if side < 3 else 3 if same_size and kernel == 2 else kernel
    dilation = 2 if kernel == 3 and side >= 5 and d.chance(0.2) else 1
    reach = dilation * (kernel - 1)
    padding = reach // 2 if same_size or side <= reach or d.chance(0.6) else d.rng.choice([0, 2])
    stride = 2 if not same_size and side >= 5 and d.chance(0.35) else 1
    modes = ["zeros"] * 5 + (["reflect", "replicate", "circular"] if 0 < padding < side else [])
    if groups == 0:
        groups = d.rng.choice(divisors(channels, out)) if d.chance(0.3) else 1
    text_padding = stride == 1 and same_size and d.chance(0.15)
    return nn.Conv2d(
        channels, out, kernel, stride, "same" if text_padding else padding, dilation, groups,
        bias=d.chance(0.4), padding_mode=d.rng.choice(modes),
    )  # fmt: skip


def conv_block(d: Draft, x: str, out: int = 0, same_size: bool = False) -> str:
    """Convolution, mostly with BatchNorm and activation, one by one or as a Sequential."""
    conv = conv_layer(d, x, out or d.rng.randint(5, 13), same_size)
    if d.chance(0.04):
        conv = nn.utils.parametrizations.weight_norm(conv)
    if d.chance(0.2):
        act = d.rng.choice(MODULES)(conv.out_channels)
        parts = [conv, norm_layer(d, conv.out_channels, pixels=1), act]
        return d.run(f"{d.own('seq', nn.Sequential(*parts))}({x})")
    return norm_and_activation(d, d.run(f"{d.own('conv', conv)}({x})"))


def with_channels(d: Draft, x: str, channels: int) -> str:
    """``x`` itself if it has that many channels, else a 1x1 projection of it."""
    if d.shape(x)[0] == channels:
        return x
    name = d.own("conv", nn.Conv2d(d.shape(x)[0], channels, 1, bias=d.chance(0.5)))
    return norm_and_activation(d, d.run(f"{name}({x})"))


# --- steps -----------------------------------------------------------------------------------


def conv(d: Draft) -> None:
    d.pool.append(conv_block(d, d.pick()))


def transposed(d: Draft) -> None:
    x = d.pick(largest=40)
    channels, out = d.shape(x)[0], d.rng.randint(5, 13)
    groups = d.rng.choice(divisors(channels, out)) if d.chance(0.3) else 1
    stride = 2 if d.shape(x)[1] * d.shape(x)[2] <= 40 else 1
    kernel = d.rng.choice([1, 2, 3, 3])
    extra = {"output_padding": d.rng.randint(0, stride - 1), "groups": groups}
    padding = d.rng.randint(0, (kernel - 1) // 2)
    layer = nn.ConvTranspose2d(channels, out, kernel, stride, padding, bias=d.chance(0.5), **extra)
    d.pool.append(norm_and_activation(d, d.run(f"{d.own('up', layer)}({x})")))


def depthwise(d: Draft) -> None:
    x = d.pick()
    if d.chance(0.6):
        x = conv_block(d, x, same_size=True)
    channels = d.shape(x)[0]
    out = channels * (2 if d.chance(0.3) and channels <= 13 else 1)
    layer = conv_layer(d, x, out, same_size=d.chance(0.6), groups=channels)
    x = norm_and_activation(d, d.run(f"{d.own('dw', layer)}({x})"))
    d.pool.append(conv_block(d, x) if d.chance(0.6) else x)


ADDITIONS = [
    "{} + {}", "{} + {}", "torch.add({}, {})", "{}.add({})", "torch.add({}, {}, alpha=2)",
    "{}.add({}, alpha=0.5)", "{} - {}", "torch.sub({}, {})", "{}.add_({})", "0.5 * {} + {}",
]  # fmt: skip


def join(d: Draft, branch: str, other: str) -> str:
    if d.chance(0.1):
        d.line(f"{branch} += {other}")
        return branch
    x = d.run(d.rng.choice(ADDITIONS).format(branch, other))
    return activate(d, x) if d.chance(0.5) else x


def residual(d: Draft) -> None:
    """One to three blocks with an identity shortcut."""
    x = d.pick()
    if d.shape(x)[0] < 5:
        x = conv_block(d, x)
    for _ in range(d.rng.choice([1, 1, 2, 3])):
        branch = conv_block(d, x, same_size=True) if d.chance(0.6) else x
        x = join(d, conv_block(d, branch, d.shape(x)[0], same_size=True), x)
        d.pool.append(x)


def shortcut(d: Draft) -> None:
    """A block whose shortcut is a strided convolution."""
    x = d.pick(smallest=5)
    out = d.rng.randint(5, 13)
    stride = d.rng.choice([1, 2])
    layers = [nn.Conv2d(d.shape(x)[0], out, k, stride, k // 2, bias=False) for k in (3, 1)]
    branch, other = (
        norm_and_activation(d, d.run(f"{d.own('conv', layer)}({x})")) for layer in layers
    )
    if d.chance(0.5):
        branch = conv_block(d, branch, out, same_size=True)
    d.pool.append(join(d, branch, other))


def option_a(d: Draft) -> None:
    """A shortcut without parameters: strided slice, zeros for the new channels."""
    x = d.pick(smallest=5)
    before, after = d.rng.randint(0, 3), d.rng.randint(0, 4)
    channels = d.shape(x)[0]
    layer = nn.Conv2d(channels, channels + before + after, 3, 2, 1, bias=False)
    branch = norm_and_activation(d, d.run(f"{d.own('conv', layer)}({x})"))
    thin = f"{x}[:, :, ::2, ::2]" if d.chance(0.7) else f"F.avg_pool2d({x}, 2, ceil_mode=True)"
    d.pool.append(join(d, branch, d.run(f"F.pad({thin}, (0, 0, 0, 0, {before}, {after}))")))


def concat(d: Draft) -> None:
    x = d.pick()
    parts = [x, *d.rng.choices(d.like(x), k=d.rng.choice([1, 1, 2]))]
    if d.chance(0.5):
        parts[-1] = conv_block(d, x, same_size=True)
    while sum(d.shape(y)[0] for y in parts) > 40 and len(parts) > 1:
        parts.pop()
    form = d.rng.choice(
        ["torch.cat([{}], 1)", "torch.cat(({},), dim=1)", "torch.cat([{}], dim=-3)"]
    )
    x = d.run(form.format(", ".join(parts)))
    d.pool.append(norm_and_activation(d, x) if d.chance(0.3) else x)


def divide(d: Draft) -> None:
    """Chunk, split or slice on channels; parts go their own ways."""
    x = d.pick()
    if d.shape(x)[0] < 5:
        x = conv_block(d, x)
    channels = d.shape(x)[0]
    cut = d.rng.randint(1, channels - 1)
    names = [f"x{d.count + 1}", f"x{d.count + 2}"]
    form = d.rng.choice(["chunk", "split", "parts", "slice", "step", "narrow", "index"])
    d.count += 2
    match form:
        case "chunk":
            call = f"{x}.chunk(2, 1)" if d.chance(0.5) else f"torch.chunk({x}, 2, dim=1)"
            d.line(f"{', '.join(names)} = {call}")
        case "split":
            d.line(f"{', '.join(names)} = torch.split({x}, [{cut}, {channels - cut}], dim=1)")
        case "parts":
            d.line(f"parts = {x}.split({(channels + 1) // 2}, 1)")
            d.line(f"{names[0]} = parts[0]")
            d.line(f"{names[1]} = parts[-1]")
        case "slice":
            d.line(f"{names[0]} = {x}[:, :{cut}]")
            d.line(f"{names[1]} = {x}[:, {cut - channels}:, :, :]")
        case "step":
            d.line(f"{names[0]} = {x}[:, ::2]")
            d.line(f"{names[1]} = {x}[:, 1::2, ...]")
        case "narrow":
            d.line(f"{names[0]} = {x}.narrow(1, 0, {cut})")
            d.line(f"{names[1]} = torch.narrow({x}, 1, {cut}, {channels - cut})")
        case "index":
            d.line(f"{names[0]} = {x}[:, [{cut}, 0, {channels - 1}]]")
            d.line(f"{names[1]} = {x}[:, {cut}].unsqueeze(1)")
    if d.chance(0.5):
        d.pool += names
        return
    names[0] = conv_block(d, names[0], same_size=True)
    d.pool.append(d.run(f"torch.cat(({', '.join(d.rng.sample(names, 2))}), dim=1)"))


def shuffle(d: Draft) -> None:
    x = d.pick()
    choices = [g for g in divisors(d.shape(x)[0]) if g > 1]
    if d.shape(x)[0] < 4 or len(choices) == 1:
        x = conv_block(d, x, d.rng.choice([6, 8, 9, 12]), same_size=True)
    groups = d.rng.choice([g for g in divisors(d.shape(x)[0]) if g > 1])
    if d.chance(0.2):
        d.pool.append(d.run(f"{d.own('shuffle', nn.ChannelShuffle(groups))}({x})"))
        return
    b, c, h, w = (f"{letter}{d.count}" for letter in "bchw")
    d.line(f"{b}, {c}, {h}, {w} = {x}.{d.rng.choice(['size()', 'shape'])}")
    y = d.run(f"{x}.view({b}, {groups}, {c} // {groups}, {h}, {w})")
    y = d.run(f"torch.transpose({y}, 1, 2).contiguous()")
    d.pool.append(d.run(f"{y}.view({b}, {d.rng.choice([c, '-1'])}, {h}, {w})"))


def squeeze_excite(d: Draft) -> None:
    x = d.pick()
    channels, hidden = d.shape(x)[0], d.rng.randint(2, 7)
    last = d.rng.choice(
        ["torch.sigmoid({})", "F.hardsigmoid({})", "{}.sigmoid()", "F.softplus({})"]
    )
    if d.chance(0.7):
        s = d.run(d.rng.choice(["F.adaptive_avg_pool2d({}, 1)", "{}.mean((2, 3), True)"]).format(x))
        layers = nn.Conv2d(channels, hidden, 1), nn.Conv2d(hidden, channels, 1)
        names = [d.own("fc", layer) for layer in layers]
        s = d.run(f"{names[1]}(F.relu({names[0]}({s})))")
        s = d.run(last.format(s))
    else:
        s = d.run(f"{x}.mean([2, 3])")
        layers = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        names = [d.own("fc", layer) for layer in layers]
        s = d.run(last.format(f"{names[1]}({names[0]}({s}).relu())"))
        forms = ["{0}[:, :, None, None]", "{0}.view({1}.size(0), {1}.size(1), 1, 1)"]
        forms += ["{0}.unsqueeze(-1).unsqueeze(-1)", "{0}.view(-1, {2}, 1, 1)"]
        s = d.run(d.rng.choice(forms).format(s, x, channels))
    forms = ["{} * {}", "{1} * {0}", "torch.mul({}, {})", "{}.mul({})", "{0} + {0} * {1}"]
    d.pool.append(d.run(d.rng.choice(forms).format(x, s)))


def arithmetic(d: Draft) -> None:
    x = d.pick()
    one = ["{} * 0.5", "{} + 1.0", "1 - {}", "-{}", "{} / 2", "2.0 * {}", "{} - 0.25", "{} ** 2"]
    one += ["torch.neg({})", "torch.mul({}, 0.3)", "{}.add(0.1)", "{}.detach()", "{}.contiguous()"]
    two = ["{} - {}", "{} * {}", "torch.maximum({}, {})", "torch.mul({}, {})", "{}.sub({})"]
    two += ["torch.min({}, {})", "{} / ({}.abs() + 1)", "torch.where({0} > 0, {0}, {1})"]
    if d.chance(0.4):
        y = with_channels(d, d.rng.choice(d.like(x)), d.shape(x)[0])
        d.pool.append(d.run(d.rng.choice(two).format(x, y)))
    else:
        d.pool.append(d.run(d.rng.choice(one).format(x)))


def activation(d: Draft) -> None:
    """On a feature map that others may read too: in-place forms then change what they see."""
    d.pool.append(activate(d, d.pick()))


def norm(d: Draft) -> None:
    """BatchNorm on whatever is there: pre-activation, after a concatenation, on the image."""
    x = d.pick()
    x = activate(d, d.run(f"{d.own('bn', norm_like(d, x))}({x})"))
    d.pool.append(conv_block(d, x) if d.chance(0.6) else x)


def pool(d: Draft) -> None:
    x = d.pick(smallest=3)
    forms = [
        "F.max_pool2d({}, 2)", "F.max_pool2d({}, 3, stride=1, padding=1)", "F.avg_pool2d({}, 2)",
        "F.avg_pool2d({}, 3, 1, 1)", "F.avg_pool2d({}, 3, 2, 1, count_include_pad=False)",
        "F.adaptive_avg_pool2d({}, (3, 2))", "F.adaptive_max_pool2d({}, 3)",
        "{}.mean((2, 3), keepdim=True)", "F.max_pool2d({}, 3, 2, ceil_mode=True)",
        "F.lp_pool2d({}, 2, 2)", "{}.amax((2, 3), keepdim=True)",
    ]  # fmt: skip
    modules: list[nn.Module] = [
        nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2),
        nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AdaptiveAvgPool2d((3, 3)),
        nn.AdaptiveMaxPool2d(2), nn.MaxPool2d(2, 1, dilation=2),
    ]  # fmt: skip
    if d.chance(0.5):
        d.pool.append(d.run(d.rng.choice(forms).format(x)))
    else:
        d.pool.append(d.run(f"{d.own('pool', d.rng.choice(modules))}({x})"))


def interpolate(d: Draft) -> None:
    x = d.pick(largest=40)
    forms = [
        "F.interpolate({}, scale_factor=2, mode='nearest')", "F.interpolate({}, size=(7, 6))",
        "F.interpolate({}, size=(5, 8), mode='bilinear', align_corners=False)",
        "F.interpolate({}, size=x0.shape[-2:], mode='bicubic')",
    ]  # fmt: skip
    if d.chance(0.3):
        layer = nn.Upsample(scale_factor=2, mode=d.rng.choice(["nearest", "bilinear"]))
        d.pool.append(d.run(f"{d.own('upsample', layer)}({x})"))
    else:
        d.pool.append(d.run(d.rng.choice(forms).format(x)))


def pad(d: Draft) -> None:
    x = d.pick(smallest=3)
    forms = ["F.pad({}, (1, 0, 2, 1))", "F.pad({}, (1, 1), value=0.7)", "F.pad({}, (0, 2, 0, 0))"]
    forms += ["F.pad({}, (1, 1, 1, 1), mode='reflect')", "F.pad({}, (0, -1, 0, -1))"]
    forms += ["F.pad({}, (1, 0, 0, 1), mode='replicate')", "F.pad({}, (0, 0, 0, 0, 1, 2))"]
    forms += ["F.pad({}, (0, 0, 0, 0, -1, 2), value=0.4)"]
    modules = [nn.ZeroPad2d(1), nn.ReflectionPad2d((1, 0, 1, 1)), nn.ConstantPad2d(1, 0.3)]
    if d.chance(0.3):
        x = d.run(f"{d.own('pad', d.rng.choice(modules))}({x})")
    else:
        x = d.run(d.rng.choice(forms if d.shape(x)[0] > 2 else forms[:5]).format(x))
    d.pool.append(conv_block(d, x) if d.chance(0.5) else x)


def idle(d: Draft) -> None:
    """What does nothing in eval mode."""
    modules = [nn.Dropout(0.3), nn.Dropout2d(0.2), nn.Identity(), nn.Dropout(0.5, inplace=True)]
    x = d.pick()
    if d.chance(0.3):
        d.pool.append(d.run(f"F.dropout({x}, 0.3, training=self.training)"))
    else:
        d.pool.append(d.run(f"{d.own('idle', d.rng.choice(modules))}({x})"))


def shared(d: Draft) -> None:
    """The same convolution and norm called twice: one after the other, or on two tensors."""
    x = d.pick()
    channels = d.shape(x)[0]
    if channels < 5:
        x = conv_block(d, x, same_size=True)
        channels = d.shape(x)[0]
    conv = d.own("conv", nn.Conv2d(channels, channels, 3, padding=1, bias=d.chance(0.5)))
    bn = d.own("bn", norm_like(d, x))
    match d.rng.choice(["chain", "chain", "siblings", "own norms", "tied weights", "alias"]):
        case "chain":
            y = d.run(f"F.relu({bn}({conv}({x})))")
            d.pool.append(d.run(f"F.relu({bn}({conv}({y})))"))
        case "siblings":
            y = with_channels(d, d.rng.choice(d.like(x)), channels)
            d.pool += [d.run(f"{bn}({conv}({y})).relu()"), d.run(f"{bn}({conv}({x}))")]
        case "own norms":
            other = d.own("bn", norm_like(d, x))
            y = d.run(f"{bn}({conv}({x})).relu()")
            d.pool.append(join(d, y, d.run(f"{other}({conv}({y}))")))
        case "tied weights":
            twin = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            twin.weight = d.env["self"].get_submodule(conv.removeprefix("self.")).weight
            y = d.run(f"{bn}({conv}({x})).relu()")
            d.pool.append(norm_and_activation(d, d.run(f"{d.own('twin', twin)}({y})")))
        case "alias":
            alias = d.own("alias", d.env["self"].get_submodule(bn.removeprefix("self.")))
            y = d.run(f"{bn}({conv}({x})).relu()")
            d.pool.append(d.run(f"{alias}({conv}({y}))"))


def supernet(d: Draft) -> None:
    """The sum of several candidates, with or without a skip."""
    x = d.pick()
    out = d.shape(x)[0] if d.shape(x)[0] > 4 else d.rng.randint(5, 9)
    parts = []
    for _ in range(d.rng.choice([2, 3, 4])):
        y = conv_block(d, x, same_size=True) if d.chance(0.4) else x
        parts.append(conv_block(d, y, out, same_size=True))
    if d.shape(x)[0] == out and d.chance(0.4):
        parts.append(x)
    forms = ["sum([{}])", "torch.stack([{}]).sum(0)", "torch.stack([{}], 1).mean(1)"]
    total = d.run(
        d.rng.choice([" + ".join(parts)] * 3 + [f.format(", ".join(parts)) for f in forms])
    )
    d.pool.append(total)


def wall(d: Draft) -> None:
    """Operations that mix channels or that count on their number."""
    x = d.pick(smallest=2)
    c, h, w = d.shape(x)
    group = d.rng.choice(divisors(c))
    owns: list[nn.Module] = [nn.GroupNorm(group, c), nn.InstanceNorm2d(c, affine=True)]
    owns += [nn.LocalResponseNorm(3), nn.Softmax(1), nn.LayerNorm([c, h, w])]
    if d.chance(0.35):
        d.pool.append(d.run(f"{d.own('wall', d.rng.choice(owns))}({x})"))
        return
    last = "{}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)"
    forms = [
        "torch.softmax({x}, 1)", "torch.softmax({x}, dim=3)", "{x}.mean(1, keepdim=True) * {x}",
        "{x}.amax(1, keepdim=True) + {x}", "torch.flip({x}, [1])", "torch.roll({x}, 2, 1)",
        "torch.cumsum({x}, 1)", "F.normalize({x}, dim=1)", "{x}.repeat(1, 2, 1, 1)[:, :-1]",
        "torch.einsum('nchw,ndhw->nc', {x}, {x})[:, :, None, None] * 0.01 + {x}",
        "torch.matmul({x}, {x}.transpose(2, 3))", "{x}.view({x}.size(0), {c}, {h}, {w}) * 1.0",
        "{x}.view(-1, {c}, {h} * {w}).sum(2)[:, :, None, None] + {x}",
        "{x}.flatten(2).transpose(1, 2).softmax(2).transpose(1, 2).view({x}.shape)",
        "{x}.transpose(1, 2)", "{x}.expand(-1, {c}, -1, -1) + 0.5", "{x}.sum() * 0.01 + {x}",
        "{x} * torch.arange({c}.0)[:, None, None]", "{x} * {x}.shape[1]",
        "F.pixel_shuffle(torch.cat([{x}, {x}, {x}, {x}], 1), 2)",
        "F.unfold({x}, 1).view({x}.size())", "{x}.unbind(1)[1][:, None]",
        "{x}[:, torch.tensor([0, {c} - 1, {c} // 2])]", "torch.stack([{x}, {x}], 2).flatten(1, 2)",
        "{x}.transpose(1, 3).mean(3, keepdim=True).transpose(1, 3) + {x}", "{x} - {x}.mean()",
    ]  # fmt: skip
    owned = {
        "layer": (nn.LayerNorm(c), last), "linear": (nn.Linear(c, 7), last),
        "scale": (nn.Parameter(torch.rand(c, 1, 1) + 0.5), "{} * {}"),
        "shift": (nn.Parameter(torch.rand(1, c, 1, 1)), "{} + {}"),
        "kernel": (nn.Parameter(torch.randn(7, c, 1, 1)), "F.conv2d({1}, {0})"),
        "standard": (StandardisedConv(c, 9, 3, padding=1), "{}({})"),
        "attention": (nn.MultiheadAttention(c, 1, batch_first=True), ""),
    }  # fmt: skip
    if d.chance(0.35):
        kind = d.rng.choice(list(owned))
        thing, form = owned[kind]
        name = d.own(kind, thing)
        form = "{}(" + form if form == last else form
        if kind == "attention":
            y = d.run(f"{x}.flatten(2).transpose(1, 2)")
            y = d.run(f"{name}({y}, {y}, {y})[0]")
            d.pool.append(d.run(f"{y}.transpose(1, 2).reshape({x}.shape)"))
            return
        d.pool.append(d.run(form.format(name, x)))
        return
    text = d.rng.choice(forms).format(x=x, c=c, h=h, w=w)
    d.pool.append(d.run(text))


def unused(d: Draft) -> None:
    """Layers that forward never calls, and a result that nobody reads."""
    x = d.pick()
    d.own("never", nn.Sequential(nn.Conv2d(5, 7, 3), nn.BatchNorm2d(7)))
    d.run(f"{d.own('idle_bn', norm_like(d, x))}({x})")


STEPS: dict[str, tuple[Callable[[Draft], None], int]] = {
    "conv": (conv, 7), "transposed": (transposed, 2), "depthwise": (depthwise, 4),
    "residual": (residual, 6), "shortcut": (shortcut, 3), "option_a": (option_a, 2),
    "concat": (concat, 5), "divide": (divide, 5), "shuffle": (shuffle, 3),
    "squeeze_excite": (squeeze_excite, 4), "arithmetic": (arithmetic, 2),
    "activation": (activation, 1), "norm": (norm, 3), "pool": (pool, 3),
    "interpolate": (interpolate, 1), "pad": (pad, 2), "idle": (idle, 2), "shared": (shared, 3),
    "supernet": (supernet, 3), "wall": (wall, 2), "unused": (unused, 1),
}  # fmt: skip


# --- heads and outputs -----------------------------------------------------------------------


def head(d: Draft, x: str, classes: int) -> str:
    """Logits of (n, classes) from a feature map."""
    pooled = [
        "{}.mean((2, 3))", "{}.mean([-1, -2])", "torch.flatten(F.adaptive_avg_pool2d({}, 1), 1)",
        "F.adaptive_avg_pool2d({0}, (1, 1)).view({0}.size(0), -1)", "torch.mean({}, dim=(2, 3))",
        "F.adaptive_max_pool2d({}, 1).squeeze(-1).squeeze(-1)", "{}.flatten(2).mean(-1)",
        "{}.mean(3).mean(2)", "F.adaptive_avg_pool2d({}, 1)[:, :, 0, 0]",
    ]  # fmt: skip
    flat = [
        "torch.flatten({}, 1)", "{0}.contiguous().view({0}.size(0), -1)", "{}.flatten(start_dim=1)",
        "{0}.reshape({0}.shape[0], -1)", "{0}.reshape(-1, {1})",
    ]  # fmt: skip
    count = d.env[x][0].numel()
    y = d.run(d.rng.choice(flat if count < 400 and d.chance(0.45) else pooled).format(x, count))
    if d.chance(0.3):
        y = d.run(f"{d.own('flatten', nn.Flatten())}({y})")
    features = d.shape(y)[0]
    if d.chance(0.4):
        hidden = d.rng.randint(5, 11)
        y = d.run(f"{d.own('fc', nn.Linear(features, hidden, bias=d.chance(0.5)))}({y})")
        if d.chance(0.7):
            y = d.run(f"{d.own('bn', nn.BatchNorm1d(hidden))}({y})")
        y, features = activate(d, y), hidden
    return d.run(f"{d.own('fc', nn.Linear(features, classes))}({y})")


def finish(d: Draft) -> str:
    """The return expression: a tensor, a tuple, a list in a tuple, a dict."""
    last = d.pool[-1]
    other = d.rng.choice(d.pool[-3:])
    match d.rng.choice(["logits"] * 6 + ["map", "sum", "tuple", "features", "dict", "nested"]):
        case "logits":
            return head(d, last, 4)
        case "map":
            return f"{d.own('conv', nn.Conv2d(d.shape(last)[0], 3, 1))}({last})"
        case "sum":
            return f"{head(d, last, 4)} + 0.3 * {head(d, other, 4)}"
        case "tuple":
            return f"({head(d, last, 4)}, {head(d, other, 6)})"
        case "features":
            return f"({head(d, last, 4)}, {other})"
        case "dict":
            return f"{{'out': {head(d, last, 4)}, 'aux': {other}}}"
        case _:
            return f"({head(d, last, 4)}, [{other}, {{'x': {d.rng.choice(d.pool)}}}])"


def build(steps: list[Step], shape: tuple[int, int, int] = SHAPE) -> nn.Module:
    """The net of a program in eval mode; its attribute ``source`` is the text of its forward."""
    with torch.random.fork_rng(devices=[]):
        d = Draft(shape)
        for kind, number in steps:
            d.rng = random.Random(f"{kind}/{number}")
            torch.manual_seed(number)
            STEPS[kind][0](d)
        d.rng = random.Random(f"end/{steps[-1] if steps else 0}")
        result = finish(d)
    body = [*d.lines, f"return {result}"]
    d.net.source = "def forward(self, x0):\n" + "".join(f"    {line}\n" for line in body)
    namespace: dict[str, Any] = {"torch": torch, "F": F}
    exec(d.net.source, namespace)
    type(d.net).forward = namespace["forward"]
    return d.net.eval()


def program(seed: int, longest: int = 7) -> list[Step]:
    """Two to ``longest`` steps drawn from ``STEPS`` by their weights."""
    rng = random.Random(seed)
    weights = [weight for _, weight in STEPS.values()]
    kinds = rng.choices(list(STEPS), weights, k=rng.randint(2, longest))
    return [(kind, rng.getrandbits(16)) for kind in kinds]


programs = st.lists(
    st.tuples(st.sampled_from(list(STEPS)), st.integers(0, 2**16 - 1)), min_size=1, max_size=6
)


# --- weights, statistics, gates --------------------------------------------------------------


@torch.no_grad()
def settle(net: nn.Module, seed: int) -> nn.Module:
    """Statistics and affines as after training; some gamma = 0, some filters zero; in place."""
    draw = torch.Generator().manual_seed(seed)

    def some(count: int, share: float) -> Tensor:
        return torch.rand(count, generator=draw) < share

    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            if layer.affine:
                layer.weight.uniform_(0.5, 1.5, generator=draw)
                layer.bias.uniform_(-0.2, 0.9, generator=draw)
                layer.weight[some(len(layer.weight), 0.04)] = 0
            if layer.track_running_stats:
                layer.running_mean.normal_(0, 0.3, generator=draw)
                layer.running_var.uniform_(0.5, 2, generator=draw)
                layer.num_batches_tracked.fill_(100)
        elif type(layer) in (nn.Conv2d, nn.Linear) and len(layer.weight) > 4:
            dead = some(len(layer.weight), 0.04)
            layer.weight[dead] = 0
            if layer.bias is not None:
                layer.bias[dead & some(len(dead), 0.5)] = 0
    return net


@torch.no_grad()
def draw_gates(gates: dict[str, Any], seed: int) -> None:
    """Close gates at random, in place: one keep share a net, now and then a whole layer."""
    rng = random.Random(f"gates/{seed}")
    keep, whole = rng.choice([0.8, 0.5, 0.2]), rng.choice([0, 0, 0.1, 0.3])
    draw = torch.Generator().manual_seed(seed)
    for gate in gates.values():
        is_open = torch.rand(len(gate.s), generator=draw) < (0 if rng.random() < whole else keep)
        gate.s.copy_(torch.where(is_open, 1.0, -1.0))


if __name__ == "__main__":
    for number in map(int, sys.argv[1:]):
        print(program(number), build(program(number)).source, sep="\n")
