"""The oracle itself: fp8 bytes against torch's own decoding, products against loops over Python integers."""

import math

import pytest
import torch
from quantkit_kernels import reference


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_byte_decodes_as_torch_decodes_it(dtype):
    theirs = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(dtype).double().tolist()
    for byte, expected in enumerate(theirs):
        ours = reference.decode_fp8(byte, dtype)
        assert ours == expected or (math.isnan(ours) and math.isnan(expected)), byte


def test_rounding_by_hand():
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    assert reference.round_to_code(17.0, e4m3) == 16.0  # 16 and 18 are neighbours; 16 is even
    assert reference.round_to_code(19.0, e4m3) == 20.0
    assert reference.round_to_code(-1e9, e4m3) == -448.0
    assert reference.round_to_code(9.0, e5m2) == 8.0
    assert reference.round_to_code(1e9, e5m2) == 57344.0
    assert reference.round_to_code(2.0**-10, e4m3) == 0.0  # half of the smallest number: the even neighbour is 0
    assert reference.round_to_code(2.0**-10 * 1.01, e4m3) == 2.0**-9
    assert [reference.round_to_code(v, torch.int8) for v in (0.5, 1.5, -200.0)] == [0.0, 2.0, -127.0]


def test_scaled_mm_is_the_loop():
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-128, 128, (3, 11), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (4, 11), generator=generator, dtype=torch.int8)
    a_scale, b_scale = torch.rand(3, 1, generator=generator), torch.rand(4, 1, generator=generator)
    bias = torch.randn(4, generator=generator)
    out = reference.scaled_mm(a, b, a_scale, b_scale, bias)
    for m in range(3):
        for n in range(4):
            total = sum(x * y for x, y in zip(a[m].tolist(), b[n].tolist(), strict=True))
            expected = total * a_scale[m].item() * b_scale[n].item() + bias[n].item()
            assert out[m, n].item() == pytest.approx(expected, rel=1e-15)
