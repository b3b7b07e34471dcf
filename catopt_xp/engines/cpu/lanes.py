"""The innermost loops of the panel engine, written lane by lane: what numba's own loops reach a third of.

Every function here is a numba intrinsic: it emits LLVM instructions on whole vector registers, so how many lanes there
are, what stays in a register and in which order is summed does not hang on what an optimiser happens to recognise.
Arrays are flat and C-contiguous; `x0`, `g0` and the like are offsets in elements. Nothing is checked: the panel engine
alone calls these, with offsets of its own making.

Two facts decide the speed, both measured: arrays start at multiples of 64 bytes (a vector load across two cache lines
costs twice), and rows of a block are no multiple of 4096 bytes apart (they would share a few places of the cache).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from catopt_xp.engines.cpu.vectors import AVX512, INDEX, X86, Code, N, pointer_to, real_of
from catopt_xp.engines.panels import STRIP

GRADIENT_ROWS = 5  # units whose gradient is formed at a time: 5 x 4 registers of sums
# Registers for columns in the gradient's block, and units in the product's: as many sums as there are registers for.
GRADIENT_REGISTERS = 4 if AVX512 else 2
PRODUCT_ROWS, PRODUCT_UNITS = 4, (4 if AVX512 else 3)


@intrinsic
def convert(typing: Any, source: Any, s0: Any, room: Any, x: Any, x0: Any) -> Any:
    """`x[x0 + j] = float(source[s0 + j])` for the columns j of a strip, 0 from column `room` on.

    The source is uint8 or float.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(builder, real_of(context, x))
        element = real_of(context, source)
        origin, target = pointer_to(context, builder, source, args[0]), pointer_to(context, builder, x, args[3])

        def as_floats(value: Any, kind: Any) -> Any:
            if isinstance(element, ir.IntType):
                return builder.uitofp(value, kind)
            return value if element == code.real else builder.fpext(value, kind)

        whole = builder.icmp_signed(">=", args[2], ir.Constant(INDEX, STRIP))
        with builder.if_else(whole, likely=True) as (then, otherwise):
            with then:
                for j in range(0, STRIP, code.lanes):
                    value = as_floats(code.load(origin, code.offset(args[1], j), element), code.vector)
                    code.store(value, target, code.offset(args[4], j))
            with otherwise:
                zeros = code.constant(0.0)
                for j in range(0, STRIP, code.lanes):
                    code.store(zeros, target, code.offset(args[4], j))

                def column(j: Any, _: Any) -> list[Any]:
                    value = as_floats(builder.load(builder.gep(origin, [code.offset(args[1], j)])), code.real)
                    builder.store(value, builder.gep(target, [code.offset(args[4], j)]))
                    return []

                code.repeat(args[2], [], column)
        return context.get_dummy_value()

    return types.void(source, N, N, x, N), emit


@intrinsic
def prefetch(typing: Any, source: Any, s0: Any, count: Any) -> Any:
    """Asks for `source[s0 : s0 + count]` to be brought near: it will be read soon. May reach beyond the array."""
    per_line = 64 // (source.dtype.bitwidth // 8)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, flag = pointer_to(context, builder, source, args[0]), ir.IntType(32)
        code = Code(builder, ir.FloatType())

        def line(i: Any, _: Any) -> list[Any]:
            at = builder.bitcast(builder.gep(pointer, [code.offset(args[1], i)]), ir.IntType(8).as_pointer())
            kind = [ir.Constant(flag, value) for value in (0, 2, 1)]  # for reading, into the second cache, data
            code.call(f"llvm.prefetch.p{at.type.addrspace}", at, *kind, returns=ir.VoidType())
            return []

        code.repeat(args[2], [], line, step=per_line)
        return context.get_dummy_value()

    return types.void(source, N, N), emit


@intrinsic
def gradient(
    typing: Any, d: Any, d0: Any, units: Any, x: Any, x0: Any, stride: Any, n: Any, g: Any, g0: Any, more: Any
) -> Any:
    """Gradient of GRADIENT_ROWS units over a strip.

    `g[g0 + r*STRIP + j] = sum_i d[d0 + i*units + r] * x[x0 + i*stride + j]`, where i counts n samples, in order; with
    `more` (not 0) the sum goes on from what g holds.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(builder, real_of(context, g))
        D, X, G = (pointer_to(context, builder, kind, args[k]) for kind, k in ((d, 0), (x, 3), (g, 7)))
        d0, units, x0, stride, n, g0 = args[1], args[2], args[4], args[5], args[6], args[8]
        goes_on = builder.icmp_signed("!=", args[9], ir.Constant(INDEX, 0))
        width = GRADIENT_REGISTERS * code.lanes
        for j in range(0, STRIP, width):
            block = [(r, j + c) for r in range(GRADIENT_ROWS) for c in range(0, width, code.lanes)]
            places = [code.offset(g0, r * STRIP + c) for r, c in block]
            with builder.if_else(goes_on) as (then, otherwise):
                with then:
                    held, end_of_then = [code.load(G, place) for place in places], builder.block
                with otherwise:
                    end_of_otherwise = builder.block
            starts = []
            for value in held:
                start = builder.phi(code.vector)
                start.add_incoming(value, end_of_then)
                start.add_incoming(code.constant(0.0), end_of_otherwise)
                starts.append(start)

            def sample(i: Any, sums: Sequence[Any], j: int = j, block: Any = block) -> list[Any]:
                columns = {c: code.load(X, code.offset(x0, (i, stride), c)) for c in range(j, j + width, code.lanes)}
                rows = [
                    code.broadcast(builder.load(builder.gep(D, [code.offset(d0, (i, units), r)])))
                    for r in range(GRADIENT_ROWS)
                ]
                return [
                    code.multiply_add(rows[r], columns[c], total) for (r, c), total in zip(block, sums, strict=True)
                ]

            for value, place in zip(code.repeat(n, starts, sample), places, strict=True):
                code.store(value, G, place)
        return context.get_dummy_value()

    return types.void(d, N, N, x, N, N, N, g, N, N), emit


@intrinsic
def product(
    typing: Any, x: Any, x0: Any, stride: Any, w: Any, w0: Any, strip: Any, strips: Any, z: Any, z0: Any
) -> Any:
    """Forward product of PRODUCT_ROWS samples and PRODUCT_UNITS units over the strips of a panel.

    `z[z0 + i*PRODUCT_UNITS + h] = sum_s sum_j x[x0 + i*stride + s*STRIP + j] * w[w0 + s*strip + h*STRIP + j]`: the
    lanes of a vector sum by themselves and are added in the end.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(builder, real_of(context, z))
        X, W, Z = (pointer_to(context, builder, kind, args[k]) for kind, k in ((x, 0), (w, 3), (z, 7)))
        x0, stride, w0, strip, strips, z0 = args[1], args[2], args[4], args[5], args[6], args[8]

        def over_strip(s: Any, sums: Sequence[Any]) -> list[Any]:
            sums = list(sums)
            for j in range(0, STRIP, code.lanes):
                units = [code.load(W, code.offset(w0, (s, strip), h * STRIP + j)) for h in range(PRODUCT_UNITS)]
                for i in range(PRODUCT_ROWS):
                    sample = code.load(X, code.offset(x0, (s, STRIP), (stride, i), j))
                    for h, unit in enumerate(units):
                        place = i * PRODUCT_UNITS + h
                        sums[place] = code.multiply_add(sample, unit, sums[place])
            return sums

        sums = code.repeat(strips, [code.constant(0.0)] * (PRODUCT_ROWS * PRODUCT_UNITS), over_strip)
        for k, numbers in enumerate(code.fold(sums)):
            done = k * code.lanes
            code.store(code.first(numbers, len(sums) - done), Z, code.offset(z0, done))
        return context.get_dummy_value()

    return types.void(x, N, N, w, N, N, N, z, N), emit


# --- rows of small matrices -----------------------------------------------------------------------------------------


@intrinsic
def combine(
    typing: Any, w: Any, w0: Any, w_step: Any, x: Any, x0: Any, x_step: Any, count: Any, z: Any, z0: Any, n: Any
) -> Any:
    """`z[z0 + j] = sum_i w[w0 + i*w_step] * x[x0 + i*x_step + j]` over `count` rows, at least one, for j below n.

    n: whole vectors of either float type, that is a multiple of 64 bytes of float32.
    """

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(builder, real_of(context, z))
        W, X, Z = (pointer_to(context, builder, kind, args[k]) for kind, k in ((w, 0), (x, 3), (z, 7)))
        w0, w_step, x0, x_step, count, z0, n = args[1], args[2], args[4], args[5], args[6], args[8], args[9]

        def column(j: Any, _: Any) -> list[Any]:
            def row(i: Any, sums: Sequence[Any]) -> list[Any]:
                weight = code.broadcast(builder.load(builder.gep(W, [code.offset(w0, (i, w_step))])))
                return [code.multiply_add(weight, code.load(X, code.offset(x0, (i, x_step), j)), sums[0])]

            code.store(code.repeat(count, [code.constant(0.0)], row)[0], Z, code.offset(z0, j))
            return []

        code.repeat(n, [], column, step=code.lanes)
        return context.get_dummy_value()

    return types.void(w, N, N, x, N, N, N, z, N, N), emit


@intrinsic
def dot(typing: Any, x: Any, x0: Any, y: Any, y0: Any, n: Any) -> Any:
    """`sum_j x[x0 + j] * y[y0 + j]` for j below n, whole vectors as in `combine`; the lanes are added in the end."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(builder, real_of(context, x))
        X, Y = (pointer_to(context, builder, kind, args[k]) for kind, k in ((x, 0), (y, 2)))

        def column(j: Any, sums: Sequence[Any]) -> list[Any]:
            here, there = code.load(X, code.offset(args[1], j)), code.load(Y, code.offset(args[3], j))
            return [code.multiply_add(here, there, sums[0])]

        total = code.fold(code.repeat(args[4], [code.constant(0.0)], column, step=code.lanes))
        return builder.extract_element(total[0], ir.Constant(ir.IntType(32), 0))

    return x.dtype(x, N, y, N, N), emit


# --- processor state and counting -----------------------------------------------------------------------------------


@intrinsic
def flush_subnormals(typing: Any) -> Any:
    """From here on this thread reads and writes subnormal numbers as 0 (x86); returns the state to `restore`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not X86:
            return ir.Constant(ir.IntType(32), 0)
        state = cgutils.alloca_once(builder, ir.IntType(32))
        _control(builder, "stmxcsr", state)
        before = builder.load(state)
        builder.store(builder.or_(before, ir.Constant(ir.IntType(32), 0x8040)), state)  # flush to zero, inputs are zero
        _control(builder, "ldmxcsr", state)
        return before

    return types.uint32(), emit


@intrinsic
def restore(typing: Any, before: Any) -> Any:
    """Puts back the state that `flush_subnormals` returned."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if X86:
            state = cgutils.alloca_once(builder, ir.IntType(32))
            builder.store(args[0], state)
            _control(builder, "ldmxcsr", state)
        return context.get_dummy_value()

    return types.void(types.uint32), emit


def _control(builder: Any, instruction: str, state: Any) -> None:
    pointer = builder.bitcast(state, ir.IntType(8).as_pointer())  # as LLVM 15 wants it, with which numba 0.61 comes
    kind = ir.FunctionType(ir.VoidType(), [pointer.type])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{instruction}"), [pointer])


@intrinsic
def take_number(typing: Any, counter: Any) -> Any:
    """The number in `counter[0]`, which is one more afterwards; threads that ask at once get different numbers."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = pointer_to(context, builder, counter, args[0])
        return builder.atomic_rmw("add", pointer, ir.Constant(INDEX, 1), "monotonic")

    return N(counter), emit
