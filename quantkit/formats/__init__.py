"""On-disk formats by name: pure functions from tensors to tensors, and the config that goes with them.

A format is a module with these names; adding one is one file here, one line in FORMATS and one oracle test.

    NAME                                    what `--format` and `quant_method` call it
    reason_against(scheme) -> str | None    why the format can't say the scheme
    is_packed(scheme) -> bool               whether codes are packed into words that an op must unpack
    tensor_specs(scheme, N, K, dtype, transposed=False) -> {name: spec}
                                            what is stored for one linear layer whose float weight has the dtype,
                                            bias aside
    compress(scheme, codes, scale, input_scale=None, transposed=False) -> {name: tensor}
                                            codes [N, K] and their scale as stored, and with static activations theirs
    decompress(scheme, tensors, K, transposed=False) -> (codes, scale)
                                            and back, but for `input_scale`, which is stored as it is used
    sparse_parts(scheme, tensors, K) -> (values, indices[, columns])
                                            of a 2:4 (or V:2:M) sparse weight, for a product that unpacks it (where it
                                            can be said)
    config(scheme, modules, left) -> dict   config.json's `quantization_config`: these linear layers are quantized,
                                            and those left in float
    parse(config) -> Layout                 which modules have which scheme

`transposed` says that the float weight lies in the model as [K, N] (GPT-2's kind of linear layer); codes are [N, K]
here all the same, and each format decides how it stores them. A scale is [N, G] with G groups of K (G = 1 by row), [1]
by tensor, and [ceil(N / 128), ceil(K / 128)] by block.
"""

from types import ModuleType
from typing import Any

from quantkit.errors import CheckpointError, RecipeError
from quantkit.formats import bitsandbytes, compressed_tensors, native
from quantkit.formats.base import Group, Layout, TensorSpec
from quantkit.scheme import Scheme

FORMATS: dict[str, ModuleType] = {form.NAME: form for form in (compressed_tensors, bitsandbytes, native)}

__all__ = ["FORMATS", "Group", "Layout", "TensorSpec", "choose", "of_config"]


def choose(scheme: Scheme, name: str = "auto") -> ModuleType:
    """The format of that name, or with `auto` the first that can say the scheme.

    Raises:
        RecipeError: the format is unknown, or can't say the scheme.
    """
    if name == "auto":
        # There is always one: native can say every scheme.
        return next(module for module in FORMATS.values() if module.reason_against(scheme) is None)
    if name not in FORMATS:
        raise RecipeError(f"format {name!r} is unknown; use auto, {', '.join(FORMATS)}")
    reason = FORMATS[name].reason_against(scheme)
    if reason is not None:
        raise RecipeError(f"format {name} cannot hold this recipe: {reason}; use --format auto")
    return FORMATS[name]


def of_config(config: Any, where: str) -> ModuleType:
    """The format of a checkpoint's `quantization_config`.

    Raises:
        CheckpointError: no format here reads it.
    """
    method = config.get("quant_method") if isinstance(config, dict) else config
    if not isinstance(method, str) or method not in FORMATS:
        raise CheckpointError(
            f"{where} is compressed as {method!r}, which quantkit {_readable()}; "
            "load it with the software that wrote it"
        )
    return FORMATS[method]


def _readable() -> str:
    *most, last = FORMATS
    return f"cannot read (it reads {', '.join(most)} and {last})"
