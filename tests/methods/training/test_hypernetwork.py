"""The hypernetwork computes in fp32 wherever it runs."""

import pytest
import torch

from methods.training.hypernetwork import HyperNetwork, without_cudnn


def made() -> HyperNetwork:
    torch.manual_seed(0)
    return HyperNetwork(6, 3, 8, torch.Generator().manual_seed(0))


def test_cudnn_which_may_round_to_tf32_takes_no_part() -> None:
    """Neither in the forward pass nor in the backward pass, whose kernels autograd chooses in the forward pass."""
    network, seen = made(), []
    network.gru.register_forward_pre_hook(lambda *_: seen.append(torch.backends.cudnn.enabled))
    network()
    assert seen == [False] and torch.backends.cudnn.enabled


def test_cudnn_is_on_again_after_an_error_and_tf32_as_it_was() -> None:
    before = torch.backends.cudnn.allow_tf32
    with pytest.raises(ValueError), without_cudnn():
        raise ValueError
    assert torch.backends.cudnn.enabled and torch.backends.cudnn.allow_tf32 == before
