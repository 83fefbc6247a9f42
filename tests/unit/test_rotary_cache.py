"""The angles that all layers share, and how they were made: training must be able to keep them."""

from __future__ import annotations

import pytest
import torch

from litespark.modules.fused_layer import _cos_sin


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_angles_that_inference_made_serve_training(mode):
    """megatron-core keeps the angles from one forward pass to the next, whoever made them.

    A tensor made in inference mode cannot be saved for backward.
    """
    with mode():
        rotary_s11d = torch.rand(5, 1, 1, 8)
        first = _cos_sin(rotary_s11d)
    cos_sr, sin_sr = _cos_sin(rotary_s11d)
    assert first[0] is cos_sr, "computed once"
    x_sr = torch.ones(5, 4, requires_grad=True)
    (x_sr * cos_sr + x_sr * sin_sr).sum().backward()
    torch.testing.assert_close(x_sr.grad, cos_sr + sin_sr)
    torch.testing.assert_close(cos_sr, rotary_s11d[:, 0, 0, :4].cos())
