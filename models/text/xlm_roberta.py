"""XLM-RoBERTa: RoBERTa on text in a hundred languages, with words of SentencePiece.

Conneau et al. 2019, arXiv:1911.02116; original code facebookresearch/fairseq. It is `roberta` under other class names.
"""

from typing import ClassVar

from formax.core.config import config
from formax.core.family import Family, Port
from formax.layers import text_encoder
from formax.models.text import roberta
from formax.models.text.roberta import RobertaConfig


@config
class XLMRobertaConfig(RobertaConfig):
    """`config.json` of model type "xlm-roberta"."""

    model_type: ClassVar[str] = "xlm-roberta"

    vocab_size: int = 30522


FAMILY = Family(
    "xlm-roberta",
    XLMRobertaConfig,
    base="roberta",
    inputs=roberta.encode,
    init_cache=text_encoder.init_cache,
    relative="roberta",
    architectures=roberta.architectures("XLMRoberta", "roberta", roberta.encode),
    counts_tokens=True,
    flax=Port(inputs=text_encoder.FLAX_INPUTS),
    tf=Port(repeats={"lm_head": "roberta/embeddings/"}),
)
