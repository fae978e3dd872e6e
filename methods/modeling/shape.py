"""The shape of a dense decoder, read from its `config.json` alone: what planning needs to count parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from methods.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes of a decoder-only transformer, in elements. Everything countable follows from them."""

    vocabulary: int
    hidden: int
    layers: int
    attention_width: int
    """Query heads times head dimension."""
    kv_width: int
    """Key (and value) heads times head dimension."""
    head_dim: int
    rotary: int
    """Dimensions of a head that rotate with the position, paired (i, i + rotary / 2); 0 with learned positions."""
    mlp_width: int
    gated: bool
    """Whether the MLP has a gate projection beside the up projection."""
    parallel: bool
    """Whether attention and MLP read the same norm and add to the stream together (one norm per block)."""
    layer_norm: bool
    """LayerNorm (gain and shift) rather than RMSNorm (gain)."""
    tied: bool
    """Whether the output head is the embedding table."""
    max_positions: int
    learned_positions: int = 0
    """Rows of a learned position table."""
    qkv_bias: bool = False
    output_bias: bool = False
    """Bias of the attention's output projection."""
    qk_norm: bool = False
    """Whether queries and keys have an RMS norm over the head, one gain for all heads."""
    mlp_bias: bool = False
    head_bias: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderShape:
        """The shape that a `config.json` describes.

        Raises:
            UserError: the architecture is not supported (the message names the ones that are), or its modules have been
                given other shapes already.
        """
        from methods.modeling.families import family_of
        from methods.modeling.families.base import required

        (model_type,) = required(config, "model_type")
        structures = (config.get("compression") or {}).get("structures", {})
        if reshaped := [name for name in structures if name != "removed_layers"]:
            raise UserError(
                f"this model is compressed already ({', '.join(reshaped)}), and sizes are shares of a dense model. "
                "Name the dense model it was made from."
            )
        return family_of(model_type).shape(config)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.attention_width // self.head_dim

    @property
    def kv_heads(self) -> int:
        """Key (and value) heads."""
        return self.kv_width // self.head_dim

    @property
    def rope_groups(self) -> list[tuple[int, ...]]:
        """Dimensions of a head that query and key must keep or lose together: rotary pairs, then single dimensions."""
        half = self.rotary // 2
        return [(i, i + half) for i in range(half)] + [(i,) for i in range(self.rotary, self.head_dim)]

    @property
    def norm(self) -> int:
        """Parameters of one norm."""
        return self.hidden * (1 + self.layer_norm)

    @property
    def head_norms(self) -> int:
        """Parameters of the norms of query and key in one block."""
        return 2 * self.head_dim * self.qk_norm

    @property
    def attention(self) -> int:
        """Parameters of one attention module."""
        qkv = self.attention_width + 2 * self.kv_width
        biases = qkv * self.qkv_bias + self.hidden * self.output_bias
        return (qkv + self.attention_width) * self.hidden + biases + self.head_norms

    @property
    def mlp(self) -> int:
        """Parameters of one MLP."""
        projections = 3 if self.gated else 2
        biases = ((projections - 1) * self.mlp_width + self.hidden) * self.mlp_bias
        return projections * self.mlp_width * self.hidden + biases

    @property
    def layer(self) -> int:
        """Parameters of one block, its norms included."""
        return self.attention + self.mlp + self.norm * (1 if self.parallel else 2)

    @property
    def block(self) -> int:
        """Parameters of all blocks: the denominator of `--ratio-basis block`."""
        return self.layers * self.layer

    @property
    def total(self) -> int:
        """All parameters, tied matrices once: the denominator of `--ratio-basis total`."""
        embeddings = (self.vocabulary + self.learned_positions) * self.hidden
        head = (0 if self.tied else self.vocabulary * self.hidden) + self.vocabulary * self.head_bias
        return embeddings + self.block + self.norm + head
