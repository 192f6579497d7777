"""Watching what is multiplied with a block's weights while it runs: the activations that calibration observes.

At the level of single operators, so that it makes no difference whether a weight belongs to a linear layer or is a
parameter that the model multiplies by itself, one expert after another.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Generic, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

See = Callable[[str, int | None, torch.Tensor], None]

_aten = torch.ops.aten
PRODUCTS = {
    _aten.mm.default: (0, 1),
    _aten.addmm.default: (1, 2),
    _aten.bmm.default: (0, 1),
    _aten.baddbmm.default: (1, 2),
    _aten.linear.default: (0, 1),
}
"""Where each product has its operands."""


Made = TypeVar("Made")


class Latest(Generic[Made]):
    """What was made of a tensor, made once while one tensor is met several times in a row: q, k and v are fed the same.

    Tensors are the same where they are one window onto one memory that nothing has written to in between. The tensor
    itself is not kept alive.
    """

    def __init__(self, make: Callable[[torch.Tensor], Made]) -> None:
        self._make = make
        self._of: tuple[StorageWeakRef, tuple[Any, ...]] | None = None
        self._made: list[Made] = []

    def __call__(self, x: torch.Tensor) -> Made:
        """`make(x)`, now or when x was met."""
        if x.is_inference():  # which doesn't say when it is written to
            return self._make(x)
        storage = StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        window = (storage.cdata, x.storage_offset(), x.shape, x.stride(), x.dtype, x._version)
        if self._of is None or self._of[1] != window or self._of[0].expired():  # type: ignore[no-untyped-call]
            self._made.clear()  # first, so that its memory is free
            self._made.append(self._make(x))
            self._of = (storage, window)
        return self._made[0]


class Enough(BaseException):
    """Ends a run that has shown what was to be seen; no Exception, so that a model's own handlers let it through."""


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Tells, for every product with a watched parameter, what it is multiplied with.

    Args:
        parameters: the parameters by name, each with its axis of the in features.
        see: called with a parameter's name, the expert's number (None for a plain weight) and the activations [..., K].
        stop: end `of` as soon as each parameter has met a product: for parameters that meet one in a run. The last
            product and what the block makes of it aren't computed.
        dtype: compute these products in this dtype, and what they give in float32; None: as they come.

    Attributes:
        met: how many products each parameter has met.
    """

    def __init__(
        self,
        parameters: Mapping[str, tuple[torch.Tensor, int]],
        see: See,
        *,
        stop: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see
        if len({p.untyped_storage().data_ptr() for p, _ in parameters.values()}) < len(parameters):
            raise ValueError("two of the parameters share their memory, and could not be told apart")
        self._known = {p.untyped_storage().data_ptr(): (name, p, axis) for name, (p, axis) in parameters.items()}
        self._stop, self._dtype = stop, dtype
        self._left: set[str] = set()
        self._cast: dict[str, torch.Tensor] = {}
        self._latest = Latest(lambda x: x.to(dtype))
        self.met: Counter[str] = Counter()

    def of(self, run: Callable[[], Any]) -> None:
        """Watch `run()`, to its end or until it has shown enough."""
        self._left = {name for name, _, _ in self._known.values()}
        with suppress(Enough), self:
            run()

    @property
    def once_each(self) -> bool:
        """Whether every parameter has met exactly one product, and none is of several experts."""
        return all(self.met[name] == 1 and p.ndim < 3 for name, p, _ in self._known.values())

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, and tell what meets a watched parameter."""
        if func in PRODUCTS:
            left, right = (args[position] for position in PRODUCTS[func])
            if func is _aten.linear.default:
                right = right.t()
            for weight, other in ((right, left), (left.transpose(-1, -2), right.transpose(-1, -2))):
                found = self._known.get(weight.untyped_storage().data_ptr())
                if found is not None:
                    self._tell(*found, weight, other)
                    self._left.discard(found[0])
                    if self._stop and not self._left:
                        raise Enough
                    if self._dtype is not None and weight.dtype == torch.float32:
                        return self._lower(func, args, kwargs or {}, *found[:2])
                    break
        return func(*args, **(kwargs or {}))

    def _lower(self, func: Any, args: tuple[Any, ...], kwargs: Any, name: str, parameter: torch.Tensor) -> Any:
        """The product in the lower dtype; the parameter is cast once for all of its products."""
        if name not in self._cast:
            self._cast[name] = torch.empty_strided(
                parameter.shape, parameter.stride(), dtype=self._dtype, device=parameter.device
            ).copy_(parameter)
        home = parameter.untyped_storage().data_ptr()

        def lower(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
                return value
            if value.untyped_storage().data_ptr() == home:
                return self._cast[name].as_strided(value.shape, value.stride(), value.storage_offset())
            return self._latest(value) if value.ndim > 1 else value.to(self._dtype)

        return func(*(lower(value) for value in args), **kwargs).float()

    def _tell(
        self, name: str, parameter: torch.Tensor, axis: int, weight: torch.Tensor, activations: torch.Tensor
    ) -> None:
        """Hand on the activations of a product with `weight` [..., K, N], all or one expert of the parameter."""
        self.met[name] += 1
        if activations.shape[-1] != parameter.shape[axis]:
            return  # a part of the weight: what it meets says nothing of the rest
        if parameter.ndim < 3:
            self._see(name, None, activations)
        elif weight.ndim == 3 and weight.shape[0] == parameter.shape[0]:
            for expert, rows in enumerate(activations):
                self._see(name, expert, rows)
        else:
            expert = (weight.storage_offset() - parameter.storage_offset()) // parameter.stride(0)
            self._see(name, int(expert), activations)


def product_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype | None:
    """The dtype in which to observe products with a weight that is stored in this one; None: float32.

    bfloat16, in which the model itself multiplies that weight, where the device does it in hardware: it has float32's
    range, rounds a factor by 2**-9, and takes less than half of the time.
    """
    if stored != torch.bfloat16:
        return None
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else None


class ForcedRouting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes every token choose the same experts, whatever its router says.

    A router that takes the `topk` of as many scores as there are experts gets these instead, with their own scores.

    Args:
        experts: how many there are.
        chosen: which of them; filled up with others where more are asked for.

    Attributes:
        taken: how many were taken for each token, from the start of `chosen`; 0 when no router asked.
    """

    def __init__(self, experts: int, chosen: list[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._experts = experts
        self._order = [*chosen, *(number for number in range(experts) if number not in chosen)]
        self.taken = 0

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operator, or choose in its place."""
        out = func(*args, **(kwargs or {}))
        if func is not _aten.topk.default or args[0].shape[-1] != self._experts or out[1].shape[-1] >= self._experts:
            return out
        self.taken = out[1].shape[-1]
        index = torch.tensor(self._order[: out[1].shape[-1]], device=out[1].device).expand_as(out[1]).contiguous()
        return args[0].gather(-1, index), index
