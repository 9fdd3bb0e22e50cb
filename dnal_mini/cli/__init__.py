"""The dnal command."""
