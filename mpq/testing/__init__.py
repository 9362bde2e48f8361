"""Conformance test suites for authors of plugins."""
