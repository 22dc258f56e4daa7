"""Flax Linen: layers, and models as they are, that keep their memories in a collection."""

from mem_aop_jax.linen._layers import COLLECTION, RNG, Dense, DotGeneral, layers, probes
from mem_aop_jax.linen._wrap import wrap

__all__ = ["COLLECTION", "RNG", "Dense", "DotGeneral", "layers", "probes", "wrap"]
