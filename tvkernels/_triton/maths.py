"""Functions of Triton kernels that several ops share: tiles in two widths, exponentials."""

from __future__ import annotations

import triton
import triton.language as tl

from tvkernels._triton.configs import next_power_of_2

# Three exponentials on the special-function unit and the fourth on the FMA pipes: x = n + f with n
# an integer and f in [0, 1); 2^f is a polynomial of degree 3 with p(0) = 1, minimax in the
# relative error over [0, 1), which is 8.7e-5 at most (`tests/ops/test_frame_kernels.py`);
# n is added to the exponent. n + 1.5 * 2^23 holds n in the low bits of its mantissa. Below -127
# the result would wrap: a maximum cuts it off there. Of a NaN it makes the largest number.
MIXED_EXP2 = tl.constexpr("""
{
    .reg .f32 x, n, f, p;
    .reg .b32 whole, bits;
    ex2.approx.ftz.f32 $0, $4;
    ex2.approx.ftz.f32 $1, $5;
    ex2.approx.ftz.f32 $2, $6;
    max.NaN.ftz.f32 x, $7, 0fC2FE0000;
    add.rm.ftz.f32 n, x, 0f4B400000;
    sub.ftz.f32 f, n, 0f4B400000;
    sub.ftz.f32 f, x, f;
    fma.rn.ftz.f32 p, f, 0f3D9DD554, 0f3E691BC4;
    fma.rn.ftz.f32 p, p, f, 0f3F31F32D;
    fma.rn.ftz.f32 p, p, f, 0f3F800000;
    mov.b32 whole, n;
    mov.b32 bits, p;
    shl.b32 whole, whole, 23;
    add.s32 bits, bits, whole;
    mov.b32 $3, bits;
}
""")


def split(head_dim: int) -> tuple[int, int]:
    """Two widths, each a power of two of at least 16 or 0, that hold a head dim.

    40 is 32 + 16 and not 64, 80 is 64 + 16, 160 is 128 + 32; a second width that would fill up to
    the next power of two is not worth its own product.
    """
    whole = max(16, next_power_of_2(head_dim))
    first = max(16, whole // 2)
    rest = max(16, next_power_of_2(max(1, head_dim - first)))
    return (first, rest) if first + rest < whole else (whole, 0)


@triton.jit
def exp2(x, EMULATE: tl.constexpr):
    """2^x in float32, of which EMULATE leaves every fourth to a polynomial (x at most 0 then)."""
    if EMULATE:
        y = tl.inline_asm_elementwise(
            MIXED_EXP2, "=&f,=&f,=&f,=f,f,f,f,f", [x], dtype=tl.float32, is_pure=True, pack=4
        )
    else:
        y = tl.math.exp2(x)
    return y


@triton.jit
def tile(
    base, size, row_stride, column_stride,
    ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """[ROWS, WIDTH] from column START of a matrix [size, D] at `base`; zero outside it.

    WHOLE says that all ROWS rows exist.
    """
    rows = tl.arange(0, ROWS)[:, None]
    columns = START + tl.arange(0, WIDTH)[None, :]
    at = base + rows * row_stride + columns * column_stride
    if START + WIDTH > D:
        if WHOLE:
            x = tl.load(at, mask=columns < D, other=0.0)
        else:
            x = tl.load(at, mask=(columns < D) & (rows < size), other=0.0)
    else:
        if WHOLE:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=rows < size, other=0.0)
    return x


@triton.jit
def put(
    base, x, size, row_stride,
    ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Writes x [ROWS, WIDTH] from column START of a matrix [size, D] at `base`, and no further."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = START + tl.arange(0, WIDTH)[None, :]
    at = base + rows * row_stride + columns
    tl.store(at, x.to(base.dtype.element_ty), mask=(columns < D) & (rows < size))
