"""Number formats from their bits, rounding to them, scales, and the few bits in which a tensor core adds.

Generated from chapters/07_fp8.ipynb; edit the chapter, not this file.
"""

import math

import torch
from torch import Tensor

# What can eight bits say?


def decode(codes: Tensor, exponent_bits: int, mantissa_bits: int, infinity: bool = True) -> Tensor:
    """The float64 values of bit patterns (int64), sign bit first.

    infinity: the topmost exponent means infinity (mantissa 0) or NaN, as IEEE 754 has it. Without it only the very
    last pattern is NaN, which is E4M3 as the Open Compute Project defines it ("fn": finite, one NaN).
    """
    sign = 1.0 - 2.0 * (codes >> (exponent_bits + mantissa_bits)).double()
    field = (codes >> mantissa_bits) & (2**exponent_bits - 1)
    fraction = (codes & (2**mantissa_bits - 1)).double() / 2**mantissa_bits
    bias, top = 2 ** (exponent_bits - 1) - 1, field == 2**exponent_bits - 1
    leading = (field > 0).double()  # subnormals have no leading one, and the exponent of the smallest normal
    value = sign * torch.ldexp(leading + fraction, field.clamp(min=1) - bias)
    if infinity:
        return value.masked_fill(top, math.nan).where(~top | (fraction != 0), sign * math.inf)
    return value.masked_fill(top & (fraction == 1 - 2.0**-mantissa_bits), math.nan)


def largest_value(exponent_bits: int, mantissa_bits: int, infinity: bool = True) -> float:
    """The largest finite number of a format: 448 for E4M3 without infinity, 57344 for E5M2 with it."""
    if exponent_bits < 2 or mantissa_bits < 1:
        raise ValueError(f"{exponent_bits=} must be at least 2 and {mantissa_bits=} at least 1")
    bias = 2 ** (exponent_bits - 1) - 1
    if infinity:
        return (2 - 2.0**-mantissa_bits) * 2.0**bias
    return (2 - 2 * 2.0**-mantissa_bits) * 2.0 ** (bias + 1)


def round_to_format(x: Tensor, exponent_bits: int, mantissa_bits: int, infinity: bool = True) -> Tensor:
    """The nearest number of a format, ties to even, as float32 (float64 stays): bit-faithful, subnormals included.

    Beyond the largest finite number it saturates; NaN stays NaN. `infinity` as in `decode`.
    """
    largest, bias = largest_value(exponent_bits, mantissa_bits, infinity), 2 ** (exponent_bits - 1) - 1
    wide = x.double().clamp(-largest, largest)
    exponent = torch.frexp(wide).exponent - 1  # of the leading bit
    step = torch.ldexp(torch.ones_like(wide), exponent.clamp(min=1 - bias) - mantissa_bits)
    return ((wide / step).round() * step).to(torch.promote_types(x.dtype, torch.float32))


# What does a scale rescue?


def scale_for(amax: Tensor, scale_fmt: str | None, largest: float = 448.0) -> Tensor:
    """The factor that maps `amax` onto the largest number of the format; "ue8m0": the next power of two above it."""
    if scale_fmt not in (None, "ue8m0"):
        raise ValueError(f"scale_fmt={scale_fmt!r}; choose None for float32 scales or 'ue8m0' for powers of two")
    scale = amax / largest
    if scale_fmt is None:
        return scale
    mantissa, exponent = torch.frexp(scale)  # scale = mantissa 2^exponent, mantissa in [0.5, 1)
    above = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
    return torch.where(scale.isfinite(), above, scale)  # an overflow stays one


def check_float(x: Tensor, tile: int, dims: int) -> None:
    """Refuse what cannot be cut into tiles."""
    if not x.is_floating_point() or x.dim() < dims or tile < 1:
        raise ValueError(
            f"{tuple(x.shape)} of {x.dtype} in tiles of {tile}: floats, {dims} dimensions, tile >= 1 needed"
        )


# How many bits does a sum need?


def truncate(value: float, exponent: int, fraction_bits: int) -> float:
    """Drop what lies below 2^(exponent - fraction_bits), towards zero."""
    step = 2.0 ** (exponent - fraction_bits)
    return math.trunc(value / step) * step


def dot_limited_reference(
    a: list[float], b: list[float], promote_every: int | None = None, fraction_bits: int = 13, group: int = 32
) -> float:
    """A dot product as H800's tensor cores add it, one number after the other (report sections 3.3.2 and 3.5.2).

    The products of `group` elements and the register are aligned to the largest exponent among them, cut below
    `fraction_bits`, added, and the sum is cut again. `promote_every` elements the register moves to a float32 sum.
    """
    total, register = torch.zeros((), dtype=torch.float32), 0.0
    for start in range(0, len(a), group):
        terms = [register, *(x * y for x, y in zip(a[start : start + group], b[start : start + group], strict=True))]
        exponent = math.frexp(max(map(abs, terms)))[1] - 1
        register = sum(truncate(term, exponent, fraction_bits) for term in terms)
        register = truncate(register, math.frexp(register)[1] - 1, fraction_bits)
        if promote_every and (start + group) % promote_every == 0:
            total, register = total + register, 0.0
    return (total + register).item()


def truncate_to_largest(terms: Tensor, fraction_bits: int) -> Tensor:
    """Cut every term below 2^-fraction_bits of the largest one's leading bit, along the last dimension."""
    exponent = torch.frexp(terms.abs().amax(-1, keepdim=True)).exponent - 1
    step = torch.ldexp(torch.ones_like(exponent, dtype=terms.dtype), exponent - fraction_bits)
    return (terms / step).trunc() * step


def matmul_limited(
    a: Tensor, b: Tensor, promote_every: int | None = None, fraction_bits: int = 13, group: int = 32
) -> Tensor:
    """`dot_limited_reference` for all pairs of rows, bit for bit: (M, K), (N, K) -> a b^T (M, N) float32.

    Exact for float8 operands, whose products and aligned sums fit into float64. Needs memory for M x N x group.
    """
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)}: (M, K) and (N, K) with one K needed")
    if promote_every is not None and (promote_every < group or promote_every % group):
        raise ValueError(f"promote_every={promote_every} must be a multiple of group={group}, or None")
    total = torch.zeros(a.shape[0], b.shape[0], device=a.device)
    register = torch.zeros(a.shape[0], b.shape[0], 1, dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], group):
        part = slice(start, start + group)
        products = a[:, None, part].double() * b[None, :, part].double()  # (M, N, group)
        aligned = truncate_to_largest(torch.cat((register, products), -1), fraction_bits)
        register = truncate_to_largest(aligned.sum(-1, keepdim=True), fraction_bits)
        if promote_every and (start + group) % promote_every == 0:
            total, register = total + register[..., 0].float(), torch.zeros_like(register)
    return total + register[..., 0].float()


def rows_of_scales(name: str, q: Tensor, scale: Tensor, tile: int) -> Tensor:
    """Scales with one row for each row of q, from 1 x tile scales or from tile x tile blocks; errors name shapes."""
    n, k = len(q), -(-q.shape[1] // tile)
    if q.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name} is {q.dtype}; float8_e4m3fn needed")
    if scale.shape == (n, k):
        return scale
    if scale.shape == (-(-n // tile), k):
        return scale.repeat_interleave(tile, 0)[:n]
    wanted = f"({n}, {k}) for tiles or ({-(-n // tile)}, {k}) for blocks of {tile}"
    raise ValueError(f"{name} {tuple(q.shape)} with scales {tuple(scale.shape)}; {wanted} needed")


def multiply_float32(a: Tensor, b: Tensor) -> Tensor:
    """a b^T with float32 sums."""
    return a.float() @ b.float().T
