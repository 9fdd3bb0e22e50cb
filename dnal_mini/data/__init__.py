"""Image sets: where they come from, how they are held, what is done to a batch."""
