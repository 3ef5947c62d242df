"""Compiled kernels: functions over numbered tasks, which a crew of threads runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir

from engine.kernels.cpu.crew import Table, crew, record_words
from engine.kernels.cpu.llvm import Emitter, Int, Isa

_I64 = ir.IntType(64)


class Kernel:
    """A compiled function over numbered tasks, which threads take one after the other; tasks must not overlap.

    ``build(emitter, task, parameters)`` generates the code of one task; every call gets ``num_parameters`` 64-bit
    integers.
    """

    def __init__(
        self, name: str, isa: Isa, num_parameters: int, build: Callable[[Emitter, Int, list[Int]], None]
    ) -> None:
        module = ir.Module(name)
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_I64, _I64]), name)
        e = Emitter(function, isa)
        base, task = (Int(e, argument) for argument in function.args)
        build(e, task, [e.load_int(base + 8 * i) for i in range(num_parameters)])
        e.b.ret_void()
        self._compiled = _compile(module, isa)
        self.num_parameters = num_parameters
        self.address: int = self._compiled.get_function_address(name)

    def __call__(self, num_tasks: int, *parameters: int) -> None:
        """Run alone on all threads; most kernels are run by programs (program.py)."""
        table = Table(1)
        table.records[:] = record_words(self.address, num_tasks, parameters)
        crew().run(table, 0, 1)


def _compile(module: ir.Module, isa: Isa) -> Any:
    """Returns the engine that owns the code; the kernel keeps it alive."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    parsed = llvm.parse_assembly(str(module))
    parsed.verify()
    target = llvm.Target.from_default_triple()
    machine = target.create_target_machine(cpu=isa.cpu, features=isa.features, opt=3, jit=True)
    # Vectors and register tiles are explicit; the compiler only allocates registers.
    options = llvm.create_pipeline_tuning_options(speed_level=2)
    options.loop_unrolling = options.loop_vectorization = options.slp_vectorization = False
    passes = llvm.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    engine = llvm.create_mcjit_compiler(parsed, machine)
    engine.finalize_object()
    return engine
