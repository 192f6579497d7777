"""One linear layer's tensors on disk, seen from the float weight [A, B] that they stand for, and back.

A weight is stored out x in, with a scale [N, G], or in x out, [K, N], with a scale [1, N]: its shape says which. Here
codes have the float weight's own shape, and the scale keeps both axes. N out features, K in features, G groups.

2:4 sparse codes are packed along the in features: such a weight is stored out x in always, and a scale [1, N] says that
the float weight is in x out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from quantkit_kernels.formats import FLOAT_DTYPES

from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats import FORMATS, TensorSpec
from quantkit.formats.places import misplaced
from quantkit.scheme import Scheme

SCALE, STATIC = "weight_scale", "input_scale"


def expert_specs(
    layout: ModuleType, scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype, transposed: bool
) -> dict[str, TensorSpec]:
    """What is stored for one expert of a parameter that holds them all, out x in or (transposed) in x out.

    Raises:
        RecipeError: groups of in features in an in x out parameter, whose scales no format has a place for.
    """
    if transposed and scheme.group_size is not None:
        raise RecipeError(
            f"experts in x out [{in_features}, {out_features}] have no groups of {scheme.group_size}; use group=channel"
        )
    sizes = (in_features, out_features) if transposed and scheme.sparsity is None else (out_features, in_features)
    specs: dict[str, TensorSpec] = layout.tensor_specs(scheme, *sizes, dtype)
    if not transposed:
        return specs
    return specs | {SCALE: TensorSpec((1, out_features), specs[SCALE].dtype)}


def compress_expert(
    layout: ModuleType, scheme: Scheme, codes: torch.Tensor, scale: torch.Tensor, transposed: bool
) -> dict[str, torch.Tensor]:
    """One expert's codes [N, K] and scale [N, G] as they are stored: in the parameter's own layout, or packed."""
    if transposed:
        codes = codes.t().contiguous() if scheme.sparsity is None else codes
        scale = scale.t().contiguous()
    stored: dict[str, torch.Tensor] = layout.compress(scheme, codes, scale)
    return stored


@dataclass(frozen=True)
class Stored:
    """How the tensors of one linear layer lie on disk.

    Attributes:
        format: the format's name.
        scheme: what the numbers look like.
        leaves: the last parts of the tensors' names.
        columns: columns of the codes as they are stored.
        flipped: whether the codes are stored with the axes of the float weight swapped.
        single: whether one scale is stored for all rows.
        turned: whether sparse codes are stored out x in, of a float weight in x out whose scale is stored so.
    """

    format: str
    scheme: Scheme
    leaves: tuple[str, ...]
    columns: int
    flipped: bool
    single: bool
    turned: bool = False

    def decode(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Codes [A, B], their scale [A, G] or [1, B], and the scale [1] of static activations.

        Raises:
            CheckpointError: what says where sparse codes stand says nothing.
        """
        for leaf, tensor in tensors.items():
            wrong = None if tensor.is_meta else misplaced(leaf, tensor, self.scheme, self.columns)
            if wrong is not None:
                raise CheckpointError(f"a {leaf!r} of the checkpoint {wrong}; download the checkpoint again")
        codes, scale = FORMATS[self.format].decompress(self.scheme, tensors, self.columns)
        if self.single:
            scale = scale.reshape(1, 1).expand(codes.shape[0], 1)
        if self.flipped or self.turned:
            codes = codes.t()
        if self.flipped:
            scale = scale.t()
        return codes, scale, tensors.get(STATIC)

    def encode(
        self, codes: torch.Tensor, scale: torch.Tensor, input_scale: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The tensors that `decode` reads so, by the last parts of their names."""
        if self.flipped or self.turned:
            codes = codes.t()
        if self.flipped:
            scale = scale.t()
        scale = scale.reshape(-1)[:1] if self.single else scale
        stored: dict[str, torch.Tensor] = FORMATS[self.format].compress(
            self.scheme, codes.contiguous(), scale.contiguous(), input_scale
        )
        return stored


def stored_as(
    layout: ModuleType,
    scheme: Scheme,
    prefix: str,
    tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    sizes: Sequence[tuple[int | None, int, bool]],
) -> Stored:
    """How a linear layer lies on disk, from shapes and dtypes.

    Args:
        layout: its format.
        scheme: what the numbers look like.
        prefix: what its tensors' names begin with.
        tensors: shape and dtype of its tensors, by the last parts of their names.
        sizes: what its codes may be: rows (None for any number), columns, and whether they are `flipped` then.

    Raises:
        CheckpointError: a tensor is missing, is one too many, or has another shape or dtype than the scheme demands.
    """
    expected = layout.tensor_specs(scheme, 1, scheme.group_size or 1, torch.float32)
    for leaf in sorted(set(expected) ^ set(tensors)):
        what = "is missing" if leaf in expected else f"is not part of the scheme {scheme.label!r} of its layer"
        raise CheckpointError(f"tensor {prefix + leaf!r} {what}; download the checkpoint again")
    words = next(leaf for leaf in expected if leaf.startswith("weight") and leaf not in (SCALE, "weight_shape"))
    shape, wrong = tensors[words][0], words
    for rows, columns, flipped in sizes:
        rows = shape[0] if rows is None and shape else rows
        spec = layout.tensor_specs(scheme, rows, columns, torch.float32)[words]
        if (spec.shape, spec.dtype) != tensors[words]:
            continue
        wrong = SCALE
        scale_shape, dtype = tensors[SCALE]
        single = scale_shape == (1,) and scheme.weight_granularity == "tensor"
        groups = 1 if scheme.group_size is None else columns // scheme.group_size
        turned = scheme.sparsity is not None and scale_shape == (1, rows) != (rows, groups)
        shapes = [(rows, groups)] + [(1, columns)] * (scheme.sparsity is None)
        if dtype in FLOAT_DTYPES and (single or turned or scale_shape in shapes):
            return Stored(layout.NAME, scheme, tuple(expected), columns, flipped and not turned, single, turned)
    raise CheckpointError(
        f"tensor {prefix + wrong!r} is {tensors[wrong][1]} {list(tensors[wrong][0])}, which doesn't fit the model and "
        f"the scheme {scheme.label!r}; the files and their config don't belong together: download both again"
    )
