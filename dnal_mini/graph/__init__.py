"""Any net as a graph of operations; knows no gate."""
