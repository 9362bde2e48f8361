"""Simulated training and inference in few bits."""
