"""A figure that grows while a run goes on, and a bar of its steps: what a notebook shows by itself.

Read ``watched``. Elsewhere nothing is shown that was not asked for.
"""

import io
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from dnal_mini.figures import plots, style

PAUSE_S = 1.0  # between two pictures: epochs of a toy are shorter than a picture takes
Row = dict[str, Any]
Progress = Callable[[Iterable, str], Iterable]
OnRow = Callable[[Row], None]


@contextmanager
def watched(
    title: str, progress: Progress | None, on_row: OnRow | None
) -> Iterator[tuple[Progress | None, OnRow | None]]:
    """``progress`` and ``on_row`` as given; in a notebook a bar and a figure where they are not."""
    if not in_notebook():
        yield progress, on_row
        return
    shown = Growing(title)
    try:
        yield progress or shown.progress, on_row or shown.show
    finally:
        shown.close()


def in_notebook() -> bool:
    """True inside a kernel, whose front end shows what it is sent."""
    if "IPython" not in sys.modules:
        return False
    from IPython import get_ipython

    return getattr(get_ipython(), "kernel", None) is not None


class Growing:
    """The epochs of a run as a figure, drawn anew in its place, and one bar for the steps."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.epochs: list[Row] = []
        self._bar: Any = None
        self._place: Any = None  # of the picture in the cell's output
        self._drawn_at = -PAUSE_S
        self._waiting = False

    def progress(self, steps: Iterable, text: str) -> Iterator:
        """The steps of an epoch under the bar, which is the same one for all epochs."""
        steps = list(steps)
        if self._bar is None:
            with warnings.catch_warnings(action="ignore"):  # without ipywidgets: a bar of text
                from tqdm.auto import tqdm

                self._bar = tqdm(total=len(steps), leave=False)
        self._bar.reset(total=len(steps))
        self._bar.set_description(text)
        for step in steps:
            yield step
            self._bar.update()

    def show(self, row: Row) -> None:
        """Take up an epoch, and say a warning."""
        if row["kind"] == "warning":
            print(f"{row['stage']}, epoch {row['epoch']}: {row['text']}")
        if row["kind"] != "epoch":
            return
        self.epochs.append(row)
        self._waiting = True
        if time.monotonic() >= self._drawn_at + PAUSE_S:
            self._draw()

    def close(self) -> None:
        """The last picture; the bar goes."""
        if self._waiting:
            self._draw()
        if self._bar is not None:
            self._bar.close()

    def picture(self) -> tuple[bytes, str]:
        """Validation accuracy and open gates over the epochs so far, as SVG; the same in words.

        Raises: ImportError without matplotlib or pandas.
        """
        import matplotlib as mpl
        from matplotlib.figure import Figure

        file = io.BytesIO()
        with mpl.rc_context(style.STYLE):
            figure = Figure()
            axes = figure.subplots()
            plots.training_curves(self.epochs, axes, title=self.title, accuracy="val_accuracy")
            style.describe(axes, _in_words(self.epochs[-1]))
            words = style.alt_text(figure)
            figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue(), words

    def _draw(self) -> None:
        """Put the picture into the cell's output, or in the place of the one that is there."""
        from IPython.display import display

        self._waiting = False
        try:
            svg, words = self.picture()
        except ImportError:  # of the extra `book`: the bar has to do
            return
        content = {"image/svg+xml": svg.decode(), "text/plain": words}
        about = {"image/svg+xml": {"alt": words}}
        if self._place is None:
            self._place = display(content, raw=True, metadata=about, display_id=True)
        else:
            self._place.update(content, raw=True, metadata=about)
        self._drawn_at = time.monotonic()


def _in_words(row: Row) -> str:
    """Where the run stands, for those who do not see the curves."""
    place = f"{row['stage']} epoch {row['epoch']} of {row['epochs']}"
    kept = f", share of gates open {row['kept']:.0%}" if "kept" in row else ""
    return f"Over the epochs so far; after {place}: accuracy {row['val_accuracy']:.1%}{kept}"
