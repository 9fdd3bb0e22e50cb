"""One colour per thing through the whole book."""

# One colour per thing through the whole book, from Okabe and Ito's set for colour-blind readers.
BLUE, VERMILION, GREEN, PURPLE = "#0072b2", "#d55e00", "#007a5a", "#a8488a"


AMBER, GREY, SKY, INK = "#b07800", "#6b7280", "#56b4e9", "#1f2933"


COLOURS = {
    "weight_stage": BLUE, "arch_stage": VERMILION, "fine_tune": GREEN,
    "dense": GREY, "pruned": BLUE, "kept": INK,
    "dnal": BLUE, "paper": BLUE, "code": VERMILION,
    "conv-bn-ss-relu": BLUE, "conv-bn-relu-ss": GREEN, "conv-ss-bn-relu": VERMILION,
    "off": GREY, "soft": VERMILION, "hard": BLUE,
    "annealed": BLUE, "steep": VERMILION, "folded": BLUE, "apart": VERMILION,
}  # fmt: skip


OTHERS = (PURPLE, AMBER, GREEN, VERMILION, SKY, GREY, INK)


def colour(name: str) -> str:
    """The book's colour of a method, stage, order or mode; an unknown name keeps one too."""
    if name in COLOURS:
        return COLOURS[name]
    return OTHERS[sum(name.encode()) % len(OTHERS)]
