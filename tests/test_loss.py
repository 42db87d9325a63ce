"""The supervised loss."""

import pytest
import torch

from areal.algo.loss import sft_loss

torch.set_num_threads(1)


def test_sft_loss():
    logprobs = torch.tensor([-1.0, -2.0, -torch.inf, -4.0], requires_grad=True)
    loss, sums = sft_loss(logprobs, torch.tensor([True, False, False, True]), denominator=10.0)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.5)
    assert logprobs.grad.tolist() == pytest.approx([-0.1, 0, 0, -0.1])
    assert sums["n_tokens"] == 2
