"""The hypernetwork: embeddings of sites of the network, from fixed noise (ToMoE, E = HyperNetwork(z); DISP-LLM).

A bidirectional GRU runs over the sites, in ToMoE attn0, mlp0, attn1, mlp1, ..., each of the N experts being a sequence
of its own: information flows between layers, and between attention and MLP, not between experts. Dropped after
training.

Departs from ToMoE's released code: z stays fixed. There a later loop makes it trainable.
"""

# Shape suffixes: S sites, N experts (DISP-LLM has none: 1), E embedding width.

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

INPUT = 32
"""Width of z."""


class HyperNetwork(nn.Module):
    """z [S, N, 32] to embeddings [S, N, E]."""

    z_SNI: Tensor

    def __init__(self, sites: int, experts: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("z_SNI", torch.randn(sites, experts, INPUT, generator=generator))
        self.gru = nn.GRU(INPUT, width // 2, bidirectional=True)

    def forward(self) -> Tensor:
        """Embeddings [S, N, E]: forward and backward states side by side, each starting at 0."""
        with without_cudnn():
            return self.gru(self.z_SNI)[0]


@contextmanager
def without_cudnn() -> Iterator[None]:
    """While open, and in the backward pass of what runs meanwhile, fp32 is fp32: cuDNN's GRU would round to TF32."""
    before, torch.backends.cudnn.enabled = torch.backends.cudnn.enabled, False
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before
