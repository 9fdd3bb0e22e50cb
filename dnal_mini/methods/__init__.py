"""One file a method: how it chooses which channels stay."""
