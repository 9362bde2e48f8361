"""Run the doctests of the four top-level folders once, under their installed names (mpq.search and its siblings)."""

import os
from importlib.util import find_spec

# Test workers run in parallel: one thread each is faster than oversubscribed cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Triton's interpreter tests the kernels on any machine; set to 0 to test them on a GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")

collect_ignore = ["search", "sensitivity", "proxies", "exporters", "experiments"]
if find_spec("triton") is None:
    collect_ignore += ["mpq/kernels/gpu/triton", "tests/kernels/gpu/triton"]
if find_spec("vllm") is None:
    collect_ignore += ["mpq/integrations/vllm_adapter.py"]
