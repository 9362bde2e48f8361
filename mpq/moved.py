"""Modules under their names of version 0.1: importing one warns with the new name. Removed in version 0.2."""

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

ROOMS = {
    "mpq.network": "mpq.core.(layers experts calibration moments ranges offload parallel fingerprint)",
    "mpq.rounding": "mpq.core.methods.(clip_search gptq hadamard stochastic super_blocks)",
    "mpq.generation": "mpq.(generate decoder compiled_step)",
    "mpq.exporters.mpq": "mpq.exporters.(checkpoint skeleton state)",
}
MOVED = {
    "mpq.search.quadratic": "mpq.search.pairwise",
    "mpq.core.rounding": "mpq.rounding.reference",
    "mpq.core.activations": "mpq.rounding.activations",
    "mpq.core.methods": "mpq.rounding",
    "mpq.exporters.hf": "mpq.integrations.transformers",
    "mpq.exporters.vllm_plugin": "mpq.integrations.vllm",
    "mpq.exporters.consumers": "mpq.exporters.targets",
    "mpq.exporters.gptq_layout": "mpq.exporters.gptq",
    "mpq.exporters.gguf_file": "mpq.exporters.gguf.file",
    "mpq.exporters.onnx_file": "mpq.exporters.onnx.file",
}
for room, old in ROOMS.items():
    parent, _, names = old.rstrip(")").partition("(")
    MOVED.update({parent + name: f"{room}.{name}" for name in names.split()})


class Moved(MetaPathFinder, Loader):
    """Finds modules by their old names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for an old name, None for any other."""
        return ModuleSpec(fullname, self) if fullname in MOVED else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The module itself, under its new name."""
        new = MOVED[spec.name]
        warnings.warn(f"{spec.name} is {new} now; the old name goes in version 0.2", DeprecationWarning, stacklevel=2)
        module = import_module(new)
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Give the module, which has run already, its own spec back."""
        assert module.__spec__ is not None
        module.__spec__ = module.__spec__.loader_state
