"""Products in Triton that don't read the rows of a weight which meet zeros: y = x @ W_t, and the gated MLP around it.

W_t is [K, N], so that the weights of an in feature lie side by side. A program has some out features, a part of K and
one token. It looks at BLOCK_K numbers of x at a time: where all are zero it goes on, else it loads the rows of those
that aren't, by a mask, so that the others cost no memory traffic, and adds to float32 sums that stay in registers. Each
token reads its own rows; those that several read come from the second-level cache. The parts of K go to a workspace in
float32 and are added up in a fixed order by a second kernel: no atomics, so results repeat. Nothing is compacted, and
no number of the device is waited for, so that a CUDA graph captures it and its replays skip what their own x has zero.

The gated MLP is two such kernels: one has a neuron's row of `up` [I, K] times x, where the neuron's gate isn't zero,
the other is the product above, from the first one's float32 results.

More than FEW_TOKENS tokens have few zeros in common, and are multiplied with all rows, by cuBLAS.

Error: |y - exact| <= (K + 4) * 2**-24 * sum over k of |x * w * scale| + 2**-24 * |bias|, then one rounding to x's
dtype.
"""

import functools

import torch
import triton
from torch import Tensor

from quantkit_kernels import formats, generic
from quantkit_kernels.configurations import architecture, configuration
from quantkit_kernels.gpu import weight_only
from quantkit_kernels.gpu.skipping_tiles import neurons_kernel, rows_kernel

FEW_TOKENS = 16
"""The most tokens whose rows are read by themselves."""

MAX_PARTS = 32
"""The most programs that share K: beyond it the workspace's traffic is seen beside rows of a tenth of the neurons."""

PROGRAMS = 4
"""Programs for each processor: what they load depends on x, and others must fill the time that one waits."""


def launch(
    out: Tensor,
    x: Tensor,
    weight_t: Tensor,
    weight_scale: Tensor | None,
    bias: Tensor | None,
    config: dict[str, int] | None = None,
) -> None:
    """Write x @ (weight_t * scale) + bias into `out` [M, N], whose rows are contiguous; M is FEW_TOKENS at most.

    Args:
        out: [M, N], float.
        x: [M, K], float; any strides.
        weight_t: [K, N], float or int8; any strides, rows that are contiguous are loaded 16 bytes at a time.
        weight_scale: [N, 1] with int8, else None.
        bias: [N] or None.
        config: what `configuration` would return: block_n, block_k, num_warps, num_stages, and parts if it shall not
            be chosen by the number of processors.
    """
    if out.numel() == 0:
        return
    (tokens, in_features), out_features = x.shape, weight_t.shape[1]
    weight_scale, bias = _in_kernel(weight_scale), _in_kernel(bias)
    config = config or configuration(
        f"sparse_rows_{_bits(weight_t)}bit", tokens, out_features, in_features, architecture(x.device)
    )
    tiles, steps = triton.cdiv(out_features, config["block_n"]), triton.cdiv(max(in_features, 1), config["block_k"])
    parts = config.get("parts") or _parts(tiles * tokens, steps, x.device)
    steps_each = triton.cdiv(steps, min(parts, steps))
    parts = triton.cdiv(steps, steps_each)  # none of them is empty
    sums = out if parts == 1 else torch.empty((parts, *out.shape), dtype=torch.float32, device=out.device)
    nothing = x  # an address for what is absent
    # Triton launches on the current device; for CPU tensors (the interpreter) this changes nothing
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        rows_kernel[(tiles, parts, tokens)](
            x,
            weight_t,
            nothing if weight_scale is None else weight_scale,
            nothing if bias is None else bias,
            sums,
            out_features,
            in_features,
            steps_each,
            x.stride(0),
            x.stride(1),
            weight_t.stride(0),
            weight_t.stride(1),
            0 if parts == 1 else sums.stride(0),
            sums.stride(-2),
            HAS_SCALE=weight_scale is not None,
            HAS_BIAS=bias is not None and parts == 1,
            BLOCK_N=config["block_n"],
            BLOCK_K=config["block_k"],
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )
        if parts > 1:
            weight_only.sum_parts(out, sums, bias)


def launch_neurons(
    out: Tensor,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    config: dict[str, int] | None = None,
) -> None:
    """Write (x @ up.T * scale + bias) * gate into `out` [M, I], 0 where the gate is; M is FEW_TOKENS at most.

    Args:
        out: [M, I], float, rows contiguous.
        x: [M, K], float; any strides.
        gate: [M, I], float; any strides.
        up: [I, K], float or int8; any strides, rows that are contiguous are loaded 16 bytes at a time.
        up_scale: [I, 1] with int8, else None.
        up_bias: [I] or None.
        config: what `configuration` would return: block_n (neurons), block_k, num_warps and num_stages.
    """
    if out.numel() == 0:
        return
    (neurons, in_features), tokens = up.shape, x.shape[0]
    up_scale, up_bias = _in_kernel(up_scale), _in_kernel(up_bias)
    config = config or configuration(
        f"sparse_neurons_{_bits(up)}bit", tokens, neurons, in_features, architecture(x.device)
    )
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        neurons_kernel[(triton.cdiv(neurons, config["block_n"]), tokens)](
            x,
            gate,
            up,
            x if up_scale is None else up_scale,
            x if up_bias is None else up_bias,
            out,
            neurons,
            in_features,
            x.stride(0),
            x.stride(1),
            gate.stride(0),
            gate.stride(1),
            up.stride(0),
            up.stride(1),
            out.stride(0),
            HAS_SCALE=up_scale is not None,
            HAS_BIAS=up_bias is not None,
            BLOCK_N=config["block_n"],
            BLOCK_K=config["block_k"],
            num_warps=config["num_warps"],
            num_stages=config["num_stages"],
        )


def linear_sparse_input(x: Tensor, weight_t: Tensor, weight_scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return the output [..., N] in x's dtype: what `ops.linear_sparse_input` says, with this module's error."""
    tokens = generic.tokens(x)
    if tokens.shape[0] > FEW_TOKENS:
        return generic.linear_sparse_input(x, weight_t, weight_scale, bias)
    out = torch.empty((tokens.shape[0], weight_t.shape[1]), dtype=x.dtype, device=x.device)
    launch(out, tokens, weight_t, weight_scale, bias)
    return out.view(*x.shape[:-1], weight_t.shape[1])


def mlp_sparse(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    up_scale: Tensor | None,
    up_bias: Tensor | None,
    down_t: Tensor,
    down_scale: Tensor | None,
    down_bias: Tensor | None,
) -> Tensor:
    """Return the gated MLP's output [..., N] in x's dtype: what `ops.mlp_sparse` says, nothing rounded in between."""
    tokens, gates = generic.tokens(x), generic.tokens(gate)
    if tokens.shape[0] > FEW_TOKENS:
        return generic.mlp_sparse(x, gate, up, up_scale, up_bias, down_t, down_scale, down_bias)
    hidden = torch.empty(gates.shape, dtype=torch.float32, device=x.device)
    launch_neurons(hidden, tokens, gates, up, up_scale, up_bias)
    out = torch.empty((tokens.shape[0], down_t.shape[1]), dtype=x.dtype, device=x.device)
    launch(out, hidden, down_t, down_scale, down_bias)
    return out.view(*x.shape[:-1], down_t.shape[1])


def _in_kernel(tensor: Tensor | None) -> Tensor | None:
    """Return scales or a bias as kernels read them: contiguous, in a dtype that they know."""
    if tensor is None:
        return None
    return (tensor if tensor.dtype in formats.FLOAT_DTYPES else tensor.float()).contiguous()


def _bits(weight: Tensor) -> int:
    """Return by how many bits a weight's table is known: 8 or 16; float32 has that of 16."""
    return 8 if weight.dtype == torch.int8 else 16


def _parts(programs: int, steps: int, device: torch.device) -> int:
    """Return among how many programs K is split: so that there are PROGRAMS for each processor."""
    return max(1, min(PROGRAMS * _processors(device) // programs, steps, MAX_PARTS))


def _processors(device: torch.device) -> int:
    """Return how many multiprocessors the device has; asked once. For the CPU (the interpreter) a few."""
    if device.type != "cuda":
        return 8
    return _count(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _count(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)
