"""Program: the LLM.int8 kernels in Triton's interpreter, on CPU tensors, against float64.

Run by test_llm_int8_kernels.py in a process of its own with TRITON_INTERPRET=1. Prints how many cases were right.
"""

import itertools
import warnings

import offline
import torch
from interpreting import guarded, stored
from quantkit_kernels import formats, ops, reference
from quantkit_kernels.configurations import INTERPRETED
from quantkit_kernels.gpu import llm_int8
from quantkit_kernels.gpu.tiles import UNALIGNED, TileConfig

SIZES = [(1, 1), (7, 0), (33, 70), (18, 64)]  # (N, K)
U32 = 2.0**-24
FEW = TileConfig(16, 32, 32, 4, 2)


def activations(generator: torch.Generator, tokens: int, in_features: int, dtype: torch.dtype) -> torch.Tensor:
    """Return tokens with columns of outliers, some of them in one token only; the second token is zeros."""
    x = torch.randn(tokens, in_features, generator=generator)
    x[:, 3::17] *= 20
    x[-1:, 5:6] = -6.0  # the threshold itself
    x[1:2] = 0
    return x.to(dtype)


def bound(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, threshold: float
) -> torch.Tensor:
    """Return the bound [M, N] against float64 on the same codes, in float32.

    A float32 product of an outlier and a code is exact or rounds once, and the sum of K of them in any order rounds at
    most K times: K + 1 u. The integer part rounds twice (to float32, by the token's scale); sum, weight's scale and
    bias round once each. So (K + 6) u of the sum of absolute values.
    """
    values = x.double().abs()
    outlier = (x.float().abs() >= threshold).any(dim=0)
    rest = torch.where(outlier, 0.0, x.float())
    codes, x_scale = reference.quantize_per_token(rest, torch.int8)
    size = (codes.abs() * x_scale) @ weight.double().abs().T + (values * outlier) @ weight.double().abs().T
    size = size * scale.double().T + (0 if bias is None else bias.double().abs())
    return (x.shape[1] + 6) * U32 * 1.01 * size


def check(
    generator: torch.Generator,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    threshold: float,
    config: TileConfig | None,
    spread: bool = False,
) -> None:
    """Raise AssertionError unless the output is right, without outliers in every bit, and nothing else was written."""
    tokens, out_features, in_features = shape
    x = activations(generator, tokens, in_features, dtype)
    weight, scale = formats.quantize_weight(torch.randn(out_features, in_features, generator=generator), torch.int8)
    bias = torch.randn(out_features, generator=generator) if out_features % 2 else None
    if spread:
        x = torch.nn.functional.pad(x, (3, 5), value=77)[:, 3 : 3 + in_features]
        weight = torch.nn.functional.pad(weight, (3, 5), value=77)[:, 3 : 3 + in_features]
    out, around = guarded(tokens, out_features, torch.float32)
    llm_int8.launch(out, x, weight, scale, bias, threshold, config)
    what = (shape, dtype, threshold, config)
    assert int(around.isnan().sum()) == around.numel() - out.numel(), what
    expected = reference.linear_llm_int8(x, weight, scale, bias, threshold)
    assert ((out.double() - expected).abs() <= bound(x, weight, scale, bias, threshold)).all(), what
    if threshold == 1e4:
        assert torch.equal(out, ops.linear_dynamic(x.float(), weight, scale, bias)), what
    rounded, _ = guarded(tokens, out_features, dtype)
    llm_int8.launch(rounded, x, weight, scale, bias, threshold, config)
    assert torch.equal(rounded, stored(out, dtype)), what


def check_columns(generator: torch.Generator) -> None:
    """Raise AssertionError unless the outlier columns are listed in order, by few tokens or many, in steps too."""
    kept = llm_int8.FEW_NUMBERS
    for tokens, numbers in itertools.product((1, 3, 16, 17, 200), (64, 1024)):
        llm_int8.FEW_NUMBERS = numbers
        x = activations(generator, tokens, 70, torch.float32)
        codes, scale, columns = llm_int8._quantize_rest(x, 6.0)
        outlier = (x.abs() >= 6.0).any(dim=0)
        expected = outlier.nonzero().view(-1).tolist()
        assert 0 < len(expected) < 70
        assert columns[-1].item() == len(expected)
        assert columns[: len(expected)].tolist() == expected
        quantized = formats.quantize_per_token(x.masked_fill(outlier, 0.0), torch.int8)
        assert torch.equal(codes, quantized[0])
        assert torch.equal(scale, quantized[1].view(-1))
    llm_int8.FEW_NUMBERS = kept


def check_damage(generator: torch.Generator) -> None:
    """Raise AssertionError unless NaN and infinity reach their token's output, and NaN no other token's."""
    weight, scale = formats.quantize_weight(torch.randn(5, 40, generator=generator), torch.int8)
    for tokens in (1, 3, 20):
        x = torch.randn(tokens, 40, generator=generator)
        x[0, 7] = torch.nan
        out = llm_int8.linear_llm_int8(x, weight, scale, None, 6.0)
        assert out[0].isnan().all()
        assert out[1:].isfinite().all()
        x[0, 7] = torch.inf
        expected = weight[:, 7].sign() * torch.inf
        for dtype in (torch.float32, torch.float16):
            out = llm_int8.linear_llm_int8(x.to(dtype), weight, scale, None, 6.0)
            assert torch.equal(out[0].float(), expected), (tokens, dtype, out[0])


def check_ops(generator: torch.Generator) -> None:
    """Raise AssertionError unless the op takes the kernel when told to."""
    x = activations(generator, 6, 40, torch.float32).view(2, 3, 40)
    weight, scale = formats.quantize_weight(torch.randn(24, 40, generator=generator), torch.int8)
    by_kernel = ops.linear_llm_int8(x, weight, scale, None, 6.0, "triton")
    assert by_kernel.shape == (2, 3, 24)
    assert torch.allclose(by_kernel, ops.linear_llm_int8(x, weight, scale, None, 6.0), rtol=1e-4, atol=1e-4)
    transposed = weight.t().contiguous().t()
    assert torch.equal(ops.linear_llm_int8(x, transposed, scale, None, 6.0, "triton"), by_kernel)


def main() -> None:
    """Run all cases: each M and size with few, no and only outliers, then each configuration at one ragged size."""
    generator = torch.Generator().manual_seed(0)
    cases = 0
    for tokens, size, threshold in itertools.product((0, 1, 3, 17, 64), SIZES, (6.0, 1e4, 1e-3)):
        dtype = formats.FLOAT_DTYPES[cases % 3]
        check(generator, (tokens, *size), dtype, threshold, None if tokens < 64 else FEW, spread=cases % 4 == 0)
        cases += 1
    for dtype in formats.FLOAT_DTYPES:
        for config in [*offline.configs("llm_int8", INTERPRETED)[:2], UNALIGNED]:
            check(generator, (19, 35, 70), dtype, 6.0, config)
            cases += 1
        check(generator, (1, 20, 256), dtype, 6.0, None)  # aligned, by the table
        check(generator, (1, 20, 256), dtype, 1e4, FEW)
        cases += 2
    check_columns(generator)
    check_damage(generator)
    check_ops(generator)
    print(cases, "cases right")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered in cast")  # NaN to bfloat16, inside the interpreter
        warnings.filterwarnings("ignore", "invalid value encountered")
        main()
