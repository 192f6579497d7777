"""The floor under a time that bytes and operations set, and a picture of what was reached."""

from pathlib import Path
from typing import Any

from torch import Tensor

from quantkit_kernels.benchmarks.cases import Case, Operands, read_bytes
from quantkit_kernels.errors import KernelError


def work(case: Case, operands: Operands, out: Any, out_features: int, in_features: int) -> tuple[int, int]:
    """Return the bytes that the op must move, each operand read once and each result written once; and operations.

    A mixture's experts without tokens need not be read: their weights are left out. Operations are two for each
    product of two numbers, and none for a quantizer, whose bytes are what costs.
    """
    results = [out] if isinstance(out, Tensor) else list(out)
    written = sum(each.numel() * each.element_size() for each in results)
    read = read_bytes(case, operands)
    if case.kind == "experts":
        offsets, weights = operands[-1], [each for each in operands if isinstance(each, Tensor) and each.ndim == 3]
        idle = int((offsets.diff() == 0).sum())
        read -= sum(each.numel() * each.element_size() // each.shape[0] * idle for each in weights)
    operations = 2 * results[0].shape[0] * out_features * in_features if case.multiplies else 0
    return read + written, operations


def floor_seconds(
    moved: int, operations: int, multiplies: int, ceilings: dict[str, float], fp8_products: bool = True
) -> float:
    """Return the least time that bytes and operations leave, by ceilings that were measured in bfloat16.

    Tensor cores multiply numbers of one byte twice as fast as bfloat16, or, before sm_89, fp8 not at all: then as fast.
    """
    rate = ceilings["product_operations_per_second"] * (2 if multiplies == 8 and fp8_products else 1)
    return max(moved / ceilings["copy_bytes_per_second"], operations / rate)


def plot(result: dict[str, Any], path: Path) -> None:
    """Write a picture: operations a second of each op against operations a byte, under the ceilings of the run.

    Raises:
        KernelError: where matplotlib is missing, nothing with operations was measured, or the file cannot be written.
    """
    plotter = _matplotlib()
    records = [each for each in result["records"] if each["microseconds"] and each["operations"] and each["bytes"]]
    if not records:
        raise KernelError("there is nothing to plot: no product was measured, choose other --ops")
    copied, multiplied = (result["ceilings"][key] for key in ("copy_bytes_per_second", "product_operations_per_second"))
    figure = plotter.figure.Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    names = sorted({each["op"] for each in records})
    for number, name in enumerate(names):
        points = [each for each in records if each["op"] == name]
        axes.scatter(
            [each["operations"] / each["bytes"] for each in points],
            [each["operations"] / each["microseconds"] / 1e6 for each in points],
            marker="osD^v<>Pp*Xh"[number % 12],
            color=f"C{number % 10}",
            s=24,
            label=name,
        )
    intensities = [each["operations"] / each["bytes"] for each in records]
    ends = [min(intensities) / 2, max([*intensities, 2 * multiplied / copied]) * 2]
    on_gpu = "architecture" in result["machine"]
    product = "bfloat16" if on_gpu else "float"
    lines = [(multiplied, f"copy and {product} product, measured", "-")]
    if on_gpu:
        lines.append((2 * multiplied, "twice that product: codes of one byte", "--"))
    for rate, label, style in lines:
        corner = rate / copied
        axes.plot(
            [ends[0], corner, ends[1]], [ends[0] * copied / 1e12, rate / 1e12, rate / 1e12], style, c="0.4", label=label
        )
    axes.set(xscale="log", yscale="log", xlabel="operations a byte", ylabel="10¹² operations a second")
    axes.set_title(str(result["machine"].get("device") or result["machine"].get("processor")))
    axes.legend(fontsize="small", ncols=2)
    axes.grid(alpha=0.3)
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise KernelError(f"the plot cannot be written to {path}: {error}") from error


def require_plots() -> None:
    """Raise KernelError, with how to install it, where matplotlib is missing: before anything is measured."""
    _matplotlib()


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
    except ImportError as error:
        raise KernelError("--plot needs matplotlib, which is not installed: pip install 'quantkit[plots]'") from error
    return matplotlib
