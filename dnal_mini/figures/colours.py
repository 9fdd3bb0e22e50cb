"""One colour per thing through the whole book; a marker too for every method."""

from collections.abc import Iterable

# From Okabe and Ito's set for colour-blind readers.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#007a5a", "#a8488a"
AMBER, GREY, SKY, INK = "#b07800", "#6b7280", "#56b4e9", "#1f2933"
COLOURS = {
    "weight_stage": BLUE, "arch_stage": VERMILION, "fine_tune": GREEN,
    "dense": GREY, "pruned": BLUE, "kept": INK,
    "paper": BLUE, "code": VERMILION,
    "conv-bn-ss-relu": BLUE, "conv-bn-relu-ss": GREEN, "conv-ss-bn-relu": VERMILION,
    "off": GREY, "soft": VERMILION, "hard": BLUE,
    "annealed": BLUE, "steep": VERMILION, "folded": BLUE, "apart": VERMILION,
}  # fmt: skip
# Each as far as can be from those above it, also for eyes that see no red or no green, and with a
# contrast of 3 on white and on near black; methods of one marker are furthest apart.
METHOD_COLOURS = {
    "dnal": (BLUE, "o"), "uniform": (GREEN, "s"), "l1-norm": (VERMILION, "D"),
    "random": (AMBER, "^"), "slimming": (PURPLE, "v"), "group-lasso": ("#9c7efc", "P"),
    "morphnet": ("#669ca2", "*"), "fbnetv2": ("#0ca260", "X"), "proxylessnas": ("#ba2a30", "*"),
    "darts": ("#6660de", "s"), "amc": ("#f0608a", "v"), "figs": ("#d266d2", "D"),
    "variational-dropout": ("#787eae", "s"), "generator-inquisitor": ("#0096d2", "X"),
    "random-weights": ("#a24ec0", "*"), "filter-bits": ("#66844e", "o"),
    "filter-widths": ("#a26678", "D"), "memnet": ("#606636", "P"), "sss": ("#5a6c96", "P"),
    "hrank": ("#cc7e66", "P"), "thinet": ("#189618", "v"), "gal": ("#7e42c0", "D"),
    "abcpruner": ("#8a6cde", "^"), "magnitude": ("#ae4860", "^"), "taylor": ("#006c7e", "X"),
}  # fmt: skip
MARKERS = "osD^vPX*"
OTHERS = (PURPLE, AMBER, GREEN, VERMILION, SKY, GREY, INK)
OTHER_MARKERS = "<>ph"  # no method has them


def colour(name: str) -> str:
    """The book's colour of a method, stage, order or mode; an unknown name keeps one too."""
    return looks([name])[name][0]


def marker(name: str) -> str:
    """The book's marker of a method, as matplotlib writes it; an unknown name keeps one too."""
    return looks([name])[name][1]


def looks(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of every name in one figure; unknown ones step aside for the others."""
    names = set(names)
    found = {name: METHOD_COLOURS[name] for name in names & set(METHOD_COLOURS)}
    for name in sorted(names - set(found), key=lambda name: (name not in COLOURS, name)):
        inks = (COLOURS[name],) if name in COLOURS else OTHERS
        first, taken = sum(name.encode()), {ink for ink, _ in found.values()}
        pairs = [
            (inks[(first + k) % len(inks)], OTHER_MARKERS[(first + turn) % len(OTHER_MARKERS)])
            for turn in range(len(OTHER_MARKERS))
            for k in range(len(inks))
        ]
        unlike = [pair for pair in pairs if pair not in found.values()] or pairs
        found[name] = next((pair for pair in unlike if pair[0] not in taken), unlike[0])
    return found
