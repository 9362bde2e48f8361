"""Simulated training and inference in few bits: FP4 and FP8 recipes, masked bfloat16, float32 over 16-bit weights.

`convert(model, Recipe("nvfp4"))` changes a model in place; any training loop then trains it in few bits.
"""

from mpq.lowprecision.convert import convert, converted
from mpq.lowprecision.layercast import layercast
from mpq.lowprecision.masking import Mask
from mpq.lowprecision.overhead import overhead
from mpq.lowprecision.recipe import Recipe
from mpq.lowprecision.reproducibility import Configuration, Reproducibility, reproducibility
from mpq.lowprecision.sharpness import logit_sharpness, sharpness
from mpq.lowprecision.stable_spam import StableSPAM

__all__ = [
    "Configuration", "Mask", "Recipe", "Reproducibility", "StableSPAM", "convert", "converted", "layercast",
    "logit_sharpness", "overhead", "reproducibility", "sharpness",
]  # fmt: skip
