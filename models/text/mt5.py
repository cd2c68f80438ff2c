"""mT5: T5 1.1 (gated networks, a head of its own) in 101 languages, with the vocabulary that they need.

Xue et al. 2020, arXiv:2010.11934; original code google-research/multilingual-t5.
"""

from typing import ClassVar

from formax.core.config import config
from formax.models.text.t5 import T5Config, family


@config
class MT5Config(T5Config):
    """`config.json` of model type "mt5"."""

    model_type: ClassVar[str] = "mt5"

    vocab_size: int = 250112
    d_ff: int = 1024
    num_layers: int = 8
    num_heads: int = 6
    feed_forward_proj: str = "gated-gelu"
    tie_word_embeddings: bool = False
    decoder_start_token_id: int | None = 0


FAMILY = family("MT5", MT5Config, relative="t5")
