"""Training-free scores as programs over layer statistics, and their evolution."""
