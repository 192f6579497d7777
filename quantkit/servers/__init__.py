"""Whether a server takes a checkpoint, by its rules and without the server.

Every rule says what it was read in or seen with. A server is a module with these names:

    NAME, VERSION              what it is called, and whose rules these are
    PLATFORMS                  the hardware that it is known to run on
    METHODS                    the quant_methods that it knows
    findings(contents, tensor_parallel) -> iterator of Finding

Rules are known for float checkpoints and compressed-tensors, and of bitsandbytes for transformers; other formats that a
server knows are `not checked`. A test that has the server can hold `check` against it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from quantkit.checkpoint import Hub
from quantkit.errors import RecipeError
from quantkit.servers import hf_loader, sglang, vllm
from quantkit.servers.contents import Contents, contents_of, of_config
from quantkit.servers.findings import HARDWARE, Finding, Verdict

SERVERS: dict[str, ModuleType] = {"vllm": vllm, "sglang": sglang, "transformers": hf_loader}
KNOWN = {"vllm": {"compressed-tensors"}, "sglang": {"compressed-tensors"}}
KNOWN["transformers"] = {"compressed-tensors", "bitsandbytes"}
"""The quant_methods whose rules are written down here; a method that a server doesn't have at all is an error there."""

__all__ = ["HARDWARE", "SERVERS", "Contents", "Finding", "Verdict", "check", "check_all", "of_recipe"]


def check(
    checkpoint: str | Path,
    server: str,
    hardware: str | None = None,
    tensor_parallel: int = 1,
    hub: Hub | None = None,
) -> Verdict:
    """What a server would do with a checkpoint, on this hardware or on any that quantkit knows rules for.

    Args:
        checkpoint: a folder or hub id.
        server: `vllm`, `sglang` or `transformers`.
        hardware: one of HARDWARE, or None for all of them that the server runs on.
        tensor_parallel: over how many devices every layer is split.
        hub: how to find the checkpoint.

    Raises:
        RecipeError: the server or the hardware is unknown, or the number isn't one.
        CheckpointError: there is no config, or a shard is missing or damaged.
    """
    return check_all(checkpoint, [server], hardware, tensor_parallel, hub)[0]


def check_all(
    checkpoint: str | Path,
    servers: Sequence[str],
    hardware: str | None = None,
    tensor_parallel: int = 1,
    hub: Hub | None = None,
) -> list[Verdict]:
    """What each of these servers would do with a checkpoint; arguments and errors are those of `check`."""
    if tensor_parallel < 1:
        raise RecipeError(f"tensor parallel is {tensor_parallel}: expected 1 or more devices")
    for server in servers:
        _module(server, hardware)
    contents = contents_of(checkpoint, hub)
    return [_verdict(contents, server, hardware, tensor_parallel) for server in servers]


def of_recipe(
    quantization_config: Mapping[str, Any] | None, config: Mapping[str, Any], name: str, *, experts: bool = False
) -> list[Verdict]:
    """What every server would do with a checkpoint of this config that is yet to be written.

    Only what follows from the config is checked: format, schemes, sizes of heads. `experts` says whether a mixture's
    experts are quantized too.
    """
    whole = {key: value for key, value in config.items() if key not in ("quantization_config", "compression_config")}
    if quantization_config is not None:
        whole["quantization_config"] = dict(quantization_config)
    contents = replace(of_config(whole, name), planned_experts=experts)
    return [_verdict(contents, server, None, 1) for server in SERVERS]


def _module(server: str, hardware: str | None) -> ModuleType:
    """The module of a server, or RecipeError for one that isn't known or doesn't run there."""
    if server not in SERVERS:
        raise RecipeError(f"server {server!r} is unknown; use {', '.join(SERVERS)}")
    module = SERVERS[server]
    if hardware is not None and hardware not in HARDWARE:
        kinds = ", ".join(f"{name} ({what})" for name, what in HARDWARE.items())
        raise RecipeError(f"hardware {hardware!r} is unknown; use one of {kinds}")
    if hardware is not None and hardware not in module.PLATFORMS:
        known = ", ".join(module.PLATFORMS)
        raise RecipeError(f"quantkit knows no rules of {module.NAME} on {hardware}; use one of {known}")
    return module


def _verdict(contents: Contents, server: str, hardware: str | None, tensor_parallel: int) -> Verdict:
    module = _module(server, hardware)
    looked_at = module.PLATFORMS if hardware is None else (hardware,)
    known = contents.method is None or contents.method in KNOWN[server]
    return Verdict.of(module.NAME, module.VERSION, module.findings(contents, tensor_parallel), looked_at, known=known)
