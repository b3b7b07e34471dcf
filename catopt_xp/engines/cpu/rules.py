"""The optimizers' rules on whole vectors, made of the same text that a GPU compiles."""

from __future__ import annotations

import ast
import re
from collections import namedtuple
from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from catopt_xp.engines.cpu.vectors import Code, N, pointer_to, real_of
from catopt_xp.optim.base import BaseOptimizer
from catopt_xp.optim.rules import Adam, GradientDescent, Momentum, RMSProp

# The numbers of each rule, in the order of `scalars()`. A class of their own each: it tells `update` which rule to run.
GradientDescentNumbers = namedtuple("GradientDescentNumbers", ["lr"])
MomentumNumbers = namedtuple("MomentumNumbers", ["rate", "beta", "alpha", "nesterov"])
RMSPropNumbers = namedtuple("RMSPropNumbers", ["rate", "beta", "alpha", "c", "eps_in", "eps_out"])
AdamNumbers = namedtuple("AdamNumbers", ["rate", "beta1", "alpha1", "beta2", "alpha2", "c2", "eps_in", "eps_out"])
NUMBERS: dict[type[BaseOptimizer], Any] = {
    GradientDescent: GradientDescentNumbers,
    Momentum: MomentumNumbers,
    RMSProp: RMSPropNumbers,
    Adam: AdamNumbers,
}


def parse_rule(text: str) -> ast.Module:
    """An optimizer's kernel text, C++ assignments with `+ - * / sqrt ?:`, as Python's syntax tree.

    >>> ast.unparse(parse_rule("p -= (fast ? lr : 1) * g;"))
    'p -= (lr if fast else 1) * g'
    """
    python = re.sub(r"\(?(\w+) \? ([^:]+) : (\w+)\)?;?", r"((\2) if \1 else (\3))", text)
    return ast.parse(python.replace(";", "\n").replace("\n ", "\n"))


_RULES = {numbers: (optimizer.moment_names, parse_rule(optimizer.kernel)) for optimizer, numbers in NUMBERS.items()}


class _Rule:
    """The statements of a rule, on vectors."""

    def __init__(self, code: Code, vectors: dict[str, Any], numbers: dict[str, Any], inverses: dict[str, Any]) -> None:
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

    `numbers`: a named tuple of float64, of a class of NUMBERS; `decay`: (), or (l2, shrink) to apply first,
    `g += l2*p; p *= shrink`.
    """
    names, rule = _RULES[numbers.instance_class]
    fields = numbers.instance_class._fields

    def emit(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(builder, real_of(context, p))
        pointers = {"p": pointer_to(context, builder, p, args[0])}
        for k, name in enumerate(names):
            pointers[name] = pointer_to(context, builder, moments[k], builder.extract_value(args[1], k))
        G, at, g0, n = pointer_to(context, builder, g, args[3]), args[2], args[4], args[5]
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
