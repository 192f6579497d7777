"""The tensors that say where the kept weights of a sparse layer stand: whether they say it."""

import torch
from quantkit_kernels import sparse24, venom

from quantkit.scheme import Scheme

PLACES = ("weight_indices", "weight_columns", "bitmask")
"""The last parts of their names."""


def misplaced(leaf: str, tensor: torch.Tensor, scheme: Scheme, in_features: int) -> str | None:
    """What is wrong with the values of one of PLACES, or None; None of any other tensor.

    Args:
        leaf: the last part of its name.
        tensor: of the shape and dtype that its format demands.
        scheme: of its layer.
        in_features: K.
    """
    if leaf == "weight_columns" and scheme.tiles is not None and not venom.are_columns(tensor, scheme.tiles[1]):
        return f"does not name four of every {scheme.tiles[1]} columns in ascending order"
    said = leaf != "weight_indices" or sparse24.are_ascending(tensor, scheme.shared_columns(in_features))
    if leaf == "bitmask":
        try:
            sparse24.indices_of_bitmask(tensor, in_features)
        except ValueError:
            said = False
    return None if said else "does not say of every four weights where two are"
