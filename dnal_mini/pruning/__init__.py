"""From hard gates to a smaller network, exactly."""
