"""Our own checkpoint: every format, every layer."""
