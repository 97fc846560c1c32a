"""Which kernel attends, and through which mask. Witnesses: torch's own switches of kernels, and the dense mask."""

import pytest
import torch
from torch.backends import cuda

from nanoforge.device import set_attention_kernel, varying_shapes

CUDA = torch.device("cuda")


@pytest.fixture
def allowed():
    """The kernels that scaled_dot_product_attention may take; all of them again after the test."""
    is_allowed = {
        "flash": cuda.flash_sdp_enabled,
        "cudnn": cuda.cudnn_sdp_enabled,
        "efficient": cuda.mem_efficient_sdp_enabled,
        "math": cuda.math_sdp_enabled,
    }
    yield lambda: {name for name, is_enabled in is_allowed.items() if is_enabled()}
    set_attention_kernel("auto", CUDA)


def test_varying_shapes_are_attended_without_cudnn_unless_it_was_asked_for(allowed):
    set_attention_kernel("auto", CUDA)
    with varying_shapes():
        assert allowed() == {"flash", "efficient", "math"}
        with varying_shapes():
            pass
        assert allowed() == {"flash", "efficient", "math"}
    assert allowed() == {"flash", "cudnn", "efficient", "math"}

    for name in ("cudnn", "flash"):
        set_attention_kernel(name, CUDA)
        with pytest.raises(ZeroDivisionError), varying_shapes():
            assert allowed() == {name}
            raise ZeroDivisionError
        assert allowed() == {name}
