"""The Triton kernels' code for the device. Imported by `_triton` alone, and only when something asks for these kernels.

Two layouts cover everything: planes, (outer, channels, inner) in memory, and rows, (outer, channels) with inner = 1. A
program works on one block of channels, which is one channel of planes or `columns` channels of rows, and on `per`
tiles of it, one after another. A tile is (lines, columns): of planes, lines samples by columns positions; of rows,
lines rows by columns channels. What belongs to a channel is a scalar with planes and (columns,) with rows; both
broadcast against a tile. (A choice by `rows` is made while compiling: one expression, since a function that returns in
two places would have to return the same type in both.)

Work per value is float32, or float64 for float64, about a pivot p; what is kept of a channel is float64.
"""

import triton
import triton.language as tl


@triton.jit
def _place(number, block, outer, inner, channels, rows: tl.constexpr, lines: tl.constexpr, columns: tl.constexpr):
    """Return where the values of a tile lie, which exist, and how many per channel. `number` and `block` are int64."""
    if rows:
        first = number * lines
        line, column = first + tl.arange(0, lines), block * columns + tl.arange(0, columns)
        offsets = line[:, None] * channels + column[None, :]
        inside = (line < outer)[:, None] & (column < channels)[None, :]
        count = tl.minimum(outer - first, lines)
    else:
        across = tl.cdiv(inner, columns)
        first, start = number // across * lines, (number % across) * columns
        line, column = first + tl.arange(0, lines), start + tl.arange(0, columns)
        offsets = (line * channels + block)[:, None] * inner + column[None, :]
        inside = (line < outer)[:, None] & (column < inner)[None, :]
        count = tl.minimum(outer - first, lines) * tl.minimum(inner - start, columns)
    return offsets, inside, count


@triton.jit
def _channel(block, rows: tl.constexpr, columns: tl.constexpr):
    """Return the number of the block's channel, or of its channels, (columns,)."""
    return block * columns + tl.arange(0, columns) if rows else block


@triton.jit
def _per_channel(tile, rows: tl.constexpr):
    """Add up what belongs to the same channel."""
    return tl.sum(tile, 0) if rows else tl.sum(tile)


@triton.jit
def _tiles(outer, inner, rows: tl.constexpr, lines: tl.constexpr, columns: tl.constexpr):
    """Return how many tiles a block of channels has."""
    tiles = tl.cdiv(outer, lines)
    if not rows:
        tiles = tiles.to(tl.int64) * tl.cdiv(inner, columns)
    return tiles


@triton.jit
def _share(program, outer, inner, channels, per, rows: tl.constexpr, lines: tl.constexpr, columns: tl.constexpr):
    """Return a program's block of channels, which of the block's splits it is, its first tile and the end, in int64."""
    blocks = tl.cdiv(channels, columns) if rows else channels
    program = program.to(tl.int64)
    block, split = program % blocks, program // blocks
    start = split * per
    return block, split, start, tl.minimum(start + per, _tiles(outer, inner, rows, lines, columns))


@triton.jit
def _affine(mean, invstd, weight, bias, channel, channels, wide: tl.constexpr):
    """Return p, scale and shift of weight·x̂ + bias = (x - p)·scale + shift: the mean in `wide`, and float64."""
    exists = channel < channels
    pivot, scale = mean.to(wide), invstd
    if weight is not None:
        scale *= tl.load(weight + channel, exists, 0.0).to(tl.float64)
    shift = (pivot.to(tl.float64) - mean) * scale
    if bias is not None:
        shift += tl.load(bias + channel, exists, 0.0).to(tl.float64)
    return pivot, scale, shift


@triton.jit
def _argument(d, scale, shift, residual, offsets, inside):
    """Return z = d·scale + shift + residual, where d = x - p."""
    z = d * scale.to(d.dtype) + shift.to(d.dtype)
    if residual is not None:
        z += tl.load(residual + offsets, inside, 0.0).to(d.dtype)
    return z


@triton.jit
def _value(z, slope, activation: tl.constexpr):
    """Return activation(z), as torch defines it."""
    if activation == "relu":
        z = tl.where(z <= 0, 0.0, z)  # NaN stays NaN
    elif activation == "leaky_relu":
        z = tl.where(z > 0, z, z * tl.full([], slope, z.dtype))
    elif activation == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif activation == "hardswish":
        z = z * tl.minimum(tl.maximum(z + 3, 0.0), 6.0) * (1 / 6)
    return z


@triton.jit
def _gradient(dy, z, slope, activation: tl.constexpr):
    """Return dz = dy·activation'(z), as torch defines it."""
    if activation == "relu":
        dy = tl.where(z <= 0, 0.0, dy)
    elif activation == "leaky_relu":
        dy = tl.where(z > 0, dy, dy * tl.full([], slope, z.dtype))
    elif activation == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        dy = dy * s * (1.0 + z * (1.0 - s))
    elif activation == "hardswish":
        dy = tl.where(z <= -3, 0.0, tl.where(z >= 3, dy, dy * (z * (1 / 3) + 0.5)))
    return dy


@triton.jit
def _add_up(
    first, second, partial, tickets, payload, block, split, splits, channels, rows: tl.constexpr, columns: tl.constexpr
):
    """Write the two sums over all splits, each (channels,), to `payload`; return whether this program did it.

    Every program leaves its share in `partial`; the one that finishes last adds the shares of its channels up, in the
    order of the splits, whichever program it is: so the bits are the same each time. Which is the last, an integer
    ticket says, and the last puts it back to 0.
    """
    channel = _channel(block, rows, columns)
    exists = channel < channels
    shares = splits.to(tl.int64) * channels
    place = split * channels + channel if rows else channel * splits + split
    tl.store(partial + place, first, exists)
    tl.store(partial + shares + place, second, exists)
    tl.debug_barrier()  # all threads of this program have stored before one of them draws the ticket
    last = tl.atomic_add(tickets + block, 1, sem="acq_rel", scope="gpu") == splits - 1
    if last:
        tl.store(tickets + block, 0)
        sum1, sum2 = tl.zeros_like(first), tl.zeros_like(second)
        batch: tl.constexpr = 1024 // columns if rows else 256
        for start in range(0, splits, batch):
            one = start + tl.arange(0, batch)
            if rows:
                at = one.to(tl.int64)[:, None] * channels + channel[None, :]
                inside = (one < splits)[:, None] & exists[None, :]
            else:
                at = channel.to(tl.int64) * splits + one
                inside = one < splits
            # From the level 2 cache, where other programs' stores are.
            sum1 += tl.sum(tl.load(partial + at, inside, 0.0, cache_modifier=".cg"), 0)
            sum2 += tl.sum(tl.load(partial + shares + at, inside, 0.0, cache_modifier=".cg"), 0)
        tl.store(payload + channel, sum1, exists)
        tl.store(payload + channels + channel, sum2, exists)
    return last


@triton.jit(
    do_not_specialize=["outer", "per", "splits"], do_not_specialize_on_alignment=["partial", "tickets", "payload"]
)
def moments(
    x, partial, tickets, payload, outer, inner, channels, per, splits,
    rows: tl.constexpr, lines: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Write `[Σx, Σx², n]`; a program's pivot is the mean of its first tile, per channel."""
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    block, split, start, end = _share(tl.program_id(0), outer, inner, channels, per, rows, lines, columns)

    offsets, inside, count = _place(start, block, outer, inner, channels, rows, lines, columns)
    values = tl.load(x + offsets, inside, 0.0).to(wide)
    pivot = _per_channel(values * (1.0 / count.to(wide)), rows)
    d = tl.where(inside, values - pivot, 0.0)
    d1, d2 = d, d * d
    for number in range(start + 1, end):
        offsets, inside, more = _place(number, block, outer, inner, channels, rows, lines, columns)
        d = tl.where(inside, tl.load(x + offsets, inside, 0.0).to(wide) - pivot, 0.0)
        d1 += d
        d2 += d * d
        count += more

    p, n = pivot.to(tl.float64), count.to(tl.float64)
    s1, s2 = _per_channel(d1.to(tl.float64), rows), _per_channel(d2.to(tl.float64), rows)
    s2 += 2 * p * s1 + n * p * p
    s1 += n * p
    last = _add_up(s1, s2, partial, tickets, payload, block, split, splits, channels, rows, columns)
    if last and block == 0:
        tl.store(payload + 2 * channels, tl.full([], 1.0, tl.float64) * outer * inner)


@triton.jit(
    do_not_specialize=["outer", "per", "splits"],
    do_not_specialize_on_alignment=["statistics", "weight", "bias", "partial", "tickets", "payload"],
)
def backward_sums(
    dy, x, residual, dz, statistics, weight, bias, partial, tickets, payload, slope: tl.float64,
    outer, inner, channels, per, splits,
    activation: tl.constexpr, rows: tl.constexpr, lines: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Write `[Σdz, Σdz·x̂]` and, unless it is None, dz; the pivot is the mean, rounded."""
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    block, split, start, end = _share(tl.program_id(0), outer, inner, channels, per, rows, lines, columns)

    channel = _channel(block, rows, columns)
    mean = tl.load(statistics + channel, channel < channels, 0.0)
    invstd = tl.load(statistics + channels + channel, channel < channels, 0.0)
    pivot, scale, shift = _affine(mean, invstd, weight, bias, channel, channels, wide)
    t1 = tl.zeros([lines, columns], wide)
    t2 = tl.zeros([lines, columns], wide)
    for number in range(start, end):
        offsets, inside, _ = _place(number, block, outer, inner, channels, rows, lines, columns)
        g = tl.load(dy + offsets, inside, 0.0).to(wide)
        d = tl.where(inside, tl.load(x + offsets, inside, 0.0).to(wide) - pivot, 0.0)
        g = _gradient(g, _argument(d, scale, shift, residual, offsets, inside), slope, activation)
        if dz is not None:
            tl.store(dz + offsets, g.to(dz.dtype.element_ty), inside)
        t1 += g
        t2 += g * d

    s1, s2 = _per_channel(t1.to(tl.float64), rows), _per_channel(t2.to(tl.float64), rows)
    s2 = (s2 + (pivot.to(tl.float64) - mean) * s1) * invstd
    _add_up(s1, s2, partial, tickets, payload, block, split, splits, channels, rows, columns)


@triton.jit
def _moments_of(total, channel, channels):
    """Return mean and variance, float64, of `[Σx, Σx², N]`; 0 where N is 0."""
    n = tl.load(total + 2 * channels)
    n = tl.where(n < 1, 1.0, n)
    mean = tl.load(total + channel, channel < channels, 0.0) / n
    variance = tl.load(total + channels + channel, channel < channels, 0.0) / n - mean * mean
    return mean, tl.where(variance < 0, 0.0, variance)  # NaN stays NaN


@triton.jit
def _move(buffer, stride, channel, channels, momentum, value, count):
    """Move a buffer by momentum·(value - buffer), where there are values."""
    exists = channel < channels
    at = buffer + channel * stride
    before = tl.load(at, exists, 0.0).to(tl.float64)
    after = before + tl.where(count > 0, momentum * (value - before), 0.0)
    if buffer.dtype.element_ty == tl.float64:
        tl.store(at, after, exists)
    else:  # by way of float32, as torch rounds
        tl.store(at, after.to(tl.float32).to(buffer.dtype.element_ty), exists)


@triton.jit
def _settle(
    total, statistics, running_mean, running_var, batches, momentum_at, momentum, eps,
    mean_stride, var_stride, channels, average: tl.constexpr,
):  # fmt: skip
    """Write `[mean, 1/√(σ²+ε), N]` and move the running statistics, for all channels: one program does it.

    So that the number of batches is read and written by one program. The momentum is 1/batches if `average`, else what
    `momentum_at` holds, if that is not None, else `momentum`.
    """
    count = tl.load(total + 2 * channels)
    tl.store(statistics + 2 * channels, count)
    if batches is not None:
        number = tl.load(batches) + tl.where(count >= 0, 1, 0)
        tl.store(batches, number)
    if average:
        weight = 1.0 / number.to(tl.float64)
    elif momentum_at is not None:
        weight = tl.load(momentum_at).to(tl.float64)
    else:
        weight = tl.full([], momentum, tl.float64)
    unbias = count / tl.where(count < 2, 1.0, count - 1)
    for start in range(0, channels, 256):
        channel = start + tl.arange(0, 256)
        mean, variance = _moments_of(total, channel, channels)
        tl.store(statistics + channel, mean, channel < channels)
        tl.store(statistics + channels + channel, 1.0 / tl.sqrt(variance + eps), channel < channels)
        if running_mean is not None:
            _move(running_mean, mean_stride, channel, channels, weight, mean, count)
        if running_var is not None:
            _move(running_var, var_stride, channel, channels, weight, variance * unbias, count)


@triton.jit(
    do_not_specialize=["outer", "per", "mean_stride", "var_stride"],
    do_not_specialize_on_alignment=[
        "total", "weight", "bias", "statistics", "running_mean", "running_var", "batches", "momentum_at",
    ],
)  # fmt: skip
def normalize(
    x, y, residual, total, weight, bias, statistics, running_mean, running_var, batches, momentum_at,
    slope: tl.float64, momentum: tl.float64, eps: tl.float64,
    mean_stride, var_stride, outer, inner, channels, per,
    activation: tl.constexpr, average: tl.constexpr, rows: tl.constexpr, lines: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Write y = activation((x - p)·scale + shift + residual). The first program does what `_settle` says instead."""
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    program = tl.program_id(0) - 1
    if program < 0:
        _settle(
            total, statistics, running_mean, running_var, batches, momentum_at, momentum, eps,
            mean_stride, var_stride, channels, average,
        )  # fmt: skip
    else:
        block, _, start, end = _share(program, outer, inner, channels, per, rows, lines, columns)
        channel = _channel(block, rows, columns)
        mean, variance = _moments_of(total, channel, channels)
        pivot, scale, shift = _affine(mean, 1.0 / tl.sqrt(variance + eps), weight, bias, channel, channels, wide)
        for number in range(start, end):
            offsets, inside, _ = _place(number, block, outer, inner, channels, rows, lines, columns)
            d = tl.load(x + offsets, inside, 0.0).to(wide) - pivot
            z = _argument(d, scale, shift, residual, offsets, inside)
            tl.store(y + offsets, _value(z, slope, activation).to(y.dtype.element_ty), inside)


@triton.jit(
    do_not_specialize=["outer", "per"],
    do_not_specialize_on_alignment=["statistics", "weight", "bias", "sums"],
)
def backward_input(
    dy, x, dx, statistics, weight, bias, sums, slope: tl.float64, outer, inner, channels, per,
    activation: tl.constexpr, rows: tl.constexpr, lines: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Write dx = (dz - p_dz)·dz_scale + (x - p)·x_scale + x_shift."""
    wide: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    block, _, start, end = _share(tl.program_id(0), outer, inner, channels, per, rows, lines, columns)

    channel = _channel(block, rows, columns)
    exists = channel < channels
    n = tl.load(statistics + 2 * channels)
    n = tl.where(n < 1, 1.0, n)
    mean, invstd = tl.load(statistics + channel, exists, 0.0), tl.load(statistics + channels + channel, exists, 0.0)
    mean_dz = tl.load(sums + channel, exists, 0.0) / n
    mean_dz_xhat = tl.load(sums + channels + channel, exists, 0.0) / n
    pivot, dz_scale, shift = _affine(mean, invstd, weight, bias, channel, channels, wide)
    x_scale = -dz_scale * invstd * mean_dz_xhat
    dz_pivot = mean_dz.to(wide)
    x_shift = (pivot.to(tl.float64) - mean) * x_scale + (dz_pivot.to(tl.float64) - mean_dz) * dz_scale
    for number in range(start, end):
        offsets, inside, _ = _place(number, block, outer, inner, channels, rows, lines, columns)
        g = tl.load(dy + offsets, inside, 0.0).to(wide)
        d = tl.load(x + offsets, inside, 0.0).to(wide) - pivot
        g = _gradient(g, _argument(d, dz_scale, shift, None, offsets, inside), slope, activation) - dz_pivot
        result = g * dz_scale.to(wide) + d * x_scale.to(wide) + x_shift.to(wide)
        tl.store(dx + offsets, result.to(dx.dtype.element_ty), inside)
