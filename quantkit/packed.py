"""PackedWeight: codes and scales that a model's own code handles like the float weight they stand for.

Code that runs experts takes one expert's weight out of a parameter and multiplies activations with it (`F.linear(x,
P[e])`, `x @ P[e]`), or multiplies with all of them at once (`torch.bmm(x, P)`). A `PackedWeight` understands just that:
it can be indexed, sliced along the out features and transposed like a tensor, and where activations are multiplied
with it an op on packed weights runs. Anything else that code does with it is refused by name; nothing is unpacked.

E experts, K in features, N out features. A weight is out x in, [N, K] or [E, N, K], or in x out, [K, N] or [E, K, N].
"""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from quantkit_kernels import ops
from quantkit_kernels.formats import FLOAT_DTYPES

from quantkit.errors import QuantkitError
from quantkit.modules import op_of
from quantkit.scheme import Scheme


class UnsupportedUse(QuantkitError, AttributeError):  # noqa: N818  (what happened, not what went wrong)
    """An operation that packed weights don't have. It counts as an AttributeError, so that `hasattr` says no."""


def is_groupable(scheme: Scheme) -> bool:
    """Whether one op multiplies all experts' tokens: a scale a row, and activations by token or in float."""
    known = op_of(scheme, packed=False) in ("linear_dynamic", "linear_weight_only")
    return known and scheme.weight_granularity == "row" and scheme.group_size is None


class PackedWeight:
    """Codes and scales that stand for a weight [A, B], or for one an expert [E, A, B].

    Attributes:
        codes: [A, B] or [E, A, B], int8 or fp8, any strides.
        scale: as `codes`, but for the axis of the in features, which holds G groups (one without groups).
        in_axis: that axis.
        scheme: what the numbers look like.
        dtype: the dtype that the weight is taken for: that of the float weight.
        input_scale: one scale an expert for static activations, or None.
        backend: `auto`, `torch` or `triton`.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        scale: torch.Tensor,
        in_axis: int,
        scheme: Scheme,
        *,
        dtype: torch.dtype | None = None,
        input_scale: torch.Tensor | None = None,
        backend: str = "auto",
    ) -> None:
        self.codes, self.scale, self.in_axis, self.scheme = codes, scale, in_axis, scheme
        self.dtype = scale.dtype if dtype is None else dtype
        self.input_scale, self.backend = input_scale, backend

    def _with(self, codes: torch.Tensor, scale: torch.Tensor, in_axis: int, **changes: Any) -> "PackedWeight":
        kept = {"dtype": self.dtype, "input_scale": self.input_scale, "backend": self.backend}
        return PackedWeight(codes, scale, in_axis, self.scheme, **(kept | changes))

    # What a tensor says of itself.

    @property
    def shape(self) -> torch.Size:
        """The weight's shape."""
        return self.codes.shape

    @property
    def ndim(self) -> int:
        """2, or 3 with an axis of experts."""
        return self.codes.ndim

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    @property
    def requires_grad(self) -> bool:
        """False: the ops have no gradient."""
        return False

    def size(self, dim: int | None = None) -> torch.Size | int:
        """The shape, or one of its sizes."""
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        """As `ndim`."""
        return self.ndim

    def numel(self) -> int:
        """How many weights there are."""
        return self.codes.numel()

    def __len__(self) -> int:
        return self.shape[0]

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"PackedWeight(shape={list(self.shape)}, in_axis={self.in_axis}, {self.scheme.label})"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(torch.Tensor, name):
            raise refusal(f"{name!r}", self)
        raise AttributeError(f"PackedWeight has no attribute {name!r}")

    # What changes no number: a weight is decoded to the dtype of the activations that it meets.

    @property
    def data(self) -> "PackedWeight":
        """Itself."""
        return self

    def detach(self) -> "PackedWeight":
        """Itself."""
        return self

    def contiguous(self) -> "PackedWeight":
        """Itself: every op takes any strides."""
        return self

    def to(self, *args: Any, **kwargs: Any) -> "PackedWeight":
        """The same codes, taken for a weight of another float dtype. A move to another device is refused."""
        wanted = [value for value in (*args, *kwargs.values()) if not isinstance(value, bool) and value is not None]
        for value in [each for each in wanted if isinstance(each, (torch.Tensor, PackedWeight))]:
            wanted += [value.dtype, value.device]
        dtypes = [value for value in wanted if isinstance(value, torch.dtype)]
        devices = [torch.device(value) for value in wanted if isinstance(value, (str, int, torch.device))]
        if not set(dtypes) <= set(FLOAT_DTYPES) or any(place.type != self.device.type for place in devices):
            raise refusal(f"to{(*args, *kwargs.values())}", self)
        return self._with(self.codes, self.scale, self.in_axis, dtype=dtypes[-1] if dtypes else self.dtype)

    def float(self) -> "PackedWeight":
        """As `to(torch.float32)`."""
        return self.to(torch.float32)

    def type_as(self, other: torch.Tensor) -> "PackedWeight":
        """As `to(other.dtype)`."""
        return self.to(other.dtype)

    # Views.

    def permute(self, *dims: Any) -> "PackedWeight":
        """The weight with its in and out features swapped, or not; the axis of experts stays the first."""
        order = [dim % self.ndim for dim in (dims[0] if len(dims) == 1 else dims)]
        if self.ndim == 3 and order[0] != 0:
            raise refusal(f"permute{dims}", self)
        return self._with(self.codes.permute(order), self.scale.permute(order), order.index(self.in_axis))

    def transpose(self, dim0: int, dim1: int) -> "PackedWeight":
        """The weight with two axes swapped."""
        order = list(range(self.ndim))
        order[dim0], order[dim1] = order[dim1], order[dim0]
        return self.permute(*order)

    def t(self) -> "PackedWeight":
        """One expert's weight, transposed."""
        if self.ndim != 2:
            raise refusal("t()", self)
        return self.transpose(0, 1)

    @property
    def T(self) -> "PackedWeight":  # noqa: N802  (a tensor's name)
        """As `t()`."""
        return self.t()

    @property
    def mT(self) -> "PackedWeight":  # noqa: N802  (a tensor's name)
        """The weights, transposed expert by expert."""
        return self.transpose(-2, -1)

    def view(self, *shape: Any) -> "PackedWeight":
        """Itself, for the shape that it has: experts that a parameter holds one below the other are an axis already."""
        wanted = list(shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape)
        if wanted.count(-1) == 1 and len(wanted) == self.ndim:
            place = wanted.index(-1)
            wanted[place] = self.shape[place]
        if tuple(wanted) != tuple(self.shape):
            raise refusal(f"view{shape}", self)
        return self

    def reshape(self, *shape: Any) -> "PackedWeight":
        """As `view`."""
        return self.view(*shape)

    def squeeze(self, dim: int) -> "PackedWeight":
        """The only expert's weight; itself along other axes."""
        return self[0] if self.ndim == 3 and dim in (0, -3) and len(self) == 1 else self

    def __getitem__(self, index: Any) -> "PackedWeight":
        items = list(index) if isinstance(index, tuple) else [index]
        gaps = [place for place, item in enumerate(items) if item is Ellipsis]
        for place in gaps[:1]:
            items[place : place + 1] = [slice(None)] * (self.ndim - len(items) + 1)
        items += [slice(None)] * (self.ndim - len(items))
        if len(items) != self.ndim:
            raise refusal(f"indexing with {len(items)} indices", self)
        found = self
        for axis in reversed(range(self.ndim)):  # an expert is taken last, so that the other axes keep their numbers
            found = found._taken(axis, items[axis])
        return found

    def _taken(self, axis: int, item: Any) -> "PackedWeight":
        """The weight at one index of an axis, or in a range of it."""
        is_expert = self.ndim == 3 and axis == 0
        if isinstance(item, slice) and item == slice(None):
            return self
        if isinstance(item, torch.Tensor) and item.numel() == 1 and item.dtype in (torch.int64, torch.int32):
            number = int(item) % self.shape[axis] if is_expert else int(item)
            item = number if item.ndim == 0 else slice(number, number + 1)
        if isinstance(item, slice) and axis != self.in_axis:
            part = (slice(None),) * axis + (item,)
            chosen = self.input_scale[item] if self.input_scale is not None and is_expert else self.input_scale
            return self._with(self.codes[part], self.scale[part], self.in_axis, input_scale=chosen)
        if is_expert and isinstance(item, int) and not isinstance(item, bool):
            chosen = None if self.input_scale is None else self.input_scale[item].reshape(1)
            return self._with(self.codes[item], self.scale[item], self.in_axis - 1, input_scale=chosen)
        raise refusal(f"indexing axis {axis} with {item!r}", self)

    def __iter__(self) -> Iterator["PackedWeight"]:
        if self.ndim != 3:
            raise refusal("iteration over rows", self)
        return (self[expert] for expert in range(len(self)))

    def unbind(self, dim: int = 0) -> tuple["PackedWeight", ...]:
        """Every expert's weight."""
        if dim not in (0, -3):
            raise refusal(f"unbind(dim={dim})", self)
        return tuple(self)

    def split(self, split_size: int | Sequence[int], dim: int = 0) -> tuple["PackedWeight", ...]:
        """Parts along the experts or the out features."""
        axis = dim % self.ndim
        total = self.shape[axis]
        if isinstance(split_size, int):
            split_size = [min(split_size, total - start) for start in range(0, total, split_size)]
        ends = [sum(split_size[: count + 1]) for count in range(len(split_size))]
        return tuple(self._taken(axis, slice(end - size, end)) for end, size in zip(ends, split_size, strict=True))

    def chunk(self, chunks: int, dim: int = 0) -> tuple["PackedWeight", ...]:
        """As `split`, into that many parts (fewer where they don't come out even)."""
        return self.split(-(-self.shape[dim] // chunks), dim)

    # Products.

    def times(self, x: torch.Tensor, bias: torch.Tensor | None, contracted: int, name: str) -> torch.Tensor:
        """The product [..., N] in x's dtype of activations [..., K] with one expert's weight.

        Args:
            x: activations.
            bias: [N], or None.
            contracted: the weight's axis that the model's code multiplies x's last axis with.
            name: what the code called, for a message.
        """
        if self.ndim != 2 or self.in_axis != contracted:
            raise refusal(f"{name} along axis {contracted}", self)
        codes, scale = (self.codes, self.scale) if contracted == 1 else (self.codes.t(), self.scale.t())
        op = op_of(self.scheme, packed=False)
        if op == "linear_tensor":
            return ops.linear_tensor(x, codes, scale, self.input_scale, bias, self.backend)
        if op == "linear_llm_int8":
            return ops.linear_llm_int8(x, codes, scale, bias, float(self.scheme.threshold or 0.0), self.backend)
        if op == "linear_block":
            raise refusal(f"{name} with {self.scheme.label}", self)
        product = ops.linear_weight_only if op == "linear_weight_only" else ops.linear_dynamic
        return product(x, codes, scale, bias, self.backend)

    def grouped(self, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The products [M, N] in x's dtype of tokens [M, K], sorted by expert, each with its expert's weight [K, N].

        Args:
            x: activations.
            ends: [E], where each expert's tokens end; the last number is M.
        """
        if not is_groupable(self.scheme) or self.ndim != 3 or self.in_axis != 1:
            raise refusal(f"grouped_mm with {self.scheme.label}", self)
        offsets = torch.nn.functional.pad(ends.to(torch.int32), (1, 0))
        activations = "none" if self.scheme.activation_dtype is None else "token"
        codes, scale = self.codes.transpose(1, 2), self.scale.transpose(1, 2)
        return ops.linear_grouped(x, codes, scale, offsets, activations, self.backend)

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        return _matmul(x, self)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """What a function of torch gives for packed weights among its arguments: a product, or a view."""
        return _dispatch(func, args, kwargs or {})


def _delegated(name: str) -> Any:
    """That property or method of PackedWeight, for what holds one."""
    known = getattr(PackedWeight, name)
    if isinstance(known, property):
        return property(lambda self: getattr(self.packed, name), doc=known.__doc__)

    def method(self: "Holder", *args: Any, **kwargs: Any) -> Any:
        return getattr(self.packed, name)(*args, **kwargs)

    method.__name__, method.__doc__ = name, known.__doc__
    return method


class Holder:
    """Something that a model's code takes for the packed weight that it holds.

    `to` and `float` are left out: a module that holds a weight has its own.
    """

    @property
    @abstractmethod
    def packed(self) -> PackedWeight:
        """The weight."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the weight is taken for."""
        return self.packed.dtype

    shape, ndim, device, data = map(_delegated, ("shape", "ndim", "device", "data"))
    requires_grad, T, mT = map(_delegated, ("requires_grad", "T", "mT"))  # noqa: N815  (a tensor's names)
    size, dim, numel, detach, contiguous = map(_delegated, ("size", "dim", "numel", "detach", "contiguous"))
    permute, transpose, t, view, reshape = map(_delegated, ("permute", "transpose", "t", "view", "reshape"))
    squeeze, unbind, split, chunk = map(_delegated, ("squeeze", "unbind", "split", "chunk"))
    __len__, __iter__, __getitem__ = map(_delegated, ("__len__", "__iter__", "__getitem__"))
    __bool__, __rmatmul__ = map(_delegated, ("__bool__", "__rmatmul__"))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """As that of `PackedWeight`."""
        return _dispatch(func, args, kwargs or {})


def refusal(what: str, weight: PackedWeight) -> UnsupportedUse:
    """The error for an operation that packed weights don't have."""
    return UnsupportedUse(
        f"the model's code uses {what} on packed experts {list(weight.shape)}, which can only be indexed, sliced along "
        "the out features, transposed, and multiplied with activations along the in features; leave them in float"
    )


def _linear(x: Any, weight: Any, bias: Any = None) -> torch.Tensor:
    """F.linear with a packed weight [N, K]."""
    if not isinstance(weight, PackedWeight) or not isinstance(x, torch.Tensor):
        raise refusal("linear", _packed_among([x, weight, bias]))
    return weight.times(x, bias, 1, "linear")


def _matmul(x: Any, other: Any) -> torch.Tensor:
    """torch.matmul with packed weights on the right: [K, N], or [E, K, N] with as many batches of x, or with one."""
    if not isinstance(other, PackedWeight) or not isinstance(x, torch.Tensor):
        raise refusal("a product from the left", _packed_among([x, other]))
    if other.ndim == 2:
        return other.times(x, None, 0, "matmul")
    experts = len(other)
    if x.ndim == 3 and experts == 1:
        return other[0].times(x, None, 0, "matmul")
    if x.ndim > 3 or (x.ndim == 3 and x.shape[0] not in (1, experts)):
        raise refusal(f"matmul with activations {list(x.shape)}", other)
    batches = x.expand(experts, *x.shape[-2:]) if x.ndim == 3 else [x] * experts
    return torch.stack([expert.times(batch, None, 0, "matmul") for expert, batch in zip(other, batches, strict=True)])


def _mm(x: Any, mat2: Any) -> torch.Tensor:
    """torch.mm and torch.bmm, which spread no batches."""
    fits = isinstance(mat2, PackedWeight) and isinstance(x, torch.Tensor) and x.ndim == mat2.ndim
    if not fits or (x.ndim == 3 and x.shape[0] != len(mat2)):
        raise refusal(f"mm with {list(x.shape)}", _packed_among([x, mat2]))
    return _matmul(x, mat2)


def _added(added: torch.Tensor, x: Any, other: Any) -> torch.Tensor:
    """torch.addmm and torch.baddbmm."""
    return _mm(x, other) + added


def _grouped(x: Any, mat2: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> torch.Tensor:
    """What grouped_mm of tokens [M, K], sorted by expert, with weights [E, K, N], gives; offs [E] are their ends."""
    fits = isinstance(mat2, PackedWeight) and isinstance(x, torch.Tensor) and isinstance(offs, torch.Tensor)
    if not fits or x.ndim != 2 or mat2.ndim != 3 or bias is not None or out_dtype not in (None, x.dtype):
        raise refusal("grouped_mm with these arguments", _packed_among([x, mat2]))
    return cast("PackedWeight", mat2).grouped(x, offs)


_PRODUCTS: dict[str, Callable[..., torch.Tensor]] = {
    "linear": _linear,
    "matmul": _matmul,
    **dict.fromkeys(("grouped_mm", "_grouped_mm", "grouped_mm_fallback"), _grouped),
    **dict.fromkeys(("mm", "bmm"), _mm),
    **dict.fromkeys(("addmm", "baddbmm"), _added),
}
_VIEWS = ("transpose", "t", "permute", "reshape", "squeeze", "unbind", "split", "chunk", "numel")


def _dispatch(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a function of torch gives for packed weights among its arguments.

    Raises:
        UnsupportedUse: it is none that packed weights have.
    """
    args = tuple(arg.packed if isinstance(arg, Holder) else arg for arg in args)
    kwargs = {key: arg.packed if isinstance(arg, Holder) else arg for key, arg in kwargs.items()}
    name = getattr(func, "__name__", str(func))
    if name in _PRODUCTS and kwargs.keys() <= {"input", "weight", "bias", "other", "mat2", "offs", "out_dtype"}:
        return _PRODUCTS[name](*args, **{"x" if key == "input" else key: value for key, value in kwargs.items()})
    if name in _VIEWS and args and isinstance(args[0], PackedWeight):
        return getattr(args[0], name)(*args[1:], **kwargs)
    raise refusal(name, _packed_among([*args, *kwargs.values()]))


def _packed_among(values: list[Any]) -> PackedWeight:
    """The first packed weight among a function's arguments, or in a list among them."""
    for value in values:
        if isinstance(value, (PackedWeight, Holder)):
            return value.packed if isinstance(value, Holder) else value
        if isinstance(value, (list, tuple)):
            with_any = [each for each in value if isinstance(each, (PackedWeight, Holder))]
            if with_any:
                return _packed_among(with_any)
    raise TypeError("torch asked for a product of packed weights, but there is none among the arguments")
