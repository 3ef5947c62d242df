"""Row-wise kernels: table rows, RMSNorm with the residual addition, head norms + RoPE + KV write in one pass, SwiGLU.

A KV block of one head holds K as [head_dim / s, block_tokens, s] and V as [block_tokens / s, head_dim, s], s elements
being one step of a dot product: attention reads both front to back, with tokens (K) and head elements (V) in its lanes.
"""

from __future__ import annotations

import math

from torch import Tensor

from engine.kernels.cpu.kernel import Kernel
from engine.kernels.cpu.llvm import Emitter, Int, Isa, Vec, itemsize, per_dot
from engine.kernels.cpu.once import once
from engine.kernels.cpu.program import Record, Tape

# Elements per task: microseconds of work.
_TASK_ELEMENTS = 1 << 14
_LOG2_E = math.log2(math.e)


def dtype_name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def rows_per_task(num_features: int) -> int:
    return max(1, _TASK_ELEMENTS // num_features)


def rms_norm(isa: Isa, tape: Tape, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """x += delta if given; x / sqrt(mean(x^2) + eps) * weight, rounded before and after the weight."""
    features, rows = x.shape[1], tape.rows(x)
    kernel = _rms_norm(isa, dtype_name(x), features, eps, delta is not None)
    out = tape.empty(x, features)
    parameters = (x, 0 if delta is None else delta, weight, out, rows)
    tape.run([Record(kernel, parameters, rows, rows_per_task(features))])
    return out


def silu_mul(isa: Isa, tape: Tape, gate_up: Tensor) -> Tensor:
    """[rows, 2 * features] -> silu(first half) * second half."""
    features, rows = gate_up.shape[1] // 2, tape.rows(gate_up)
    out = tape.empty(gate_up, features)
    kernel = _silu_mul(isa, dtype_name(gate_up), features)
    tape.run([Record(kernel, (gate_up, out, rows), rows, rows_per_task(features))])
    return out


def take_rows(isa: Isa, tape: Tape, table: Tensor, indices: Tensor) -> Tensor:
    """table[indices]: table [any number, ...], indices int64."""
    features, rows = math.prod(table.shape[1:]), tape.rows(indices)
    out = tape.empty(indices, *table.shape[1:], dtype=table.dtype)
    kernel = _take_rows(isa, dtype_name(table), features)
    tape.run([Record(kernel, (table, indices, out, rows), rows, rows_per_task(features))])
    return out


@once
def _take_rows(isa: Isa, dtype: str, size: int) -> Kernel:
    row_bytes = size * itemsize(dtype)
    piece = math.gcd(row_bytes, isa.lanes * 4)

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        table, indices, out, num_rows = parameters
        first = task * rows_per_task(size)
        with e.loop(first, (first + rows_per_task(size)).min(num_rows)) as rows:
            source = table + e.load_int(indices + rows.index * 8) * row_bytes
            target = out + rows.index * row_bytes
            with e.loop(0, row_bytes, piece) as loop:
                e.copy(source + loop.index, target + loop.index, piece)

    return Kernel(f"take_rows_{dtype}", isa, 4, build)


@once
def _rms_norm(isa: Isa, dtype: str, size: int, eps: float, adds: bool) -> Kernel:
    width, item = isa.width(size), itemsize(dtype)

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        x, delta, weight, out, num_rows = parameters
        first = task * rows_per_task(size)
        with e.loop(first, (first + rows_per_task(size)).min(num_rows)) as rows:
            at = rows.index * (size * item)
            with e.loop(0, size * item, width * item, [e.constant(0.0, width)]) as loop:
                here = at + loop.index
                value = e.load(dtype, x + here, width)
                if adds:
                    value = e.round(dtype, value + e.load(dtype, delta + here, width))
                    e.store(dtype, value, x + here)
                loop.following = [e.fma(value, value, loop.values[0])]
            scale = inverse_rms(e, loop.values[0], size, eps)
            with e.loop(0, size * item, width * item) as loop:
                normed = e.round(dtype, e.load(dtype, x + at + loop.index, width) * scale)
                e.store(dtype, normed * e.load(dtype, weight + loop.index, width), out + at + loop.index)

    return Kernel(f"rms_norm_{dtype}", isa, 5, build)


def inverse_rms(e: Emitter, squares: Vec, size: int, eps: float) -> Vec:
    """Of the squares, summed lane by lane."""
    return e.constant(1.0, squares.width) / e.sqrt(e.lane_sum(squares) * (1 / size) + eps)


@once
def _silu_mul(isa: Isa, dtype: str, size: int) -> Kernel:
    width, item = isa.width(size), itemsize(dtype)

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        gate_up, out, num_rows = parameters
        first = task * rows_per_task(size)
        with e.loop(first, (first + rows_per_task(size)).min(num_rows)) as rows:
            gates, target = gate_up + rows.index * (2 * size * item), out + rows.index * (size * item)
            with e.loop(0, size * item, width * item) as loop:
                gate = e.load(dtype, gates + loop.index, width)
                up = e.load(dtype, gates + size * item + loop.index, width)
                # Beyond 127 the quotient rounds to the gate, or to zero.
                decay = e.exp2((gate * -_LOG2_E).min(127.0))
                e.store(dtype, gate / (decay + 1.0) * up, target + loop.index)

    return Kernel(f"silu_mul_{dtype}", isa, 3, build)


def rope_store(
    isa: Isa,
    tape: Tape,
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    cache: Tensor,
    slot_mapping: Tensor,
    scale: float,
) -> Tensor:
    """Queries [rows, heads, head_dim], normed, rotated and scaled; keys and values go to their slots of the cache."""
    _, kv_heads, _, block_tokens, head_dim = cache.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    kernel = _rope_store(isa, dtype_name(qkv), heads, kv_heads, head_dim, block_tokens, norms is not None, eps, scale)
    rows = tape.rows(qkv)
    queries = tape.empty(qkv, heads, head_dim)
    parameters = (qkv, cos, sin, *(norms or (0, 0)), cache, slot_mapping, queries, rows)
    tape.run([Record(kernel, parameters, rows, rows_per_task(qkv.shape[1]))])
    return queries


@once
def _rope_store(
    isa: Isa, dtype: str, heads: int, kv_heads: int, head_dim: int, block_tokens: int, norms: bool, eps: float,
    scale: float,
) -> Kernel:  # fmt: skip
    half, item, step = head_dim // 2, itemsize(dtype), per_dot(dtype)
    width = isa.width(half)
    side = block_tokens * head_dim * item  # bytes of K, or of V, of one head of a block

    def build(e: Emitter, task: Int, parameters: list[Int]) -> None:
        qkv, cos, sin, q_norm, k_norm, cache, slot_mapping, queries, num_rows = parameters
        turned = e.scratch(head_dim * item)
        per_task = rows_per_task((heads + 2 * kv_heads) * head_dim)

        def turn(source: Int, norm: Int, angles: Int, factor: float, target: Int) -> None:
            """Rotates one head; its halves are the two coordinates of each pair."""
            inverse = e.constant(1.0, width)
            if norms:
                with e.loop(0, head_dim * item, width * item, [e.constant(0.0, width)]) as loop:
                    value = e.load(dtype, source + loop.index, width)
                    loop.following = [e.fma(value, value, loop.values[0])]
                inverse = inverse_rms(e, loop.values[0], head_dim, eps)
            for i in range(0, half, width):
                pair = []
                for at in (i * item, (half + i) * item):
                    value = e.load(dtype, source + at, width)
                    if norms:
                        normed = e.round(dtype, value * inverse)
                        value = e.round(dtype, normed * e.load(dtype, norm + at, width))
                    pair.append(value)
                c = e.load("float32", cos + angles + 4 * i, width)
                s = e.load("float32", sin + angles + 4 * i, width)
                e.store(dtype, (pair[0] * c - pair[1] * s) * factor, target + i * item)
                e.store(dtype, (pair[1] * c + pair[0] * s) * factor, target + (half + i) * item)

        first = task * per_task
        with e.loop(first, (first + per_task).min(num_rows)) as rows:
            row = rows.index
            angles = row * (half * 4)
            source = qkv + row * ((heads + 2 * kv_heads) * head_dim * item)
            with e.loop(0, heads) as loop:
                offset = loop.index * (head_dim * item)
                turn(source + offset, q_norm, angles, scale, queries + row * (heads * head_dim * item) + offset)
            slot = e.load_int(slot_mapping + row * 8)
            block, token = slot // block_tokens, slot % block_tokens
            with e.loop(0, kv_heads) as loop:
                keys = source + (loop.index + heads) * (head_dim * item)
                values = keys + kv_heads * head_dim * item
                turn(keys, k_norm, angles, 1.0, turned)
                place = cache + (block * kv_heads + loop.index) * (2 * side)
                with e.loop(0, head_dim // step) as element:
                    e.copy(
                        turned + element.index * (step * item),
                        place + (element.index * block_tokens + token) * (step * item),
                        step * item,
                    )
                target = place + side + (token // step * (head_dim * step) + token % step) * item
                with e.loop(0, head_dim) as element:
                    e.copy(values + element.index * item, target + element.index * (step * item), item)

    return Kernel(f"rope_store_{dtype}", isa, 9, build)
