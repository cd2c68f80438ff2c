"""Whisper: an encoder-decoder that hears a spectrogram of half a minute and writes what was said in it.

Radford et al. 2022, arXiv:2212.04356; original code openai/whisper. BART's layers with the norms moved to the inputs, a
norm after the last and no bias on keys. The encoder halves the frames by two convolutions, has sinusoids for positions
(stored, not trained) and always hears the same number of frames; the decoder's word table is the output.
"""

from functools import partial
from typing import Any, ClassVar

from formax.core import tap
from formax.core.config import ConfigError, config
from formax.core.family import Architecture, Family, Port
from formax.core.outputs import BaseModelOutput, LogitsOutput, Seq2SeqOutput
from formax.core.rng import split
from formax.core.spec import At, Param, Spec, constant, fold, normal, optional, stack_of
from formax.layers import embed, heads, norm, seq2seq_heads, speech, transformer
from formax.layers.activations import activation
from formax.layers.attention import Mask, causal_mask
from formax.layers.conv import channels_last, conv, conv_spec
from formax.layers.dropout import dropout
from formax.layers.linear import linear, linear_spec
from formax.layers.seq2seq import memory_of, states_of
from formax.layers.spec_augment import SpecAugmentConfig, augment
from formax.layers.transformer import TransformerConfig, pre_norm


@config
class WhisperConfig(TransformerConfig, SpecAugmentConfig):
    """`config.json` of model type "whisper"."""

    model_type: ClassVar[str] = "whisper"
    attribute_map: ClassVar = {**TransformerConfig.attribute_map, "num_key_value_heads": "encoder_attention_heads"}

    vocab_size: int = 51865
    num_mel_bins: int = 80
    encoder_layers: int = 4
    encoder_attention_heads: int = 6
    decoder_layers: int = 4
    decoder_attention_heads: int = 6
    decoder_ffn_dim: int = 1536
    encoder_ffn_dim: int = 1536
    decoder_start_token_id: int | None = 50257
    use_cache: bool = True
    d_model: int = 384
    dropout: float = 0.0
    scale_embedding: bool = False  # no code has ever read it
    max_source_positions: int = 1500
    max_target_positions: int = 448
    pad_token_id: int | None = 50256
    bos_token_id: int | None = 50256
    eos_token_id: int | tuple[int, ...] | None = 50256
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = (220, 50256)
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    apply_spec_augment: bool = False
    median_filter_width: int = 7

    def check(self) -> None:
        super().check()
        if self.d_model % 2 or self.d_model < 4:
            raise ConfigError(f"d_model={self.d_model} must be even and at least 4, for sines and as many cosines")


def stack_spec(c: WhisperConfig, part: str, embeddings: Spec) -> Spec:
    """Embeddings, layers and last norm of the encoder or the decoder."""
    blocks = [transformer.block_spec(c, part, bias="qvo")] * getattr(c, f"{part}_layers")
    last = norm.layer_spec("layer_norm", c.d_model)
    return At(part, {"embed": embeddings, "layers": stack_of("layers", blocks), "norm": last})


def encoder_spec(c: WhisperConfig) -> dict[str, Spec]:
    """Convolutions, positions and layers."""
    make = partial(conv_spec, d_out=c.d_model, window=(3,), init=normal(c.init_std))
    shape = (c.max_source_positions, c.d_model)
    table = Param(shape, (None, "embed"), "weight", embed.sinusoids, buffer=True, tf="weight")
    embeddings = {
        "conv1": make("conv1", c.num_mel_bins),
        "conv2": make("conv2", c.d_model),
        "position": At("embed_positions", {"embedding": table}),
    }
    return {"encoder": stack_spec(c, "encoder", embeddings)}


def decoder_spec(c: WhisperConfig) -> dict[str, Spec]:
    """Words, positions and layers."""
    table = partial(embed.embedding_spec, size=c.d_model, init=normal(c.init_std))
    position = table("embed_positions", c.max_target_positions, axes=(None, "embed"), tf="weight")
    return {
        "embed": {"word": table("decoder.embed_tokens", c.vocab_size)},
        "decoder": stack_spec(c, "decoder", {"position": position}),
    }


def model_spec(c: WhisperConfig) -> dict[str, Spec]:
    """Encoder and decoder."""
    return {**encoder_spec(c), **decoder_spec(c)}


def hear(p: Any, c: WhisperConfig, features: Any, key: Any) -> Any:
    """The encoder: spectrogram [B, mels, frames] -> (states [B, S, E], those before each layer)."""
    frames = 2 * c.max_source_positions
    if features is None or features.ndim != 3 or features.shape[1:] != (c.num_mel_bins, frames):
        shape = None if features is None else features.shape
        raise ValueError(
            f"input_features must be [batch, {c.num_mel_bins} mels, {frames} frames], got {shape}; pad them"
        )
    k_embed, k_layers = split(key, 2)
    own, gelu = p["encoder"]["embed"], activation("gelu")
    with tap.scope("encoder"):
        with tap.scope("embed"):
            x = channels_last(features).astype(own["conv1"]["kernel"].dtype)
            x = gelu(conv(own["conv2"], gelu(conv(own["conv1"], x, padding=1)), stride=2, padding=1))
            x = tap.tap("out", dropout(x + own["position"]["embedding"].astype(x.dtype), c.dropout, k_embed))

        def run(p: Any, x: Any, cache: Any, key: Any) -> Any:
            return transformer.block(p, c, "encoder", x, Mask(), None, None, None, key, pre_norm)[0], x

        x, before = fold(run, p["encoder"].get("layers", ()), x, key=k_layers)
        return transformer.last_norm(p["encoder"], x), before


def encode(
    p: Any, c: WhisperConfig, input_features: Any = None, attention_mask: Any = None, key: Any = None
) -> BaseModelOutput:
    """The encoder's states of a spectrogram: [B, mels, frames] -> [B, S, E]; all frames are heard, also padding."""
    k_augment, k_hear = split(key, 2)
    features = augment(c, input_features, attention_mask, k_augment)
    return BaseModelOutput(last_hidden_state=hear(p, c, features, k_hear)[0])


def decode(
    p: Any,
    c: WhisperConfig,
    input_ids: Any = None,
    attention_mask: Any = None,
    encoder_outputs: Any = None,
    inputs_embeds: Any = None,
    position_ids: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Any:
    """The decoder: ids [B, T] and an encoder's states [B, S, E], if there are any -> (states [B, T, E], cache)."""
    embed.check_inputs(input_ids, inputs_embeds, c.max_target_positions, "decoder_" if "encoder" in p else "")
    k_embed, k_layers = split(key, 2)
    memory = None if encoder_outputs is None else states_of(encoder_outputs)
    mask = causal_mask(attention_mask, cache)
    with tap.scope("decoder"):
        with tap.scope("embed"):
            x = embed.embed(p["embed"]["word"], input_ids) if inputs_embeds is None else inputs_embeds
            positions = embed.positions(mask.q_offset, x) if position_ids is None else position_ids
            x = x + embed.embed(p["decoder"]["embed"]["position"], positions)
            x = tap.tap("out", dropout(x, c.dropout, k_embed))
        return transformer.decoder_layers(p, c, x, mask, memory, Mask(), cache, k_layers, pre_norm)


def run_both(
    p: Any,
    c: WhisperConfig,
    input_features: Any = None,
    attention_mask: Any = None,
    decoder_input_ids: Any = None,
    decoder_attention_mask: Any = None,
    encoder_outputs: Any = None,
    decoder_inputs_embeds: Any = None,
    decoder_position_ids: Any = None,
    cache: Any = None,
    key: Any = None,
) -> Seq2SeqOutput:
    """Encoder and decoder: spectrogram [B, mels, frames] and ids [B, T] -> the decoder's states [B, T, E].

    In the place of `input_features` the encoder's states [B, S, E] may be given, or a cache that has seen them.
    """
    k_encoder, k_decoder = split(key, 2)
    read = partial(encode, p, c, input_features, attention_mask, k_encoder)
    memory = memory_of(read, (input_features,), encoder_outputs, cache)
    own = decoder_inputs_embeds, decoder_position_ids
    x, cache = decode(p, c, decoder_input_ids, decoder_attention_mask, memory, *own, cache, k_decoder)
    return Seq2SeqOutput(last_hidden_state=x, cache=cache, encoder_last_hidden_state=memory)


def audio_classification(
    p: Any, c: WhisperConfig, input_features: Any = None, encoder_outputs: Any = None, key: Any = None
) -> LogitsOutput:
    """A label for every recording [B, labels], from the mean of the encoder's states, or of all layers' weighted."""
    if encoder_outputs is not None:
        if c.use_weighted_layer_sum:
            raise ValueError("use_weighted_layer_sum=True needs the states of all layers: give input_features")
        x = states_of(encoder_outputs)
    else:
        x, before = hear(p, c, input_features, key)
        if c.use_weighted_layer_sum:
            x = speech.weighted(p["layer_weights"], before, x)
    return LogitsOutput(logits=linear(p["head"], linear(p["projector"], x).mean(1)))


def classifier_spec(c: WhisperConfig) -> dict[str, Spec]:
    """The encoder and what is made of its states."""
    make, size = partial(linear_spec, axes=("embed", None), init=normal(c.init_std)), c.classifier_proj_size
    count = c.encoder_layers + 1
    own: dict[str, Spec] = {"layer_weights": Param((count,), (None,), "layer_weights", constant(1 / count))}
    ends: dict[str, Spec] = own if c.use_weighted_layer_sum else {}
    ends |= {"projector": make("projector", c.d_model, size), "head": make("classifier", size, c.num_labels)}
    # the encoder of a whole model has none of these
    return {**encoder_spec(c), **{key: optional(part) for key, part in ends.items()}}


_words = heads.lm_head("proj_out", flax="lm_head")
words_spec = heads.with_heads("model", model_spec, _words)
conditional_generation = seq2seq_heads.conditional_generation(run_both)
_seq2seq = partial(Architecture, methods={"encode": encode})
_POSITIONS = ("position_ids", "decoder_position_ids")

FAMILY = Family(
    "whisper",
    WhisperConfig,
    base="model",
    inputs=run_both,
    relative="bart",
    init_cache=transformer.init_cache,
    architectures=(
        _seq2seq("WhisperModel", "", model_spec, run_both),
        _seq2seq(
            "WhisperForConditionalGeneration",
            "ForSpeechSeq2Seq",
            words_spec,
            conditional_generation,
            also=("ForPreTraining",),
        ),
        Architecture(
            "WhisperForAudioClassification",
            "ForAudioClassification",
            classifier_spec,
            audio_classification,
            inputs=audio_classification,
        ),
        seq2seq_heads.lone_decoder("Whisper", "model", decoder_spec, decode, _words),
    ),
    flax=Port(
        ("WhisperModel", "WhisperForConditionalGeneration", "WhisperForAudioClassification"),
        lacks=lambda c: {"use_weighted_layer_sum": c.use_weighted_layer_sum},  # its weights are constants there
        inputs=("input_features", "decoder_input_ids", "attention_mask", "decoder_attention_mask", *_POSITIONS),
    ),
    tf=Port(("WhisperModel", "WhisperForConditionalGeneration"), numbered="."),
)
