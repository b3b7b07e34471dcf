"""Small changes of a source text, for mutation.py: cosmic-ray's, and two kinds that it lacks."""

from __future__ import annotations

import ast
import collections
import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    operator: str
    place: str  # function or class
    before: str  # the changed lines
    after: str
    source: str

    @property
    def name(self) -> str:
        return f"{self.operator}, {self.place}: `{self.before}` -> `{self.after}`"


@dataclass(frozen=True)
class Piece:
    """A statement of a module, or of one of its classes: parsed alone, for a file takes a tenth of a second."""

    first: int  # line, from 0
    last: int  # the line behind it
    opening: str = ""  # what makes a text of its own of it
    ending: str = ""


def pieces(source: str) -> Iterator[Piece]:
    for top in ast.parse(source).body:
        first = first_line(top)
        if not isinstance(top, ast.ClassDef):
            yield Piece(first, top.end_lineno or 0)
            continue
        yield Piece(first, first_line(top.body[0]), ending="    pass\n")
        for part in top.body:
            yield Piece(first_line(part), part.end_lineno or 0, opening="class Around:\n")


def first_line(node: ast.stmt) -> int:
    return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1


def cosmic_ray_variants(text: str) -> Iterator[tuple[str, str]]:
    """(operator, mutated text) of each place where an operator of cosmic-ray that takes no arguments applies."""
    import cosmic_ray.plugins as plugins
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code

    nodes = list(ast_nodes(get_ast(text)))
    for name in sorted(plugins.operator_names()):
        kind = plugins.get_operator(name)
        if not kind.arguments():
            for occurrence in range(sum(1 for node in nodes for _ in kind().mutation_positions(node))):
                yield name.removeprefix("core/"), mutate_code(text, kind(), occurrence)


AUGMENTED = {"+=": ["-=", "*="], "-=": ["+=", "*="], "*=": ["/=", "+="], "|=": ["&="], "<<=": [">>="]}


def own_variants(source: str) -> Iterator[tuple[str, str]]:
    """What cosmic-ray lacks: another augmented assignment, and a statement of a function left out."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def offset(line: int, column: int) -> int:
        text = lines[line - 1].encode()[:column].decode()
        return starts[line - 1] + len(text)

    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        for part in ast.walk(node):
            if not isinstance(part, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr | ast.Return | ast.Raise):
                continue
            if isinstance(part, ast.Expr) and isinstance(part.value, ast.Constant):
                continue  # a docstring
            first, last = offset(part.lineno, part.col_offset), offset(part.end_lineno or 0, part.end_col_offset or 0)
            lines_left = "\n" * source.count("\n", first, last)  # the lines below keep their numbers
            yield "LeaveOutStatement", source[:first] + "pass" + lines_left + source[last:]
            if isinstance(part, ast.AugAssign):
                target = offset(part.target.end_lineno or 0, part.target.end_col_offset or 0)
                sign = re.match(r"\s*(\S+=)\s", source[target:])
                for other in AUGMENTED[sign[1]] if sign else ():
                    yield "ReplaceAugmented", source[:target] + f" {other} " + source[target + sign.end() :]


class Bare(ast.NodeTransformer):
    """Drops annotations, which run nothing here: every module has `from __future__ import annotations`."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)


def bare(source: str) -> str:
    return ast.dump(Bare().visit(ast.parse(source)))


def mutants_of(source: str) -> list[Mutant]:
    lines, names, found = source.splitlines(keepends=True), places(source), []
    times: collections.Counter[tuple[str, ...]] = collections.Counter()
    for piece in pieces(source):
        text = piece.opening + "".join(lines[piece.first : piece.last]) + piece.ending
        seen = {bare(text)}
        for operator, mutated in [*cosmic_ray_variants(text), *own_variants(text)]:
            try:
                meaning = bare(mutated)
            except SyntaxError:
                continue
            if meaning not in seen:
                seen.add(meaning)
                line, before, after = changed_lines(text, mutated)
                told = (operator, names[piece.first + line - piece.opening.count("\n")], before, after)
                times[told] += 1  # the same line may stand there twice
                place = told[1] + (f" ({times[told]})" if times[told] > 1 else "")
                inner = mutated.removeprefix(piece.opening).removesuffix(piece.ending)
                whole = "".join(lines[: piece.first]) + inner + "".join(lines[piece.last :])
                found.append(Mutant(operator, place, before, after, whole))
    return found


def changed_lines(source: str, mutated: str) -> tuple[int, str, str]:
    """The first line that differs, from 0, and what differs, before and after."""
    old, new = source.splitlines(), mutated.splitlines()
    changes = [c for c in difflib.SequenceMatcher(None, old, new, False).get_opcodes() if c[0] != "equal"]
    first, last = changes[0], changes[-1]
    texts = [" ".join(" ".join(part).split()) for part in (old[first[1] : last[2]], new[first[3] : last[4]])]
    return first[1], texts[0], texts[1]


def places(source: str) -> list[str]:
    """For each line the innermost function or class around it, with those around that."""
    names = [""] * (source.count("\n") + 1)
    for node in ast.walk(ast.parse(source)):  # outer ones first
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            for line in range(node.lineno - 1, node.end_lineno or 0):
                names[line] += f".{node.name}"
    return [name.removeprefix(".") or "module" for name in names]
