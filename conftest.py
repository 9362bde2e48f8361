"""Doctests of the four top-level folders run once, under their installed names (mpq.search and its siblings)."""

import os
from importlib.util import find_spec

# Test workers run side by side: one thread each is faster than all of them fighting for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's kernels are tested on any machine by its interpreter; set to 0 to test them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore = ["search", "sensitivity", "proxies", "exporters", "experiments"]
if find_spec("triton") is None:
    collect_ignore += ["mpq/kernels/gpu/triton", "tests/kernels/gpu/triton"]
if find_spec("vllm") is None:
    collect_ignore += ["mpq/integrations/vllm_adapter.py"]
