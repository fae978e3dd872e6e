"""A value cache that holds only what tokens chose, in the value slot of an ordinary transformers cache.

A token's entry is one row: the K kept values of each of the J heads, then one bit for each of the v dimensions, which
all heads share. Its bytes lie in elements of the cache's dtype, so that everything a cache does with batches and
positions (growing, beam reordering, repeating, cropping) works. In bf16 a row has 2 J K + v / 8 bytes instead of 2 J v.
"""

# Shape suffixes: B batch, T new or cached tokens, J value heads, v value width, K kept of it, P packed row.

import torch
from torch import Tensor
from torch.nn.functional import pad

BITS = 8


def pack(value_BJTv: Tensor, index_BTK: Tensor) -> Tensor:
    """Masked values as packed rows, [B, 1, T, P].

    Args:
        index_BTK: the kept dimensions in ascending order; all others of the values are taken to be zero.
    """
    index_BJTK = index_BTK[:, None].expand(-1, value_BJTv.shape[1], -1, -1)
    kept_BTR = value_BJTv.gather(-1, index_BJTK).transpose(1, 2).flatten(2)
    bits_BTv = torch.zeros_like(value_BJTv[:, 0], dtype=torch.uint8).scatter(-1, index_BTK, 1)
    return torch.cat((kept_BTR, _to_elements(bits_BTv, value_BJTv.dtype)), -1)[:, None]


def unpack(packed_B1TP: Tensor, heads: int, kept: int, width: int) -> Tensor:
    """Values with zeros where nothing was kept, [B, J, T, v], from packed rows."""
    kept_BTR, tail = packed_B1TP[:, 0].split((heads * kept, packed_B1TP.shape[-1] - heads * kept), -1)
    bits_BTv = _to_bits(tail)[..., :width]
    rank_BTv = (bits_BTv.cumsum(-1) - 1).clamp(min=0)
    values_BJTK = kept_BTR.unflatten(-1, (heads, kept)).transpose(1, 2)
    values_BJTv = values_BJTK.gather(-1, rank_BTv[:, None].expand(-1, heads, -1, -1))
    return values_BJTv.masked_fill(bits_BTv[:, None] == 0, 0)


def _weights(device: torch.device) -> Tensor:
    return 1 << torch.arange(BITS, dtype=torch.uint8, device=device)


def _to_elements(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Bits [..., v] as elements of a dtype, with zero bits added up to whole elements."""
    bits = pad(bits, (0, -bits.shape[-1] % (BITS * dtype.itemsize)))
    octets = (bits.unflatten(-1, (-1, BITS)) * _weights(bits.device)).sum(-1, dtype=torch.uint8)
    return octets.view(dtype)


def _to_bits(elements: Tensor) -> Tensor:
    """The bits of some elements, int64, [..., all of them]."""
    octets = elements.contiguous().view(torch.uint8)
    return (octets[..., None] & _weights(octets.device)).ne(0).flatten(-2).long()
