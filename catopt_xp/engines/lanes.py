"""The innermost loops of the panel engine, written lane by lane: what numba's own loops reach a third of. Floor F3.

Every function here is a numba intrinsic: it emits LLVM instructions on whole vector registers, so how many lanes there
are, what stays in a register and in which order is summed does not hang on what an optimiser happens to recognise.
Arrays are flat and C-contiguous; `x0`, `g0` and the like are offsets in elements. Nothing is checked: the panel engine
alone calls these, with offsets of its own making.

Three facts decide the speed, all measured: arrays start at multiples of 64 bytes (a vector load across two cache lines
costs twice), rows of a block are no multiple of 4096 bytes apart (they would share a few places of the cache), and
square root and quotient of float32 start from the processor's estimate (exact ones cost as much as all the rest).
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

from catopt_xp.engines.panels import STRIP

GRADIENT_ROWS = 5  # units whose gradient is formed at a time: 5 x 4 registers of sums
INDEX = ir.IntType(64)
SMALLEST, LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127  # normal numbers of float32


def _features() -> str:
    """The processor's instruction sets, as numba will compile for them (its environment variables are honoured)."""
    if config.CPU_FEATURES is not None:
        return str(config.CPU_FEATURES)
    return "" if config.CPU_NAME else str(get_host_cpu_features())


AVX512 = "+avx512f" in _features() and "+avx512dq" in _features()
VECTOR_BYTES = 64 if AVX512 else 32 if "+avx2" in _features() else 16
# Registers for columns in the gradient's block, and units in the product's: as many sums as there are registers for.
GRADIENT_REGISTERS = 4 if AVX512 else 2
PRODUCT_ROWS, PRODUCT_UNITS = 4, (4 if AVX512 else 2)
FLUSHES = "+sse2" in _features()  # whether `flush_subnormals` has an effect


class _Code:
    """A builder of vector instructions for one float type."""

    def __init__(self, builder: Any, real: Any) -> None:
        self.builder, self.real = builder, real
        self.bits = 32 if isinstance(real, ir.FloatType) else 64
        self.lanes = VECTOR_BYTES * 8 // self.bits
        self.vector = ir.VectorType(real, self.lanes)

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [value] * self.lanes)

    def offset(self, *terms: Any) -> Any:
        """The sum of offsets; a pair is a product."""
        total: Any = ir.Constant(INDEX, 0)
        for term in terms:
            factors = [ir.Constant(INDEX, f) if isinstance(f, int) else f for f in _pair(term)]
            total = self.builder.add(total, self.builder.mul(*factors))
        return total

    def load(self, pointer: Any, offset: Any, element: Any = None) -> Any:
        """The vector of elements that starts at an offset, which may be any."""
        kind = ir.VectorType(element or self.real, self.lanes)
        value = self.builder.load(self.builder.bitcast(self.builder.gep(pointer, [offset]), kind.as_pointer()))
        value.align = 1
        return value

    def store(self, value: Any, pointer: Any, offset: Any) -> None:
        place = self.builder.bitcast(self.builder.gep(pointer, [offset]), value.type.as_pointer())
        self.builder.store(value, place).align = 1

    def broadcast(self, scalar: Any) -> Any:
        """The scalar in every lane."""
        undefined, numbers = ir.Constant(self.vector, ir.Undefined), ir.VectorType(ir.IntType(32), self.lanes)
        first = self.builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(first, undefined, ir.Constant(numbers, [0] * self.lanes))

    def number(self, double: Any) -> Any:
        """A float64 of the caller in every lane."""
        return self.broadcast(self.builder.fptrunc(double, self.real) if self.bits == 32 else double)

    def call(self, name: str, *arguments: Any, returns: Any = None) -> Any:
        """A function of the instruction set, or one that LLVM knows for every vector."""
        kind = ir.FunctionType(returns or self.vector, [a.type for a in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, name), arguments)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return self.call(f"llvm.fmuladd.v{self.lanes}f{self.bits}", a, b, c)

    def repeat(
        self, count: Any, carried: Sequence[Any], body: Callable[..., Sequence[Any]], step: int = 1
    ) -> list[Any]:
        """`for i in range(0, count, step): carried = body(i, carried)`, at least once; what is carried in the end."""
        builder, before = self.builder, self.builder.block
        inside, behind = builder.append_basic_block("loop"), builder.append_basic_block("behind")
        builder.branch(inside)
        builder.position_at_end(inside)
        i, values = builder.phi(INDEX), [builder.phi(value.type) for value in carried]
        for phi, start in zip([i, *values], [ir.Constant(INDEX, 0), *carried], strict=True):
            phi.add_incoming(start, before)
        results = list(body(i, values))
        following = builder.add(i, ir.Constant(INDEX, step))
        for phi, result in zip([i, *values], [following, *results], strict=True):
            phi.add_incoming(result, builder.block)
        builder.cbranch(builder.icmp_signed("<", following, count), inside, behind)
        builder.position_at_end(behind)
        return results

    def fold(self, sums: list[Any]) -> list[Any]:
        """Vectors of sums by lane -> one number for each vector, in order: halved by adding neighbours until whole."""
        numbers = ir.VectorType(ir.IntType(32), self.lanes)
        even, odd = (ir.Constant(numbers, [2 * k + o for k in range(self.lanes)]) for o in (0, 1))
        for _ in range(self.lanes.bit_length() - 1):
            pairs = zip(sums[::2], sums[1::2], strict=True)
            shuffle = self.builder.shuffle_vector
            sums = [self.builder.fadd(shuffle(a, b, even), shuffle(a, b, odd)) for a, b in pairs]
        return sums

    # --- square root and quotient ---------------------------------------------------------------------------------

    @property
    def _estimates(self) -> bool:
        return AVX512 and self.bits == 32

    def _estimate(self, name: str, x: Any) -> Any:
        """The processor's guess, good to 14 bits."""
        every_lane = ir.Constant(ir.IntType(16), -1)
        return self.call(f"llvm.x86.avx512.{name}.ps.512", x, self.constant(0.0), every_lane)

    def sqrt(self, x: Any) -> Any:
        """The root, to about one unit in the last place: an estimate and one Newton step, `q += q/2 * (1 - q*r)`.

        Of infinity it is the largest number, whose inverse is as good as 0; of a NaN it is NaN.
        """
        if not self._estimates:
            return self.call(f"llvm.sqrt.v{self.lanes}f{self.bits}", x)
        builder, low, high = self.builder, self.constant(SMALLEST), self.constant(LARGEST)
        r = self._estimate("rsqrt14", x)  # about 1/sqrt(x)
        q = builder.fmul(x, r)
        rest = self.multiply_add(builder.fneg(q), r, self.constant(1.0))
        q = self.multiply_add(builder.fmul(q, self.constant(0.5)), rest, q)
        q = builder.select(builder.fcmp_ordered("<", x, low), self.constant(0.0), q)  # there r is infinite
        return builder.select(builder.fcmp_ordered(">", x, high), high, q)

    def divide(self, a: Any, b: Any) -> Any:
        """a/b, to about one unit in the last place, for a normal b: an estimate of 1/b and one Newton step."""
        if not self._estimates:
            return self.builder.fdiv(a, b)
        r = self._estimate("rcp14", b)
        rest = self.multiply_add(self.builder.fneg(b), r, self.constant(1.0))
        return self.builder.fmul(a, self.multiply_add(r, rest, r))


def _pair(term: Any) -> tuple[Any, Any]:
    return term if isinstance(term, tuple) else (term, 1)


def _pointer(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    return context.make_array(kind)(context, builder, array).data


def _real(context: Any, kind: Any) -> Any:
    return context.get_value_type(kind.dtype)


N = types.intp


@intrinsic
def convert(typing: Any, source: Any, s0: Any, x: Any, x0: Any) -> Any:
    """`x[x0 + j] = float(source[s0 + j])` for the columns j of a strip; the source is uint8 or float."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Code(builder, _real(context, x))
        element = _real(context, source)
        origin, target = _pointer(context, builder, source, args[0]), _pointer(context, builder, x, args[2])
        for j in range(0, STRIP, code.lanes):
            value = code.load(origin, code.offset(args[1], j), element)
            if isinstance(element, ir.IntType):
                value = builder.uitofp(value, code.vector)
            elif value.type != code.vector:
                value = builder.fpext(value, code.vector)
            code.store(value, target, code.offset(args[3], j))
        return context.get_dummy_value()

    return types.void(source, N, x, N), emit


@intrinsic
def prefetch(typing: Any, source: Any, s0: Any, count: Any) -> Any:
    """Asks for `source[s0 : s0 + count]` to be brought near: it will be read soon. May reach beyond the array."""
    per_line = 64 // (source.dtype.bitwidth // 8)

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, flag = _pointer(context, builder, source, args[0]), ir.IntType(32)
        code = _Code(builder, ir.FloatType())

        def line(i: Any, _: Any) -> list[Any]:
            at = builder.bitcast(builder.gep(pointer, [code.offset(args[1], i)]), ir.PointerType())
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
        code = _Code(builder, _real(context, g))
        D, X, G = (_pointer(context, builder, kind, args[k]) for kind, k in ((d, 0), (x, 3), (g, 7)))
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
        code = _Code(builder, _real(context, z))
        X, W, Z = (_pointer(context, builder, kind, args[k]) for kind, k in ((x, 0), (w, 3), (z, 7)))
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
            code.store(numbers, Z, code.offset(z0, k * code.lanes))
        return context.get_dummy_value()

    return types.void(x, N, N, w, N, N, N, z, N), emit


# --- the rules of the optimizers ------------------------------------------------------------------------------------

# What a rule is called with, by the class of its numbers: the names of its moments, and its text (`optim.py`).
_RULES: dict[str, tuple[Sequence[str], ast.Module]] = {}


def register_rule(name: str, moments: Sequence[str], text: str) -> None:
    """Makes an optimizer's kernel text, C++ assignments with `+ - * / sqrt ?:`, known to `update` under a name."""
    python = re.sub(r"\(?(\w+) \? ([^:]+) : (\w+)\)?;?", r"((\2) if \1 else (\3))", text)
    _RULES[name] = (tuple(moments), ast.parse(python.replace(";", "\n").replace("\n ", "\n")))


class _Rule:
    """The statements of a rule, on vectors."""

    def __init__(self, code: _Code, vectors: dict[str, Any], numbers: dict[str, Any], inverses: dict[str, Any]) -> None:
        self.code, self.vectors, self.numbers, self.inverses = code, vectors, numbers, inverses

    def run(self, rule: ast.Module) -> None:
        for statement in rule.body:
            if isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                value: ast.expr = ast.BinOp(statement.target, statement.op, statement.value)
                target: ast.expr = statement.target
            elif isinstance(statement, ast.Assign):
                target, value = statement.targets[0], statement.value
            else:
                raise NotImplementedError(f"a rule of the panel engine has no {ast.unparse(statement)!r}")
            self.vectors[ast.unparse(target)] = self.value(value)

    def value(self, node: ast.expr) -> Any:
        code, builder = self.code, self.code.builder
        match node:
            case ast.Name(name):
                return self.vectors[name] if name in self.vectors else self.numbers[name]
            case ast.Call(ast.Name("sqrt"), [inside]):
                return code.sqrt(self.value(inside))
            case ast.BinOp(left, ast.Div(), ast.Name(name)) if name in self.inverses:
                return builder.fmul(self.value(left), self.inverses[name])
            case ast.BinOp(left, ast.Div(), right):
                return code.divide(self.value(left), self.value(right))
            case ast.BinOp(left, ast.Mult(), right):
                return builder.fmul(self.value(left), self.value(right))
            case ast.BinOp(ast.BinOp(a, ast.Mult(), b), ast.Add(), right):
                return code.multiply_add(self.value(a), self.value(b), self.value(right))
            case ast.BinOp(left, ast.Add(), ast.BinOp(a, ast.Mult(), b)):
                return code.multiply_add(self.value(a), self.value(b), self.value(left))
            case ast.BinOp(left, ast.Add(), right):
                return builder.fadd(self.value(left), self.value(right))
            case ast.BinOp(left, ast.Sub(), ast.BinOp(a, ast.Mult(), b)):
                return code.multiply_add(builder.fneg(self.value(a)), self.value(b), self.value(left))
            case ast.IfExp(test, yes, no):
                chosen = builder.fcmp_unordered("!=", self.value(test), code.constant(0.0))
                return builder.select(chosen, self.value(yes), self.value(no))
        raise NotImplementedError(f"a rule of the panel engine has no {ast.unparse(node)!r}")


@intrinsic
def update(typing: Any, p: Any, moments: Any, at: Any, g: Any, g0: Any, n: Any, numbers: Any, decay: Any) -> Any:
    """The optimizer's rule on n elements (a multiple of STRIP) of p and its moments from `at` on, with g from `g0` on.

    `numbers`: a named tuple of float64, whose class was registered; `decay`: (), or (l2, shrink) to apply first,
    `g += l2*p; p *= shrink`.
    """
    names, rule = _RULES[numbers.instance_class.__name__]
    fields = numbers.instance_class._fields

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = _Code(builder, _real(context, p))
        pointers = {"p": _pointer(context, builder, p, args[0])}
        for k, name in enumerate(names):
            pointers[name] = _pointer(context, builder, moments[k], builder.extract_value(args[1], k))
        G, at, g0, n = _pointer(context, builder, g, args[3]), args[2], args[4], args[5]
        doubles = {name: builder.extract_value(args[6], k) for k, name in enumerate(fields)}
        one = ir.Constant(ir.DoubleType(), 1.0)
        scalars = {name: code.number(value) for name, value in doubles.items()}
        inverses = {name: code.number(builder.fdiv(one, value)) for name, value in doubles.items()}
        l2, shrink = (code.number(builder.extract_value(args[7], k)) for k in range(2)) if len(decay) else (None, None)

        def vector(i: Any, _: Any) -> list[Any]:
            here = code.offset(at, i)
            vectors = {name: code.load(pointer, here) for name, pointer in pointers.items()}
            vectors["g"] = code.load(G, code.offset(g0, i))
            if l2 is not None:
                vectors["g"] = code.multiply_add(l2, vectors["p"], vectors["g"])
                vectors["p"] = builder.fmul(vectors["p"], shrink)
            _Rule(code, vectors, scalars, inverses).run(rule)
            for name, pointer in pointers.items():
                code.store(vectors[name], pointer, here)
            return []

        code.repeat(n, [], vector, step=code.lanes)
        return context.get_dummy_value()

    return types.void(p, moments, N, g, N, N, numbers, decay), emit


# --- processor state and counting -----------------------------------------------------------------------------------


@intrinsic
def flush_subnormals(typing: Any) -> Any:
    """From here on this thread reads and writes subnormal numbers as 0 (x86); returns the state to `restore`."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if not FLUSHES:
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
        if FLUSHES:
            state = cgutils.alloca_once(builder, ir.IntType(32))
            builder.store(args[0], state)
            _control(builder, "ldmxcsr", state)
        return context.get_dummy_value()

    return types.void(types.uint32), emit


def _control(builder: Any, instruction: str, state: Any) -> None:
    pointer = builder.bitcast(state, ir.PointerType())
    kind = ir.FunctionType(ir.VoidType(), [pointer.type])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.sse.{instruction}"), [pointer])


@intrinsic
def take_number(typing: Any, counter: Any) -> Any:
    """The number in `counter[0]`, which is one more afterwards; threads that ask at once get different numbers."""

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, counter, args[0])
        return builder.atomic_rmw("add", pointer, ir.Constant(INDEX, 1), "monotonic")

    return N(counter), emit
