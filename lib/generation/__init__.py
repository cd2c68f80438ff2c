"""Generation: its settings, what is done to scores before a token is chosen, and when it stops."""

from formax.generation.api import astream, generate, stream
from formax.generation.config import (
    GenerationConfig,
    GenerationMode,
    SynthIDTextWatermarkingConfig,
    WatermarkingConfig,
)
from formax.generation.constraints import DisjunctiveConstraint, PhrasalConstraint
from formax.generation.engine import Engine
from formax.generation.legacy import from_legacy_cache, to_legacy_cache
from formax.generation.outputs import transition_scores
from formax.generation.processors import processors_of, then
from formax.generation.state import Rule, Tokens
from formax.generation.stopping import MaxTime, any_of, criteria_of, stop_strings
from formax.generation.streamers import (
    AsyncTextIteratorStreamer,
    BaseStreamer,
    TextIteratorStreamer,
    TextStreamer,
)
from formax.generation.watermark import SynthIDDetector, WatermarkDetector, WatermarkReport

__all__ = [
    "AsyncTextIteratorStreamer",
    "BaseStreamer",
    "DisjunctiveConstraint",
    "Engine",
    "GenerationConfig",
    "GenerationMode",
    "MaxTime",
    "PhrasalConstraint",
    "Rule",
    "SynthIDDetector",
    "SynthIDTextWatermarkingConfig",
    "TextIteratorStreamer",
    "TextStreamer",
    "Tokens",
    "WatermarkDetector",
    "WatermarkReport",
    "WatermarkingConfig",
    "any_of",
    "astream",
    "criteria_of",
    "from_legacy_cache",
    "generate",
    "processors_of",
    "stop_strings",
    "stream",
    "then",
    "to_legacy_cache",
    "transition_scores",
]
