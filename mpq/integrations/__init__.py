"""How other libraries run our checkpoints."""
