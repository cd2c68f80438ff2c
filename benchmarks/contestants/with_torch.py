"""PyTorch with transformers' own classes, as they come ("eager") or through `torch.compile`."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import transformers

from benchmarks.task import (
    BETAS,
    CHECKED_STEPS,
    EPS,
    LEARNING_RATE,
    WEIGHT_DECAY,
    Options,
    Task,
    UnavailableError,
    arrays,
    heads,
    labels,
    sample,
    square,
    tall,
    token_ids,
)


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "torch threads": str(torch.get_num_threads()),
    }


def tensor(values: Any) -> Any:
    return torch.from_numpy(np.asarray(values, np.int64))


def compiled(model: Any, options: Options) -> Any:
    if not options.get("compile"):
        return model
    torch.compiler.reset()  # what was compiled for the shape before
    return torch.compile(model, dynamic=False)


def first(run: Any, options: Options) -> Any:
    """The first call, in which `torch.compile` compiles and may find that it cannot."""
    if not options.get("compile"):
        return run()
    try:
        return run()
    except Exception as error:  # a missing compiler has many shapes
        raise UnavailableError(f"torch.compile failed: {type(error).__name__}: {error}") from error


@cache
def open_model(checkpoint: str) -> Any:
    return transformers.BertModel.from_pretrained(checkpoint).eval()


def forward(options: Options) -> Task:
    model = compiled(open_model(options["checkpoint"]), options)
    ids = tensor(token_ids(options))
    mask = torch.ones_like(ids)

    def run() -> Any:
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask)

    out = first(run, options)
    return Task(run, sample(out.last_hidden_state.numpy()))


def call(options: Options) -> Task:
    model = compiled(open_head(options["checkpoint"], options["architecture"]), options)
    inputs = {name: as_tensor(x) for name, x in arrays(options).items()}

    def run() -> Any:
        with torch.inference_mode():
            return model(**inputs)

    return Task(run, sample(getattr(first(run, options), options["output"]).numpy()))


def generate(options: Options) -> Task:
    model = open_head(options["checkpoint"], options["architecture"])
    ids = tensor(arrays(options)["input_ids"])

    def run() -> Any:
        with torch.inference_mode():
            return model.generate(ids, attention_mask=torch.ones_like(ids), **options["settings"])

    # A guess that was right may take it past the number of tokens that was asked for.
    asked = ids.shape[1] + options["settings"]["max_new_tokens"]
    return Task(run, [float(token) for token in run()[:, :asked].reshape(-1)])


@cache
def open_head(checkpoint: str, architecture: str) -> Any:
    return getattr(transformers, architecture).from_pretrained(checkpoint).eval()


def as_tensor(x: Any) -> Any:
    return tensor(x) if x.dtype.kind == "i" else torch.from_numpy(x)


def train_step(options: Options) -> Task:
    rate = options["dropout"]
    plain = transformers.BertForMaskedLM.from_pretrained(
        options["checkpoint"], hidden_dropout_prob=rate, attention_probs_dropout_prob=rate
    ).train()
    model = compiled(plain, options)
    # Fused is PyTorch's fastest, and what the Trainer of transformers takes.
    optimizer = torch.optim.AdamW(
        plain.parameters(), lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    ids, targets = tensor(token_ids(options)), tensor(labels(options))
    mask = torch.ones_like(ids)

    def run() -> float:
        loss = model(input_ids=ids, attention_mask=mask, labels=targets).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    losses = [first(run, options)]
    return Task(run, losses + [run() for _ in range(CHECKED_STEPS - 1)])


def load(options: Options) -> Task:
    """The parameters in memory: what is only mapped is touched, one element a page."""

    def run() -> Any:
        model = transformers.BertModel.from_pretrained(options["checkpoint"])
        for parameter in model.parameters():
            parameter.detach().view(-1)[::1024].sum()
        return model

    # Its module is imported before the clock starts.
    assert issubclass(transformers.BertModel, torch.nn.Module)
    return Task(run)


def attention(options: Options) -> Task:
    """`scaled_dot_product_attention`, with a mask as booleans where it has no structure for it."""
    for name in ("softcap", "sinks"):
        if options.get(name):
            raise UnavailableError(f"scaled_dot_product_attention has no {name}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    length, window, segments = options["q"][1], options.get("window"), options.get("segments")
    mask = None
    if window or segments:
        at = torch.arange(length, device=device)
        mask = at[:, None] >= at
        if window:
            mask = mask & (at[:, None] - at < window)
        if segments:
            mask = mask & (at[:, None] * segments // length == at * segments // length)
    inputs = [torch.from_numpy(x).to(device, getattr(torch, options["dtype"])).transpose(1, 2) for x in heads(options)]

    def attend() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(
            *inputs,
            attn_mask=mask,
            is_causal=bool(options.get("causal")) and mask is None,
            enable_gqa=options["q"][2] != options["k"][2],
        )

    def run() -> Any:
        if options["slopes"]:
            for x in inputs:
                x.grad = None
                x.requires_grad_()
            (attend().float() ** 2).sum().backward()
            out = inputs[0].grad
        else:
            with torch.inference_mode():
                out = attend()
        if device == "cuda":
            torch.cuda.synchronize()
        return out

    return Task(run, sample(run().float().transpose(1, 2).cpu().numpy()))


def matmul(options: Options) -> Task:
    a = torch.from_numpy(square(options))
    return Task(lambda: a @ a, sample((a @ a).numpy()))


def stream(options: Options) -> Task:
    a, x = map(torch.from_numpy, tall(options))
    return Task(lambda: a @ x, sample((a @ x).numpy()))


TASKS = {
    "attention": attention,
    "call": call,
    "forward": forward,
    "generate": generate,
    "load": load,
    "matmul": matmul,
    "stream": stream,
    "train_step": train_step,
}
