"""Linear layers by what they compute, not by their class: `x @ W.T + b` or `x @ W + b` with one 2-D weight.

So GPT-2's Conv1D (weight in x out) and subclasses of nn.Linear with a forward pass of their own are found, and a
subclass that computes something else isn't.
"""

import copy
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

TOKENS = (2, 3)
_known: dict[tuple[object, ...], str | None] = {}


def linear_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, int, int, bool]]:
    """Every linear layer: its name, the module, K in features, N out features, and whether the weight is [K, N]."""
    for name, module in model.named_modules():
        orientation = linear_orientation(module)
        if orientation is not None:
            rows, columns = module.weight.shape  # type: ignore[union-attr, misc]
            transposed = orientation == "in_out"
            yield name, module, *((rows, columns) if transposed else (columns, rows)), transposed


def linear_orientation(module: nn.Module) -> str | None:
    """`out_in` where the module computes x @ weight.T + bias, `in_out` where it's x @ weight + bias, else None.

    Such a module's only parameters are a 2-D `weight` and maybe a 1-D `bias`. Its forward pass runs on tensors of the
    meta device first, in bfloat16: shape and dtype must come out as those of a linear layer. Then a copy runs with
    random float32 weights on the CPU, and its output is held against both products in float64. The answer is kept for
    modules of the same class, shapes and settings; nn.Linear's own forward pass needs no run.
    """
    parameters = dict(module.named_parameters())
    weight, bias = parameters.get("weight"), parameters.get("bias")
    named = parameters.keys() <= {"weight", "bias"} and module._parameters.keys() >= parameters.keys()
    if not named or weight is None or weight.ndim != 2 or not weight.is_floating_point() or 0 in weight.shape:
        return None
    if bias is not None and bias.ndim != 1:
        return None
    if type(module).forward is nn.Linear.forward:
        return "out_in"
    settings = {name: value for name, value in vars(module).items() if name[0] != "_" and name != "training"}
    shapes = (tuple(weight.shape), None if bias is None else tuple(bias.shape))
    key = (type(module), shapes, tuple(sorted(settings.items(), key=lambda item: item[0])))
    try:
        if key not in _known:
            _known[key] = _probe(module)
        return _known[key]
    except TypeError:  # a setting that can't be looked up
        return _probe(module)


def _probe(module: nn.Module) -> str | None:
    """What the module's forward pass computes."""
    for orientation in ("out_in", "in_out"):
        if _has_shape(module, orientation) and _has_values(module, orientation):
            return orientation
    return None


def _has_shape(module: nn.Module, orientation: str) -> bool:
    """Whether activations [..., K] in bfloat16 come out as [..., N] in bfloat16."""
    out_features, in_features = _sizes(module, orientation)
    stand_ins = {
        name: torch.empty(value.shape, dtype=torch.bfloat16, device="meta") for name, value in _own(module).items()
    }
    out = _run(module, stand_ins, torch.empty(*TOKENS, in_features, dtype=torch.bfloat16, device="meta"))
    return isinstance(out, torch.Tensor) and tuple(out.shape) == (*TOKENS, out_features) and out.dtype == torch.bfloat16


def _has_values(module: nn.Module, orientation: str) -> bool:
    """Whether the output is the product, for random values in [-1, 1].

    A float32 sum of K + 1 products and the bias is off by at most (K + 2) * 2**-23 times the sum of their magnitudes.
    """
    _, in_features = _sizes(module, orientation)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator) * 2 - 1

    with torch.device("cpu"):  # whatever device a caller builds its model on
        values = {name: draw(*value.shape) for name, value in _own(module).items()}
        x = draw(*TOKENS, in_features)
        out = _run(module, values, x)
    weight = values["weight"].double()
    weight = weight.t() if orientation == "in_out" else weight
    bias = values["bias"].double() if "bias" in values else None
    exact = F.linear(x.double(), weight, bias)
    size = F.linear(x.double().abs(), weight.abs(), None if bias is None else bias.abs())
    bound = (in_features + 2) * 2.0**-23 * size
    return isinstance(out, torch.Tensor) and bool(((out.double() - exact).abs() <= bound).all())


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """The module's weight, and its bias if it has one."""
    return dict(module.named_parameters())


def _sizes(module: nn.Module, orientation: str) -> tuple[int, int]:
    """N and K."""
    first, second = _own(module)["weight"].shape
    return (second, first) if orientation == "in_out" else (first, second)


def _run(module: nn.Module, values: dict[str, torch.Tensor], x: torch.Tensor) -> object:
    """The output of a copy of the module with these values, or None where it doesn't take them."""
    new = {id(value): nn.Parameter(values[name], requires_grad=False) for name, value in _own(module).items()}
    made = copy.deepcopy(module, new).eval()  # the memo puts the new values in, without a copy of the old ones
    try:
        with torch.no_grad():
            return made(x)
    except Exception:  # whatever code that isn't a linear layer's does with this x
        return None
