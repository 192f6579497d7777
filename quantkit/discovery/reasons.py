"""Why an operation forbids a fold, in words."""

from collections.abc import Mapping

from torch import Tensor

from quantkit.discovery.products import multiplies_activations
from quantkit.discovery.trace import Op, Slot, Trace

_SUMS = ("add", "sub", "rsub")
_ON_THE_WAY = (*_SUMS, "mul", "div", "_to_copy", "clone", "copy", "_unsafe_view", "native_dropout", "index_add", "cat")


class Reasons:
    """Words for what an operation does with scaled tensors."""

    def __init__(self, trace: Trace) -> None:
        self.trace = trace

    def of(self, op: Op, labelled: Mapping[int, Tensor], consumed: bool) -> str:
        """Why the operation doesn't keep the scales of the leaves that carry some.

        `consumed` says whether a linear weight takes them too.
        """
        others = [
            leaf for i, leaf in enumerate(op.leaves) if isinstance(leaf, Slot) and leaf.floating and i not in labelled
        ]
        scaled = [op.leaves[i] for i in labelled]
        activations = [slot for slot in others if slot.active]
        read = [slot.parameter for slot in scaled if slot.parameter is not None]
        if op.name in _SUMS and activations:
            if consumed or self._reaches_output(op):
                return f"its output also goes to the residual stream ({op.name})"
            return f"its output is added to another activation ({op.name})"
        if multiplies_activations(op):
            if read and others:
                return f"{read[0]} is multiplied with something else as well ({op.name})"
            if activations or len(scaled) > 1:
                return f"its output is multiplied with another activation ({op.name}), as in attention scores"
            return f"its channels are mixed by a product that isn't scaled along them ({op.name})"
        if len(scaled) > 1:
            return f"its channels are mixed with each other ({op.name})"
        return f"it feeds {op.name.lstrip('_')}, which doesn't keep a channel's scale"

    def _reaches_output(self, op: Op) -> bool:
        """Whether the result is the block's output but for sums and factors."""
        reached = {slot.storage for slot in op.results}
        start = self.trace.ops.index(op)
        for later in self.trace.ops[start + 1 :]:
            if later.name in _ON_THE_WAY and any(slot.storage in reached for slot in later.slots):
                reached |= {slot.storage for slot in later.results}
        return bool(reached & self.trace.outputs)
