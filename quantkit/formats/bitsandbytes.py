"""bitsandbytes' int8 format, which transformers loads with bitsandbytes. Written and read without its package.

A linear layer's tensors are `weight` int8 [N, K]; `SCB` float32 [N], the largest magnitude of each row, so that a
weight is code * SCB / 127; and `weight_format` uint8, a single 0. Weights are out x in, also where the model has them
in x out. The layout follows bitsandbytes 0.50 and transformers 5.23.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from quantkit.errors import CheckpointError
from quantkit.formats.base import Group, Layout, TensorSpec, checked_targets
from quantkit.scheme import LARGEST, Scheme
from quantkit.untrusted import fits, shown

NAME = "bitsandbytes"
THRESHOLD = 6.0
"""transformers' default, for a config that doesn't say."""


def reason_against(scheme: Scheme) -> str | None:
    """Why this format can't say the scheme, or None."""
    if scheme.outlier_columns is not None:
        return "it keeps no column of a weight in float"
    if scheme.sparsity is not None:
        return "it stores every weight, whatever its zeros"
    return None if scheme.threshold is not None else "it is for LLM.int8 alone"


def is_packed(scheme: Scheme) -> bool:
    """False: codes are bytes."""
    return False


def tensor_specs(
    scheme: Scheme, out_features: int, in_features: int, dtype: torch.dtype, transposed: bool = False
) -> dict[str, TensorSpec]:
    """What is stored for a linear layer [N, K], whatever the dtype of its float weight."""
    return {
        "weight": TensorSpec((out_features, in_features), torch.int8),
        "SCB": TensorSpec((out_features,), torch.float32),
        "weight_format": TensorSpec((), torch.uint8),
    }


def compress(
    scheme: Scheme,
    codes: torch.Tensor,
    scale: torch.Tensor,
    input_scale: torch.Tensor | None = None,
    transposed: bool = False,
) -> dict[str, torch.Tensor]:
    """Codes [N, K] and scale [N, 1] as they are stored.

    SCB = scale * 127 in float32: the row's largest magnitude, or one of its neighbours in float32, as several have the
    same scale. `decompress` gives a scale back bit for bit where it is a float32 number / 127, as LLM.int8's are.
    """
    largest = torch.finfo(torch.float32).max
    return {
        "weight": codes,
        "SCB": (scale.flatten().float() * 127.0).clamp(max=largest),
        "weight_format": torch.zeros((), dtype=torch.uint8),
    }


def decompress(
    scheme: Scheme, tensors: Mapping[str, torch.Tensor], in_features: int, transposed: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [N, K] as stored, and scale [N, 1] = SCB / 127 in float32."""
    return tensors["weight"], (tensors["SCB"] / 127.0).unsqueeze(1)


def config(scheme: Scheme, modules: Sequence[str], left: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linear layers are quantized but for those left.

    transformers takes an entry of `llm_int8_skip_modules` for a regex (before 5.23 for that of a name's beginning) and
    for the end of a name. So what is left is written by its plain name where that catches nothing else, and else as a
    regex that only it fits.
    """
    skipped = []
    for name in left:
        plain = re.fullmatch(r"[\w.]+", name) is not None
        plain = plain and not any(module.startswith(name) or skips(module, [name]) for module in modules)
        skipped.append(name if plain else f"^{re.escape(name)}$")
    return {
        "quant_method": NAME,
        "load_in_8bit": True,
        "_load_in_8bit": True,
        "load_in_4bit": False,
        "_load_in_4bit": False,
        "llm_int8_threshold": float(scheme.threshold or 0.0),
        "llm_int8_skip_modules": skipped,
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
    }


def skips(module: str, patterns: Iterable[str]) -> bool:
    """Whether transformers leaves the module of that name in float for one of `llm_int8_skip_modules`.

    It is `should_convert_module` of transformers 5.23. A model class's `_keep_in_fp32_modules` are such patterns too.
    """
    return any(fits(_regex(pattern), module) for pattern in patterns)


def _regex(pattern: str) -> str:
    """A regex from a name's start that fits what transformers skips for a pattern: a regex up to the border of a
    module's name, or the end of a name."""
    return rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))|.*{re.escape(pattern)}$"


def parse(config: Mapping[str, Any]) -> Layout:
    """Which modules have which scheme.

    Raises:
        CheckpointError: 4-bit weights, weights that aren't stored in int8, or a config that isn't one.
    """
    in_8bit = config.get("load_in_8bit", config.get("_load_in_8bit"))
    in_4bit = config.get("load_in_4bit", config.get("_load_in_4bit"))
    if in_8bit is not True or in_4bit or config.get("llm_int8_has_fp16_weight"):
        kind = "4-bit weights" if in_4bit else "no int8 weights"
        raise CheckpointError(
            f"quantization_config of bitsandbytes says {kind}, which quantkit doesn't read (it reads load_in_8bit "
            "without llm_int8_has_fp16_weight); load it with transformers and bitsandbytes"
        )
    threshold = config.get("llm_int8_threshold", THRESHOLD)
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= LARGEST:
        raise CheckpointError(
            f"llm_int8_threshold of quantization_config is {shown(threshold)}, not a number from 0; mend config.json"
        )
    skipped = config.get("llm_int8_skip_modules")
    names = [] if skipped is None else checked_targets(skipped, "llm_int8_skip_modules")
    ignore = checked_targets([f"re:{_regex(name)}" for name in names], "llm_int8_skip_modules")
    # From 0 on everything would be an outlier; bitsandbytes means that nothing is one.
    scheme = Scheme("int8", activation_dtype="int8", threshold=float(threshold) or None)
    return Layout((Group(scheme, ("Linear",)),), ignore, spares_head=skipped is None)
