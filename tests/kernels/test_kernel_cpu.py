"""Integer products on the CPU are exact, with VNNI and without."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantkit_kernels import cpu, cpu_decoding, formats, generic

WAYS = {"with": lambda: True, "without": lambda: False}


def exact_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() @ b.double().T).to(torch.int32)  # sums stay far below 2**53


@pytest.fixture(params=sorted(WAYS))
def vnni(request, monkeypatch):
    """Run the test both ways; the way with VNNI only where the processor has it."""
    if request.param == "with" and not torch.cpu._is_vnni_supported():
        pytest.skip("this processor has no VNNI")
    monkeypatch.setattr(cpu, "has_exact_int_mm", WAYS[request.param])
    return request.param


@settings(deadline=None, max_examples=80)
@given(
    tokens=st.integers(0, 20), in_features=st.integers(0, 70), out_features=st.integers(0, 20),
    seed=st.integers(0, 2**31), way=st.sampled_from(sorted(WAYS)), layout=st.sampled_from(["rows", "columns", "steps"]),
)  # fmt: skip
def test_int_mm_is_exact(tokens, in_features, out_features, seed, way, layout):
    if way == "with" and not torch.cpu._is_vnni_supported():
        way = "without"
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(-128, 128, (tokens, in_features), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (out_features, in_features), generator=generator, dtype=torch.int8)
    if layout == "columns":
        a, b = a.T.contiguous().T, b.T.contiguous().T
    elif layout == "steps":
        a, b = a.repeat_interleave(2, dim=1)[:, ::2], b.repeat_interleave(2, dim=1)[:, ::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "has_exact_int_mm", WAYS[way])
        out = cpu.int_mm(a, b)
    assert out.dtype == torch.int32
    assert torch.equal(out, exact_product(a, b))


@pytest.mark.parametrize("in_features", [0, 1, 2])
@pytest.mark.parametrize("tokens", [1, 3, 17])
def test_short_rows_are_exact(vnni, in_features, tokens):
    """`torch._int_mm` itself is wrong for a single column (torch 2.13)."""
    generator = torch.Generator().manual_seed(in_features)
    a = torch.randint(-128, 128, (tokens, in_features), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (9, in_features), generator=generator, dtype=torch.int8)
    assert torch.equal(cpu.int_mm(a, b), exact_product(a, b))


@pytest.mark.parametrize("in_features", [1023, 1024, 1025, 4096, 9000])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (127, 127), (-128, 127)])
def test_the_largest_sums_are_exact(vnni, in_features, left, right):
    """All codes extreme: float32 partial sums reach 2**24, 16-bit partial sums would saturate."""
    a = torch.full((3, in_features), left, dtype=torch.int8)
    b = torch.full((5, in_features), right, dtype=torch.int8)
    b[1, 0] = 1  # an odd sum, which float32 cannot hold beyond 2**24
    assert torch.equal(cpu.int_mm(a, b), exact_product(a, b))


@pytest.mark.parametrize("out_dtype", formats.FLOAT_DTYPES)
def test_both_ways_give_the_same_bits(monkeypatch, out_dtype):
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-127, 128, (7, 3000), generator=generator, dtype=torch.int8)
    b = torch.randint(-127, 128, (9, 3000), generator=generator, dtype=torch.int8)
    a_scale, b_scale = torch.rand(7, 1, generator=generator) / 100, torch.rand(9, 1, generator=generator) / 100
    bias = torch.randn(9, generator=generator)
    results = []
    for way in WAYS.values():
        monkeypatch.setattr(cpu, "has_exact_int_mm", way)
        results.append(cpu.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype))
    generic_result = generic.scaled_mm(a, b, a_scale, b_scale, bias, out_dtype)
    if torch.cpu._is_vnni_supported():
        assert torch.equal(results[0], generic_result)
    assert torch.equal(results[1], generic_result)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("elements", [1, 200, 1 << 20])
def test_fp8_products_by_parts(monkeypatch, dtype, elements):
    """Small whole numbers, so that every order of the float32 sums is exact: one row at a time, two, or all."""
    monkeypatch.setattr(cpu_decoding, "_DECODED_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(3)
    for tokens, out_features, in_features in ((0, 9, 100), (1, 9, 100), (5, 9, 100), (3, 0, 100), (3, 9, 0)):
        a = torch.randint(-3, 4, (tokens, in_features), generator=generator).float().to(dtype)
        b = torch.randint(-3, 4, (out_features, in_features), generator=generator).float().to(dtype)
        for view in (b, b.view(torch.int8).t().contiguous().t().view(dtype)):
            out = cpu_decoding.fp8_mm(a, view)
            assert out.dtype == torch.float32
            assert torch.equal(out, a.float() @ b.float().t())


def test_the_slower_way_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(cpu, "has_exact_int_mm", WAYS["without"])
    monkeypatch.setattr(logging.getLogger("quantkit"), "propagate", True)
    cpu.warn_no_vnni.cache_clear()
    codes = torch.ones(2, 8, dtype=torch.int8)
    with caplog.at_level(logging.WARNING, logger="quantkit"):
        for _ in range(3):
            cpu.int_mm(codes, codes)
    assert [record.message for record in caplog.records if "VNNI" in record.message] == [
        "this processor has no VNNI: int8 products run in float32 (exact, but several times slower)"
    ]


def test_the_gate_asks_torch():
    assert cpu.has_exact_int_mm() == torch.cpu._is_vnni_supported()
