"""Training and inference in few bits, simulated: what the numerics alone do to a model."""
