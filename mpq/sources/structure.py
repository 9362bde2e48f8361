"""A model's structure by name, without its weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpq.core.errors import MpqError
from mpq.models import BUNDLED
from mpq.network.experts import unstack
from mpq.sources.extras import need
from mpq.sources.networks import config_of, kind_of


def structure_of(name: str) -> nn.Module | None:
    """The model of this name on the device "meta"; None if it needs the weights or the user's code.

    Raises:
        MpqError: an unknown model, or a missing extra.
    """
    try:
        with torch.device("meta"):
            return _structure(name)
    except MpqError:
        raise
    except Exception:  # constructors that compute with their weights may raise anything
        return None


def _structure(name: str) -> nn.Module | None:
    if name in BUNDLED:
        return BUNDLED[name].build()
    if name.startswith("timm:"):
        model: nn.Module = need("timm", "timm", "timm models").create_model(name.removeprefix("timm:"))
        return model.eval()
    if ":" in name or name.endswith(".gguf") or (Path(name).is_dir() and not (Path(name) / "config.json").is_file()):
        return None
    config = config_of(name)
    transformers = need("transformers", "hf", f"Hugging Face models such as {name!r}")
    cls: Any = getattr(transformers, kind_of(config, transformers)[1])
    # The smallest type if the config names none: a budget too small for it is too small for wider ones.
    return unstack(cls._from_config(config, dtype=config.dtype or torch.bfloat16)).eval()
