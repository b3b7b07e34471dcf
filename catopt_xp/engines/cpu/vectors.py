"""Vector instructions for numba functions: how many lanes this processor has, and a builder that emits them.

What `lanes.py` and `rules.py` are made of. Square root and quotient of float32 start from the processor's estimate
where that is fast, with AVX-512: exact ones cost as much as all the rest of an update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, config, types
from numba.core.codegen import get_host_cpu_features

INDEX = ir.IntType(64)
SMALLEST, LARGEST = 2.0**-126, (2.0 - 2.0**-23) * 2.0**127  # normal numbers of float32


def _features() -> str:
    """The processor's instruction sets, as numba will compile for them (its environment variables are honoured)."""
    if config.CPU_FEATURES is not None:
        return str(config.CPU_FEATURES)
    return "" if config.CPU_NAME else str(get_host_cpu_features())


AVX512 = "+avx512f" in _features() and "+avx512dq" in _features()
VECTOR_BYTES = 64 if AVX512 else 32 if "+avx2" in _features() else 16
X86 = "+sse2" in _features()
N = types.intp


class Code:
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

    def first(self, vector: Any, count: int) -> Any:
        """A vector's first numbers, or all of them where it has no more."""
        numbers = ir.VectorType(ir.IntType(32), min(count, self.lanes))
        return self.builder.shuffle_vector(vector, vector, ir.Constant(numbers, list(range(numbers.count))))

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
        """Vectors of sums by lane -> one number for each vector, in order: halved by adding neighbours until whole.

        The last of the vectors that are returned holds zeros behind them, where they do not fill it.
        """
        sums = [*sums, *[self.constant(0.0)] * (-len(sums) % self.lanes)]
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


def pointer_to(context: Any, builder: Any, kind: Any, array: Any) -> Any:
    """Where the elements of an array begin; `kind`: its numba type."""
    return context.make_array(kind)(context, builder, array).data


def real_of(context: Any, kind: Any) -> Any:
    """The LLVM type of an array's elements."""
    return context.get_value_type(kind.dtype)
