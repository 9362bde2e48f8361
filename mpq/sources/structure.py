"""A model's structure by name, without its weights: for questions that shapes alone answer."""

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
    """The model of this name on the device "meta"; None where only its weights or code of the user's own say it.

    Raises:
        MpqError: an unknown model, or a missing extra.
    """
    try:
        with torch.device("meta"):
            return _structure(name)
    except MpqError:
        raise
    except Exception:  # whatever a constructor does that computes with its weights
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
    # The smallest type where the config names none: what is refused by it cannot be had in a wider one.
    return unstack(cls._from_config(config, dtype=config.dtype or torch.bfloat16)).eval()
