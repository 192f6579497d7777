"""The Triton kernels for packed 2:4 and V:N:M weights without a GPU: numbers in the interpreter, instructions from the
compiler, and which way is taken when."""

from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="Triton exists on Linux only")

import offline
from quantkit_kernels import sparse24, venom
from quantkit_kernels.gpu import cusparselt, sparse24_units
from quantkit_kernels.gpu import sparse24 as kernels
from quantkit_kernels.gpu.sparse24_units import Packed

MMA_SYNC = {"bf16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16\.bf16\.f32",
            "fp16": r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32"}  # fmt: skip
WGMMA = {"bf16": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16\.bf16",
         "fp16": r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.f16\.f16"}  # fmt: skip
TCGEN05 = dict.fromkeys(("bf16", "fp16"), r"tcgen05\.mma\.cta_group::1\.kind::f16")
INSTRUCTION = {80: MMA_SYNC, 86: MMA_SYNC, 89: MMA_SYNC, 90: WGMMA, 100: TCGEN05, 120: MMA_SYNC}
"""What a product becomes: the weight is its left operand, so that its rows are out features, and few tokens will do."""

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def check_compiled(lines) -> None:
    """Assert for each compilation: the instruction, no spills, memory within limits, and 16 bytes in every load.

    Tiles of fewer than 64 out features, which a small V makes, have the smaller products of earlier architectures.
    """
    for line in lines:
        expected = ""
        if line["kernel"] == "tiles":
            small = line["block_n"] < 64
            expected = (MMA_SYNC if small else INSTRUCTION[line["architecture"]])[line["dtype"]]
        offline.check(line, expected)
        if line["kernel"] == "token" and line["aligned"]:
            wide = ".v2.b64" if line["numbers"] in ("bf16", "fp16") else ".v4.b32"
            assert any(wide in load for load in line["loads"]), line


def test_interpreter(tmp_path):
    out = offline.run("interpret_sparse24.py", cache=tmp_path, interpret=True)
    assert out.strip() == "133 cases right"


def test_compiles_to_tensor_cores_on_every_target(tmp_path):
    lines = offline.lines("compile_sparse24.py", "one", "80", "86", "89", "90", "100", cache=tmp_path)
    assert [line["architecture"] for line in lines[::2]] == [80, 86, 89, 90, 100]
    check_compiled(lines)


@pytest.mark.exhaustive
@pytest.mark.parametrize("architecture", sorted(INSTRUCTION))
def test_every_configuration_compiles_to_tensor_cores(tmp_path, architecture):
    check_compiled(offline.lines("compile_sparse24.py", "all", str(architecture), cache=tmp_path))


def packed(out_features=8, in_features=4096, dtype=torch.int8, groups=1, pattern=None) -> Packed:
    """Return a packed weight of zeros."""
    bits4 = dtype == torch.int32
    weight = torch.zeros(out_features, in_features, dtype=torch.int8 if bits4 else dtype)
    scale = None if dtype in (torch.bfloat16, torch.float16, torch.float32) else torch.ones(out_features, groups)
    if pattern is None:
        values, indices = sparse24.pack_int4(weight) if bits4 else sparse24.pack(weight)
        return Packed(values, indices, scale, in_features)
    values, indices, columns = (venom.pack_int4 if bits4 else venom.pack)(weight, *pattern)
    return Packed(values, indices, scale, in_features, columns, *pattern)


def way(tokens, weight, dtype=torch.bfloat16) -> str:
    return kernels.way(torch.empty(tokens, weight.in_features, dtype=dtype), weight)


def test_ways():
    for dtype in (torch.int8, E4M3, E5M2, torch.int32, torch.bfloat16, torch.float16):
        assert way(1, packed(dtype=dtype)) == way(1, packed(dtype=dtype), torch.float32) == "token"
        assert way(2, packed(dtype=dtype)) == way(kernels.TILE_TOKENS, packed(dtype=dtype), torch.float16) == "tiles"
        assert (
            way(kernels.TILE_TOKENS + 1, packed(dtype=dtype)) == way(2, packed(dtype=dtype), torch.float32) == "whole"
        )
    assert way(1, packed(dtype=torch.float32)) == way(2, packed(dtype=torch.float32)) == "whole"
    assert way(1, packed(in_features=72)) == "tiles"  # no whole 16 bytes a thread
    assert way(1, packed(in_features=68)) == way(2, packed(in_features=68)) == "whole"  # no whole words
    assert way(1, packed(in_features=4096, groups=256)) == "tiles"  # a thread's 16 bytes, but two groups
    assert way(2, packed(in_features=4096, groups=1024)) == "whole"  # a word, but two groups
    for pattern, expected in (((64, 8), "tiles"), ((16, 8), "tiles"), ((8, 8), "tiles"), ((4, 8), "whole")):
        assert way(1, packed(pattern=pattern)) == "token"
        assert way(2, packed(pattern=pattern)) == expected  # of 8 rows a V of 8 is all
        assert way(kernels.COLUMN_TOKENS + 1, packed(pattern=pattern)) == "whole"
    assert way(1, packed(pattern=(64, 16), groups=128)) == way(2, packed(pattern=(64, 16), groups=128)) == "tiles"
    assert way(2, packed(pattern=(64, 16), groups=256)) == "whole"  # a word, but two groups
    assert way(1, packed(pattern=(64, 16), groups=512)) == "whole"  # a tile of 16 in features, but two groups


def test_fp8_is_read_as_it_is_where_the_processor_knows_it():
    for architecture, numbers in ((80, "e4m3"), (86, "e4m3"), (89, "fp8"), (90, "fp8"), (120, "fp8")):
        with mock.patch.object(sparse24_units, "architecture", return_value=architecture):
            assert sparse24_units.token_words(packed(dtype=E4M3)).numbers == numbers
            assert sparse24_units.token_words(packed(dtype=E5M2)).numbers == "e5m2"
            assert sparse24_units.tile_words(packed(dtype=E4M3)).numbers == "e4m3"


class Cuda:
    """A torch with cuSPARSELt of a version, on a card."""

    def __init__(self, version, architecture):
        self.version, self.architecture = version, architecture

    def __enter__(self):
        self.patches = [
            mock.patch.object(torch.backends.cusparselt, "is_available", return_value=self.version is not None),
            mock.patch.object(torch.backends.cusparselt, "version", return_value=self.version),
            mock.patch.object(cusparselt, "architecture", return_value=self.architecture),
        ]
        for each in self.patches:
            each.start()

    def __exit__(self, *error):
        for each in self.patches:
            each.stop()


@pytest.mark.parametrize(
    ("version", "architecture", "dtype", "size", "device", "says"),
    [
        (701, 90, torch.bfloat16, (4096, 4096), "cuda", ""),
        (602, 80, torch.float16, (16, 4096), "cuda", ""),
        (400, 86, torch.float16, (16, 4096), "cuda", ""),
        (502, 90, torch.bfloat16, (4096, 4096), "cuda", "cuSPARSELt is version 502 on sm_90: expected version 600"),
        (602, 100, torch.bfloat16, (4096, 4096), "cuda", "version 602 on sm_100: expected version 701"),
        (701, 75, torch.bfloat16, (4096, 4096), "cuda", "on sm_75: expected one of sm_80, sm_86, sm_89, sm_90, sm_100"),
        (None, 90, torch.bfloat16, (4096, 4096), "cuda", "this build of torch has no cuSPARSELt"),
        (701, 90, torch.float32, (4096, 4096), "cuda", "activations are torch.float32: expected bfloat16 or float16"),
        (701, 90, torch.bfloat16, (4100, 4096), "cuda", "the weight is 4100 x 4096: expected multiples of 16"),
        (701, 90, torch.bfloat16, (4096, 4100), "cuda", "the weight is 4096 x 4100: expected multiples of 16"),
        (701, 90, torch.bfloat16, (4096, 4096), "cpu", "cuSPARSELt needs a CUDA device and this is cpu"),
    ],
)
def test_whether_cusparselt_is_there(version, architecture, dtype, size, device, says):
    with Cuda(version, architecture):
        reason = cusparselt.reason_against(dtype, *size, torch.device(device))
    assert says in reason
    assert bool(says) == bool(reason)


def test_many_tokens_are_multiplied_by_cusparselt_where_it_is_there():
    """Its two calls are stood in for: the order that the sparse cores want is not ours to know, the arguments are."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 64, generator=generator) * venom.mask(torch.rand(32, 64, generator=generator), 32, 4)
    weight = weight.to(torch.bfloat16)
    bias = torch.randn(32, generator=generator)
    calls = []

    def compress(dense):
        assert dense.is_contiguous()
        calls.append("compress")
        return dense

    def product(compressed, right, bias=None, transpose_result=False):
        assert right.t().is_contiguous()
        assert right.shape[1] % cusparselt.TOKEN_STEP == 0
        assert transpose_result
        calls.append("product")
        return (compressed @ right + bias.unsqueeze(1)).t().contiguous()

    x = torch.randn(cusparselt.TOKENS + 3, 64, generator=generator).to(torch.bfloat16)
    values, indices = sparse24.pack(weight)
    with (
        mock.patch.object(cusparselt, "reason_against", return_value=""),
        mock.patch.object(torch, "_cslt_compress", compress, create=True),
        mock.patch.object(torch, "_cslt_sparse_mm", product, create=True),
        mock.patch.object(kernels, "dense", lambda packed, dtype: weight.to(dtype)),
    ):
        assert way(cusparselt.TOKENS - 1, packed(32, 64)) == "whole"
        assert way(cusparselt.TOKENS, packed(32, 64)) == "cusparselt"
        out = kernels.linear_sparse24(x, values, indices, None, bias)
    assert calls == ["compress", "product"]
    expected = torch.nn.functional.linear(x, weight, bias.to(torch.bfloat16))
    assert out.shape == expected.shape
    assert torch.allclose(out.float(), expected.float(), rtol=2.0**-6, atol=0.1)
