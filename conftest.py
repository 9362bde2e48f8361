"""Doctests of the four top-level folders run once, under their installed names (mpq.search and its siblings)."""

import os

# Test workers run side by side: one thread each is faster than all of them fighting for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

collect_ignore = ["search", "sensitivity", "proxies", "exporters", "experiments"]
