"""How a method is run to a smaller network."""
