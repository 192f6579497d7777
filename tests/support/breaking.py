"""Ways to break a compressed checkpoint, each a function that changes a folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch

Change = Callable[[Path], object]


def config(change: Callable[[dict[str, Any]], object]) -> Change:
    """A change of quantization_config."""

    def apply(folder: Path) -> None:
        stored = json.loads((folder / "config.json").read_text())["quantization_config"]
        change(stored)
        models.change_config(folder, quantization_config=stored)

    return apply


def group(**values: Any) -> Change:
    """A change of the only group; `weights` and `input_activations` are changed by what is in them."""

    def change(stored: dict[str, Any]) -> None:
        for key, value in values.items():
            old = stored["config_groups"]["group_0"].get(key)
            merged = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
            stored["config_groups"]["group_0"][key] = merged
            if key == "format":
                stored["format"] = value

    return config(change)


def two_groups(*targets: str) -> Change:
    """These targets get a group of their own, which scales weights by tensor."""

    def change(stored: dict[str, Any]) -> None:
        groups = stored["config_groups"]
        other = json.loads(json.dumps(groups["group_0"]))
        other["targets"] = list(targets)
        other["weights"]["strategy"] = "tensor"
        stored["config_groups"] = {"group_1": other, **groups}

    return config(change)


def ignored(*names: str) -> Change:
    return config(lambda stored: stored["ignore"].extend(names))


def key(**values: Any) -> Change:
    return lambda folder: models.change_config(folder, **values)


def without(*names: str) -> Change:
    return lambda folder: models.change_tensors(
        folder, lambda tensors: {key: value for key, value in tensors.items() if key not in names}
    )


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda folder: models.change_tensors(folder, lambda tensors: tensors | {name: change(tensors[name])})


def extra(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Change:
    return lambda folder: models.change_tensors(
        folder, lambda tensors: tensors | {name: torch.ones(shape, dtype=dtype)}
    )


def float_layer(name: str) -> Change:
    """The layer's weight in float, as it were left alone, and the config as it was."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = tensors[f"{name}.weight"].float()
        return {key: value for key, value in tensors.items() if key != f"{name}.weight_scale"} | {
            f"{name}.weight": weight
        }

    return lambda folder: models.change_tensors(folder, change)


def coded_layer(name: str) -> Change:
    """A float layer's weight as int8 codes with scales, and the config as it was."""

    def change(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weight = tensors[f"{name}.weight"]
        scale = torch.ones(weight.shape[0], 1)
        return tensors | {f"{name}.weight": weight.to(torch.int8), f"{name}.weight_scale": scale}

    return lambda folder: models.change_tensors(folder, change)


def kv_cache(**changes: Any) -> Change:
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
    return config(lambda stored: stored.update(kv_cache_scheme=scheme | changes))


def both(*changes: Change) -> Change:
    def apply(folder: Path) -> None:
        for change in changes:
            change(folder)

    return apply
