"""Generates vector code at start-up: values with operators over llvmlite's IR.

The compiler may not reorder or contract operations (no fast-math), so a kernel computes each element exactly as its
source says, on every path.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir


class _BFloatType(ir.Type):  # type: ignore[misc]
    """llvmlite has no name for LLVM's bfloat."""

    def _to_string(self) -> str:
        return "bfloat"


_LINE_BYTES = 64
_I8, _I16, _I32, _I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32 = ir.FloatType()
_STORAGE = {"float32": _F32, "float16": ir.HalfType(), "bfloat16": _BFloatType()}


@dataclass(frozen=True, slots=True)
class Isa:
    """The vector instructions of a processor, and the register tile that fits its register file."""

    name: str
    cpu: str
    features: str
    lanes: int  # float32 per vector
    tile_rows: int
    tile_vectors: int
    has_bf16_dot: bool
    # Multiplies four bytes per lane in one instruction (VNNI).
    has_vnni: bool

    @classmethod
    def of_host(cls) -> Isa:
        features = llvm.get_host_cpu_features()
        cpu = llvm.get_host_cpu_name(), features.flatten()
        if features.get("avx512f"):
            has_bf16_dot, has_vnni = features.get("avx512bf16", False), features.get("avx512vnni", False)
            return cls("avx512bf16" if has_bf16_dot else "avx512", *cpu, 16, 6, 4, has_bf16_dot, has_vnni)
        if features.get("avx2") and features.get("fma"):
            return cls("avx2", *cpu, 8, 6, 2, has_bf16_dot=False, has_vnni=features.get("avxvnni", False))
        return cls("128bit", *cpu, 4, 4, 4, has_bf16_dot=False, has_vnni=False)

    def width(self, size: int) -> int:
        """Lanes of the widest vector that divides ``size`` elements."""
        return math.gcd(self.lanes, size)

    @property
    def per_int8_dot(self) -> int:
        """Elements of the summed dimension per step of an 8-bit integer product: four bytes of a row."""
        return 4 if self.has_vnni else 2


class Int:
    """A 64-bit integer of the kernel; combines with Python integers."""

    __slots__ = ("e", "v")

    def __init__(self, e: Emitter, v: ir.Value) -> None:
        self.e = e
        self.v = v

    def __add__(self, other: Int | int) -> Int:
        return Int(self.e, self.e.b.add(self.v, self.e.integer(other).v))

    def __sub__(self, other: Int | int) -> Int:
        return Int(self.e, self.e.b.sub(self.v, self.e.integer(other).v))

    def __mul__(self, other: Int | int) -> Int:
        return Int(self.e, self.e.b.mul(self.v, self.e.integer(other).v))

    def __floordiv__(self, other: Int | int) -> Int:
        """For non-negative numbers."""
        return Int(self.e, self.e.b.udiv(self.v, self.e.integer(other).v))

    def __mod__(self, other: Int | int) -> Int:
        """For non-negative numbers."""
        return Int(self.e, self.e.b.urem(self.v, self.e.integer(other).v))

    __radd__ = __add__
    __rmul__ = __mul__

    def __lt__(self, other: Int | int) -> ir.Value:
        return self.e.b.icmp_signed("<", self.v, self.e.integer(other).v)

    def __le__(self, other: Int | int) -> ir.Value:
        return self.e.b.icmp_signed("<=", self.v, self.e.integer(other).v)

    def min(self, other: Int | int) -> Int:
        other = self.e.integer(other)
        return Int(self.e, self.e.b.select(self < other, self.v, other.v))

    def max(self, other: Int | int) -> Int:
        other = self.e.integer(other)
        return Int(self.e, self.e.b.select(self < other, other.v, self.v))


class Vec:
    """A vector of float32."""

    __slots__ = ("e", "v")

    def __init__(self, e: Emitter, v: ir.Value) -> None:
        self.e = e
        self.v = v

    @property
    def width(self) -> int:
        return int(self.v.type.count)

    def _other(self, other: Vec | float) -> ir.Value:
        return other.v if isinstance(other, Vec) else self.e.constant(other, self.width).v

    def __add__(self, other: Vec | float) -> Vec:
        return Vec(self.e, self.e.b.fadd(self.v, self._other(other)))

    def __sub__(self, other: Vec | float) -> Vec:
        return Vec(self.e, self.e.b.fsub(self.v, self._other(other)))

    def __mul__(self, other: Vec | float) -> Vec:
        return Vec(self.e, self.e.b.fmul(self.v, self._other(other)))

    def __truediv__(self, other: Vec | float) -> Vec:
        return Vec(self.e, self.e.b.fdiv(self.v, self._other(other)))

    def max(self, other: Vec | float) -> Vec:
        """The larger; a NaN of ``self`` is kept."""
        v = self._other(other)
        return Vec(self.e, self.e.b.select(self.e.b.fcmp_ordered("<", self.v, v), v, self.v))

    def min(self, other: Vec | float) -> Vec:
        """The smaller; a NaN of ``self`` is kept."""
        v = self._other(other)
        return Vec(self.e, self.e.b.select(self.e.b.fcmp_ordered(">", self.v, v), v, self.v))

    def is_above(self, other: Vec) -> ir.Value:
        """Mask of the lanes that are larger; false for NaN."""
        return self.e.b.fcmp_ordered(">", self.v, other.v)

    def where(self, mask: ir.Value, other: Vec | float) -> Vec:
        return Vec(self.e, self.e.b.select(mask, self.v, self._other(other)))


class IntVec:
    """A vector of int32."""

    __slots__ = ("e", "v")

    def __init__(self, e: Emitter, v: ir.Value) -> None:
        self.e = e
        self.v = v

    @property
    def width(self) -> int:
        return int(self.v.type.count)

    def to_float(self) -> Vec:
        return Vec(self.e, self.e.b.sitofp(self.v, ir.VectorType(_F32, self.width)))


@dataclass(slots=True)
class Loop:
    """A loop under construction: ``values`` are those of the current iteration, and after the loop the last ones."""

    index: Int
    values: list[Any]
    following: list[Any] = field(default_factory=list)


class Emitter:
    """Writes one function. Addresses are integers; loads and stores need no alignment beyond the element's."""

    def __init__(self, function: ir.Function, isa: Isa) -> None:
        self.isa = isa
        self.function = function
        self.module = function.module
        self.b = ir.IRBuilder(function.append_basic_block("entry"))

    # -- integers and control flow

    def integer(self, value: Int | int) -> Int:
        return value if isinstance(value, Int) else Int(self, _I64(value))

    @contextmanager
    def loop(self, start: Int | int, stop: Int | int, step: int = 1, values: Sequence[Any] = ()) -> Iterator[Loop]:
        """``for index in range``; ``values`` (Int or Vec) are carried, and each iteration leaves them in
        ``following``."""
        b, before = self.b, self.b.block
        head, body, done = (b.append_basic_block(name) for name in ("head", "body", "done"))
        first, last = self.integer(start).v, self.integer(stop).v
        b.branch(head)
        b.position_at_end(head)
        index = b.phi(_I64)
        index.add_incoming(first, before)
        carried = [b.phi(value.v.type) for value in values]
        for phi, value in zip(carried, values, strict=True):
            phi.add_incoming(value.v, before)
        loop = Loop(Int(self, index), [type(v)(self, phi) for v, phi in zip(values, carried, strict=True)])
        b.cbranch(b.icmp_signed("<", index, last), body, done)
        b.position_at_end(body)
        yield loop
        following = b.add(index, _I64(step))
        index.add_incoming(following, b.block)
        for phi, value in zip(carried, loop.following, strict=True):
            phi.add_incoming(value.v, b.block)
        b.branch(head)
        b.position_at_end(done)

    def by_rows(
        self, start: Int | int, stop: Int, most: int, emit: Callable[[Int, int], None], multiple: int = 1
    ) -> None:
        """``emit(row, num_rows)`` over rows [start, stop): ``most`` at a time, then the remainder in one piece.

        The number of rows is a multiple of ``multiple``: no code is generated for remainders that cannot occur.
        """
        b = self.b
        first = self.integer(start)
        whole = stop - (stop - first) % most
        with self.loop(first, whole, most) as loop:
            emit(loop.index, most)
        done = b.append_basic_block("rows")
        choice = b.switch((stop - whole).v, done)
        unit = math.gcd(multiple, most)
        for num_rows in range(unit, most, unit):
            choice.add_case(_I64(num_rows), block := b.append_basic_block("tail"))
            b.position_at_end(block)
            emit(whole, num_rows)
            b.branch(done)
        b.position_at_end(done)

    def when(self, flag: Int, values: list[Vec], change: Callable[[list[Vec]], list[Vec]]) -> list[Vec]:
        """``change(values)`` where the flag is 1, ``values`` where it is 0."""
        b, before = self.b, self.b.block
        with b.if_then(b.icmp_signed("!=", flag.v, _I64(0))):
            changed = change(values)
            inside = b.block
        merged = []
        for old, new in zip(values, changed, strict=True):
            phi = b.phi(old.v.type)
            phi.add_incoming(old.v, before)
            phi.add_incoming(new.v, inside)
            merged.append(Vec(self, phi))
        return merged

    # -- memory

    def load_int(self, address: Int) -> Int:
        return Int(self, self._load(address, _I64, 8))

    def load(self, dtype: str, address: Int, width: int) -> Vec:
        """``width`` elements, widened to float32."""
        storage = _STORAGE[dtype]
        raw = self._load(address, ir.VectorType(storage, width), itemsize(dtype))
        return Vec(self, raw if dtype == "float32" else self.b.fpext(raw, ir.VectorType(_F32, width)))

    def spread(self, dtype: str, address: Int, width: int) -> Vec:
        """One element in every lane (broadcast)."""
        raw = self._load(address, _STORAGE[dtype], itemsize(dtype))
        return Vec(self, self._splat(raw if dtype == "float32" else self.b.fpext(raw, _F32), width))

    def store(self, dtype: str, value: Vec, address: Int) -> None:
        """Rounded to nearest, ties to even."""
        raw = self._narrow(dtype, value)
        self.b.store(raw, self.b.inttoptr(address.v, raw.type.as_pointer()), align=itemsize(dtype))

    def store_lane(self, value: Vec, address: Int) -> None:
        """The first lane, as float32."""
        first = self.b.extract_element(value.v, _I32(0))
        self.b.store(first, self.b.inttoptr(address.v, _F32.as_pointer()), align=4)

    def store_integers(self, value: Vec, address: Int, num_bytes: int) -> None:
        """Integral float values as integers of 1, 2 or 4 bytes that can hold them; NaN as 0."""
        b, kind = self.b, ir.VectorType(_I32, value.width)
        raw = b.fptosi(value.where(b.fcmp_ordered("ord", value.v, value.v), 0.0).v, kind)
        if num_bytes < 4:
            raw = b.trunc(raw, ir.VectorType(ir.IntType(8 * num_bytes), value.width))
        b.store(raw, b.inttoptr(address.v, raw.type.as_pointer()), align=num_bytes)

    def round(self, dtype: str, value: Vec) -> Vec:
        """The value after a store and a load."""
        if dtype == "float32":
            return value
        raw = self.b.bitcast(self._narrow(dtype, value), ir.VectorType(_STORAGE[dtype], value.width))
        return Vec(self, self.b.fpext(raw, value.v.type))

    def copy(self, source: Int, target: Int, num_bytes: int) -> None:
        """2, 4, 8 or more bytes, a power of two."""
        kind = ir.IntType(8 * num_bytes) if num_bytes <= 8 else ir.VectorType(_I64, num_bytes // 8)
        self.b.store(self._load(source, kind, 1), self.b.inttoptr(target.v, kind.as_pointer()), align=1)

    def prefetch(self, address: Int, num_bytes: int) -> None:
        """Prefetch cache lines into the second cache; any address is allowed.

        Not into the first: its few outstanding misses are left to loads.
        """
        kind = ir.IntType(8).as_pointer()
        for at in range(0, num_bytes, _LINE_BYTES):
            place = self.b.inttoptr((address + at).v, kind)
            self._call("llvm.prefetch.p0", ir.VoidType(), place, _I32(0), _I32(2), _I32(1))

    def scratch(self, num_bytes: int) -> Int:
        """Memory of the calling thread's stack; uninitialized."""
        with self.b.goto_entry_block():
            place = self.b.alloca(ir.ArrayType(_I64, -(-num_bytes // 64) * 8))
            place.align = 64
            return Int(self, self.b.ptrtoint(place, _I64))

    def _load(self, address: Int, kind: ir.Type, align: int) -> ir.Value:
        return self.b.load(self.b.inttoptr(address.v, kind.as_pointer()), align=align)

    def _narrow(self, dtype: str, value: Vec) -> ir.Value:
        b, width = self.b, value.width
        if dtype == "float32":
            return value.v
        if dtype == "float16":
            return b.fptrunc(value.v, ir.VectorType(_STORAGE[dtype], width))
        if self.isa.has_bf16_dot and width >= 4:
            return b.fptrunc(value.v, ir.VectorType(_STORAGE[dtype], width))
        # Written out: without the instruction LLVM would call a function per element.
        wide = ir.VectorType(_I32, width)
        bits = b.bitcast(value.v, wide)
        constant = functools.partial(_constant, wide)
        odd = b.and_(b.lshr(bits, constant(16)), constant(1))
        rounded = b.lshr(b.add(b.add(bits, odd), constant(0x7FFF)), constant(16))
        quiet = b.or_(b.lshr(bits, constant(16)), constant(0x40))
        chosen = b.select(b.fcmp_unordered("uno", value.v, value.v), quiet, rounded)
        return b.trunc(chosen, ir.VectorType(_I16, width))

    # -- vectors

    def constant(self, value: float, width: int) -> Vec:
        return Vec(self, _constant(ir.VectorType(_F32, width), value))

    def count_from(self, first: Int, width: int) -> Vec:
        """first, first + 1, ...; exact below 2^24."""
        start = self._splat(self.b.sitofp(first.v, _F32), width)
        return Vec(self, start) + Vec(self, ir.Constant(ir.VectorType(_F32, width), [float(i) for i in range(width)]))

    def lanes_between(self, first: int, width: int, low: Int, high: Int) -> ir.Value:
        """Mask of lanes i with low <= first + i < high."""
        kind = ir.VectorType(_I32, width)
        index = ir.Constant(kind, [first + i for i in range(width)])
        edges = [self._splat(self.b.trunc(edge.v, _I32), width) for edge in (low, high)]
        return self.b.and_(self.b.icmp_signed(">=", index, edges[0]), self.b.icmp_signed("<", index, edges[1]))

    def fma(self, x: Vec, y: Vec, z: Vec) -> Vec:
        """x * y + z, rounded once."""
        return Vec(self, self._call(f"llvm.fma.v{x.width}f32", x.v.type, x.v, y.v, z.v))

    def sqrt(self, x: Vec) -> Vec:
        return Vec(self, self._call(f"llvm.sqrt.v{x.width}f32", x.v.type, x.v))

    def nearest(self, x: Vec) -> Vec:
        """Rounded to an integer, ties to even."""
        return Vec(self, self._call(f"llvm.nearbyint.v{x.width}f32", x.v.type, x.v))

    def exp2(self, x: Vec) -> Vec:
        """2^x to 1e-7, 0 from -127 down; x at most 127. A polynomial of the remainder to the nearest integer."""
        b = self.b
        x = x.max(-127.0)
        whole = self.nearest(x)
        part = x - whole
        result = self.constant(_EXP2[0], x.width)
        for coefficient in _EXP2[1:]:
            result = self.fma(result, part, self.constant(coefficient, x.width))
        kind = ir.VectorType(_I32, x.width)
        power = b.shl(b.add(b.fptosi(whole.v, kind), _constant(kind, 127)), _constant(kind, 23))
        return result * Vec(self, b.bitcast(power, x.v.type))

    def lane_max(self, x: Vec) -> Vec:
        """The largest lane, in every lane."""
        return self._across(x, Vec.max)

    def lane_sum(self, x: Vec) -> Vec:
        """Halves are added until one lane is left; the sum is in every lane."""
        return self._across(x, Vec.__add__)

    def _across(self, x: Vec, join: Callable[[Vec, Vec], Vec]) -> Vec:
        distance = x.width // 2
        while distance:
            order = ir.Constant(ir.VectorType(_I32, x.width), [i ^ distance for i in range(x.width)])
            x = join(x, Vec(self, self.b.shuffle_vector(x.v, x.v, order)))
            distance //= 2
        return x

    def resize(self, x: Vec, width: int) -> Vec:
        """The first lane, in ``width`` lanes."""
        order = _constant(ir.VectorType(_I32, width), 0)
        return x if x.width == width else Vec(self, self.b.shuffle_vector(x.v, x.v, order))

    # -- dot products along packed dimensions: `per_dot(dtype)` elements of the summed dimension a step

    def dot_load(self, dtype: str, address: Int, width: int, keep: str = "both") -> Any:
        """An operand of ``width`` lanes; ``keep`` may mask the "low" or "high" element of each pair with 0."""
        if dtype != "bfloat16":
            return self.load(dtype, address, width)
        pairs = self._load(address, ir.VectorType(_I32, width), 2)
        masks = {"low": 0x0000FFFF, "high": -0x10000}
        return pairs if keep == "both" else self.b.and_(pairs, _constant(pairs.type, masks[keep]))

    def dot_spread(self, dtype: str, address: Int, width: int) -> Any:
        """The same step of one row in every lane (broadcast)."""
        if dtype != "bfloat16":
            return self.spread(dtype, address, width)
        return self._splat(self._load(address, _I32, 2), width)

    def dot(self, dtype: str, total: Vec, x: Any, y: Any) -> Vec:
        """total + x . y for one step."""
        if dtype != "bfloat16":
            return self.fma(x, y, total)
        b, width = self.b, total.width
        if self.isa.has_bf16_dot and width >= 4:
            kind = ir.VectorType(_STORAGE["bfloat16"], 2 * width)
            name = f"llvm.x86.avx512bf16.dpbf16ps.{32 * width}"
            return Vec(self, self._call(name, total.v.type, total.v, b.bitcast(x, kind), b.bitcast(y, kind)))

        def halves(pairs: ir.Value) -> tuple[Vec, Vec]:
            low, high = b.shl(pairs, _constant(pairs.type, 16)), b.and_(pairs, _constant(pairs.type, -0x10000))
            return Vec(self, b.bitcast(low, total.v.type)), Vec(self, b.bitcast(high, total.v.type))

        for one, other in zip(halves(x), halves(y), strict=True):
            total = self.fma(one, other, total)
        return total

    # -- products of 8-bit integers, exact: `isa.per_int8_dot` elements of the summed dimension a step

    def spread_integers(self, address: Int, width: int) -> IntVec:
        """An int32 in every lane (broadcast)."""
        return IntVec(self, self._splat(self._load(address, _I32, 4), width))

    def int8_load(self, address: Int, width: int) -> ir.Value:
        """A step of unsigned bytes for each of ``width`` lanes."""
        return self._load(address, ir.VectorType(_I8, self.isa.per_int8_dot * width), 1)

    def int8_dot(self, total: IntVec, weights: ir.Value, row: IntVec) -> IntVec:
        """total + weights . row for one step; a lane of ``row`` is four signed bytes, or without VNNI two int16."""
        b, kind = self.b, total.v.type
        if self.isa.has_vnni:
            # LLVM renames its intrinsic types between versions but accepts the old names.
            name = f"llvm.x86.avx512.vpdpbusd.{32 * total.width}"
            return IntVec(self, self._call(name, kind, total.v, b.bitcast(weights, kind), row.v))
        pairs = ir.VectorType(_I32, 2 * total.width)
        signed = b.sext(b.bitcast(row.v, ir.VectorType(_I16, 2 * total.width)), pairs)
        products = b.mul(b.zext(weights, pairs), signed)
        halves = []
        for first in (0, 1):
            order = ir.Constant(ir.VectorType(_I32, total.width), [2 * i + first for i in range(total.width)])
            halves.append(b.shuffle_vector(products, products, order))
        return IntVec(self, b.add(total.v, b.add(*halves)))

    def _splat(self, value: ir.Value, width: int) -> ir.Value:
        kind = ir.VectorType(value.type, width)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
        return self.b.shuffle_vector(first, first, _constant(ir.VectorType(_I32, width), 0))

    def _call(self, name: str, result: ir.Type, *arguments: ir.Value) -> ir.Value:
        found = self.module.globals.get(name)
        if found is None:
            found = ir.Function(self.module, ir.FunctionType(result, [a.type for a in arguments]), name)
        return self.b.call(found, arguments)


# 2^x on [-1/2, 1/2] to 2.6e-9: Chebyshev interpolation, highest power first.
_EXP2 = (
    1.546144472e-4, 1.340042818e-3, 9.618056678e-3, 5.550327227e-2, 2.402265092e-1, 6.931472067e-1, 1.0,
)  # fmt: skip


def _constant(kind: ir.VectorType, value: float) -> ir.Constant:
    return ir.Constant(kind, [value] * kind.count)


def itemsize(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def per_dot(dtype: str) -> int:
    """Elements of the summed dimension per step of a dot product, adjacent in memory."""
    return 2 if dtype == "bfloat16" else 1
