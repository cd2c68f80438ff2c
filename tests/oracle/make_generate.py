"""Makes `tests/data/generate/`: what the reference's `generate` writes, for tiny models whose weights are known.

    python tests/oracle/make_generate.py [family ...]          # writes
    python tests/oracle/make_generate.py [family ...] --check  # compares with the files; status 1 if any differs

Run it in two environments, that of requirements.txt first: transformers 4.57.6 makes greedy search, beam search,
assisted generation and the probabilities of sampling. Four ways of generating have left it for repositories of remote
code. Group and constrained beam search were last part of the library in 4.56.2, contrastive search and DoLa in 4.55.4,
where the code of the other two is the same. So all four are made with 4.55.4, of requirements-older.txt. Each run
replaces the cases of its own ways and leaves the others.

A model of random weights is sure of little and soon repeats itself. `scale` in `MODELS` weighs its parts so that texts
go on, and no answer here hangs on the last bits: every case is repeated with weights that are off by 3e-5, three times,
and its text must stay what it was; between the best and the second best token of a greedy step there must be 1e-3, and
1e-4 between neighbours among the candidates of a beam.

What a reimplementer must know, and may not expect
--------------------------------------------------

Greedy search:
- Positions are counted from the first token that is not padding (GPT-2's as well, whose plain call counts from the
  first column). Where a call has no mask, tokens that are `pad_token_id` are padding, unless that is an eos as well.
- A row that has ended goes on with `pad_token_id` (eos, if there is none), and its scores go on being those of the
  model that reads padding. Generation stops with the last row, so that sequences may be shorter than asked for.
- BART's configuration has a `forced_eos_token_id` (2, unless it says otherwise): its texts end so at their full length.
- `forced_bos_token_id` is for texts of one token: after a longer prompt it does nothing.
- `exponential_decay_length_penalty` makes NaN of an eos that `min_length` or a forced token rules out, and NaN is taken
  for the best: the text ends where it must not. No case has both; in formax what is ruled out stays so.
- `logits` are the model's, `scores` what processors made of them; of beams, they are log-softmaxed before processors.
- Without `negative_prompt_ids`, guidance compares with a text that begins with the last token of the prompt. A negative
  prompt with padding has positions that count the padding, even where the prompt's own do not; here it has none, or the
  model (Llama) knows only distances.
- A BART or Whisper decoder counts the padding in a left-padded decoder prompt as positions; T5 knows only distances.

Beam search:
- Scores are divided by (number of new tokens, eos among them) ** length_penalty; the prompt never counts, nor does the
  start token of a decoder.
- Finished texts are filled with `pad_token_id`, but with the first eos if padding is token 0 (which is taken for none),
  and the output is as wide as the longest text that is returned, not as long as the search went.
- `beam_indices` of a finished text is -1 from its end on and includes the index of the eos' own step.
- Twice as many candidates as beams are looked at (or one more than there are eos tokens, times beams, if that is more),
  but an eos counts only among the first `num_beams`. One that is further behind is neither kept nor continued.
- `early_stopping=True` ends a search when every row has `num_beams` finished texts. Before that, a row that has them
  goes on, and what it finds is ignored. False ends when no row's best running score, divided by the length it has now,
  is above its worst finished one; "never" divides by the full length if the penalty is above zero. A row of which that
  was once true takes no more texts, even if the others go on.
- At the full length the running beams count as finished, and compete with what is finished, without an eos.
- `forced_eos_token_id` and the like work on log probabilities: the forced token is free.

Group beam search (an older loop, as is constrained search):
- Groups take turns within a step, each sees the tokens that the groups before it have chosen, and all in one batch.
- A group is done by itself: then its tokens are padding, with scores of 0, and these are what later groups see.
- An eos is cut off and put back when texts are returned, if there is room. Padding is padding, 0 or not. The output is
  one wider than the longest text that is returned, but no wider than `max_length`.
- Texts of all groups are sorted together, by score; with equal ones the group that comes last is first.
- With several rows, the `beam_indices` of groups after the first are those of other beams. They are not stored here.

Constrained beam search:
- Tokens of the prompt count: a phrase that is in it is fulfilled from the start.
- `scores` hold the running score of their beam as well, unlike those of any other search.
- A text that ends without having fulfilled its constraints is dropped, not continued.
- Asked for scores it fails if texts that ended and texts that were cut off are returned together.
- Beams are dealt by how far they are: the best of each number of fulfilled tokens, most first, then the second best of
  each, and so on. So they are not in the order of their scores, and the most likely beam goes on beside one that has
  just been pushed on, however unlikely that is.
- At the full length the beams that fulfil their constraints count as finished; if these are fewer than
  `num_return_sequences`, all others do as well, and often win: one asked for may be fulfilled, three are not.

Contrastive search:
- Only probabilities of the `top_k` candidates after processors count, and they are not normalised again.
- Similarity is with all hidden states of the last layer (after the last norm), those of the prompt's padding left out.
  Of a row that has ended, the states of the tokens that it would have taken are kept.

DoLa:
- Layers are read through the head without the last norm. Layer 0 is the embedding. The last layer cannot be compared
  with; "low" leaves out 0 and 1 of a model whose head is tied (with four layers, all that is left is layer 2).
- The layer to compare with is chosen once for the whole batch, by the mean over rows (padding of those that have ended
  is a row like any other): a text can depend on the texts beside it.
- Tokens less likely than a tenth of the likeliest are ruled out, so `scores` has values of minus infinity.

Assisted generation:
- One row only. The text is that of greedy search, whatever is proposed; `scores` have one entry for each token. With
  `prompt_lookup_num_tokens` it may become one token longer than asked for, and a prompt whose last token is an eos gets
  nothing; here neither is so.
- The number of proposed tokens and its schedule are settings of the assistant, not of the call.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers
from safetensors import safe_open
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `oracle` has the name that it has in the test suite

from oracle import weights
from oracle.cases import floats, ids, mask

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "data" / "generate"
Tensors = dict[str, npt.NDArray[Any]]
Settings = dict[str, Any]
# Which release makes which ways of generating, and the file that pins it.
RELEASES = {
    "4.57.6": ("requirements.txt", ("greedy", "beam", "assisted", "sampling")),
    "4.55.4": ("requirements-older.txt", ("group", "constrained", "contrastive", "dola")),
}
JITTER, SEEDS = 3e-5, (0, 1, 2)
CLEAR = {"greedy": 1e-3, "assisted": 1e-3, "dola": 1e-3, "beam": 1e-4, "group": 1e-4, "constrained": 1e-4}
# Two CPUs sum in different orders.
AGREE = 1e-4
VOCAB, NEW = 48, 12


# ---- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A tiny checkpoint.

    Attributes:
        architecture: the class that writes and opens it.
        config: keyword arguments of its configuration.
        scale: (pattern, factor): how many times larger than drawn are the weights whose names match.
        settings: its generation_config.json; none if empty.
        more: tensors on disk that the reference does not write, and others of their shape.
    """

    architecture: str
    config: Settings
    scale: tuple[tuple[str, float], ...] = ()
    settings: Settings = field(default_factory=dict)
    more: Mapping[str, str] = field(default_factory=dict)


GPT2 = Model(
    "GPT2LMHeadModel",
    {
        "vocab_size": VOCAB,
        "n_positions": 40,
        "n_embd": 32,
        "n_layer": 4,
        "n_head": 4,
        "bos_token_id": 1,
        "eos_token_id": 40,
        "pad_token_id": 0,
    },
    (
        (r"wte", 0.3),
        (r"attn\.c_proj\.weight", 3.0),
        (r"attn\.c_attn\.weight", 3.0),
        (r"c_proj\.bias", 0.3),
        (r"ln_f", 2.5),
    ),
)
LLAMA = Model(
    "LlamaForCausalLM",
    {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_theta": 300.0,
        "bos_token_id": 1,
        "eos_token_id": 31,
        "pad_token_id": 3,
    },
    ((r"embed_tokens", 1.5), (r"lm_head", 2.5)),
)
T5 = Model(
    "T5ForConditionalGeneration",
    {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 4,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "pad_token_id": 0,
        "eos_token_id": 11,
    },
    ((r"lm_head", 3.0), (r"relative", 2.0), (r"decoder.*SelfAttention\.q", 0.5), (r"decoder.*wo", 2.0)),
)
# Decoders of this kind repeat themselves if their head is the table of words.
_DECODER = (
    (r"decoder\.embed_positions", 0.5),
    (r"decoder.*q_proj\.weight", 3.0),
    (r"decoder.*bias", 0.3),
    (r"self_attn\.out_proj\.weight", 0.5),
    (r"proj_out|lm_head", 3.0),
)
BART = Model(
    "BartForConditionalGeneration",
    {
        "vocab_size": VOCAB,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_position_embeddings": 40,
        "tie_word_embeddings": False,
        "pad_token_id": 1,
        "bos_token_id": 0,
        "eos_token_id": 11,
        "forced_eos_token_id": 11,
        "decoder_start_token_id": 2,
    },
    (*_DECODER, (r"encoder_attn\.(out|v)_proj\.weight", 0.5)),
    # Untied, it has three tables of words and saves one, of which it makes no use.
    more=dict.fromkeys(
        ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"), "model.shared.weight"
    ),
)
WHISPER = Model(
    "WhisperForConditionalGeneration",
    {
        "vocab_size": VOCAB,
        "num_mel_bins": 8,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "max_source_positions": 12,
        "max_target_positions": 40,
        "tie_word_embeddings": False,
        "pad_token_id": 4,
        "bos_token_id": 39,
        "eos_token_id": 39,
        "decoder_start_token_id": 5,
    },
    (*_DECODER, (r"encoder_attn\.out_proj\.weight", 0.3), (r"encoder_attn\.v_proj\.weight", 2.0)),
    {
        "pad_token_id": 4,
        "bos_token_id": 39,
        "eos_token_id": 39,
        "decoder_start_token_id": 5,
        "begin_suppress_tokens": [38, 39],
    },
)
MAMBA = Model(
    "MambaForCausalLM",
    {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "state_size": 5,
        "num_hidden_layers": 2,
        "expand": 1.5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 7,
        "pad_token_id": 2,
    },
    ((r"lm_head", 3.0),),
)
MIXTRAL = Model(
    "MixtralForCausalLM",
    {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "rope_theta": 300.0,
        "bos_token_id": 1,
        "eos_token_id": 31,
        "pad_token_id": 3,
    },
    ((r"lm_head", 2.0),),
)


def shallow(model: Model, **config: Any) -> Model:
    """A draft of a model: its weights have the same names, so that it is the model with layers missing."""
    return dataclasses.replace(model, config=model.config | config)


# ---- inputs ---------------------------------------------------------------------------------------------------------

Inputs = dict[str, Any]


def prompts(pad: int, *lengths: int, name: str = "generate.prompts") -> Inputs:
    """Prompts of a decoder [rows, 7], padded on the left."""
    seen = mask(*lengths, width=7, left=True)
    drawn = ids(name, *seen.shape, low=8, high=VOCAB)
    return {"input_ids": np.where(seen, drawn, pad).tolist(), "attention_mask": seen.tolist()}


def texts(pad: int, *lengths: int, left: bool = False, name: str = "generate.texts") -> Inputs:
    """What an encoder reads [rows, 9]."""
    seen = mask(*lengths, width=9, left=left)
    drawn = ids(name, *seen.shape, low=8, high=VOCAB)
    return {"input_ids": np.where(seen, drawn, pad).tolist(), "attention_mask": seen.tolist()}


def decoders(pad: int, name: str = "generate.prompts") -> dict[str, Inputs]:
    """Named inputs of a decoder."""
    whole = prompts(pad, 7, 7, 7, name=name)["input_ids"]
    repeating = [[11, 30, 25, 11, 30, 25, 11]]
    return {
        "padded": prompts(pad, 7, 4, 2, name=name),
        "whole": {"input_ids": whole},
        "one": {"input_ids": repeating, "attention_mask": [[1] * 7]},
        "one_padded": prompts(pad, 5, name=name),
        "negative": prompts(pad, 7, 4, 2, name=name)
        | {"negative_prompt_ids": ids("generate.negative", 3, 4, low=8, high=VOCAB).tolist()},
    }


def encoders(pad: int, start: int, name: str = "generate.texts") -> dict[str, Inputs]:
    """Named inputs of an encoder and its decoder."""
    begun = ids("generate.begun", 3, 3, low=8, high=VOCAB)
    begun[:, 0] = start
    return {
        "padded": texts(pad, 9, 6, 4, name=name),
        "left": texts(pad, 9, 6, 4, left=True, name=name),
        "one": texts(pad, 9, name=name),
        "begun": texts(pad, 9, 6, 4, name=name) | {"decoder_input_ids": begun.tolist()},
    }


# A sound is not stored: ["floats", name, *shape] is made by `oracle.cases.floats`.
SOUND = {"input_features": ["floats", "generate.sound", 3, 8, 24]}
# Nor is a prompt of vectors.
VECTORS = {"inputs_embeds": ["floats", "generate.vectors", 3, 7, 32]}
SPOKEN = VECTORS | {"input_ids": prompts(0, 7, 7, 7, name="generate.spoken")["input_ids"]}
# The decoder's prompt is as long as what the encoder's text is filled up to; and a text that is vectors.
BEGUN_LONG = texts(1, 9, 6, 4, name="generate.texts.c") | {
    "decoder_input_ids": [[2, *row] for row in ids("generate.begun_long", 3, 15, low=8, high=VOCAB).tolist()]
}
TEXT_OF_VECTORS = {"inputs_embeds": ["floats", "generate.text", 3, 9, 32]}
SOUNDS = {
    "sound": SOUND,
    "one": {"input_features": ["floats", "generate.sound", 1, 8, 24]},
    "begun": SOUND | {"decoder_input_ids": [[5, 30, 21, 44], [5, 9, 21, 44], [5, 40, 12, 44]]},
}


def arrays(inputs: Mapping[str, Any]) -> Tensors:
    """The arrays of a call."""
    return {
        name: floats(value[1], *value[2:]) if value[0] == "floats" else np.asarray(value, np.int64)
        for name, value in inputs.items()
    }


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One call of `generate`.

    Attributes:
        mode: the way of generating.
        name: unique in its family.
        inputs: the name of what is given.
        settings: keyword arguments.
        keep: results to store beside the sequences; "transition_scores" of `compute_transition_scores`, "shapes" of
            attentions and hidden states.
        assistant: whether there is a draft model, and its settings.
    """

    mode: str
    name: str
    inputs: str
    settings: Settings
    keep: tuple[str, ...] = ()
    assistant: Settings | None = None


def make(mode: str, cases: Mapping[str, Settings], inputs: str = "padded", most: int = NEW) -> list[Case]:
    """Cases of one mode; `_inputs`, `_keep` and `_assistant` among the settings are no settings."""
    out = []
    for name, settings in cases.items():
        own = {key: value for key, value in settings.items() if not key.startswith("_")}
        if not own.keys() & {"max_length", "max_new_tokens"}:
            own = {"max_new_tokens": most} | own
        keep = settings.get("_keep", ())
        own |= {f"output_{key}": True for key in ("scores", "logits") if key in keep}
        if "shapes" in keep:
            own |= {"output_attentions": True, "output_hidden_states": True}
        case = Case(mode, f"{mode}_{name}", settings.get("_inputs", inputs), own, keep, settings.get("_assistant"))
        out.append(case)
    return out


THREE = {"num_beams": 3, "num_return_sequences": 3}
# Where texts end at all times, so that it shows when a search ends and what it weighs.
ENDING = THREE | {"_inputs": "ending"}
CONTRASTIVE = {"penalty_alpha": 0.6, "top_k": 4}
SCORED = ("scores", "sequences_scores", "beam_indices", "transition_scores")


@dataclass(frozen=True)
class Family:
    """What is asked of one family."""

    models: dict[str, Model]
    inputs: dict[str, Inputs]
    cases: list[Case]
    sampling: dict[str, tuple[str, Settings]] = field(default_factory=dict)


def groups(beams: int, groups: int, penalty: float) -> Settings:
    """Settings of group beam search."""
    return {"num_beams": beams, "num_beam_groups": groups, "diversity_penalty": penalty}


FAMILIES: dict[str, Family] = {
    "gpt2": Family(
        {"main": GPT2, "draft": shallow(GPT2, n_layer=2)},
        decoders(0)
        | {"ending": prompts(0, 7, 4, 2, name="generate.prompts.l")}
        | {"vectors": VECTORS, "spoken": SPOKEN},
        make(
            "greedy",
            {
                "plain": {},
                "short": {"max_new_tokens": 5},
                "max_length": {"max_length": 13},
                "whole": {"_inputs": "whole"},
                "no_eos": {"eos_token_id": None},
                "eos_several": {"eos_token_id": [40, 27, 8]},
                "min_new_tokens": {"min_new_tokens": 10},
                "min_length": {"min_length": 16},
                "min_both": {"min_new_tokens": 3, "min_length": 16},
                "vectors": {"_inputs": "vectors", "max_length": 15, "min_length": 12},
                "vectors_and_words": {"_inputs": "spoken", "max_length": 15, "repetition_penalty": 1.4},
                "repetition": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
                "forced": {"forced_bos_token_id": 9, "forced_eos_token_id": 40},
                "suppress": {"suppress_tokens": [27, 38], "begin_suppress_tokens": [21, 46]},
                "bad_words": {"bad_words_ids": [[27], [21, 22], [6, 4, 22], [40]]},
                "bias": {"sequence_bias": [[[27], -2.5], [[21, 46], -9.0], [[28, 22, 6], 8.0]]},
                "decay": {"exponential_decay_length_penalty": [4, 1.6]},
                "guidance": {"guidance_scale": 1.5, "_keep": ("scores",), "max_new_tokens": 6},
                "guidance_negative": {"guidance_scale": 1.8, "_inputs": "negative"},
                "scores": {"_keep": ("scores", "logits", "transition_scores"), "repetition_penalty": 1.2},
                "shapes": {"_keep": ("shapes",), "max_new_tokens": 3},
            },
        )
        + make(
            "beam",
            {
                "2": {"num_beams": 2},
                "4": {"num_beams": 4},
                "3": THREE,
                "3_whole": {"num_beams": 3, "_inputs": "whole"},
                "3_ending": ENDING,
                "3_early": ENDING | {"early_stopping": True},
                "3_never": ENDING | {"early_stopping": "never"},
                "3_penalty_0": ENDING | {"length_penalty": 0.0, "_keep": ("sequences_scores",)},
                "3_penalty_half": ENDING | {"length_penalty": 0.5},
                "3_penalty_2": ENDING | {"length_penalty": 2.0},
                "3_penalty_less": ENDING | {"length_penalty": -1.0, "_keep": ("sequences_scores",)},
                "3_never_0": ENDING
                | {"early_stopping": "never", "length_penalty": 0.0, "_keep": ("sequences_scores",)},
                "3_never_2": ENDING | {"early_stopping": "never", "length_penalty": 2.0},
                "3_early_2": ENDING | {"early_stopping": True, "length_penalty": 2.0},
                "4_two_of_four": {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 9},
                "3_ngram": THREE | {"no_repeat_ngram_size": 1},
                "3_min_new": THREE | {"min_new_tokens": 9},
                "3_eos_several": THREE | {"eos_token_id": [40, 27, 8]},
                "3_no_eos": THREE | {"eos_token_id": None},
                "3_pad": THREE | {"pad_token_id": 5},
                "3_forced": THREE | {"forced_bos_token_id": 9, "forced_eos_token_id": 40},
                "2_scores": {
                    "num_beams": 2,
                    "num_return_sequences": 2,
                    "max_new_tokens": 8,
                    "repetition_penalty": 1.2,
                    "_keep": (*SCORED, "logits"),
                },
                "2_shapes": {"num_beams": 2, "max_new_tokens": 3, "_keep": ("shapes",)},
            },
        )
        + make(
            "group",
            {
                "4_2": groups(4, 2, 1.0),
                "4_2_all": groups(4, 2, 1.0) | {"num_return_sequences": 4, "_keep": ("sequences_scores",)},
                "6_3": groups(6, 3, 0.4) | {"num_return_sequences": 3},
                "6_3_early": groups(6, 3, 2.5)
                | ENDING
                | {"num_beams": 6, "num_return_sequences": 6, "early_stopping": True},
                "4_2_penalty": groups(4, 2, 1.0)
                | {"num_return_sequences": 4, "length_penalty": 2.0, "repetition_penalty": 1.2},
                "4_2_never": groups(4, 2, 1.0)
                | ENDING
                | {"num_beams": 4, "num_return_sequences": 4, "early_stopping": "never", "length_penalty": -1.0},
            },
        )
        + make(
            "constrained",
            {
                "words": {"num_beams": 4, "force_words_ids": [[33, 20]]},
                "words_likely": {"num_beams": 4, "num_return_sequences": 4, "force_words_ids": [[41, 21], [8]]},
                "any_word": {
                    "num_beams": 4,
                    "num_return_sequences": 2,
                    "force_words_ids": [[[22, 21], [38, 29, 8], [37, 6]]],
                },
                "constraints": {
                    "num_beams": 6,
                    "num_return_sequences": 3,
                    "constraints": [{"phrase": [41, 38, 9]}, {"any": [[41, 29], [22, 19]]}],
                },
                "early": ENDING | {"force_words_ids": [[27]], "early_stopping": True, "length_penalty": 0.5},
            },
        )
        + make(
            "contrastive",
            {
                "plain": CONTRASTIVE,
                "less": {"penalty_alpha": 0.3, "top_k": 4},
                "whole": CONTRASTIVE | {"_inputs": "whole"},
                "repetition": CONTRASTIVE | {"repetition_penalty": 1.3},
                "scores": CONTRASTIVE | {"max_new_tokens": 6, "_keep": ("scores", "logits")},
            },
        )
        + make(
            "dola",
            {
                "low": {"dola_layers": "low", "repetition_penalty": 1.2},
                "list": {"dola_layers": [1, 3], "repetition_penalty": 1.2},
            },
        )
        + make(
            "assisted",
            {
                "draft": {"_assistant": {}},
                "draft_heuristic": {
                    "_assistant": {"num_assistant_tokens": 3, "num_assistant_tokens_schedule": "heuristic"}
                },
                "draft_transient": {
                    "_assistant": {"num_assistant_tokens": 4, "num_assistant_tokens_schedule": "heuristic_transient"},
                    "_inputs": "one_padded",
                },
                "draft_eos": {
                    "_assistant": {"num_assistant_tokens": 5, "assistant_confidence_threshold": 0.0},
                    "eos_token_id": 29,
                },
                "draft_scores": {
                    "_assistant": {"num_assistant_tokens": 3},
                    "repetition_penalty": 1.3,
                    "_keep": ("scores", "logits"),
                },
                "lookup": {"prompt_lookup_num_tokens": 3},
                "lookup_eos": {
                    "prompt_lookup_num_tokens": 4,
                    "max_matching_ngram_size": 2,
                    "eos_token_id": [4, 29],
                    "_inputs": "one_padded",
                },
            },
            "one",
        ),
        {"narrow": ("one_padded", {"temperature": 0.7, "top_k": 8, "top_p": 0.9})},
    ),
    "llama": Family(
        {"main": LLAMA, "draft": shallow(LLAMA, num_hidden_layers=2)},
        decoders(3),
        make(
            "greedy",
            {
                "plain": {},
                "mixed": {
                    "min_new_tokens": 4,
                    "repetition_penalty": 1.2,
                    "no_repeat_ngram_size": 2,
                    "suppress_tokens": [20],
                    "_keep": ("scores", "logits", "transition_scores"),
                },
                "guidance_negative": {"guidance_scale": 1.4, "_inputs": "negative"},
                "shapes": {"_keep": ("shapes",), "max_new_tokens": 3},
            },
        )
        + make(
            "beam",
            {
                "3": THREE,
                "3_ngram": THREE | {"no_repeat_ngram_size": 2, "length_penalty": 2.0},
                "2_scores": {"num_beams": 2, "max_new_tokens": 7, "_keep": SCORED},
            },
        )
        + make(
            "group",
            {"4_2": groups(4, 2, 0.8) | {"num_return_sequences": 4}},
        )
        + make("constrained", {"words": THREE | {"force_words_ids": [[33, 20]]}})
        + make("contrastive", {"plain": CONTRASTIVE})
        + make(
            "dola",
            {
                "low": {"dola_layers": "low", "repetition_penalty": 1.2},
                "high": {"dola_layers": "high", "repetition_penalty": 1.2},
            },
        )
        + make(
            "assisted",
            {
                "draft": {"_assistant": {"num_assistant_tokens": 3}, "repetition_penalty": 1.3},
            },
            "one",
        ),
    ),
    "t5": Family(
        {"main": T5, "draft": shallow(T5, num_decoder_layers=1)},
        encoders(0, 0, "generate.texts.b")
        | {
            "begun_padded": texts(0, 9, 6, 4, name="generate.texts.b")
            | {
                "decoder_input_ids": [[0, 12, 40], [0, 0, 9], [0, 0, 0]],
                "decoder_attention_mask": [[1, 1, 1], [0, 1, 1], [0, 0, 1]],
            }
        },
        make(
            "greedy",
            {
                "plain": {},
                "left": {"_inputs": "left"},
                "begun": {"_inputs": "begun"},
                "begun_padded": {"_inputs": "begun_padded"},
                "of_encoder": {"encoder_no_repeat_ngram_size": 1, "encoder_repetition_penalty": 1.5},
                "scores": {"repetition_penalty": 1.3, "_keep": ("scores", "logits", "transition_scores")},
                "shapes": {"_keep": ("shapes",), "max_new_tokens": 3},
            },
        )
        + make(
            "beam",
            {
                "3": THREE,
                "3_begun": THREE | {"_inputs": "begun"},
                "3_mixed": THREE | {"no_repeat_ngram_size": 2, "min_new_tokens": 5},
                "2_scores": {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 6, "_keep": SCORED},
            },
        )
        + make(
            "group",
            {"4_2": groups(4, 2, 0.8) | {"num_return_sequences": 4, "_keep": ("sequences_scores",)}},
        )
        + make(
            "constrained",
            {
                "any_word": THREE | {"force_words_ids": [[[33, 20], [12, 9]], [41]]},
            },
        )
        + make("contrastive", {"plain": CONTRASTIVE})
        + make(
            "assisted",
            {
                "draft": {"_assistant": {"num_assistant_tokens": 3}},
            },
            "one",
        ),
        {"mixed": ("one", {"temperature": 1.4, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.3})},
    ),
    "bart": Family(
        {"main": BART, "draft": shallow(BART, decoder_layers=1)},
        encoders(1, 2, "generate.texts.c") | {"begun_long": BEGUN_LONG, "vectors": TEXT_OF_VECTORS},
        make(
            "greedy",
            {
                "plain": {},
                "begun": {"_inputs": "begun"},
                "begun_long": {"_inputs": "begun_long"},
                "vectors": {"_inputs": "vectors"},
                "forced_bos": {"forced_bos_token_id": 45, "no_repeat_ngram_size": 3, "min_length": 6, "max_length": 11},
                "shapes": {"_keep": ("shapes",), "max_new_tokens": 3},
            },
        )
        + make(
            "beam",
            {
                # As its checkpoints for summaries are used.
                "4_summary": {
                    "num_beams": 4,
                    "no_repeat_ngram_size": 3,
                    "forced_bos_token_id": 45,
                    "length_penalty": 2.0,
                    "early_stopping": True,
                    "min_length": 5,
                },
                "2_scores": {"num_beams": 2, "max_new_tokens": 6, "_keep": SCORED},
            },
        )
        + make(
            "group",
            {"6_3": groups(6, 3, 0.8) | {"num_return_sequences": 3}},
        )
        # One text: its forced end leaves the others a score of minus infinity, in an order that means nothing.
        + make("constrained", {"words": {"num_beams": 3, "force_words_ids": [[33, 20]]}})
        + make("contrastive", {"plain": CONTRASTIVE})
        + make("assisted", {"draft": {"_assistant": {"num_assistant_tokens": 3}}}, "one"),
    ),
    "whisper": Family(
        {"main": WHISPER, "draft": shallow(WHISPER, decoder_layers=1)},
        SOUNDS,
        make(
            "greedy",
            {
                "plain": {},
                "begun": {"_inputs": "begun"},
                "suppress": {"suppress_tokens": [3, 6], "begin_suppress_tokens": [8, 37], "_inputs": "begun"},
                "shapes": {"_keep": ("shapes",), "max_new_tokens": 3},
            },
            "sound",
        )
        + make(
            "beam",
            {
                "3": THREE,
                "3_begun": THREE | {"_inputs": "begun"},
            },
            "sound",
        )
        + make(
            "group",
            {"4_2": groups(4, 2, 0.8) | {"num_return_sequences": 2}},
            "sound",
        )
        + make("contrastive", {"plain": CONTRASTIVE}, "sound")
        # Tokens that are suppressed at the beginning are suppressed where each guess of a draft begins, too, and by the
        # model with it: the text is not that of greedy search then.
        + make(
            "assisted",
            {"draft": {"_assistant": {"num_assistant_tokens": 3}, "begin_suppress_tokens": None}},
            "one",
        ),
    ),
    "mamba": Family(
        {"main": MAMBA},
        {name: decoders(2)[name] for name in ("padded", "whole")},
        make("greedy", {"plain": {}, "mixed": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}})
        + make(
            "beam",
            {"3": THREE, "3_whole": THREE | {"_inputs": "whole", "length_penalty": 0.0}},
        ),
    ),
    "mixtral": Family(
        {"main": MIXTRAL},
        {name: decoders(3, "generate.prompts.mixtral")[name] for name in ("padded", "whole")},
        make(
            "greedy",
            {"plain": {}, "scores": {"repetition_penalty": 1.2, "max_new_tokens": 6, "_keep": ("scores",)}},
        )
        + make(
            "beam",
            {"3": THREE, "3_early": THREE | {"early_stopping": True, "eos_token_id": [31, 35]}},
        ),
    ),
}


# ---- the reference --------------------------------------------------------------------------------------------------


def written(model: Model) -> dict[str, Any]:
    """What is stored of a model: its config.json, and the names, shapes and dtypes of its tensors on disk."""
    cls = getattr(transformers, model.architecture)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings of generation among those of the model
        cls(cls.config_class(**copy.deepcopy(model.config))).save_pretrained(folder)
        config = json.loads(Path(folder, "config.json").read_text())
        with safe_open(Path(folder, "model.safetensors"), "np") as file:
            keys = {name: file.get_tensor(name) for name in sorted(file.keys())}
    keys |= {name: keys[like] for name, like in model.more.items()}
    # What is a setting of generation may have been moved to the other file, which is not kept.
    config |= {key: value for key, value in model.config.items() if key.endswith("token_id")}
    return {
        "architecture": model.architecture,
        "config": config,
        "keys": {name: [list(array.shape), array.dtype.name] for name, array in sorted(keys.items())},
        "scale": [list(one) for one in model.scale],
        "generation_config": dict(model.settings),
    }


def opened(stored: Mapping[str, Any], settings: Settings | None = None, seed: int | None = None) -> Any:
    """Opens a stored model, with other settings of generation or with weights that are a little off."""
    tensors = weights.scaled(stored["keys"], stored["scale"])
    if seed is not None:
        random = np.random.RandomState(seed)
        tensors = {
            name: array * (1 + JITTER * random.standard_normal(array.shape)).astype(array.dtype)
            for name, array in tensors.items()
        }
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(stored["config"]))
        if said := stored["generation_config"] | (settings or {}):
            Path(folder, "generation_config.json").write_text(json.dumps(said))
        save_file(tensors, Path(folder, "model.safetensors"), metadata={"format": "pt"})
        model, report = getattr(transformers, stored["architecture"]).from_pretrained(
            folder, attn_implementation="eager", torch_dtype=torch.float32, output_loading_info=True
        )
    if any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise ValueError(f"{stored['architecture']}: loading reported {report}")
    return model.eval()


def constraint(one: Mapping[str, Any]) -> Any:
    """The reference's constraint: {"phrase": ids} or {"any": [ids, ids]}."""
    if "phrase" in one:
        return transformers.PhrasalConstraint(one["phrase"])
    return transformers.DisjunctiveConstraint(one["any"])


def generate(model: Any, case: Case, inputs: Inputs, draft: Any, **more: Any) -> Any:
    """Calls the method that models share, also where one has its own before it (Whisper, for long sounds)."""
    settings = dict(case.settings)
    if "constraints" in settings:
        settings["constraints"] = [constraint(one) for one in settings["constraints"]]
    if draft is not None:
        settings["assistant_model"] = draft
    given = {name: torch.from_numpy(array) for name, array in arrays(inputs).items()}
    settings |= {"return_dict_in_generate": True} | more
    if model.config.model_type == "mamba" and case.mode == "beam":
        settings["use_cache"] = False  # its states are not put into the order of the beams: with them texts are wrong
    with torch.inference_mode():
        return transformers.GenerationMixin.generate(model, **given, **settings)


@contextmanager
def candidates() -> Iterator[list[float]]:
    """Notes how far neighbours are apart among the candidates of each `topk`, and the first one left out."""
    gaps: list[float] = []
    real = torch.topk

    def topk(values: torch.Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        best = torch.sort(values, -1, descending=True)[0][..., : k + 1]
        apart = best[..., :-1] - best[..., 1:]
        # Far below are what is ruled out and what stands for nothing.
        # The beams of a group that is done are all the same, and nothing comes of them.
        if (apart := apart[(best[..., 1:] > -1e8) & (apart > 0)]).numel():
            gaps.append(float(apart.min()))
        return real(values, k, *args, **kwargs)

    torch.topk = topk
    try:
        yield gaps
    finally:
        torch.topk = real


def greedy_margin(sequences: Any, scores: Any, eos: set[int]) -> float:
    """The least distance of the best score from the next, at all steps of rows that have not ended."""
    written_ = sequences[:, sequences.shape[1] - len(scores) :]
    least = float("inf")
    for row in range(sequences.shape[0]):
        for step, values in enumerate(scores):
            best = values[row].topk(2)[0]
            least = min(least, float(best[0] - best[1]))
            if int(written_[row, step]) in eos:
                break
    return least


def ends(model: Any, case: Case) -> set[int]:
    """The tokens that end a text."""
    eos = case.settings.get("eos_token_id", model.generation_config.eos_token_id)
    return set() if eos is None else {eos} if isinstance(eos, int) else set(eos)


def answered(family: Family, stored: Mapping[str, Any], case: Case, cache: dict[Any, Any]) -> tuple[Settings, Tensors]:
    """Runs a case; returns its entry in the json and its arrays."""

    def model(name: str, settings: Settings | None, seed: int | None) -> Any:
        key = name, json.dumps(settings), seed
        if key not in cache:
            cache[key] = opened(stored[name], settings, seed)
        return cache[key]

    def run(seed: int | None, **more: Any) -> Any:
        draft = None if case.assistant is None else model("draft", case.assistant, seed)
        return generate(model("main", None, seed), case, family.inputs[case.inputs], draft, **more)

    main = model("main", None, None)
    out = run(None)
    with candidates() as gaps:
        # Constrained search fails if asked, where texts that ended and others are returned together.
        scored = run(None, **({} if case.mode == "constrained" else {"output_scores": True}))
    if not torch.equal(out.sequences, scored.sequences):
        raise ValueError(f"{case.name}: asking for scores changes the text")
    for seed in SEEDS:
        if not torch.equal(out.sequences, (got := run(seed)).sequences):
            raise ValueError(
                f"{case.name}: weights that are off by {JITTER} change the text to {got.sequences.tolist()}"
            )
    if case.mode == "assisted":
        greedy = replace(case, mode="greedy", assistant=None)
        unaided = {name: value for name, value in case.settings.items() if not name.startswith("prompt_lookup")}
        plain = generate(main, replace(greedy, settings=unaided), family.inputs[case.inputs], None)
        if not torch.equal(out.sequences, plain.sequences):
            raise ValueError(f"{case.name}: greedy search gives {plain.sequences.tolist()}")
    margin = None
    if case.mode in ("greedy", "assisted", "dola"):
        margin = greedy_margin(scored.sequences, scored.scores, ends(main, case))
    elif case.mode != "contrastive":
        margin = min(gaps)
    if margin is not None and margin < CLEAR[case.mode]:
        raise ValueError(f"{case.name}: a choice is as close as {margin:.1e}; give it another prompt")
    entry: Settings = {"mode": case.mode, "inputs": case.inputs, "settings": case.settings}
    if case.assistant is not None:
        entry["assistant"] = case.assistant
    entry["margin"] = None if margin is None else float(f"{margin:.1e}")
    entry["sequences"] = out.sequences.tolist()
    if "shapes" in case.keep:
        entry["shapes"] = {
            name: shapes(out[name])
            for name in sorted(out.keys())
            if name.endswith(("attentions", "hidden_states")) and out[name] is not None
        }
    kept = {}
    for name in case.keep:
        if name in ("scores", "logits"):
            kept[name] = torch.stack(out[name]).numpy()
        elif name == "transition_scores":
            indices = out.get("beam_indices")
            for normalize in (False, True) if indices is None else (False,):
                got = main.compute_transition_scores(
                    out.sequences, out.scores, *([] if indices is None else [indices]), normalize_logits=normalize
                )
                kept[name + "_normalized" * normalize] = got.numpy()
        elif name in ("sequences_scores", "beam_indices"):
            kept[name] = scored[name].numpy()
    return entry, {f"{case.name}.{name}": array for name, array in kept.items()}


def shapes(value: Any) -> Any:
    """The shapes of tensors in tuples, the tuples as lists; one shape for the entries of a tuple that have the same."""
    if isinstance(value, torch.Tensor):
        return list(value.shape)
    return [shapes(one) for one in value]


def probabilities(model: Any, inputs: Inputs, settings: Settings) -> Tensors:
    """Of one row: how likely each first token is [V], and after it each second one [V, V] (0 after impossible ones)."""
    key = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    eos = ends(model, Case("sampling", "", "", settings))
    if model.config.is_encoder_decoder:
        inputs = {key: [[model.generation_config.decoder_start_token_id]]} | inputs

    def next_of(inputs: Inputs) -> npt.NDArray[Any]:
        case = Case("sampling", "", "", settings | {"do_sample": True, "max_new_tokens": 1})
        scores = generate(model, case, inputs, None, output_scores=True).scores[0]
        return torch.softmax(scores, -1)[0].numpy()

    first = next_of(inputs)
    second = np.zeros((first.size, first.size), np.float32)
    for token in np.flatnonzero(first):
        if token in eos:
            second[token, model.generation_config.pad_token_id] = 1
            continue
        longer = inputs | {key: [[*inputs[key][0], int(token)]]}
        if key == "input_ids":
            longer["attention_mask"] = [[*inputs["attention_mask"][0], 1]]
        second[token] = next_of(longer)
    return {"first": first, "second": second}


# ---- files ----------------------------------------------------------------------------------------------------------


def made(name: str, before: Mapping[str, Any], modes: tuple[str, ...]) -> tuple[dict[str, Any], Tensors]:
    """What the reference says about a family, in these modes: the json and the arrays."""
    family = FAMILIES[name]
    if "greedy" in modes:
        models = {key: written(model) for key, model in family.models.items()}
    elif not (models := before.get("models", {})):
        sys.exit(f"{name}: run this with transformers 4.57.6 first, which writes the models")
    meta: dict[str, Any] = {"models": models, "inputs": family.inputs, "cases": {}, "sampling": {}}
    out: Tensors = {}
    cache: dict[Any, Any] = {}
    wrong = []
    for case in family.cases:
        if case.mode in modes:
            try:
                entry, kept = answered(family, models, case, cache)
            except ValueError as error:
                wrong.append(str(error))
                continue
            entry = {"transformers": transformers.__version__} | entry
            meta["cases"][case.name] = entry
            out |= kept
    if wrong:
        sys.exit(f"{name}:\n" + "\n".join(wrong))
    if "sampling" in modes:
        for key, (inputs, settings) in family.sampling.items():
            meta["sampling"][key] = {"inputs": inputs, "settings": settings}
            got = probabilities(opened(models["main"]), family.inputs[inputs], settings)
            out |= {f"sampling.{key}.{part}": array for part, array in got.items()}
    return meta, out


def read(name: str) -> tuple[dict[str, Any], Tensors]:
    """The stored files of a family."""
    if not (path := DATA / f"{name}.json").is_file():
        return {}, {}
    held: Tensors = {}
    if path.with_suffix(".npz").is_file():
        with np.load(path.with_suffix(".npz")) as file:
            held = dict(file)
    return json.loads(path.read_text()), held


def merged(name: str, modes: tuple[str, ...]) -> tuple[dict[str, Any], Tensors, dict[str, Any], Tensors]:
    """The files as they are, and as this environment would have them: (json, arrays, json, arrays)."""
    meta, held = read(name)
    fresh, out = made(name, meta, modes)
    others = {key: one for key, one in meta.get("cases", {}).items() if one["mode"] not in modes}
    sampling = fresh["sampling"] if "sampling" in modes else meta.get("sampling", {})
    known = {case.name: case for case in FAMILIES[name].cases}
    cases = {key: (others | fresh["cases"])[key] for key in known if key in others or key in fresh["cases"]}
    versions = {"torch": torch.__version__.partition("+")[0]}
    result = {"versions": versions, "models": fresh["models"], "inputs": fresh["inputs"], "cases": cases}
    result["sampling"] = sampling
    kept = {
        key: array
        for key, array in held.items()
        if key.rpartition(".")[0] in others or (key.startswith("sampling.") and "sampling" not in modes)
    }
    return meta, held, json.loads(json.dumps(result)), kept | out


def write(name: str, modes: tuple[str, ...]) -> int:
    """Writes a family's files, of which arrays that agree stay as they are."""
    meta, held, fresh, out = merged(name, modes)
    if meta == fresh and not differing(held, out):
        print(f"{name}: {len(fresh['cases'])} cases, as before")
        return 0
    DATA.mkdir(exist_ok=True)
    path = DATA / f"{name}.json"
    path.write_text(dumps(fresh))
    near = {
        key: held[key] if key in held and not differing({key: held[key]}, {key: out[key]}) else out[key] for key in out
    }
    if near:
        np.savez_compressed(path.with_suffix(".npz"), allow_pickle=False, **dict(sorted(near.items())))
    size = path.stat().st_size + (path.with_suffix(".npz").stat().st_size if near else 0)
    print(f"{name}: {len(fresh['cases'])} cases, {size / 1000:.0f} kB")
    return 0


def check(name: str, modes: tuple[str, ...]) -> int:
    """Compares a family's files with what the reference says now."""
    meta, held, fresh, out = merged(name, modes)
    wrong = [f"{part!r} differs" for part in ("models", "inputs", "sampling") if meta.get(part) != fresh[part]]
    for key in meta.get("cases", {}).keys() | fresh["cases"].keys():
        ours, theirs = (dict(one["cases"].get(key, {})) for one in (meta, fresh))
        for one in (ours, theirs):
            one.pop("margin", None)
        if ours != theirs:
            wrong.append(f"{key} differs")
    wrong += differing(held, out)
    print("\n".join(f"{name}/{line}" for line in wrong) or f"{name}: all {len(fresh['cases'])} cases agree")
    return 1 if wrong else 0


def differing(held: Tensors, out: Tensors) -> list[str]:
    """Says which arrays are not the same."""
    wrong = [f"{key} is not in both" for key in sorted(held.keys() ^ out.keys())]
    for key in sorted(held.keys() & out.keys()):
        same = held[key].shape == out[key].shape and held[key].dtype == out[key].dtype
        if not same or not np.allclose(held[key], out[key], rtol=AGREE, atol=AGREE):
            wrong.append(f"{key} differs")
    return wrong


def settle(path: Path, meta: Mapping[str, Any]) -> int:
    """Writes a file of cases, or with `--check` among the arguments says whether it is as it would be written."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", action="store_true", help="compare with the file, write nothing")
    text, count = dumps(meta), len(meta["cases"])
    if parser.parse_args().check:
        same = path.read_text() == text
        print(f"{count} cases {'agree' if same else 'differ'}")
        return 0 if same else 1
    path.write_text(text)
    print(f"{count} cases, {len(text) / 1000:.0f} kB")
    return 0


def dumps(meta: Mapping[str, Any]) -> str:
    """JSON with one line for each case, each tensor's key and each input."""

    def block(value: Any, depth: int, deep: Callable[[int, str], bool], name: str = "") -> str:
        if not isinstance(value, Mapping) or not value or not deep(depth, name):
            return json.dumps(value)
        pad = "  " * depth
        lines = (f"{pad}{json.dumps(key)}: {block(one, depth + 1, deep, key)}" for key, one in value.items())
        return "{\n" + ",\n".join(lines) + "\n}"

    return block(meta, 0, lambda depth, name: depth < 2 or name in ("main", "draft", "keys")) + "\n"


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--check", action="store_true", help="compare with the stored files, write nothing")
    args = parser.parse_args()
    if unknown := sorted(set(args.families) - set(FAMILIES)):
        parser.error(f"no such family: {', '.join(unknown)}; there are {', '.join(FAMILIES)}")
    if transformers.__version__ not in RELEASES:
        sys.exit(
            f"transformers {transformers.__version__} is installed, the goldens are made with {', '.join(RELEASES)}"
        )
    requirements, modes = RELEASES[transformers.__version__]
    for line in (HERE / requirements).read_text().splitlines():
        name, pinned, wanted = line.partition("==")
        if pinned and (found := importlib.metadata.version(name).partition("+")[0]) != wanted:
            sys.exit(f"{name} {found} is installed, the goldens are made with {wanted}")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    act = check if args.check else write
    return max(act(name, modes) for name in args.families or FAMILIES)


if __name__ == "__main__":
    sys.exit(main())
