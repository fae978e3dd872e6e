"""A value cache that holds only what tokens chose, in the value slot of an ordinary transformers cache.

A token's entry is a row per head: the K kept values of this head, then the head's part of one bit for each of the v
dimensions, which all J heads share. The bytes of the bits lie in elements of the cache's dtype, so that everything a
cache does with batches, heads and positions (allocating, growing, beam reordering, repeating, cropping) works. In bf16
and for v in multiples of 16 J the rows of a token have 2 J K + v / 8 bytes instead of 2 J v; where they would not be
smaller than the values, the values themselves are the rows.
"""

# Shape suffixes: B batch, T new or cached tokens, J value heads, v value width, K kept of it, e elements of bits per
# head, E = J e, P row per head: K + e, or v.

import torch
from torch import Tensor
from torch.nn.functional import pad

BITS = 8


def pack(value_BJTv: Tensor, index_BTK: Tensor) -> Tensor:
    """Masked values as rows, [B, J, T, P].

    Args:
        index_BTK: the kept dimensions in ascending order; all others of the values are taken to be zero.
    """
    heads, width = value_BJTv.shape[1], value_BJTv.shape[-1]
    tail = -(-width // (BITS * value_BJTv.itemsize * heads))
    if index_BTK.shape[-1] + tail >= width:
        return value_BJTv
    bits_BTv = torch.zeros_like(value_BJTv[:, 0], dtype=torch.uint8).scatter(-1, index_BTK, 1)
    elements_BTE = _to_elements(bits_BTv, heads * tail, value_BJTv.dtype)
    kept_BJTK = value_BJTv.gather(-1, index_BTK[:, None].expand(-1, heads, -1, -1))
    return torch.cat((kept_BJTK, elements_BTE.unflatten(-1, (heads, tail)).transpose(1, 2)), -1)


def unpack(packed_BJTP: Tensor, kept: int, width: int) -> Tensor:
    """Values with zeros where nothing was kept, [B, J, T, v], from rows."""
    if packed_BJTP.shape[-1] == width:
        return packed_BJTP
    kept_BJTK, tail_BJTe = packed_BJTP.split((kept, packed_BJTP.shape[-1] - kept), -1)
    bits_BTv = _to_bits(tail_BJTe.transpose(1, 2).flatten(2))[..., :width]
    rank_BTv = (bits_BTv.cumsum(-1) - 1).clamp(min=0)
    values_BJTv = kept_BJTK.gather(-1, rank_BTv[:, None].expand(-1, kept_BJTK.shape[1], -1, -1))
    return values_BJTv.masked_fill(bits_BTv[:, None] == 0, 0)


def _weights(device: torch.device) -> Tensor:
    return 1 << torch.arange(BITS, dtype=torch.uint8, device=device)


def _to_elements(bits_BTv: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Bits as so many elements of a dtype, [B, T, E], with zero bits after them."""
    bits = pad(bits_BTv, (0, count * dtype.itemsize * BITS - bits_BTv.shape[-1]))
    octets = (bits.unflatten(-1, (-1, BITS)) * _weights(bits.device)).sum(-1, dtype=torch.uint8)
    return octets.view(dtype)


def _to_bits(elements_BTE: Tensor) -> Tensor:
    """The bits of some elements, int64, [B, T, all of them]."""
    octets = elements_BTE.contiguous().view(torch.uint8)
    return (octets[..., None] & _weights(octets.device)).ne(0).flatten(-2).long()
