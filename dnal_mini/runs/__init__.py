"""The folder of a run, its record, and what many records tell."""
