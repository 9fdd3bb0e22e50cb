"""Static and interactive figures, from numbers alone."""
