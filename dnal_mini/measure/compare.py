"""Does the smaller network also run faster? Measured in several forms, and said in words.

Read ``compare`` first. Fewer MACs are a count, time is a measurement, and the one does not promise
the other; so the words are derived from the numbers (``speed_words``, ``layer_words``), and a form
without a gain is called that. What the words guess at (widths, memory) they mark with "may".
"""

import copy
import importlib.util
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import ceil, prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dnal_mini.deployment.export import export, onnx_runner
from dnal_mini.deployment.fold import deploy
from dnal_mini.gating import gates
from dnal_mini.graph.capture import replace_module
from dnal_mini.layers.channelmap import ChannelMap
from dnal_mini.layers.gated_norm import GatedNorm
from dnal_mini.layers.scaled_sigmoid import ScaledSigmoid
from dnal_mini.measure.cost import cost, layer_table
from dnal_mini.measure.latency import interleaved

FORMS = {
    "eager": "as it is",
    "channels_last": "as it is, channels last in memory",
    "deployed": "norms folded into the layers before them, channels last in memory",
    "onnxruntime": "norms folded, exported to ONNX, run by onnxruntime on the CPU",
}


NEEDED_SPEED_UP = 1.05  # below this a speed-up is called no gain


LOW_EFFICIENCY = 0.8  # below this the words look for reasons


MULTIPLE = 8  # channels that kernels take at once (AVX-512: 16); other widths are padded or slow


NOTABLE = 0.01  # share of the MACs from which a layer is named


FEW_MACS_PER_BYTE = 4


MUCH_TRAFFIC = 0.3  # share of the bytes from which slow traffic is worth a sentence


NAMED = 4  # layers named in one sentence; the rest are counted


Row = dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Two networks side by side, JSON-able; printing gives a table with the words below it.

    ``sizes``: one row each for "macs", "params", "file_bytes" (tensors as safetensors) and
    "peak_activation_bytes" of one image, with keys ``what``, ``dense``, ``small``, ``ratio``.
    ``rows``: one per form and batch. Keys: ``form``, ``batch``, seconds per batch ``dense_s``,
    ``small_s`` with ``_p10_s`` and ``_p90_s``, ``speed_up`` (median of dense / small, taken turn by
    turn) with ``_p10`` and ``_p90``, ``efficiency`` (speed-up / ratio of MACs; at 1 every MAC saved
    is time saved) and ``gain`` (a bool); or ``not_measured`` with the reason instead.
    ``words``: what the numbers say, one sentence or two each.
    """

    sizes: list[Row]
    rows: list[Row]
    words: list[str]
    device: str
    threads: int

    def __str__(self) -> str:
        lines = [f"{'':20}{'dense':>14}{'small':>14}{'ratio':>8}"]
        for row in self.sizes:
            dense, small = f"{row['dense']:,}", f"{row['small']:,}"
            lines.append(f"{row['what']:21}{dense:>13} {small:>13}{row['ratio']:8.2f}")
        where = f"{self.device}, {_count(range(self.threads), 'thread')}"
        lines += ["", f"ms per batch, median (10th to 90th percentile), on {where}"]
        titles = f"{'dense':>26}{'small':>26}{'speed-up':>22}{'efficiency':>12}"
        lines.append(f"{'form':14}{'batch':>5}{titles}")
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", *(f"- {sentence}" for sentence in self.words)])


def _line(row: Row) -> str:
    """One row of the table of times."""
    start = f"{row['form']:14}{row['batch']:5}"
    if "not_measured" in row:
        return f"{start}  not measured: {row['not_measured']}"

    def spread(middle: float, low: float, high: float) -> str:
        return f"{middle:.3g} ({low:.3g} to {high:.3g})"

    times = [
        spread(*(1e3 * row[f"{net}{place}_s"] for place in ("", "_p10", "_p90")))
        for net in ("dense", "small")
    ]
    ratio = spread(row["speed_up"], row["speed_up_p10"], row["speed_up_p90"])
    return f"{start}{times[0]:>26}{times[1]:>26}{ratio:>22}{row['efficiency']:12.2f}"


class HasModule(Protocol):
    """What ``prune`` returns, as far as it matters here."""

    module: nn.Module


def compare(
    dense: nn.Module | HasModule,
    small: nn.Module | HasModule,
    image_shape: Sequence[int] = (3, 32, 32),
    batches: Sequence[int] = (1, 8, 64),
    forms: Sequence[str] = tuple(FORMS),
    *,
    budget_s: float = 2.0,
    min_repeats: int = 10,
) -> Comparison:
    """Sizes and times of a network and a smaller one, and in words whether it was worth it.

    Both are modules, or hold one as ``.module`` (what ``prune`` returns). A dense net with gates is
    compared without them: they are tools of the search. ``forms`` are words of ``FORMS``; a form
    that cannot be had is told in its row. For each form and batch the two are timed in turns in
    one run of about ``budget_s`` seconds and at least ``min_repeats`` turns, with the threads that
    torch has now; writing the ONNX files takes its own time. Both nets are left alone.

    Raises: ValueError for a small net with gates, nets on different devices, an unknown form, no
    batch, and what ``cost`` and ``latency`` refuse.
    """
    dense, small = (net if isinstance(net, nn.Module) else net.module for net in (dense, small))
    device = _check(dense, small, batches, forms)
    words = []
    if closed := len(gates(dense)):
        dense = _without_gates(dense)
        words.append(f"The dense net is compared without its {closed} gates.")
    sizes = _sizes(dense, small, image_shape)
    words += [
        f"The small net needs more {row['what']}: {row['small']:,} against {row['dense']:,}."
        for row in sizes
        if row["small"] > row["dense"]
    ]
    ratio = sizes[0]["ratio"]
    rows: list[Row] = []
    for form in forms:
        try:
            pair = [_in_form(net, form, image_shape) for net in (dense, small)]
        except ValueError as error:
            reason = str(error)
            rows += [{"form": form, "batch": batch, "not_measured": reason} for batch in batches]
            continue
        memory = form in ("channels_last", "deployed")
        for batch in batches:
            times = interleaved(pair, image_shape, batch, memory, budget_s, min_repeats)
            rows.append({"form": form, "batch": batch, **timing(times[0], times[1], ratio)})
    words += speed_words(rows, ratio)
    if any(row.get("efficiency", 1) < LOW_EFFICIENCY or not row.get("gain", True) for row in rows):
        words += _reasons(dense, small, image_shape, rows)
    return Comparison(sizes, rows, words, device, torch.get_num_threads())


def _check(dense: nn.Module, small: nn.Module, batches: Sequence, forms: Sequence[str]) -> str:
    """Refuse what cannot be compared; returns the device that both nets are on."""
    if unknown := [form for form in forms if form not in FORMS]:
        raise ValueError(f"got form {unknown[0]!r}; need one of {', '.join(FORMS)}")
    if not batches or not forms:
        raise ValueError(f"got batches {batches!r}, forms {forms!r}; need at least one of each")
    if count := len(gates(small)):
        raise ValueError(
            f"got a small net with {count} gates: it is masked, not pruned, and saves nothing; "
            "need one without; do prune it first"
        )
    tensors = chain(*(t for net in (dense, small) for t in (net.parameters(), net.buffers())))
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"got nets on {' and '.join(sorted(devices))}; need one device; move one")
    return devices.pop() if devices else "cpu"


def _without_gates(net: nn.Module) -> nn.Module:
    """A copy with the layers that the gates were added to, as they were."""
    net = copy.deepcopy(net)
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if isinstance(module, GatedNorm):
            replace_module(net, name, module.norm)
    for name, module in list(net.named_modules(remove_duplicate=False)):
        if isinstance(module, ScaledSigmoid):
            replace_module(net, name, nn.Identity())
    return net


def _sizes(dense: nn.Module, small: nn.Module, image_shape: Sequence[int]) -> list[Row]:
    """What can be counted, MACs first."""
    counts = [
        {**vars(cost(net, image_shape)), "file_bytes": _file_bytes(net)} for net in (dense, small)
    ]
    return [
        {"what": what, "dense": a, "small": b, "ratio": max(a, 1) / max(b, 1)}
        for what in ("macs", "params", "file_bytes", "peak_activation_bytes")
        for a, b in [[count[what] for count in counts]]
    ]


def _file_bytes(net: nn.Module) -> int:
    """Size of a safetensors file with the net's state and nothing else."""
    from safetensors.torch import save

    state = {k: v.detach().cpu() for k, v in net.state_dict().items() if isinstance(v, Tensor)}
    return len(save({k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}))


class _OnnxNet(nn.Module):
    """An ONNX file behind the call of a module, for the stopwatch."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.run = onnx_runner(path, torch.get_num_threads())

    def forward(self, images: Tensor) -> Any:
        return self.run(images.numpy())


def _in_form(net: nn.Module, form: str, image_shape: Sequence[int]) -> nn.Module:
    """The net as it is to be timed. Raises: ValueError with the reason why it cannot be."""
    if form == "deployed":
        return deploy(net)
    if form != "onnxruntime":
        return net
    for package in ("onnxruntime", "onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f"{package} is not installed")
    first = next(net.parameters(), torch.zeros(()))
    if first.device.type != "cpu" or first.dtype != torch.float32:
        raise ValueError(
            f"it would run in float32 on the CPU, these are {first.dtype}, {first.device}"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        export(net, path, image_shape, fold=True)
        return _OnnxNet(path)


def timing(dense_s: Sequence[float], small_s: Sequence[float], macs_ratio: float) -> Row:
    """The numbers of a row from the seconds of each turn: medians, 10th and 90th percentiles.

    The speed-up is taken turn by turn, so that a machine that slows down meanwhile cancels out.
    There is a ``gain`` if the median speed-up is at least 1.05 and the two intervals of times are
    apart.
    """
    row: Row = {}
    dense, small = (torch.tensor(times, dtype=torch.float64) for times in (dense_s, small_s))
    for name, values, unit in (
        ("dense", dense, "_s"),
        ("small", small, "_s"),
        ("speed_up", dense / small, ""),
    ):
        for place, share in (("", 0.5), ("_p10", 0.1), ("_p90", 0.9)):
            row[f"{name}{place}{unit}"] = float(values.quantile(share))
    apart = row["small_p90_s"] < row["dense_p10_s"]
    row["efficiency"] = row["speed_up"] / macs_ratio
    row["gain"] = apart and row["speed_up"] >= NEEDED_SPEED_UP
    return row


def speed_words(rows: Sequence[Row], macs_ratio: float) -> list[str]:
    """What the times of ``Comparison.rows`` say: the best gain, and every form without one."""
    measured = [row for row in rows if "not_measured" not in row]
    gains = [row for row in measured if row["gain"]]
    fewer = f"{macs_ratio:.2f} times fewer MACs"
    words = []
    if gains:
        best = max(gains, key=lambda row: row["speed_up"])
        words.append(
            f"Largest gain: {best['speed_up']:.2f} times faster in {_where(best)}, "
            f"{best['efficiency']:.2f} of what {fewer} could give."
        )
        if len(gains) == len(measured):
            least = min(gains, key=lambda row: row["speed_up"])
            words.append(f"Least gain: {least['speed_up']:.2f} times faster in {_where(least)}.")
    elif measured:
        words.append(f"No gain in any form that was measured: {fewer} saved no time here.")
    lost = [row for row in measured if not row["gain"]]
    slower = [row for row in lost if row["small_p10_s"] > row["dense_p90_s"]]
    equal = [row for row in lost if row not in slower and row["speed_up"] < NEEDED_SPEED_UP]
    unclear = [row for row in lost if row not in slower and row not in equal]
    if slower:
        words.append(f"No gain, the small net is slower: {_speed_ups(slower)}.")
    if equal:
        words.append(f"No gain, the speed-up is under {NEEDED_SPEED_UP}: {_speed_ups(equal)}.")
    if unclear:
        words.append(
            f"No gain that shows, the times of the two nets overlap: {_speed_ups(unclear)}. A "
            "quieter machine or a larger budget_s may tell them apart."
        )
    return words


def _where(row: Row) -> str:
    return f"{row['form']} at batch {row['batch']}"


def _speed_ups(rows: Sequence[Row]) -> str:
    return ", ".join(
        f"{_where(r)} ({r['speed_up']:.2f}; {r['speed_up_p10']:.2f} to {r['speed_up_p90']:.2f})"
        for r in rows
    )


def fixed_cost_words(rows: Sequence[Row]) -> list[str]:
    """Says where the smallest batch takes at least twice as long per image as the largest one."""
    measured = [row for row in rows if "not_measured" not in row]
    found = []
    for form in dict.fromkeys(row["form"] for row in measured):
        of_form = sorted((r for r in measured if r["form"] == form), key=lambda r: r["batch"])
        first, last = of_form[0], of_form[-1]
        times = (first["small_s"] / first["batch"]) / (last["small_s"] / last["batch"])
        if times >= 2 and first["efficiency"] < LOW_EFFICIENCY:
            found.append(f"{form} ({times:.1f} times batch {last['batch']})")
    if not found:
        return []
    return [
        f"At batch {min(row['batch'] for row in measured)} the small net needs much more time per "
        f"image than in large batches: {', '.join(found)}. A fixed cost per layer may dominate "
        "there, and narrower layers do not lower it."
    ]


def _reasons(
    dense: nn.Module, small: nn.Module, image_shape: Sequence[int], rows: Sequence[Row]
) -> list[str]:
    """Words on what in the small net may hold the speed back."""
    before = {name for name, m in dense.named_modules() if isinstance(m, ChannelMap)}
    maps = [n for n, m in small.named_modules() if isinstance(m, ChannelMap) and n not in before]
    try:
        tables = layer_table(dense, image_shape), layer_table(small, image_shape)
    except ValueError as error:
        return [f"The widths were not looked at: {error}.", *map_words(maps)]
    batch = min(row["batch"] for row in rows)
    widths = width_words(*tables)
    if not widths and torch.backends.cpu.get_cpu_capability() == "AVX512":
        widths = width_words(*tables, 2 * MULTIPLE)
    memory = memory_words(*tables, batch)
    return [*widths, *map_words(maps), *memory, *fixed_cost_words(rows)]


def map_words(names: Sequence[str]) -> list[str]:
    """Names the index operations that the surgery put in."""
    if not names:
        return []
    return [
        f"{_count(names, 'index operation')} ({_some(names)}) copy channels and compute nothing, "
        'which may cost what the MACs save; prune(..., residual="tie") needs none in residual sums.'
    ]


def width_words(dense: Sequence[Row], small: Sequence[Row], multiple: int = MULTIPLE) -> list[str]:
    """Names the cut layers whose width is no ``multiple``, and what rounding up would cost.

    ``dense`` and ``small``: rows of ``layer_table``. A layer is named if it is narrower than the
    layer of its name in the dense net and holds at least 1 % of the MACs. The price is that of
    rounding all of them, never above the dense width.
    """
    total, rounded = sum(row["macs"] for row in small), 0.0
    named = []
    for index, row in enumerate(small):
        growth, wanted = 1.0, row["out_channels"]
        place = _place(row["name"], dense)
        if place is not None:
            wanted = _next_width(wanted, dense[place]["out_channels"], multiple)
            growth = wanted / row["out_channels"]
            if row["kind"] != "depthwise":
                inputs, full = _in_channels(small, index), _in_channels(dense, place)
                growth *= _next_width(inputs, full, multiple) / inputs
        rounded += row["macs"] * growth
        share = row["macs"] / max(total, 1)
        if wanted > row["out_channels"] and share >= NOTABLE:
            about = f"{row['out_channels']}, next {wanted}, {share:.1%} of the MACs"
            named.append((-share, f"{row['name']} ({about})"))
    if not named:
        return []
    return [
        f"{_count(named, 'layer')} that the cut left without a multiple of {multiple} channels may "
        f"run below full speed: {_some([text for _, text in sorted(named)])}. Rounding all widths "
        f"up costs about {rounded / total - 1:.1%} more MACs and may still be faster: do "
        f"prune(..., round_to={multiple})."
    ]


def _place(name: str, table: Sequence[Row]) -> int | None:
    """Index of the layer of that name; the surgery may have wrapped it, which adds a level."""
    names = [row["name"] for row in table]
    return next((names.index(n) for n in (name, name.rpartition(".")[0]) if n in names), None)


def _next_width(width: int, full: int, multiple: int) -> int:
    """The next multiple, but not above the ``full`` width of the dense layer."""
    return max(width, min(ceil(width / multiple) * multiple, full))


def _in_channels(table: Sequence[Row], index: int) -> int:
    """Channels that a layer reads: for a linear layer after a flatten fewer than its columns."""
    inputs = table[index]["in_channels"]
    if table[index]["kind"] != "linear" or index == 0:
        return inputs
    before = table[index - 1]["out_channels"]
    return before if inputs % before == 0 else inputs


def memory_words(dense: Sequence[Row], small: Sequence[Row], batch: int = 1) -> list[str]:
    """Says if layers with few MACs per byte move much of what the small net moves.

    ``dense`` and ``small``: rows of ``layer_table``; bytes are inputs, outputs and weights of
    convolutions and linear layers in float32, each counted once per call.
    """
    rows = [row for row in small if row["macs"]]
    low = [r for r in rows if batch * r["macs"] < FEW_MACS_PER_BYTE * _bytes(r, batch)]
    moved, before = (sum(_bytes(row, batch) for row in table) for table in (small, dense))
    macs, macs_before = (sum(row["macs"] for row in table) for table in (small, dense))
    share = sum(_bytes(row, batch) for row in low) / max(moved, 1)
    if share < MUCH_TRAFFIC:
        return []
    depthwise = sum(row["kind"] == "depthwise" for row in low)
    return [
        f"At batch {batch}, {len(low)} of {_count(rows, 'layer')} do under {FEW_MACS_PER_BYTE} "
        f"MACs per byte ({depthwise} of them depthwise): {share:.0%} of the bytes, "
        f"{sum(row['macs'] for row in low) / macs:.0%} of the MACs. They may run at the speed of "
        f"memory, and bytes fell {before / moved:.2f} times while MACs fell "
        f"{macs_before / macs:.2f} times: the speed-up may lie between the two."
    ]


def _bytes(row: Row, batch: int) -> int:
    """Bytes of inputs, outputs and weights of a convolution or linear layer in float32."""
    if not row["macs"]:
        return 0
    stride = prod(int(step) for step in row["stride"].split("x")) if row["stride"] else 1
    pixels = row["height"] * row["width"]
    entries = pixels * (row["out_channels"] + stride * row["in_channels"])
    return 4 * (batch * entries + row["params"])


def _count(things: Sequence, noun: str) -> str:
    return f"{len(things)} {noun}" + ("s" if len(things) != 1 else "")


def _some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = [f"{len(names) - NAMED} more"] if len(names) > NAMED else []
    return ", ".join([*names[:NAMED], *more])
