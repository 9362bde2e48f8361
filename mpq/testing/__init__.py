"""Conformance suites that the authors of plugins inherit."""
