"""Sphinx extension: a picture that a cell shows gets its alt text from the output's metadata.

``plots.use_style`` stores it there, under ``alt`` of the picture's type, where nbconvert looks too;
MyST-NB reads only ``width`` and ``height`` from that place.
"""

from typing import Any

from docutils import nodes
from myst_nb.core.render import MimeData, NbElementRenderer
from sphinx.application import Sphinx

render_image = NbElementRenderer.render_image


def with_alt(self: NbElementRenderer, data: MimeData) -> list[nodes.Element]:
    """MyST-NB's image node, with alt text; cell metadata that give one stand above the output's."""
    pictures = render_image(self, data)
    alt = data.output_metadata.get(data.mime_type, {}).get("alt")
    for picture in pictures:
        if alt and "alt" not in picture:
            picture["alt"] = str(alt)
    return pictures


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    NbElementRenderer.render_image = with_alt
    return {"parallel_read_safe": True}
