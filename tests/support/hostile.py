"""Values that no friendly checkpoint holds, and what must come of them: an answer, or one sentence."""

import json
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.scheme import Scheme

HUGE = (2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
ODD_TEXT = (
    "",
    " ",
    "\n",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\x07\x08\x7f\x9b",
    "\u202etxt.exe",
    "\u2028",
    "\ud800",
    "a\0b",
    "..",
    "../../etc/passwd",
    "/etc/passwd",
    "~nobody-of-this-name",
    "²",
    "٣",
    "9" * 5000,
    "x" * 100_000,
    "re:",
    "re:(",
    "re:(a+)+$",
    "re:.*",
    "*",
    "[",
    "__class__",
    "os.system",
    "NaN",
    "1e999",
    "Linear",
    "weight",
    "true",
)
numbers = (
    st.integers(-3, 300)
    | st.sampled_from(HUGE)
    | st.sampled_from([-value for value in HUGE])
    | st.floats()
    | st.sampled_from([float("nan"), float("inf"), float("-inf"), -0.0, 1e308, 5e-324])
)
texts = st.text(max_size=8) | st.sampled_from(ODD_TEXT)
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)
"""What JSON can say, with the numbers that Python's reader adds."""


def places(example: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value, itself first."""
    inner = example.items() if isinstance(example, dict) else enumerate(example) if isinstance(example, list) else ()
    return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


ODD = (
    *(None, True, False, 0, 1, 2, -1, 0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), float("-inf")),
    *(sign * number for number in HUGE for sign in (1, -1)),
    *ODD_TEXT,
    *([], {}, [[]], [None], [True], [2**63], ["re:(a+)+$"], [{}], {"": None}, {"a": {"a": []}}),
)
"""One of every kind of value that something may trip over."""


def changed(example: Any, odd: Iterable[Any] = ODD) -> Iterator[Any]:
    """Yield a JSON value with each of its places in turn holding each odd value, and without the place."""
    for path in places(example)[1:]:
        *outer, last = path
        for value in odd:
            found = json.loads(json.dumps(example))
            holder = found
            for key in outer:
                holder = holder[key]
            holder[last] = value
            yield found
        del holder[last]
        yield found
    yield from odd


@st.composite
def near(draw: st.DrawFn, example: Any) -> Any:
    """A JSON value in which one to three places hold something else, are gone, or have a neighbour."""
    found = [json.loads(json.dumps(example))]  # a list, so that the value itself has a place too
    for _ in range(draw(st.integers(1, 3))):
        *outer, last = draw(st.sampled_from(places(found)[1:]))
        holder = found
        for key in outer:
            holder = holder[key]
        kind = draw(st.sampled_from(("other", "other", "other", "gone", "more")))
        if kind == "gone" and outer:
            del holder[last]
        elif kind == "more" and isinstance(holder, dict):
            holder[draw(texts)] = draw(values)
        else:
            holder[last] = draw(values)
    return found[0]


def answer(call: Callable[[], Any], *, seconds: float = 5.0) -> Any:
    """What the call returns, or the QuantkitError that it raises; anything else is a failure, and so is a hang."""
    started = time.process_time()
    try:
        found = call()
    except QuantkitError as error:
        found = error
    if isinstance(found, QuantkitError) and not str(found).strip():
        raise AssertionError("an error without a sentence")
    taken = time.process_time() - started
    assert taken < seconds, f"took {taken:.1f} s"
    return found


def dumped(value: Any) -> bytes:
    """The value as JSON bytes, with half surrogates as they come."""
    return json.dumps(value).encode()


def all_answers(example: Any, call: Callable[[Any], Any], odd: Iterable[Any] = ODD) -> int:
    """How many of the changed values were answered at all, not refused; a failure names the value."""
    answered = 0
    for value in changed(example, odd):
        try:
            answered += not isinstance(answer(lambda value=value: call(value)), QuantkitError)
        except BaseException as error:
            error.add_note(f"given {repr(value)[:1000]}")
            raise
    return answered


def peak_bytes() -> int:
    """The largest resident memory that this process ever had."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def raw_safetensors(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """The path of a file with this header (a value, or bytes as they are), this length before it and data after it."""
    text = header if isinstance(header, bytes) else dumped(header)
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "block_structure": None, "actorder": None}
COMPRESSED_TENSORS = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "int-quantized",
            "weights": {**INT8, "strategy": "channel", "dynamic": False},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
            "output_activations": None,
        }
    },
    "ignore": ["lm_head", "re:.*router"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False},
    "sparsity_config": {},
    "transform_config": {},
}
PACKED = {
    **COMPRESSED_TENSORS,
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {**INT8, "num_bits": 4, "strategy": "group", "group_size": 32, "dynamic": False},
            "input_activations": None,
        }
    },
}
BLOCKS = {
    **COMPRESSED_TENSORS,
    "config_groups": {
        "group_0": {
            **COMPRESSED_TENSORS["config_groups"]["group_0"],  # type: ignore[index]
            "weights": {**INT8, "strategy": "block", "block_structure": "4x16", "dynamic": False},
        }
    },
}
BITSANDBYTES = {
    "quant_method": "bitsandbytes",
    "load_in_8bit": True,
    "load_in_4bit": False,
    "llm_int8_threshold": 6.0,
    "llm_int8_skip_modules": ["lm_head"],
    "llm_int8_has_fp16_weight": False,
}
NATIVE = {
    "quant_method": "quantkit",
    "version": 1,
    "groups": [{"scheme": Scheme("int8", 32).to_dict(), "modules": ["m.a"]}],
}
NATIVE_COLUMNS = {
    "quant_method": "quantkit",
    "version": 2,
    "groups": [
        {
            "scheme": Scheme("int8", activation_dtype="int8", threshold=6.0, outlier_columns=2).to_dict(),
            "modules": ["m.a"],
        }
    ],
}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
CONFIGS = {
    "compressed-tensors": COMPRESSED_TENSORS,
    "packed": PACKED,
    "blocks": BLOCKS,
    "bitsandbytes": BITSANDBYTES,
    "native": NATIVE,
    "native-columns": NATIVE_COLUMNS,
    "fp8": FP8,
}
"""A `quantization_config` of every kind that is read."""
