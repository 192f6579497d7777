# ruff: noqa: N803 (compile-time constants are written large, as Triton writes them)
"""What the codes of a quantized weight are as numbers, inside Triton kernels: fields of words, and fp8 by its bits.

A weight arrives in units: bytes with one code each, or words with several, the first in the lowest bits. How
they are read has a name, NUMBERS:

| NUMBERS | a unit | its codes |
| --- | --- | --- |
| int8 | int8, or an int32 word of four | two's complement |
| offset8 | uint8, or an int32 word of four | code + 128: `formats.pack_int32` with 8 bits |
| offset4 | an int32 word of eight | code + 8: `formats.pack_int32` with 4 bits |
| fp8 | fp8 | the processor's own conversion: E5M2 everywhere, E4M3 from sm_89 on |
| e4m3 | uint8, or an int32 word of four | E4M3 by its bits, for processors that do not know it |
| e5m2 | an int32 word of four | E5M2 by its bits |
| bf16, fp16 | an int64 word of four | the number itself |

Fields of 4 and 8 bits become float32 without an integer conversion, which is slow: or-ed with the exponent of 2**23
they are the lowest mantissa bits of a float32 number, and one multiply-add takes the rest away. Every step is exact.
The exponent comes as an argument of the kernel: an instruction has room for one constant, and so "and, or" is one.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl

EXPONENT = 0x4B000000
"""The bits of 2.0**23 in float32: what a kernel is given as `exponent`."""


@triton.jit
def field(words, exponent, BITS: tl.constexpr, i: tl.constexpr):
    """Return code i, in float32, of each int32 word that holds codes + 2**(BITS - 1) of 4 or 8 bits."""
    LOW: tl.constexpr = BITS * i
    # a field stays where it is while it lies within the 23 bits of the mantissa, else the word is shifted
    SHIFT: tl.constexpr = 0 if LOW + BITS <= 23 else (20 if BITS == 4 else 16)
    PLACE: tl.constexpr = LOW - SHIFT
    MASK: tl.constexpr = ((1 << BITS) - 1) << PLACE
    UNIT: tl.constexpr = 1.0 / (1 << PLACE)
    OFFSET: tl.constexpr = 8388608.0 / (1 << PLACE) + (1 << (BITS - 1))
    shifted = words >> SHIFT if SHIFT > 0 else words
    return ((shifted & MASK) | exponent).to(tl.float32, bitcast=True) * UNIT - OFFSET


@triton.jit
def e4m3_field(words, i: tl.constexpr):
    """Return the E4M3 number i, in float32, of each int32 word of four; NaN included."""
    # sign to bit 31, exponent and mantissa to the bits 20 to 26; bits 27 to 30, copies of the sign, are cleared
    bits = ((words << (24 - 8 * i)) >> 4) & -0x78100000
    values = bits.to(tl.float32, bitcast=True) * 1329227995784915872903807060280344576.0  # 2**120: the biases differ
    return tl.where((bits & 0x07F00000) == 0x07F00000, float("nan"), values)


@triton.jit
def e5m2_field(words, i: tl.constexpr):
    """Return the E5M2 number i, in float32, of each int32 word of four: the upper byte of a float16 number."""
    half = (words >> (8 * i - 8)) if i > 0 else words << 8
    return (half & 0xFF00).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def wide_field(words, BFLOAT: tl.constexpr, i: tl.constexpr):
    """Return number i, in float32, of each int64 word of four in bfloat16 (BFLOAT) or float16."""
    half = words >> (16 * i)
    if BFLOAT:
        return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return half.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def word_codes(words, exponent, NUMBERS: tl.constexpr, i: tl.constexpr):
    """Return code i, in float32, of each word (see NUMBERS; "fp8" has no words)."""
    if NUMBERS == "offset4":
        values = field(words, exponent, 4, i)
    elif NUMBERS == "int8":  # flipping the top bit adds 128
        values = field(words ^ -0x7F7F7F80, exponent, 8, i)
    elif NUMBERS == "offset8":
        values = field(words, exponent, 8, i)
    elif NUMBERS == "e5m2":
        values = e5m2_field(words, i)
    elif NUMBERS == "bf16" or NUMBERS == "fp16":
        values = wide_field(words, NUMBERS == "bf16", i)
    else:
        values = e4m3_field(words, i)
    return values


@triton.jit
def byte_codes(units, NUMBERS: tl.constexpr, DTYPE: tl.constexpr):
    """Return the code of each byte in DTYPE, a float type: exact (see NUMBERS; "offset4" has no bytes)."""
    if NUMBERS == "offset8":
        values = (units ^ 128).to(tl.int8, bitcast=True).to(DTYPE)
    elif NUMBERS == "e4m3":
        bits = units.to(tl.int16)
        half = (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True) * 256.0
        values = tl.where((bits & 0x7F) == 0x7F, float("nan"), half).to(DTYPE)
    elif NUMBERS == "fp8":  # straight to bfloat16 would be one slow conversion a code
        values = units.to(tl.float32).to(DTYPE)
    else:
        values = units.to(DTYPE)
    return values
