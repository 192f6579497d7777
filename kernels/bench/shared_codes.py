"""The linear layers of a block on a CPU, W8A8: each quantizes what it is fed, or layers that are fed the same share.

    OMP_NUM_THREADS=1 python kernels/bench/shared_codes.py

q, k and v are fed one tensor, gate and up another. "shared" quantizes each tensor once, and gives the same bits. The
ratio says how many times as fast the seven layers together are for it. A tensor that was not written to in between is
known by its version, which it has under `torch.no_grad()` and not in `torch.inference_mode()`: both are measured. All
ways take turns in one run; every number is that of the fastest pass. Attention, norms and what calls the layers are
left out, so that a model gains less.
"""

import time
from collections.abc import Callable

import torch
from quantkit_kernels import cpu, formats
from torch import Tensor

BLOCKS = {"0.5B": (896, 128, 4864), "1B": (2048, 512, 8192), "8B": (4096, 1024, 14336)}
"""In features, out features of k and v, and of gate and up."""
PASSES = {1: 60, 16: 20, 256: 6}
Layer = tuple[Tensor, Tensor]


def layers(shape: tuple[int, int, int]) -> list[list[Layer]]:
    """Return the block's layers, those that are fed the same together: q, k, v; o; gate, up; down."""
    width, narrow, wide = shape
    sizes = [[(width, width), (narrow, width), (narrow, width)], [(width, width)], [(wide, width)] * 2, [(width, wide)]]
    return [[formats.quantize_weight(torch.randn(size) * 0.02, torch.int8) for size in group] for group in sizes]


def plain(x: Tensor, group: list[Layer]) -> list[Tensor]:
    """Return the outputs of layers that each quantize x."""
    return [cpu.linear_dynamic(x, *layer, None) for layer in group]


def shared(x: Tensor, group: list[Layer]) -> list[Tensor]:
    """Return the same, x being quantized once."""
    if len(group) == 1:
        return plain(x, group)
    codes, scale = cpu.quantize_per_token(x, torch.int8)
    return [cpu.scaled_mm(codes, weight, scale, row, None, x.dtype) for weight, row in group]


def seconds(run: Callable[[Tensor, list[Layer]], list[Tensor]], fed: list[Tensor], block: list[list[Layer]]) -> float:
    """Return how long a pass takes."""
    started = time.perf_counter()
    for x, group in zip(fed, block, strict=True):
        run(x, group)
    return time.perf_counter() - started


def main() -> None:
    """Print a line for each block and number of tokens."""
    torch.manual_seed(0)
    modes = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    for name, shape in BLOCKS.items():
        block = layers(shape)
        for tokens, passes in PASSES.items():
            fed = [torch.randn(tokens, group[0][0].shape[1]).bfloat16() for group in block]
            for x, group in zip(fed, block, strict=True):
                assert all(map(torch.equal, plain(x, group), shared(x, group)))
            least: dict[str, float] = {}
            for _ in range(passes):
                for mode, context in modes.items():
                    for run in (plain, shared):
                        with context():
                            took = seconds(run, fed, block)
                        key = f"{run.__name__} {mode}"
                        least[key] = min(took, least.get(key, took))
            ratio = least["plain no_grad"] / least["shared no_grad"]
            other = least["plain inference_mode"] / least["shared no_grad"]
            line = f"{name:4}  {tokens:4} tokens  {ratio:.3f} of no_grad, {other:.3f} of inference_mode without sharing"
            print(line, flush=True)  # noqa: T201 (the result)


if __name__ == "__main__":
    main()
