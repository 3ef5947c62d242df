"""Computes xxh3_128 of every segment of a stream of bytes while copying it: vector code compiled by LLVM at start-up.

Copying with ordinary stores reads the target before it is overwritten, and hashing afterwards loads everything again.
Here each vector is loaded once, hashed, and stored past the caches. One call does any number of segments without the
GIL. Without llvmlite callers copy and hash by other means, with the same result.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

import llvmlite.binding as llvm
from llvmlite import ir

# Rows and segments are multiples of this: what xxh3 takes between two scrambles of its accumulators.
_BLOCK_BYTES = 1024

# Constants of the algorithm (xxHash 0.8, doc/xxhash_spec.md).
_SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221"
    "b8084674f743248ee03590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb"
    "170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)
_P32_1, _P32_2, _P32_3 = 0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D
_P64_1, _P64_2, _P64_3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
_P64_4, _P64_5 = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5
_START = (_P32_3, _P64_1, _P64_2, _P64_3, _P64_4, _P32_2, _P64_5, _P32_1)

_I1, _I32, _I64, _I128 = ir.IntType(1), ir.IntType(32), ir.IntType(64), ir.IntType(128)
_VECTOR = ir.VectorType(_I64, 8)


def _words(offset: int, count: int) -> tuple[int, ...]:
    return struct.unpack_from(f"<{count}Q", _SECRET, offset)


def _lanes(values: Sequence[int]) -> ir.Constant:
    return ir.Constant(_VECTOR, list(values))


class _Emitter:
    def __init__(self, module: ir.Module, name: str, *, is_copying: bool) -> None:
        """``name(rows, num_bytes, segment_bytes, hashes)``: rows of (source, target, num_bytes) addresses in order."""
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64] * 4), name)
        self._function, self._module, self._is_copying = function, module, is_copying
        self._b = ir.IRBuilder(function.append_basic_block("entry"))
        self._emit()

    def _emit(self) -> None:
        b = self._b
        rows, num_bytes, segment_bytes, hashes = self._function.args
        entry = b.block
        names = ("head", "more", "row", "ready", "inner", "last", "done")
        head, more, row, ready, inner, last, done = (self._function.append_basic_block(name) for name in names)
        length = self._min(num_bytes, segment_bytes)
        b.branch(head)

        # Bytes left in all, in the row, in the segment.
        b.position_at_end(head)
        total, rows_at, hash_at, left, length_now = (b.phi(_I64) for _ in range(5))
        at_head = [b.phi(_I64) for _ in range(3)]
        state = b.phi(_VECTOR)
        begun = ((total, num_bytes), (rows_at, rows), (hash_at, hashes), (left, length), (length_now, length))
        for phi, value in begun:
            phi.add_incoming(value, entry)
        for phi in at_head:
            phi.add_incoming(_I64(0), entry)
        state.add_incoming(_lanes(_START), entry)
        b.cbranch(b.icmp_unsigned("==", total, _I64(0)), done, more)
        b.position_at_end(more)
        b.cbranch(b.icmp_unsigned("==", at_head[2], _I64(0)), row, ready)

        b.position_at_end(row)
        loaded = [self._load(b.add(rows_at, _I64(8 * i)), _I64, 8) for i in range(3)]
        next_row = b.add(rows_at, _I64(24))
        b.branch(ready)

        b.position_at_end(ready)
        source, target, row_left = (b.phi(_I64) for _ in range(3))
        rows_now = b.phi(_I64)
        for phi, old, new in zip((source, target, row_left), at_head, loaded, strict=True):
            phi.add_incoming(old, more)
            phi.add_incoming(new, row)
        rows_now.add_incoming(rows_at, more)
        rows_now.add_incoming(next_row, row)
        step = _I64(_BLOCK_BYTES)
        b.cbranch(b.icmp_unsigned("==", left, step), last, inner)

        for block, is_last in ((inner, False), (last, True)):
            b.position_at_end(block)
            after = self._stripes(state, source, target, is_last=is_last)
            values = {
                total: total,
                rows_at: rows_now,
                hash_at: hash_at,
                left: b.sub(left, step),
                length_now: length_now,
                state: after,
            }
            if is_last:
                self._store_hash(after, length_now, hash_at)
                values[total] = b.sub(total, length_now)
                values[hash_at] = b.add(hash_at, _I64(16))
                values[left] = values[length_now] = self._min(values[total], segment_bytes)
                values[state] = _lanes(_START)
            values[at_head[0]] = b.add(source, step)
            values[at_head[1]] = b.add(target, step)
            values[at_head[2]] = b.sub(row_left, step)
            for phi, value in values.items():
                phi.add_incoming(value, block)
            b.branch(head)

        b.position_at_end(done)
        if self._is_copying:
            b.fence("seq_cst")  # Stores past the cache are ordered by nothing else.
        b.ret_void()

    def _stripes(self, state: ir.Value, source: ir.Value, target: ir.Value, *, is_last: bool) -> ir.Value:
        b = self._b
        swap = ir.Constant(ir.VectorType(_I32, 8), [i ^ 1 for i in range(8)])
        low, half = _lanes([2**32 - 1] * 8), _lanes([32] * 8)
        num_stripes = _BLOCK_BYTES // 64
        for i in range(num_stripes):
            place = b.add(source, _I64(64 * i))
            data = self._load(place, _VECTOR, 1)
            if self._is_copying:
                store = b.store(data, self._pointer(b.add(target, _I64(64 * i)), _VECTOR), align=64)
                store.set_metadata("nontemporal", self._module.add_metadata([_I32(1)]))
            is_end = is_last and i == num_stripes - 1
            keyed = b.xor(data, _lanes(_words(len(_SECRET) - 64 - 7 if is_end else 8 * i, 8)))
            product = b.mul(b.and_(keyed, low), b.lshr(keyed, half))
            state = b.add(state, b.add(product, b.shuffle_vector(data, data, swap)))
        if is_last:
            return state
        state = b.xor(b.xor(state, b.lshr(state, _lanes([47] * 8))), _lanes(_words(len(_SECRET) - 64, 8)))
        return b.mul(state, _lanes([_P32_1] * 8))

    def _store_hash(self, state: ir.Value, length: ir.Value, place: ir.Value) -> None:
        b = self._b
        lanes = [b.extract_element(state, _I32(i)) for i in range(8)]
        low = self._merge(lanes, _words(11, 8), b.mul(length, _I64(_P64_1)))
        high = self._merge(lanes, _words(len(_SECRET) - 64 - 11, 8), b.not_(b.mul(length, _I64(_P64_2))))
        for i, value in enumerate((low, high)):
            b.store(value, self._pointer(b.add(place, _I64(8 * i)), _I64), align=8)

    def _merge(self, lanes: list[ir.Value], key: Sequence[int], value: ir.Value) -> ir.Value:
        b = self._b
        for i in range(0, 8, 2):
            pair = [b.zext(b.xor(lanes[j], _I64(key[j])), _I128) for j in (i, i + 1)]
            product = b.mul(*pair)
            folded = b.xor(b.trunc(product, _I64), b.trunc(b.lshr(product, _I128(64)), _I64))
            value = b.add(value, folded)
        value = b.mul(b.xor(value, b.lshr(value, _I64(37))), _I64(0x165667919E3779F9))
        return b.xor(value, b.lshr(value, _I64(32)))

    def _min(self, x: ir.Value, y: ir.Value) -> ir.Value:
        return self._b.select(self._b.icmp_unsigned("<", x, y), x, y)

    def _pointer(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self._b.inttoptr(address, kind.as_pointer())

    def _load(self, address: ir.Value, kind: ir.Type, align: int) -> ir.Value:
        return self._b.load(self._pointer(address, kind), align=align)


class OnePass:
    """The compiled functions. Any thread may call them, many at a time."""

    def __init__(self) -> None:
        llvm.initialize_native_target()
        llvm.initialize_native_asmprinter()
        module = ir.Module("kvtransfer")
        for name, is_copying in (("hash_rows", False), ("copy_rows", True)):
            _Emitter(module, name, is_copying=is_copying)
        parsed = llvm.parse_assembly(str(module))
        machine = llvm.Target.from_default_triple().create_target_machine(
            cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3, jit=True
        )
        self._engine = llvm.create_mcjit_compiler(parsed, machine)
        self._engine.finalize_object()
        kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_void_p)
        self.hash_rows: Callable[..., None] = kind(self._engine.get_function_address("hash_rows"))
        self.copy_rows: Callable[..., None] = kind(self._engine.get_function_address("copy_rows"))
