"""Program: the kernel for experts in Triton's interpreter, on CPU tensors, against float64.

Run by test_grouped_kernel.py in a process of its own with TRITON_INTERPRET=1. Prints how many cases were right.
"""

import itertools
import warnings

import torch
from interpreting import guarded, stored
from quantkit_kernels import formats, ops, reference
from quantkit_kernels.gpu import grouped
from quantkit_kernels.gpu.tiles import GROUP_M, TileConfig

U32 = 2.0**-24
SMALL = TileConfig(16, 32, 32, 4, 2)
LARGE = TileConfig(64, 64, 64, 8, 2)
COUNTS = [
    (0, 0),
    (1,),
    (0, 3, 0, 1),  # experts without tokens in front and between
    (17, 1, 0, 5, 9),  # more than a tile, a single token, none, some
    (0, 64, 0),  # a tile is full, and the last expert has nothing
]
SIZES = [(1, 1), (7, 0), (33, 70), (20, 64)]  # (N, K)


def offsets_of(counts: tuple[int, ...]) -> torch.Tensor:
    """Return where each expert's tokens begin, and the end."""
    return torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)


def bound(
    a: torch.Tensor, a_scale: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Return the bound [M, N] against float64 on the same codes, in float32.

    Each product is exact (a float32 number is multiplied in three parts, each product exact, three times as many
    terms), the sum of K of them in any order rounds at most K times, and two scales round once each.
    """
    terms = a.shape[1] * (3 if a.dtype == torch.float32 else 1) + 3
    ones = torch.ones(scale.shape, dtype=torch.float64)
    size = reference.linear_grouped(a.double().abs(), weight.double().abs(), ones, offsets, "none")
    size = size * (1 if a_scale is None else a_scale.double())
    for expert in range(len(weight)):
        part = slice(int(offsets[expert]), int(offsets[expert + 1]))
        size[part] *= scale[expert, :, 0].double()
    return terms * U32 * 1.01 * size


def check(
    generator: torch.Generator,
    counts: tuple[int, ...],
    size: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    activations: str,
    config: TileConfig | None,
    stored_as: str,
) -> None:
    """Raise AssertionError unless the output is right, int8 in every bit, and nothing else was written."""
    (out_features, in_features), (dtype, float_dtype) = size, dtypes
    tokens, offsets = sum(counts), offsets_of(counts)
    x = torch.randn(tokens, in_features, generator=generator)
    x[2:3] = 0
    x = x.to(float_dtype)
    weight = torch.randn(len(counts), out_features, in_features, generator=generator)
    weight, scale = formats.quantize_weight(weight.bfloat16(), dtype)
    if stored_as == "in x out":
        weight = weight.view(torch.int8).mT.contiguous().mT.view(dtype)
    elif stored_as == "inside":
        inside = torch.nn.functional.pad(weight.view(torch.int8), (3, 5, 2, 1), value=77)
        weight = inside[:, 2 : 2 + out_features, 3 : 3 + in_features].view(dtype)
    a, a_scale = (x, None) if activations == "none" else formats.quantize_per_token(x, dtype)
    what = (counts, size, dtypes, activations, config, stored_as)
    around = torch.full((tokens + 2, out_features), torch.nan)
    out = around[1 : tokens + 1]
    grouped.launch(out, a, weight, a_scale, scale, offsets, config)
    assert not out.isnan().any(), what
    assert around[0].isnan().all(), what
    assert around[-1].isnan().all(), what
    expected = reference.linear_grouped(x, weight, scale, offsets, activations)
    assert ((out.double() - expected).abs() <= bound(a, a_scale, weight, scale, offsets)).all(), what
    by_torch = ops.linear_grouped(x.float() if activations == "token" else x, weight, scale, offsets, activations)
    if dtype == torch.int8 and activations == "token":
        assert torch.equal(out, by_torch), what
    rounded, _ = guarded(tokens, out_features, float_dtype)
    rounded = rounded.contiguous()
    grouped.launch(rounded, a, weight, a_scale, scale, offsets, config)
    assert torch.equal(rounded, stored(out, float_dtype)), what


def check_bands(generator: torch.Generator) -> None:
    """Raise AssertionError where more tiles than GROUP_M, so that programs are numbered in two bands, go wrong."""
    counts = (3, 16 * GROUP_M + 1, 40)
    check(generator, counts, (40, 16), (torch.int8, torch.float16), "token", SMALL, "out x in")


def check_offsets_beyond(generator: torch.Generator) -> None:
    """Raise AssertionError unless offsets that are wrong write nothing outside: the device cannot refuse them."""
    x = torch.randn(4, 16, generator=generator)
    weight, scale = formats.quantize_weight(torch.randn(2, 8, 16, generator=generator), torch.int8)
    for wrong in ([0, 9, 90], [0, 4, 1], [3, 1, 2]):
        around = torch.full((40, 8), torch.nan)
        offsets = torch.tensor(wrong, dtype=torch.int32)
        grouped.launch(around[10:14], x, weight, None, scale, offsets, SMALL)
        assert around[:10].isnan().all(), wrong
        assert around[14:].isnan().all(), wrong


def check_ops(generator: torch.Generator) -> None:
    """Raise AssertionError unless the op takes the kernel when told to."""
    x = torch.randn(5, 16, generator=generator)
    offsets = offsets_of((2, 0, 3))
    weight, scale = formats.quantize_weight(torch.randn(3, 8, 16, generator=generator), torch.int8)
    wide = torch.cat([x, x], dim=1)[:, ::2]
    for values, activations in itertools.product((x, wide), ("none", "token")):
        by_kernel = ops.linear_grouped(values, weight, scale, offsets, activations, "triton")
        by_torch = ops.linear_grouped(values, weight, scale, offsets, activations)
        assert torch.allclose(by_kernel, by_torch, rtol=1e-5, atol=1e-5)


def main() -> None:
    """Run all cases."""
    generator = torch.Generator().manual_seed(0)
    kinds = itertools.cycle(itertools.product(formats.QMAX, ("token", "none")))
    floats = itertools.cycle(formats.FLOAT_DTYPES)
    layouts = itertools.cycle(("out x in", "in x out", "inside", "out x in"))
    cases = 0
    for counts, size in itertools.product(COUNTS, SIZES):
        for dtype, activations in itertools.islice(kinds, 3):
            config = SMALL if cases % 4 else LARGE
            check(generator, counts, size, (dtype, next(floats)), activations, config, next(layouts))
            cases += 1
    for (dtype, activations), float_dtype in zip(itertools.islice(kinds, 6), itertools.cycle(formats.FLOAT_DTYPES)):
        check(generator, (3, 2), (32, 128), (dtype, float_dtype), activations, None, "out x in")  # by the table
        cases += 1
    check_bands(generator)
    check_offsets_beyond(generator)
    check_ops(generator)
    print(cases, "cases right")  # noqa: T201 (what the test reads)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "overflow encountered in cast")  # NaN to bfloat16, inside the interpreter
        main()
