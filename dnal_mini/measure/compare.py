"""Does the smaller network also run faster? Counted, and measured in several forms.

Read ``compare`` first. Fewer MACs are a count, time is a measurement, and the one does not promise
the other; so a form without a gain is called that.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dnal_mini.deployment.export import export, onnx_runner
from dnal_mini.deployment.fold import deploy
from dnal_mini.gating import check_gates, gates, strip_gates
from dnal_mini.graph.copies import copied
from dnal_mini.measure.cost import cost
from dnal_mini.measure.latency import interleaved
from dnal_mini.refused import Refused, need_module, need_number, need_numbers, need_word, shown

FORMS = {
    "eager": "as it is",
    "channels_last": "as it is, channels last in memory",
    "deployed": "norms folded into the layers before them, channels last in memory",
    "onnxruntime": "norms folded, exported to ONNX, run by onnxruntime on the CPU",
}
NEEDED_SPEED_UP = 1.05  # below this a speed-up is called no gain
PLACES = {"": 0.5, "_p10": 0.1, "_p90": 0.9}  # endings of keys, and what share of turns is below
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
    ``words``: the largest gain, the forms without one, gates that were left out; a sentence each.

    Example:
        >>> dense, small = (dnal.models.vgg16(width=width) for width in (0.25, 0.125))
        >>> found = dnal.compare(dense, small, batches=(4,), forms=("eager",), budget_s=0.05)
        >>> isinstance(found, dnal.Comparison)
        True
        >>> print(str(found).splitlines()[1])
        macs                    19,924,224     5,091,968    3.91
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
        where = f"{self.device}, {self.threads} thread" + ("s" if self.threads != 1 else "")
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
    dense, small = (_spread(row, net, "_s", 1e3) for net in ("dense", "small"))
    ratio = _spread(row, "speed_up")
    return f"{start}{dense:>26}{small:>26}{ratio:>22}{row['efficiency']:12.2f}"


def _spread(row: Row, name: str, unit: str = "", times: float = 1.0) -> str:
    """Median and 10th to 90th percentile of one of a row's numbers."""
    middle, low, high = (times * row[f"{name}{place}{unit}"] for place in PLACES)
    return f"{middle:.3g} ({low:.3g} to {high:.3g})"


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
    """Sizes and times of a network and a smaller one: was it worth it?

    Both are modules, or hold one as ``.module`` (what ``prune`` returns). A dense net with gates is
    compared without them: they are tools of the search. ``forms`` are words of ``FORMS``; a form
    that cannot be had is told in its row. For each form and batch the two are timed in turns in
    one run of about ``budget_s`` seconds and at least ``min_repeats`` turns, with the threads that
    torch has now; writing the ONNX files takes its own time. Both nets are left alone.

    Raises: ValueError for a small net with gates, nets on different devices, an unknown form, no
    batch, and what ``cost`` and ``latency`` refuse.
    Example:
        >>> dense, small = (dnal.models.vgg16(width=width) for width in (0.25, 0.125))
        >>> found = dnal.compare(dense, small, batches=(4,), forms=("eager",), budget_s=0.05)
        >>> [(row["what"], round(row["ratio"], 1)) for row in found.sizes[:2]]
        [('macs', 3.9), ('params', 4.0)]
    """
    dense, small = _net_of("dense", dense), _net_of("small", small)
    device = _check(dense, small, batches, forms)
    count = len(gates(dense))
    dense = _without_gates(dense) if count else dense
    sizes = _sizes(dense, small, image_shape)
    ratio = sizes[0]["ratio"]
    rows: list[Row] = []
    for form in forms:
        try:
            pair = [_in_form(net, form, image_shape) for net in (dense, small)]
        except ValueError as error:
            rows += [{"form": form, "batch": b, "not_measured": str(error)} for b in batches]
            continue
        memory = form in ("channels_last", "deployed")
        for batch in batches:
            times = interleaved(pair, image_shape, batch, memory, budget_s, min_repeats)
            rows.append({"form": form, "batch": batch, **timing(times[0], times[1], ratio)})
    words = [f"The dense net is compared without its {count} gates."] if count else []
    words += speed_words(rows, ratio)
    return Comparison(sizes, rows, words, device, torch.get_num_threads())


def _net_of(name: str, given: nn.Module | HasModule) -> nn.Module:
    """The network, or the one that is held. Raises: ValueError if there is none."""
    net: Any = given if isinstance(given, nn.Module) else getattr(given, "module", given)
    need_module(net, name)
    return net


def _check(dense: nn.Module, small: nn.Module, batches: Sequence, forms: Sequence[str]) -> str:
    """Refuse what cannot be compared; returns the device that both nets are on."""
    for name, given in (("batches", batches), ("forms", forms)):
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise Refused(f"got {name} {shown(given)}; need a tuple of at least one")
    for form in forms:
        need_word("form", form, FORMS)
    for batch in batches:
        need_number("batch", batch, 1, whole=True)
    check_gates(dense)
    if count := len(gates(small)):
        raise Refused(
            f"got a small net with {count} gates: it is masked, not pruned, and saves nothing; "
            "need one without; do prune it first"
        )
    tensors = chain(*(t for net in (dense, small) for t in (net.parameters(), net.buffers())))
    devices = {str(tensor.device) for tensor in tensors}
    if len(devices) > 1:
        raise Refused(f"got nets on {' and '.join(sorted(devices))}; need one device; move one")
    need_numbers(dense, "dense")
    return devices.pop() if devices else "cpu"


def _without_gates(net: nn.Module) -> nn.Module:
    """A copy with the layers that the gates were added to, as they were."""
    net = copied(net)
    strip_gates(net)
    return net


def _sizes(dense: nn.Module, small: nn.Module, image_shape: Sequence[int]) -> list[Row]:
    """What can be counted, MACs first; the file has the net's state and nothing else."""
    from safetensors.torch import save

    counts = []
    for net in (dense, small):
        state = {k: v.detach().cpu() for k, v in net.state_dict().items() if isinstance(v, Tensor)}
        plain = {k: v.clone(memory_format=torch.contiguous_format) for k, v in state.items()}
        counts.append({**vars(cost(net, image_shape)), "file_bytes": len(save(plain))})
    rows = []
    for what in ("macs", "params", "file_bytes", "peak_activation_bytes"):
        a, b = (count[what] for count in counts)
        rows.append({"what": what, "dense": a, "small": b, "ratio": max(a, 1) / max(b, 1)})
    return rows


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
        return deploy(net, image_shape)
    if form != "onnxruntime":
        return net
    first = next(net.parameters(), torch.zeros(()))
    if first.device.type != "cpu" or first.dtype != torch.float32:
        raise Refused(f"runs in float32 on the CPU, these are {first.dtype}, {first.device}")
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
    for place, share in PLACES.items():
        row[f"dense{place}_s"] = float(dense.quantile(share))
        row[f"small{place}_s"] = float(small.quantile(share))
        row[f"speed_up{place}"] = float((dense / small).quantile(share))
    apart = row["small_p90_s"] < row["dense_p10_s"]
    row["efficiency"] = row["speed_up"] / macs_ratio
    row["gain"] = apart and row["speed_up"] >= NEEDED_SPEED_UP
    return row


def speed_words(rows: Sequence[Row], macs_ratio: float) -> list[str]:
    """What the times of ``Comparison.rows`` say: the largest gain, every form without one.

    Where the small net is faster in the middle, but times scatter so that they overlap, the two
    are not told apart.
    """
    measured = [row for row in rows if "not_measured" not in row]
    gains = [row for row in measured if row["gain"]]
    lost = [row for row in measured if not row["gain"] and row["speed_up"] < NEEDED_SPEED_UP]
    unclear = [row for row in measured if row not in gains and row not in lost]
    fewer = f"{macs_ratio:.2f} times fewer MACs"
    words = []
    if gains:
        best = max(gains, key=lambda row: row["speed_up"])
        words.append(
            f"Largest gain: {best['speed_up']:.2f} times faster in {best['form']} at batch "
            f"{best['batch']}, {best['efficiency']:.2f} of what {fewer} could give."
        )
    elif lost and not unclear:
        words.append(f"No gain in any form that was measured: {fewer} saved no time here.")
    parts = []
    for says, some in (("no gain, with the speed-up", lost), ("not told apart", unclear)):
        places = (f"{r['form']} at batch {r['batch']}, {_spread(r, 'speed_up')}" for r in some)
        parts += [f"{says}: {'; '.join(places)}"] if some else []
    sentence = "; ".join(parts)
    words += [f"{sentence[0].upper()}{sentence[1:]}."] if parts else []
    return words
