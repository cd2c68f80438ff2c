"""Attention: one function (`attention`), structured masks (`Mask`), caches, and the multi-head layers over them."""

from formax.layers.attention.api import KVCache, attention, attention_spec, cross_attention, self_attention
from formax.layers.attention.mask import Mask, from_attention_mask

__all__ = ["KVCache", "Mask", "attention", "attention_spec", "cross_attention", "from_attention_mask", "self_attention"]
