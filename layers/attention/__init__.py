"""Attention: one function (`attention`), structured masks and biases, backends, caches, and multi-head layers."""

from formax.layers.attention.api import attention, attention_spec, cross_attention, self_attention
from formax.layers.attention.backends import explain_attention
from formax.layers.attention.bias import ALiBi, Bucketed, Indexed, alibi_slopes
from formax.layers.attention.cache import Cache, CrossCache, KVCache, causal_mask
from formax.layers.attention.decode import Pages, explain_paged_attention, paged_attention
from formax.layers.attention.mask import Mask, from_attention_mask
from formax.layers.attention.problem import compile_for

__all__ = [
    "ALiBi",
    "Bucketed",
    "Cache",
    "CrossCache",
    "Indexed",
    "KVCache",
    "Mask",
    "Pages",
    "alibi_slopes",
    "attention",
    "attention_spec",
    "causal_mask",
    "compile_for",
    "cross_attention",
    "explain_attention",
    "explain_paged_attention",
    "from_attention_mask",
    "paged_attention",
    "self_attention",
]
