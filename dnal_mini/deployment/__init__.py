"""A trained net for other places: norms folded, files written and checked."""
