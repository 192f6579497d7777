"""Matrix products: which axis of which operand is contracted, and what becomes of labels. Nothing is multiplied."""

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.discovery.labels import ANY, UNSCALED, channel_of, collapse, opposite, power_of
from quantkit.discovery.trace import Op, Slot

# name: (position of the left operand [.., M, K], of the right one [.., K, N], of what is added, or None)
_OPERANDS: dict[str, tuple[int, int, int | None]] = {
    "mm": (0, 1, None),
    "bmm": (0, 1, None),
    "mv": (0, 1, None),
    "linear": (0, 1, 2),
    "addmm": (1, 2, 0),
    "addmv": (1, 2, 0),
    "baddbmm": (1, 2, 0),
    "_grouped_mm": (0, 1, None),
}
ATTENTION = "_scaled_dot_product"


@dataclass(frozen=True, eq=False)
class Product:
    """A matrix product `left @ right + added`.

    Attributes:
        left, right: its operands, [.., M, K] and [.., K, N] (`transposed`: [N, K]; `mv`: [K]).
        added: what is added to the product, or None.
        transposed: whether the right operand is stored as [N, K].
        grouped: whether each group of rows has its own right operand.
        vector: whether the right operand has no axis N.
    """

    left: Slot
    right: Slot
    added: Slot | None
    transposed: bool
    grouped: bool
    vector: bool

    @property
    def operands(self) -> tuple[tuple[Slot, int], tuple[Slot, int]]:
        """Each operand with the axis that is contracted."""
        right_axis = -1 if self.transposed or self.vector else -2
        return (self.left, len(self.left.size) - 1), (self.right, len(self.right.size) + right_axis)

    def free_axis(self, slot: Slot) -> int | None:
        """The axis of an operand that becomes an axis of the output, other than the batch."""
        if slot is self.left:
            return len(slot.size) - 2
        if self.vector:
            return None
        return len(slot.size) - (2 if self.transposed else 1)


def product_of(op: Op) -> Product | None:
    """The operation as a matrix product, or None if it isn't one."""
    places = _OPERANDS.get(op.name)
    if places is None or len(op.results) != 1 or op.written:
        return None
    args = op.leaves
    left, right = args[places[0]], args[places[1]]
    added = None if places[2] is None or places[2] >= len(args) else args[places[2]]
    if not isinstance(left, Slot) or not isinstance(right, Slot) or (op.name == "_grouped_mm" and len(right.size) != 3):
        return None
    if op.name in ("addmm", "addmv", "baddbmm") and _factor(op, "beta") == 0:
        added = None
    return Product(
        left,
        right,
        added if isinstance(added, Slot) else None,
        transposed=op.name == "linear",
        grouped=op.name == "_grouped_mm",
        vector=op.name in ("mv", "addmv"),
    )


def multiplies_activations(op: Op) -> bool:
    """Whether the operation is a matrix product of any kind, fused attention included."""
    return product_of(op) is not None or op.name.startswith(ATTENTION)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a product makes of its operands' labels.

    Attributes:
        label: the product's label, or None if some elements carry no single scale.
        wanted: with `label` None, the label along K that one operand would need to have for the scales to cancel, and
            that operand; or None if nothing would help.
    """

    label: Tensor | None
    wanted: tuple[Slot, Tensor] | None = None


def multiply(product: Product, left: Tensor | None, right: Tensor | None) -> Outcome:
    """What becomes of the operands' labels (None: no scale).

    Every term of a sum over K must carry the same scale. It does when only one operand has labels and they don't change
    along K, or when the operands' scales along K cancel.
    """
    x = _none(product.left) if left is None else left
    w = _none(product.right) if right is None else right
    if product.vector:
        w = w.unsqueeze(-1)
    if product.transposed:
        w = w.transpose(-1, -2)
    has_x, has_w = bool((x > 0).any()), bool((w > 0).any())
    if not (has_x and has_w):
        kept = collapse(x, -1) if has_x else collapse(w, -2)
        if kept is not None and product.grouped and has_w:
            kept = collapse(kept, 0)
            kept = None if kept is None else kept[0]
        if kept is not None:
            return Outcome(kept[..., 0] if product.vector else kept)
    along_x = collapse(x, *(i for i in range(x.ndim) if i != x.ndim - 1))
    along_w = collapse(w, *(i for i in range(w.ndim) if i != w.ndim - 2))
    if along_x is None or along_w is None:
        return Outcome(None)
    k = product.left.size[-1]
    on_x, on_w = along_x.reshape(-1).expand(k), along_w.reshape(-1).expand(k)
    if bool(_cancel(on_x, on_w).all()):
        return Outcome(torch.full([1] * len(product.left.size), UNSCALED)[..., 0 if product.vector else slice(None)])
    return Outcome(None, _wanted(product, on_x, on_w))


def _wanted(product: Product, on_x: Tensor, on_w: Tensor) -> tuple[Slot, Tensor] | None:
    """The weight that would have to be scaled along K, and its label there."""
    for slot, own, other in ((product.right, on_w, on_x), (product.left, on_x, on_w)):
        if slot.weightlike and bool(((own == UNSCALED) | (own == ANY) | _cancel(own, other)).all()):
            return slot, opposite(other)
    return None


def _cancel(x: Tensor, w: Tensor) -> Tensor:
    """Where two labels make no scale together: a zero cancels everything."""
    opposed = (x > 0) & (w > 0) & (channel_of(x) == channel_of(w)) & (power_of(x) + power_of(w) == 0)
    free = ((x == UNSCALED) | (x == ANY)) & ((w == UNSCALED) | (w == ANY))
    return opposed | free | (x == ANY) | (w == ANY)


def _none(slot: Slot) -> Tensor:
    """The label of an operand without scales: zeros that depend on nothing (a state's start) are zeros at any scale."""
    constant = not slot.active and not slot.parameters and not bool(slot.value.count_nonzero())
    return torch.full([1] * len(slot.size), ANY if constant else UNSCALED)


def _factor(op: Op, name: str) -> object:
    """A keyword argument of the operation (they come last when flattened), 1 if it wasn't given."""
    _, kwargs = torch.utils._pytree.tree_unflatten(list(op.leaves), op.spec)
    return kwargs.get(name, 1)
