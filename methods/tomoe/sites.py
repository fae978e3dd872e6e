"""The trainable modules at the sites of the network (ToMoE, equations 2 to 5): routers and mask decoders.

    MLP site         r = x Wr^T                     A = Wd gelu(LN(E))            mask logits of the N experts
    attention site   s_t   from Wv gelu(LN(We x_t + mean(E)))                     value and output mask of token t
                     s_0   from Wq gelu(LN(mean(E)))                              query and key mask of the layer

No linear map has a bias, gelu is the exact one, and everything computes in fp32 whatever the model's precision.
"""

# Shape suffixes: B batch, T tokens, D hidden size, E embedding width, N experts, M MLP width, h head dimension,
# G groups of query/key dimensions that share a bit.

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from methods.training.precision import FullPrecisionLinear


class MLPSite(nn.Module):
    """Router and mask decoder of one MLP."""

    def __init__(self, hidden: int, experts: int, width: int, mlp_width: int) -> None:
        super().__init__()
        self.router = FullPrecisionLinear(hidden, experts)
        self.norm = nn.LayerNorm(width)
        self.decoder = nn.Linear(width, mlp_width, bias=False)

    def expert_logits(self, embeddings_NE: Tensor) -> Tensor:
        """Mask logits A of the experts, [N, M]."""
        return self.decoder(gelu(self.norm(embeddings_NE)))

    def token_logits(self, routes_BTN: Tensor, embeddings_NE: Tensor) -> Tensor:
        """Mask logits of each token, [B, T, M], through its own embedding q = G E; the value is that of its expert."""
        return self.decoder(gelu(self.norm(routes_BTN @ embeddings_NE)))


class AttentionSite(nn.Module):
    """Mask decoders of one attention module."""

    def __init__(self, hidden: int, width: int, values: int, groups: int, *, local: bool) -> None:
        super().__init__()
        self.local = nn.Parameter(torch.randn(width)) if local else None
        self.project = FullPrecisionLinear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dynamic = nn.Linear(width, values, bias=False)
        self.static = nn.Linear(width, groups, bias=False)

    def value_logits(self, x_BTD: Tensor, mean_E: Tensor) -> Tensor:
        """Mask logits of each token's values and outputs, [B, T, h]."""
        return self.dynamic(gelu(self.norm(self.project(x_BTD) + mean_E)))

    def static_value_logits(self, mean_E: Tensor) -> Tensor:
        """The same without looking at the token (ablation "w/o VO routing"), [h]."""
        return self.dynamic(gelu(self.norm(mean_E)))

    def group_logits(self, mean_E: Tensor) -> Tensor:
        """Mask logits of the query/key groups, [G]."""
        return self.static(gelu(self.norm(mean_E)))


def spread(mask_G: Tensor, groups: Sequence[tuple[int, ...]]) -> Tensor:
    """A mask over groups as one over head dimensions, [..., G] to [..., h]."""
    owner = {dim: index for index, group in enumerate(groups) for dim in group}
    return mask_G[..., [owner[dim] for dim in range(len(owner))]]
