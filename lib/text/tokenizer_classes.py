"""What the name of a tokenizer class stands for in checkpoints.

A checkpoint names the class that wrote its tokenizer (`"tokenizer_class"`), or only the model type, and leaves out
whatever equals that class's defaults. This table holds those defaults: special tokens, the inputs the models take, the
padding side, and whether `tokenizer_config.json` overrules the normalizer of tokenizer.json.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

WITH_TYPES = ("input_ids", "token_type_ids", "attention_mask")
WITHOUT_TYPES = ("input_ids", "attention_mask")

# Switches of tokenizer_config.json -> the fields of a BERT normalizer that they overrule, with the classes' defaults.
BERT_NORMALIZER: dict[str, tuple[str, bool | None]] = {
    "do_lower_case": ("lowercase", True),
    "strip_accents": ("strip_accents", None),
    "tokenize_chinese_chars": ("handle_chinese_chars", True),
}


@dataclass(frozen=True)
class TokenizerClass:
    """Defaults of one class.

    Attributes:
        special_tokens: name of the special token (`pad_token`) -> its text.
        input_names: what a call returns unless asked otherwise, in this order.
        padding_side: "right" or "left".
        normalizer_switches: the keys of `BERT_NORMALIZER` that this class applies.
    """

    special_tokens: Mapping[str, str] = field(default_factory=dict)
    input_names: tuple[str, ...] = WITH_TYPES
    padding_side: str = "right"
    normalizer_switches: tuple[str, ...] = ()


def _tokens(**tokens: str) -> dict[str, str]:
    """Spells out `pad="[PAD]"` as `{"pad_token": "[PAD]"}`."""
    return {f"{name}_token": token for name, token in tokens.items()}


_BERT_TOKENS = _tokens(unk="[UNK]", sep="[SEP]", pad="[PAD]", cls="[CLS]", mask="[MASK]")
_BART_TOKENS = _tokens(bos="<s>", eos="</s>", unk="<unk>", sep="</s>", pad="<pad>", cls="<s>", mask="<mask>")
_ALBERT_TOKENS = _tokens(bos="[CLS]", eos="[SEP]", unk="<unk>", sep="[SEP]", pad="<pad>", cls="[CLS]", mask="[MASK]")
_XLNET_TOKENS = _tokens(bos="<s>", eos="</s>", unk="<unk>", sep="<sep>", pad="<pad>", cls="<cls>", mask="<mask>")
_GPT2_TOKENS = _tokens(bos="<|endoftext|>", eos="<|endoftext|>", unk="<|endoftext|>")
_LLAMA_TOKENS = _tokens(bos="<s>", eos="</s>", unk="<unk>")
_T5_TOKENS = _tokens(eos="</s>", unk="<unk>", pad="<pad>")

_ALL_SWITCHES = tuple(BERT_NORMALIZER)
_BERT = TokenizerClass(_BERT_TOKENS, normalizer_switches=_ALL_SWITCHES)
_BERT_TWO_SWITCHES = TokenizerClass(_BERT_TOKENS, normalizer_switches=_ALL_SWITCHES[:2])
_BERT_WITHOUT_TYPES = TokenizerClass(_BERT_TOKENS, WITHOUT_TYPES, normalizer_switches=_ALL_SWITCHES)
_ALBERT = TokenizerClass(_ALBERT_TOKENS)
_BART = TokenizerClass(_BART_TOKENS, WITHOUT_TYPES)
_GPT2 = TokenizerClass(_GPT2_TOKENS, WITHOUT_TYPES)
_LLAMA = TokenizerClass(_LLAMA_TOKENS, WITHOUT_TYPES, "left")
_T5 = TokenizerClass(_T5_TOKENS, WITHOUT_TYPES)
_XGLM = TokenizerClass({k: v for k, v in _BART_TOKENS.items() if k != "mask_token"}, WITHOUT_TYPES)

# The class of a tokenizer that says nothing about itself.
PLAIN = TokenizerClass()

# By name, without the ending "Fast".
CLASSES: dict[str, TokenizerClass] = {
    "AlbertTokenizer": _ALBERT,
    "BartTokenizer": _BART,
    "BarthezTokenizer": _BART,
    "BertTokenizer": _BERT,
    "BigBirdTokenizer": TokenizerClass(_BART_TOKENS | _tokens(sep="[SEP]", cls="[CLS]", mask="[MASK]"), WITHOUT_TYPES),
    "BlenderbotTokenizer": _BART,
    "BloomTokenizer": TokenizerClass(_LLAMA_TOKENS | _tokens(pad="<pad>"), WITHOUT_TYPES),
    "CLIPTokenizer": TokenizerClass(_GPT2_TOKENS | _tokens(bos="<|startoftext|>", pad="<|endoftext|>"), WITHOUT_TYPES),
    "CamembertTokenizer": _BART,
    "CodeGenTokenizer": _GPT2,
    "CodeLlamaTokenizer": _LLAMA,
    "CohereTokenizer": TokenizerClass(
        _tokens(bos="<BOS_TOKEN>", eos="<|END_OF_TURN_TOKEN|>", unk="<UNK>"), WITHOUT_TYPES, "left"
    ),
    "ConvBertTokenizer": _BERT,
    "CpmTokenizer": TokenizerClass(_XLNET_TOKENS),
    "DPRContextEncoderTokenizer": _BERT,
    "DPRQuestionEncoderTokenizer": _BERT,
    "DPRReaderTokenizer": TokenizerClass(_BERT_TOKENS, WITHOUT_TYPES, normalizer_switches=_ALL_SWITCHES),
    "DebertaTokenizer": TokenizerClass(
        _ALBERT_TOKENS | _tokens(unk="[UNK]", pad="[PAD]"), ("input_ids", "attention_mask", "token_type_ids")
    ),
    "DebertaV2Tokenizer": TokenizerClass(_ALBERT_TOKENS | _tokens(unk="[UNK]", pad="[PAD]")),
    "DistilBertTokenizer": _BERT_WITHOUT_TYPES,
    "ElectraTokenizer": _BERT,
    "FNetTokenizer": TokenizerClass(_BERT_TOKENS | _tokens(unk="<unk>", pad="<pad>"), ("input_ids", "token_type_ids")),
    "FunnelTokenizer": TokenizerClass(_XLNET_TOKENS, normalizer_switches=_ALL_SWITCHES),
    "GPT2Tokenizer": _GPT2,
    "GPTNeoXTokenizer": _GPT2,
    "GemmaTokenizer": TokenizerClass(
        _tokens(bos="<bos>", eos="<eos>", unk="<unk>", pad="<pad>"), WITHOUT_TYPES, "left"
    ),
    "HerbertTokenizer": TokenizerClass({k: v for k, v in _BART_TOKENS.items() if k not in ("bos_token", "eos_token")}),
    "LEDTokenizer": _BART,
    "LayoutLMTokenizer": _BERT,
    "LayoutLMv2Tokenizer": _BERT_TWO_SWITCHES,
    "LayoutLMv3Tokenizer": _BART,
    "LayoutXLMTokenizer": _BART,
    "LlamaTokenizer": _LLAMA,
    "LongformerTokenizer": _BART,
    "LxmertTokenizer": _BERT,
    "MBart50Tokenizer": TokenizerClass({k: v for k, v in _BART_TOKENS.items() if k != "bos_token"}, WITHOUT_TYPES),
    "MBartTokenizer": _BART,
    "MPNetTokenizer": TokenizerClass(
        _BART_TOKENS | _tokens(unk="[UNK]"), WITHOUT_TYPES, normalizer_switches=_ALL_SWITCHES[:2]
    ),
    "MT5Tokenizer": _T5,
    "MobileBertTokenizer": _BERT,
    "MvpTokenizer": _BART,
    "NllbTokenizer": _BART,
    "OpenAIGPTTokenizer": TokenizerClass(_tokens(unk="<unk>"), WITHOUT_TYPES),
    "PegasusTokenizer": TokenizerClass(_T5_TOKENS | _tokens(mask="<mask_2>"), WITHOUT_TYPES),
    "PreTrainedTokenizer": PLAIN,
    "TokenizersBackend": TokenizerClass(input_names=WITHOUT_TYPES),
    "Qwen2Tokenizer": TokenizerClass(
        _tokens(eos="<|endoftext|>", unk="<|endoftext|>", pad="<|endoftext|>"), WITHOUT_TYPES
    ),
    "RealmTokenizer": _BERT,
    "ReformerTokenizer": TokenizerClass(_tokens(eos="</s>", unk="<unk>"), WITHOUT_TYPES),
    "RemBertTokenizer": _ALBERT,
    "RetriBertTokenizer": _BERT_WITHOUT_TYPES,
    "RobertaTokenizer": _BART,
    "SeamlessM4TTokenizer": _XGLM,
    "SplinterTokenizer": _BERT_TWO_SWITCHES,
    "SqueezeBertTokenizer": _BERT,
    "T5Tokenizer": _T5,
    "UdopTokenizer": TokenizerClass(_T5_TOKENS | _tokens(sep="</s>"), WITHOUT_TYPES),
    "WhisperTokenizer": _GPT2,
    "XGLMTokenizer": _XGLM,
    "XLMRobertaTokenizer": _BART,
    "XLNetTokenizer": TokenizerClass(_XLNET_TOKENS, padding_side="left"),
}

# For checkpoints that name no class: model type -> class.
_MODEL_TYPES = {
    "AlbertTokenizer": "albert nystromformer yoso",
    "BartTokenizer": "bart",
    "BarthezTokenizer": "barthez",
    "BertTokenizer": "align bark bert blip bros chinese_clip ernie git grounding-dino megatron-bert mm-grounding-dino"
    " nezha qdqbert tvp vilt visual_bert",
    "BigBirdTokenizer": "big_bird",
    "BlenderbotTokenizer": "blenderbot",
    "BloomTokenizer": "bloom",
    "CLIPTokenizer": "aimv2 clip clipseg groupvit omdet-turbo oneformer owlv2 owlvit xclip",
    "CamembertTokenizer": "camembert",
    "CodeGenTokenizer": "codegen phi",
    "CodeLlamaTokenizer": "code_llama",
    "CohereTokenizer": "aya_vision cohere cohere2",
    "ConvBertTokenizer": "convbert",
    "CpmTokenizer": "cpm",
    "DPRQuestionEncoderTokenizer": "dpr",
    "DebertaTokenizer": "deberta",
    "DebertaV2Tokenizer": "deberta-v2",
    "DistilBertTokenizer": "distilbert",
    "ElectraTokenizer": "electra",
    "FNetTokenizer": "fnet",
    "FunnelTokenizer": "funnel",
    "GPT2Tokenizer": "blip-2 dbrx emu3 exaone4 flex_olmo gpt2 gpt_bigcode gpt_neo gptj instructblip instructblipvideo"
    " minimax olmo3 opt starcoder2",
    "GPTNeoXTokenizer": "falcon_mamba gpt_neox mamba mamba2 mpt olmo olmo2 olmoe rwkv stablelm xlstm",
    "GemmaTokenizer": "gemma gemma2 gemma3 gemma3_text gemma3n gemma3n_text recurrent_gemma shieldgemma2 siglip2"
    " t5gemma",
    "HerbertTokenizer": "herbert",
    "LEDTokenizer": "led",
    "LayoutLMTokenizer": "layoutlm",
    "LayoutLMv2Tokenizer": "layoutlmv2",
    "LayoutLMv3Tokenizer": "layoutlmv3 lilt",
    "LayoutXLMTokenizer": "layoutxlm",
    "LlamaTokenizer": "arcee aria chameleon colpali deepseek_v2 deepseek_v3 deepseek_vl deepseek_vl_hybrid diffllama"
    " ernie4_5 ernie4_5_moe idefics idefics2 idefics3 jamba janus jetmoe llama llama4 llama4_text llava llava_next"
    " llava_next_video llava_onevision ministral mistral mistral3 mixtral mllama paligemma persimmon phi3 phimoe"
    " video_llava vipllava zamba zamba2",
    "LongformerTokenizer": "longformer",
    "LxmertTokenizer": "lxmert",
    "MBart50Tokenizer": "mbart50",
    "MBartTokenizer": "mbart",
    "MPNetTokenizer": "mpnet",
    "MT5Tokenizer": "mt5",
    "MobileBertTokenizer": "mobilebert",
    "MvpTokenizer": "mvp",
    "NllbTokenizer": "nllb nllb-moe",
    "OpenAIGPTTokenizer": "openai-gpt",
    "PegasusTokenizer": "bigbird_pegasus pegasus pegasus_x",
    "PreTrainedTokenizer": "bitnet blt csm falcon glm glm4 glm4_moe glm4v glm4v_moe gpt_oss helium kosmos-2.5"
    " modernbert moonshine moshi nemotron pixtral smollm3 voxtral",
    "Qwen2Tokenizer": "colqwen2 internvl qwen2 qwen2_5_omni qwen2_5_vl qwen2_audio qwen2_moe qwen2_vl qwen3 qwen3_moe"
    " qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe",
    "RealmTokenizer": "realm",
    "ReformerTokenizer": "reformer",
    "RemBertTokenizer": "rembert",
    "RetriBertTokenizer": "retribert",
    "RobertaTokenizer": "bridgetower clap data2vec-text ibert mega mra roberta roberta-prelayernorm",
    "SeamlessM4TTokenizer": "seamless_m4t seamless_m4t_v2",
    "SplinterTokenizer": "splinter",
    "SqueezeBertTokenizer": "squeezebert",
    "T5Tokenizer": "longt5 musicgen musicgen_melody pix2struct switch_transformers t5 umt5",
    "UdopTokenizer": "udop",
    "WhisperTokenizer": "whisper",
    "XGLMTokenizer": "xglm",
    "XLMRobertaTokenizer": "kosmos-2 metaclip_2 xlm-roberta xlm-roberta-xl xmod",
    "XLNetTokenizer": "xlnet",
}
CLASS_OF_MODEL_TYPE = {model_type: name for name, types in _MODEL_TYPES.items() for model_type in types.split()}

# Classes whose splitting into words is not in tokenizer.json.
NOT_IN_TOKENIZER_JSON = {"RoFormerTokenizer": "it splits Chinese with jieba"}
