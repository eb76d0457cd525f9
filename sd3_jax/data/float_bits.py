"""Telling by their bits whether floats are finite, as fast as they are copied."""

import ml_dtypes
import numpy as np

# The bits, without the sign, from which on a float is infinite or NaN: all bits of the
# exponent are set. E4M3 has no infinity, and a single NaN.
BEYOND = {
    np.float64: 0x7FF << 52,
    np.float32: 0x7F800000,
    np.float16: 0x7C00,
    ml_dtypes.bfloat16: 0x7F80,
    ml_dtypes.float8_e4m3fn: 0x7F,
    ml_dtypes.float8_e5m2: 0x7C,
}


def finite(x: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    # np.isfinite takes up to ten times as long for floats of one or two bytes.
    beyond = BEYOND.get(x.dtype.type)
    if beyond is None:
        return True
    bits = np.ascontiguousarray(x).reshape(-1).view(f"u{x.dtype.itemsize}")
    number = bits.dtype.type(np.iinfo(bits.dtype).max >> 1)  # all but the sign
    starts = range(0, bits.size, 2**18)  # blocks that stay in a core's cache
    return all((bits[i : i + 2**18] & number).max() < beyond for i in starts)
