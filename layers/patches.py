"""Images as rows of vectors: a token for the whole, the patches, and where each of them is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from formax.core.config import Config, check_multiple, config
from formax.core.layout import Reshape
from formax.core.spec import Initializer, Param, Spec, normal, zeros
from formax.layers.activations import check_activation
from formax.layers.conv import embed_patches, patch_spec
from formax.layers.resize import Size, check_pixels, grid_of, pair, stretch_positions


@config
class PatchesConfig(Config):
    """The fields that configurations of ViT's line have."""

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    image_size: Size = 224
    patch_size: Size = 16
    num_channels: int = 3

    def check(self) -> None:
        check_multiple(self, "hidden_size", "num_attention_heads")
        check_activation(self.hidden_act)
        grid_of(self.image_size, self.patch_size)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def heads_of(self, layer: int) -> int:
        """Attention heads that are left in a layer."""
        return self.num_attention_heads - len(self.pruned_heads.get(layer, ()))


def image_spec(c: Any, *, init: Initializer, positions: bool = True, mask: tuple[int, ...] = ()) -> dict[str, Spec]:
    """What `embed_image` reads, named as ViT's: patches, a class token, a position for each, the vector of hidden ones.

    Args:
        c: a configuration with `hidden_size`, `initializer_range`, `num_channels`, `image_size` and `patch_size`.
        init: of the class token and the positions.
        positions: whether positions have a table.
        mask: the shape that the hidden patches' vector is stored as; none for models without.
    """
    rows, columns = grid_of(c.image_size, c.patch_size)
    size, count, patch = c.hidden_size, 1 + rows * columns, pair(c.patch_size)
    spec: dict[str, Spec] = {
        "patch": patch_spec(
            "patch_embeddings.projection", c.num_channels, size, patch, init=normal(c.initializer_range)
        ),
        "cls": {"embedding": Param((size,), ("embed",), "cls_token", init, Reshape((1, 1, size)))},
    }
    if positions:
        table = Param((count, size), (None, "embed"), "position_embeddings", init, Reshape((1, count, size)))
        spec["position"] = {"embedding": table}
    if mask:
        spec["mask"] = {"embedding": Param((size,), ("embed",), "mask_token", zeros, Reshape(mask))}
    return spec


def tokens_first(tokens: Sequence[Any], x: jax.Array) -> jax.Array:
    """So many vectors before the patches of every image: [B, N, E] -> [B, tokens + N, E]."""
    shape = (len(x), 1, x.shape[-1])
    return jnp.concatenate([*(jnp.broadcast_to(p["embedding"].astype(x.dtype), shape) for p in tokens), x], axis=1)


def embed_image(
    p: Any, c: Any, pixels: Any, *, stretch: bool, hidden: Any = None, first: tuple[str, ...] = ("cls",)
) -> jax.Array:
    """Tokens and patches, row by row, with their positions: [B, C, height, width] -> [B, tokens + N, E].

    Args:
        p: `patch` (of `conv.patch_spec`), the tokens' vectors, the table `position` of tokens + N rows (if positions
            are told here), and in models that hide patches the vector `mask`.
        c: a configuration with `num_channels`, `image_size` and `patch_size`.
        pixels: the images.
        stretch: whether the positions are to be stretched to images of another size.
        hidden: [B, N], not 0 where a patch is replaced by the mask.
        first: names of the tokens before the patches.

    Raises:
        ValueError: images that do not fit, or patches hidden of another shape or in a model without a mask.
    """
    grid = check_pixels(pixels, c, stretch)
    if hidden is not None and "mask" not in p:
        raise ValueError("bool_masked_pos needs a model for masked image modelling: this one has no token for masks")
    if hidden is not None and hidden.shape != (len(pixels), grid[0] * grid[1]):
        raise ValueError(
            f"bool_masked_pos must be {(len(pixels), grid[0] * grid[1])} [batch, patches], got {hidden.shape}"
        )
    x = embed_patches(p["patch"], pixels.astype(p["patch"]["kernel"].dtype), pair(c.patch_size))
    if hidden is not None:
        x = jnp.where(hidden[..., None] != 0, p["mask"]["embedding"].astype(x.dtype), x)
    x = tokens_first([p[name] for name in first], x)
    if "position" not in p:
        return x
    own = grid_of(c.image_size, c.patch_size)
    table = stretch_positions(p["position"]["embedding"], own, grid, first=len(first))
    return x + table.astype(x.dtype)
