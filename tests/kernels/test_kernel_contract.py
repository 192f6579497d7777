"""The contract of every op: schema, typed function, shapes, checks, oracle, generic way, CPU way, Triton way.

`CONTRACT` says for each op where its parts are, or why it has none; an op that is registered and not in it fails here.
"""

import dataclasses
import importlib
import inspect
import itertools
import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
import torch
from quantkit_kernels import (
    backends,
    checks,
    formats,
    ops,
    ops_grouped,
    ops_quantization,
    ops_skipping,
    ops_sparse24,
    reference,
    sparse24,
    venom,
)
from quantkit_kernels.errors import KernelError
from quantkit_kernels.registration import SCHEMAS
from waiting import NothingWaits

INT8, E4M3, E5M2, INT32 = torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int32
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
N, K = 13, 70


@dataclasses.dataclass(frozen=True)
class Parts:
    """Where an op's parts are.

    Attributes:
        generic: the function that any device can run.
        cpu: the CPU's own, or the reason why there is none.
        triton: the function that launches kernels.
        dtypes: of the quantized numbers, those that the op takes.
        oracle: its name in reference.py.
    """

    generic: str
    cpu: str
    triton: str
    dtypes: tuple[torch.dtype, ...] = (INT8, E4M3, E5M2)
    oracle: str = ""


ELEMENTWISE = "no way of its own: torch's elementwise operators are the CPU's"
CONTRACT = {
    "quantize_per_token": Parts("formats.quantize_per_token", ELEMENTWISE, "gpu.quantization.quantize_per_token"),
    "quantize_per_tensor": Parts("formats.quantize_per_tensor", ELEMENTWISE, "gpu.quantization.quantize_per_tensor"),
    "quantize_per_group": Parts("formats.quantize_per_group", ELEMENTWISE, "gpu.quantization.quantize_per_group"),
    "rms_norm_quantize": Parts("generic.rms_norm", ELEMENTWISE, "gpu.quantization.rms_norm_quantize"),
    "silu_mul_quantize": Parts("generic.silu_mul", ELEMENTWISE, "gpu.quantization.silu_mul_quantize"),
    "dequantize": Parts("formats.dequantize", ELEMENTWISE, "gpu.dequantize.dequantize", oracle="decoded_weight"),
    "scaled_mm": Parts("generic.scaled_mm", "cpu.scaled_mm", "gpu.linears.scaled_mm"),
    "linear_dynamic": Parts("generic.linear_dynamic", "cpu.linear_dynamic", "gpu.linears.linear_dynamic"),
    "linear_tensor": Parts("generic.linear_tensor", "cpu.linear_tensor", "gpu.linears.linear_tensor"),
    "linear_block": Parts(
        "generic.linear_block", "cpu_decoding.linear_block", "gpu.linears.linear_block", dtypes=(E4M3, E5M2)
    ),
    "linear_llm_int8": Parts(
        "generic.linear_llm_int8", "cpu.linear_llm_int8", "gpu.llm_int8.linear_llm_int8", dtypes=(INT8,)
    ),
    "linear_grouped": Parts("generic.linear_dynamic", "cpu.linear_dynamic", "gpu.grouped.linear_grouped"),
    "linear_weight_only": Parts(
        "generic.linear_weight_only", "cpu_decoding.linear_weight_only", "gpu.weight_only.linear_weight_only"
    ),
    "linear_weight_only_packed": Parts(
        "generic.linear_weight_only_packed",
        "cpu_decoding.linear_weight_only_packed",
        "gpu.weight_only.linear_weight_only_packed",
        dtypes=(INT32,),
    ),
    "linear_sparse_input": Parts(
        "generic.linear_sparse_input",
        "cpu_skipping.linear_sparse_input",
        "gpu.skipping.linear_sparse_input",
        dtypes=(INT8, *FLOATS),
    ),
    "linear_sparse24": Parts(
        "generic.linear_sparse24",
        "cpu_decoding.linear_sparse24",
        "gpu.sparse24.linear_sparse24",
        dtypes=(INT8, E4M3, E5M2, INT32, *FLOATS),
    ),
    "linear_venom": Parts(
        "generic.linear_venom",
        "cpu_decoding.linear_venom",
        "gpu.sparse24.linear_venom",
        dtypes=(INT8, E4M3, E5M2, INT32, *FLOATS),
    ),
    "mlp_sparse": Parts(
        "generic.mlp_sparse", "cpu_skipping.mlp_sparse", "gpu.skipping.mlp_sparse", dtypes=(INT8, *FLOATS)
    ),
}
PAIRS = [(op, dtype) for op, parts in CONTRACT.items() for dtype in parts.dtypes]
OTHER_DTYPES = (INT8, E4M3, E5M2, INT32, torch.uint8, torch.float16)


@dataclasses.dataclass(frozen=True)
class Case:
    """How an op is called.

    Attributes:
        tokens: M.
        dtype: that of what is in float.
        bias: whether there is one.
        strided: whether the tensors have gaps between their rows and columns.
        variant: which of the optional ways an op has: a scale that is given, 3 bits, weights alone.
    """

    tokens: int = 5
    dtype: torch.dtype = torch.float32
    bias: bool = True
    strided: bool = False
    variant: bool = False


CASES = (
    Case(),
    Case(tokens=0, dtype=torch.bfloat16, bias=False, variant=True),
    Case(tokens=1, dtype=torch.float16, strided=True),
    Case(tokens=3, dtype=torch.bfloat16, bias=False, strided=True, variant=True),
)


def gaps(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same numbers with gaps between rows and columns."""
    as_bytes = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    wide = as_bytes.repeat_interleave(3, 0).repeat_interleave(2, 1)[::3, ::2]
    return wide.view(tensor.dtype) if tensor.element_size() == 1 else wide


def sparse_arguments(op: str, dtype: torch.dtype, case: Case) -> list[Any]:
    """Return the arguments of an op with a packed sparse weight."""
    generator = torch.Generator().manual_seed(0)
    in_features, spread = 72, gaps if case.strided else torch.Tensor.clone
    x = torch.randn(case.tokens, in_features, generator=generator).to(case.dtype)
    weight = torch.randn(N, in_features, generator=generator)
    weight = weight * venom.mask(weight.abs(), 3, 8)  # which is 2:4 as well
    bias = torch.randn(N, generator=generator).to(case.dtype) if case.bias else None
    codes, scale = weight.to(dtype if dtype in FLOATS else case.dtype), None
    if dtype not in FLOATS:
        group, bits = 9 if case.variant else None, 4 if dtype == INT32 else 8
        codes, scale = formats.quantize_weight(codes, INT8 if dtype == INT32 else dtype, group, bits=bits)
    module = sparse24 if op == "linear_sparse24" else venom
    pattern = () if module is sparse24 else (3, 8)
    pack = module.pack_int4 if dtype == INT32 else module.pack
    return [spread(x), *map(spread, pack(codes, *pattern)), scale, bias, *pattern]


def arguments(op: str, dtype: torch.dtype, case: Case) -> list[Any]:
    """Return an op's arguments in a case, ragged where it can be."""
    if op in ("linear_sparse24", "linear_venom"):
        return sparse_arguments(op, dtype, case)
    generator = torch.Generator().manual_seed(0)
    in_features = 256 if op in ("linear_block", "quantize_per_group") else K
    x = torch.randn(case.tokens, in_features, generator=generator).to(case.dtype)
    x[:, ::9] *= 20
    weight = torch.randn(N, in_features, generator=generator)
    spread = gaps if case.strided else torch.Tensor.clone
    if op in ("linear_sparse_input", "mlp_sparse"):
        return skipping_arguments(op, dtype, case, x, spread, generator)
    code_dtype = INT8 if dtype == INT32 else dtype
    granularity = "block" if op == "linear_block" else "row"
    codes, scale = formats.quantize_weight(weight.to(case.dtype), code_dtype, granularity=granularity)
    bias = torch.randn(N, generator=generator).to(case.dtype) if case.bias else None
    given = torch.full((1,), 0.04) if case.variant else None
    x, codes = spread(x), spread(codes)
    if op == "linear_grouped":
        bounds = [0, case.tokens // 2, case.tokens // 2, case.tokens]
        experts = [each.expand(3, *each.shape).clone() for each in (codes, scale)]
        return [x, *experts, torch.tensor(bounds, dtype=torch.int32), "none" if case.variant else "token"]
    if op == "linear_weight_only_packed":
        bits = 3 if case.variant else 4
        return [x, spread(formats.pack_int32(codes >> (8 - bits), bits)), scale, bias, bits]
    if op == "scaled_mm":
        x_codes, x_scale = formats.quantize_per_token(x, code_dtype)
        return [spread(x_codes), codes, x_scale, scale, bias, case.dtype]
    made: dict[str, list[Any]] = {
        "quantize_per_token": [x, dtype],
        "quantize_per_tensor": [x, dtype, given],
        "quantize_per_group": [x, dtype],
        "rms_norm_quantize": [x, weight[0].to(case.dtype), 1e-6, float(case.variant), dtype],
        "silu_mul_quantize": [x, spread(x + 1), dtype],
        "dequantize": [codes, scale[0, :1].clone() if case.variant else scale, case.dtype],
        "linear_tensor": [x, codes, scale[0, :1].clone() if case.variant else scale, given, bias],
        "linear_llm_int8": [x, codes, scale, bias, 6.0],
    }
    return made.get(op, [x, codes, scale, bias])


def skipping_arguments(op: str, dtype: torch.dtype, case: Case, x: torch.Tensor, spread: Any, generator: Any) -> Any:
    """Return the arguments of an op that skips rows: a weight in float or int8, and much of what it looks at zero."""
    width = 11 if op == "mlp_sparse" else K

    def weight(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        made = torch.randn(rows, columns, generator=generator).to(case.dtype)
        codes, scale = formats.quantize_weight(made, INT8) if dtype == INT8 else (made.to(dtype), None)
        return codes, scale

    bias = torch.randn(N, generator=generator).to(case.dtype) if case.bias else None
    down, scale = weight(N, width)
    down_t = spread(down.t().contiguous())
    if op == "linear_sparse_input":
        return [spread(x.masked_fill(torch.rand(x.shape, generator=generator) < 0.8, 0.0)), down_t, scale, bias]
    up, up_scale = weight(width, K)
    gate = torch.randn(case.tokens, width, generator=generator).relu().to(case.dtype)
    up_bias = torch.randn(width, generator=generator).to(case.dtype) if case.bias else None
    return [spread(x), spread(gate), spread(up), up_scale, up_bias, down_t, scale, bias]


def overload(op: str) -> Any:
    """Return the op as torch has it."""
    return getattr(torch.ops.quantkit, op).default


# The parts are there


def test_every_registered_op_is_in_the_table_and_in_every_list():
    assert set(CONTRACT) == set(SCHEMAS) == set(backends.TRITON_KERNELS)
    assert set(SCHEMAS) <= set(ops.__all__)
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("quantkit::")}
    assert {name.removeprefix("quantkit::").partition(".")[0] for name in registered} == set(SCHEMAS)
    assert set(SCHEMAS) > backends.FP8_PRODUCTS


@pytest.mark.parametrize("op", CONTRACT)
def test_schema_typed_function_checks_and_oracle_take_the_same_arguments(op):
    schema = [(argument.name, argument.has_default_value()) for argument in overload(op)._schema.arguments]
    assert schema[-1] == ("backend", True)
    assert not overload(op)._schema.is_mutable
    typed = inspect.signature(getattr(ops, op)).parameters
    assert [(name, each.default is not each.empty) for name, each in typed.items()] == schema
    names = [name for name, _ in schema]
    assert list(inspect.signature(getattr(checks, op)).parameters) == names[:-1]
    oracle = inspect.signature(getattr(reference, CONTRACT[op].oracle or op)).parameters
    assert [name for name in oracle if name in names] == [name for name in names[:-1] if name != "out_dtype"]


@pytest.mark.parametrize("op", CONTRACT)
def test_torch_knows_shapes_gradient_and_every_device(op):
    for key in ("CompositeExplicitAutograd", "Meta", "Autograd"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"quantkit::{op}", key)
    assert torch.Tag.pt2_compliant_tag in overload(op).tags


@pytest.mark.parametrize("op", CONTRACT)
def test_triton_has_a_kernel_for_every_dtype_that_an_op_takes_and_others_are_refused(op):
    assert set(CONTRACT[op].dtypes) == backends.TRITON_KERNELS[op]
    for dtype in set(OTHER_DTYPES) - set(CONTRACT[op].dtypes):
        taken = arguments(op, CONTRACT[op].dtypes[0], Case())
        taken = [dtype if isinstance(value, torch.dtype) and value in formats.QMAX else value for value in taken]
        place = {"scaled_mm": (0, 1), "dequantize": (0,), "mlp_sparse": (2,)}.get(op, (1,) if "linear" in op else ())
        for index in place:
            taken[index] = torch.ones(taken[index].shape).to(dtype)
        for backend in backends.BACKENDS:
            with pytest.raises(KernelError, match=re.escape(str(dtype))):
                overload(op)(*taken, backend)


@pytest.mark.parametrize("op", CONTRACT)
def test_an_op_has_a_way_for_the_cpu_or_a_reason(op):
    has_none = CONTRACT[op].cpu == ELEMENTWISE
    assert (op in backends.CPU_PATHS) is not has_none
    dtype = CONTRACT[op].dtypes[0]
    assert ops.select_backend(op, dtype, CPU, "auto") == ("torch" if has_none else "cpu")


# The parts are what runs


def run(way: str, call: Callable[[], Any]) -> Any:
    """Return what a call gives where that way serves it."""
    with ExitStack() as stack:
        for module in (ops, ops_grouped, ops_quantization, ops_skipping, ops_sparse24):
            stack.enter_context(mock.patch.object(module, "take_backend", return_value=way))
        return call()


def watched(name: str, **how: Any) -> mock._patch:
    """Return a patch of a function of the package that notes its calls."""
    module, _, leaf = name.rpartition(".")
    home = importlib.import_module(f"quantkit_kernels.{module}")
    return mock.patch.object(home, leaf, **(how or {"side_effect": getattr(home, leaf)}))


@pytest.mark.parametrize("way", ["torch", "cpu"])
@pytest.mark.parametrize(("op", "dtype"), [pair for pair in PAIRS if CONTRACT[pair[0]].cpu != ELEMENTWISE])
def test_torch_code_is_the_generic_one_or_that_of_the_cpu(op, dtype, way):
    """Each is called on its own way and not on the other, but for the CPU's `linear_tensor`, which is the generic one
    with its own product."""
    taken = arguments(op, dtype, Case())
    with watched(CONTRACT[op].generic) as generic, watched(CONTRACT[op].cpu) as own:
        run(way, lambda: overload(op)(*taken))
    assert own.called is (way == "cpu")
    assert generic.called is (way == "torch") or (op, way) == ("linear_tensor", "cpu")


@pytest.mark.parametrize(("op", "dtype"), [pair for pair in PAIRS if CONTRACT[pair[0]].cpu == ELEMENTWISE])
def test_torch_code_without_a_way_for_the_cpu_is_the_generic_one(op, dtype):
    with watched(CONTRACT[op].generic) as generic:
        overload(op)(*arguments(op, dtype, Case()))
    generic.assert_called_once()


@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_triton_gets_the_arguments_of_the_op(op, dtype):
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    taken = arguments(op, dtype, Case())
    answer = overload(op)(*taken)
    with watched(CONTRACT[op].triton, return_value=answer) as kernel:
        found = run("triton", lambda: overload(op)(*taken))
    kernel.assert_called_once()
    given = kernel.call_args.args
    assert len(given) == len(taken)
    for one, other in zip(given, taken, strict=True):
        both = isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        assert torch.equal(one.float(), other.float()) if both else one == other
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, answer)), strict=True):
        assert torch.equal(one.float(), other.float())


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_a_cuda_graph_could_capture_what_triton_runs(op, dtype, case):
    """The kernels are left out; nothing around them asks for a number, and no shape depends on one."""
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    from triton.runtime.jit import JITFunction

    taken = arguments(op, dtype, case)
    expected = overload(op)(*taken)
    module, _, leaf = CONTRACT[op].triton.rpartition(".")
    implementation = getattr(importlib.import_module(f"quantkit_kernels.{module}"), leaf)
    if op == "dequantize":
        taken[1] = taken[1].expand(N, -1)  # which the op does before
    launched = []
    with mock.patch.object(JITFunction, "run", lambda self, *_, **__: launched.append(self)), NothingWaits():
        found = implementation(*taken)
    for one, other in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.is_contiguous()
    assert launched or not case.tokens


# What torch demands of an op


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_opcheck(op, dtype, case):
    """Torch compares inputs before and after with allclose, which fp8 doesn't have (torch 2.13): there, bytes do."""
    taken = arguments(op, dtype, case)
    before = [value.clone() if isinstance(value, torch.Tensor) else value for value in taken]
    out = overload(op)(*taken)
    outputs = out if isinstance(out, tuple) else (out,)
    memory = {value.untyped_storage().data_ptr() for value in taken if isinstance(value, torch.Tensor)}
    for value, copy in zip(taken, before, strict=True):
        assert not isinstance(value, torch.Tensor) or torch.equal(value.float(), copy.float())
    for each in outputs:
        assert each.is_contiguous()
        assert not each.numel() or each.untyped_storage().data_ptr() not in memory
    tensors = [each for each in (*taken, *outputs) if isinstance(each, torch.Tensor)]
    with_fp8 = any(each.dtype in (E4M3, E5M2) for each in tensors)
    some = ("test_faketensor", "test_autograd_registration")
    if with_fp8:
        gives_fp8 = any(each.dtype in (E4M3, E5M2) for each in outputs)
        torch.library.opcheck(
            overload(op), taken, test_utils=some if gives_fp8 else (*some, "test_aot_dispatch_dynamic")
        )
    else:
        torch.library.opcheck(overload(op), taken)


# Selection


@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_every_op_and_dtype_is_chosen_or_refused_with_the_reason(monkeypatch, op, dtype):
    monkeypatch.setattr(backends, "triton_installed", lambda: True)
    monkeypatch.setattr(backends, "architecture", lambda device: 90)
    own = "torch" if CONTRACT[op].cpu == ELEMENTWISE else "cpu"
    chosen = {(place.type, backend): ops.select_backend(op, dtype, place, backend)
              for place, backend in itertools.product((CPU, CUDA), ("auto", "torch"))}  # fmt: skip
    assert chosen == {
        ("cpu", "auto"): own, ("cpu", "torch"): own, ("cuda", "auto"): "triton", ("cuda", "torch"): "torch",
    }  # fmt: skip
    assert ops.select_backend(op, dtype, CUDA, "triton") == "triton"

    def refused(device: torch.device, backend: str = "triton", kind: torch.dtype = dtype) -> str:
        with pytest.raises(KernelError) as caught:
            ops.select_backend(op, kind, device, backend)
        return str(caught.value)

    remedy = ": use backend 'auto' or 'torch'"
    assert refused(CUDA, "mkl") == "backend is 'mkl': expected one of auto, torch, triton"
    assert refused(CUDA, kind=torch.uint8) == f"backend 'triton' has no kernel for {op} with torch.uint8 yet{remedy}"
    monkeypatch.setattr(backends, "_interpreting", lambda: False)
    assert refused(CPU) == (
        f"backend 'triton' cannot run {op} on device cpu: expected tensors on a CUDA device (on the CPU Triton runs "
        f"only in its interpreter){remedy}"
    )
    assert refused(torch.device("meta")).startswith(f"backend 'triton' cannot run {op} on device meta: expected")
    least = 89 if op in backends.FP8_PRODUCTS and dtype.is_floating_point else 80
    monkeypatch.setattr(backends, "architecture", lambda device: least)
    assert ops.select_backend(op, dtype, CUDA, "auto") == "triton"
    monkeypatch.setattr(backends, "architecture", lambda device: 75)
    assert ops.select_backend(op, dtype, CUDA, "auto") == "torch"
    assert refused(CUDA) == (
        f"backend 'triton' cannot run {op} with {dtype} on sm_75: expected sm_{least} or later, use backend 'auto' or "
        "'torch'"
    )
    monkeypatch.setattr(backends, "triton_installed", lambda: False)
    assert ops.select_backend(op, dtype, CUDA, "auto") == "torch"
    assert refused(CUDA) == (
        f"backend 'triton' cannot run {op}: Triton is not installed (it exists on Linux only){remedy}"
    )


@pytest.mark.parametrize(("op", "dtype"), PAIRS)
def test_a_call_that_asks_for_triton_on_a_cpu_is_refused(op, dtype):
    pytest.importorskip("triton", reason="Triton exists on Linux only")
    with pytest.raises(
        KernelError, match=f"^backend 'triton' cannot run {op} on device cpu: expected tensors on a CUDA"
    ):
        overload(op)(*arguments(op, dtype, Case()), "triton")
