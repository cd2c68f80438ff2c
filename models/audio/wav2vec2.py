"""Wav2Vec2: speech as waveforms; convolutions make frames of the samples, a BERT-like encoder makes states of them.

Baevski et al. 2020, arXiv:2006.11477; original code facebookresearch/fairseq. Positions come from one wide, grouped
convolution, with weight normalisation over its taps. Pre-training hides frames and tells their own codes, chosen by a
quantizer, from those of other frames. Beside BERT's blocks (post-norm) larger checkpoints have pre-norm ones
(`do_stable_layer_norm`), to which multilingual ones add a small adapter for each language (Pratap et al. 2023,
arXiv:2305.13516). Most speech encoders here descend from it.
"""

from functools import partial
from typing import Any, ClassVar

import jax

from formax.core import tap
from formax.core.config import check_multiple, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import SpeechOutput
from formax.core.rng import split
from formax.core.spec import At, Entry, Spec, fold, normal, stack_of, table
from formax.layers import mlp, norm, speech, speech_heads
from formax.layers.attention import Mask, attention_spec, self_attention
from formax.layers.dropout import dropout, layer_drop
from formax.layers.heads import with_heads
from formax.layers.linear import linear_spec
from formax.layers.speech import AdaptedSpeechConfig
from formax.layers.speech_heads import between


@config
class Wav2Vec2Config(AdaptedSpeechConfig):
    """`config.json` of model type "wav2vec2"."""

    model_type: ClassVar[str] = "wav2vec2"

    do_stable_layer_norm: bool = False
    feat_quantizer_dropout: float = 0.0
    num_codevectors_per_group: int = 320
    num_codevector_groups: int = 2
    contrastive_logits_temperature: float = 0.1
    num_negatives: int = 100
    codevector_dim: int = 256
    proj_codevector_dim: int = 256
    diversity_loss_weight: float = 0.1
    tdnn_dim: tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512
    adapter_attn_dim: int | None = None

    def check(self) -> None:
        super().check()
        check_multiple(self, "codevector_dim", "num_codevector_groups")
        speech.check_lengths(self, "tdnn_dim", "tdnn_kernel", "tdnn_dilation")


# ---- layers


def block_spec(c: Wav2Vec2Config) -> dict[str, Spec]:
    """One layer, of either order."""
    init, e = normal(c.initializer_range), c.hidden_size
    names = ("q_proj", "k_proj", "v_proj", "out_proj")
    dense = ("intermediate_dense", "output_dense")
    spec: dict[str, Spec] = {
        "attn": At("attention", attention_spec(e, c.num_attention_heads, c.head_dim, names=names, init=init)),
        "attn_norm": norm.layer_spec("layer_norm", e),
        "mlp": At("feed_forward", mlp.dense_spec(e, c.intermediate_size, dense, init=init)),
        "mlp_norm": norm.layer_spec("final_layer_norm", e),
    }
    if c.do_stable_layer_norm and c.adapter_attn_dim is not None:
        adapter = mlp.dense_spec(e, c.adapter_attn_dim, ("linear_1", "linear_2"), init=init)
        spec["adapter"] = At("adapter_layer", {"norm": norm.layer_spec("norm", e), **adapter}, flax="", tf="")
    return spec


def attend(p: Any, c: Wav2Vec2Config, x: jax.Array, mask: Mask, key: Any) -> jax.Array:
    """Attention with its dropouts: [B, T, E] -> [B, T, E]."""
    inner, outer = split(key, 2)
    h, _ = self_attention(p["attn"], x, c.head_dim, mask=mask, dropout=c.attention_dropout, key=inner)
    return dropout(h, c.hidden_dropout, outer)


def feed(p: Any, c: Wav2Vec2Config, x: jax.Array, key: Any) -> jax.Array:
    """Feed-forward with its dropouts: [B, T, E] -> [B, T, E]."""
    inner, outer = split(key, 2)
    h = mlp.dense(p["mlp"], x, c.hidden_act, rate=c.activation_dropout, key=inner)
    return dropout(h, c.hidden_dropout, outer)


def block(p: Any, c: Wav2Vec2Config, x: jax.Array, mask: Mask, key: Any) -> jax.Array:
    """Post-norm: what each part computes is added to its input, then normalised. [B, T, E] -> [B, T, E]."""
    keys = split(key, 2)
    x = norm.layer(p["attn_norm"], x + attend(p, c, x, mask, keys[0]), c.layer_norm_eps)
    return norm.layer(p["mlp_norm"], x + feed(p, c, x, keys[1]), c.layer_norm_eps)


def stable_block(p: Any, c: Wav2Vec2Config, x: jax.Array, mask: Mask, key: Any) -> jax.Array:
    """Pre-norm: each part computes from its normalised input; then the language's adapter. [B, T, E] -> [B, T, E]."""
    keys = split(key, 2)
    x = x + attend(p, c, norm.layer(p["attn_norm"], x, c.layer_norm_eps), mask, keys[0])
    x = x + feed(p, c, norm.layer(p["mlp_norm"], x, c.layer_norm_eps), keys[1])
    if "adapter" in p:
        x = x + mlp.dense(p["adapter"], norm.layer(p["adapter"]["norm"], x, speech.EPS), "relu", name="adapter")
    return x


# ---- the model


def model_spec(c: Wav2Vec2Config) -> dict[str, Spec]:
    """Convolutions, projection, positions and layers; the norm comes before the layers, or in stable models after."""
    width, e = c.conv_dim[-1], c.hidden_size
    project = linear_spec("feature_projection.projection", width, e, ("conv_out", "embed"), init=speech.UNIFORM)
    first: dict[str, Spec] = {
        "conv": speech.features_spec(c),
        "features_norm": norm.layer_spec("feature_projection.layer_norm", width),
        "project": project,
        "position": speech.position_spec(c),
        "masked": speech.masked_spec(c),
    }
    blocks = stack_of("encoder.layers", [block_spec(c)] * c.num_hidden_layers)
    spec: dict[str, Spec] = {"embed": first, "layers": blocks}
    (spec if c.do_stable_layer_norm else first)["norm"] = norm.layer_spec("encoder.layer_norm", e)
    return spec | ({"adapter": At("adapter", speech.adapter_spec(c), tf="")} if c.add_adapter else {})


def encode(
    p: Any,
    c: Wav2Vec2Config,
    input_values: Any = None,
    attention_mask: Any = None,
    mask_time_indices: Any = None,
    key: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Waveforms [B, samples] -> (states [B, T, E], features [B, T, C]).

    The states are the weighted sum of all layers' where `p` has weights for it; T and E are the adapter's where there
    is one. `attention_mask` is of samples; `mask_time_indices` [B, T], which frames to hide, is of frames.
    """
    *first, k_layers = split(key, 4)
    x, found, real = speech.embed_waveform(p["embed"], c, input_values, attention_mask, mask_time_indices, first)
    mask, one = Mask(keys=real), stable_block if c.do_stable_layer_norm else block

    def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
        inner, skip = split(key, 2)
        return layer_drop(x, one(p, c, x, mask, inner), c.layerdrop, skip), x

    x, before = fold(run, p.get("layers", ()), x, key=k_layers)
    if "norm" in p:
        x = tap.tap("last", norm.layer(p["norm"], x, c.layer_norm_eps))
    if "layer_weights" in p:
        return speech.weighted(p["layer_weights"], before, x), found
    return speech.adapt(p["adapter"], c, x) if "adapter" in p else x, found


def model(p: Any, c: Wav2Vec2Config, input_values: Any = None, **inputs: Any) -> SpeechOutput:
    """States [B, T, E] and features [B, T, C]."""
    x, found = encode(p, c, input_values, **inputs)
    return SpeechOutput(last_hidden_state=x, extract_features=found)


# ---- heads


ctc, pretraining = speech_heads.ctc(encode), speech_heads.pretraining(encode)


def masked_lm(p: Any, c: Wav2Vec2Config, input_values: Any = None, attention_mask: Any = None, **inputs: Any) -> Any:
    """As `ctc`, but padding counts as speech: the reference passes its mask over."""
    return ctc(p, c, input_values, **inputs)


def language_leaves(spec: Spec) -> list[Entry]:
    """What `adapter.<language>.safetensors` holds, under the names there: every layer's small adapter, and the head.

    Raises:
        ValueError: the model has no such adapters.
    """
    entries = table(spec).entries
    adapters = [entry for entry in entries if entry.path[0] == "layers" and entry.path[2] == "adapter"]
    if not adapters:
        raise ValueError("an adapter for each language needs adapter_attn_dim, and do_stable_layer_norm=True")
    return adapters + [entry for entry in entries if entry.path[0] == "head"]


_with = partial(with_heads, "wav2vec2", model_spec)
_ctc, *_labels = speech_heads.encoder_heads("Wav2Vec2", "wav2vec2", model_spec, encode)

FAMILY = Family(
    "wav2vec2",
    Wav2Vec2Config,
    base="wav2vec2",
    inputs=encode,
    architectures=(
        Architecture("Wav2Vec2Model", "", model_spec, model),
        Architecture(
            "Wav2Vec2ForPreTraining",
            "ForPreTraining",
            _with(speech_heads.quantizer_spec),
            pretraining,
            inputs=pretraining,
        ),
        _ctc,
        Architecture(
            "Wav2Vec2ForMaskedLM",
            "ForMaskedLM",
            _with(between("head", "lm_head", "hidden_size", "vocab_size")),
            masked_lm,
        ),
        *_labels,
    ),
    flax=Port(
        ("Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2ForPreTraining"),
        lacks=lambda c: {"do_stable_layer_norm": not c.do_stable_layer_norm},
    ),
    tf=Port(
        ("Wav2Vec2Model", "Wav2Vec2ForCTC", "Wav2Vec2ForSequenceClassification"),
        numbered=".",
        # Its weights of layers are saved where they are not looked for.
        lacks=lambda c: {"conv_dim": len(set(c.conv_dim)) > 1, "use_weighted_layer_sum": c.use_weighted_layer_sum},
    ),
)
