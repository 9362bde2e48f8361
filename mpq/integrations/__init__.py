"""Integrations with libraries that run our checkpoints."""
