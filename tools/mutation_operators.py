"""Mutants of a file, made by mutmut's operators, for `mutants.py`."""

import ast
import dataclasses
import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parents[1]
EQUIVALENT = Path(__file__).with_name("mutants.md")
DEFINITIONS = cst.FunctionDef | cst.ClassDef


@dataclasses.dataclass(frozen=True)
class Mutant:
    """A file with one change."""

    path: str
    #: The function. ``before`` and ``after`` are the lines that differ.
    where: str
    before: str
    after: str
    source: str
    #: Lines for which to look for tests; each set is used only if no test reaches any line of the sets before it.
    lines: tuple[frozenset[int], ...]

    @property
    def key(self) -> tuple[str, ...]:
        return self.path, self.where, self.before, self.after

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.path}\n{self.source}".encode()).hexdigest()

    def __str__(self) -> str:
        return f"{self.path}:{min(self.lines[0])} {self.where}\n    - {self.before}\n    + {self.after}"


class Places(cst.CSTVisitor):
    """Collects each node that a mutmut operator changes, together with its ancestors and its replacements.

    Annotations are skipped. Decorated functions are included, unlike in mutmut, because half of the ops are decorated.
    """

    def __init__(self) -> None:
        self.around: list[cst.CSTNode] = []
        self.found: list[tuple[tuple[cst.CSTNode, ...], cst.CSTNode]] = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        self.around.append(node)
        if isinstance(node, cst.Annotation):
            return False
        for kind, operator in mutation_operators:
            if isinstance(node, kind):
                self.found.extend((tuple(self.around), changed) for changed in operator(node))
        return True

    def on_leave(self, original_node: cst.CSTNode) -> None:
        self.around.pop()


class Meaning(ast.NodeTransformer):
    """Removes the parts of a program that cannot affect any result.

    - ``strict=`` of zip, which has no effect if the lengths are equal.
    - Type aliases, ``Rule = …``, which are for annotations.
    """

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if isinstance(node.func, ast.Name) and node.func.id == "zip":
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        return self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> ast.AST:
        is_type = re.fullmatch("[A-Z]([A-Z]*[a-z].*)?", ast.unparse(node.targets[0]))
        return ast.Pass() if is_type else self.generic_visit(node)


def meaning(code: bytes) -> str | None:
    """Return the normalized AST of ``code``, or None if it does not parse."""
    try:
        return ast.dump(Meaning().visit(ast.parse(code)))
    except SyntaxError:
        return None


def mutants(paths: Iterable[str], seed: int) -> Iterator[Mutant]:
    """Yield all mutants in random order, each once."""
    places, known = [], set()
    for path in paths:
        wrapper = MetadataWrapper(cst.parse_module(source := (ROOT / path).read_bytes()), unsafe_skip_copy=True)
        wrapper.module.visit(visitor := Places())
        at = wrapper.resolve(ByteSpanPositionProvider)
        places += [(path, source, at, *found) for found in visitor.found]
    random.Random(seed).shuffle(places)
    for path, source, at, around, changed in places:
        (module, top, *_, node) = around
        start, end = at[node].start, at[node].start + at[node].length
        new = source[:start] + module.code_for_node(changed).encode() + source[end:]
        # Compare only the module-level statement, including its decorators.
        first = source.rfind(b"\n", 0, min(at[part].start for part in (top, *getattr(top, "decorators", ())))) + 1
        last = at[top].start + at[top].length - len(source) or None
        after = meaning(new[first:last])
        if after is None or after == meaning(source[first:last]) or (path, new) in known:
            continue
        known.add((path, new))
        where = ".".join(a.name.value for a in around if isinstance(a, DEFINITIONS)) or "-"
        yield Mutant(path, where, *differ(source, new), new.decode(), tuple(lines(source, at, around)))


def differ(source: bytes, new: bytes) -> tuple[str, str]:
    """Return the lines that differ, with each side joined into one line."""
    a, b = source.decode().splitlines(), new.decode().splitlines()
    while a[:1] == b[:1]:
        a, b = a[1:], b[1:]
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return " ".join(map(str.strip, a)), " ".join(map(str.strip, b))


def lines(source: bytes, at: Any, around: Sequence[cst.CSTNode]) -> Iterator[frozenset[int]]:
    """Yield sets of lines for which to look for tests, from narrow to wide.

    They are the lines of the node; of its statement, or the head of a compound statement; of each enclosing function or
    class; of definitions that share names with the module-level statement, for code that runs at import; and of the
    file.
    """
    module, top, *_, node = around

    def span(first: cst.CSTNode, last: cst.CSTNode) -> frozenset[int]:
        ends = at[first].start, at[last].start + at[last].length
        return frozenset(range(*(source.count(b"\n", 0, end) + 1 + i for i, end in enumerate(ends))))

    yield span(node, node)
    *_, statement = (a for a in around if isinstance(a, cst.BaseCompoundStatement | cst.SimpleStatementLine))
    if not isinstance(statement, DEFINITIONS):
        yield span(statement, statement if isinstance(statement, cst.SimpleStatementLine) else node)
    yield from (span(a, a) for a in reversed(around) if isinstance(a, DEFINITIONS))
    text = source.decode()
    defined = {a.name.value: span(a, a) for a in module.body if isinstance(a, DEFINITIONS)}
    names = {*defined, *re.findall(r"^(\w+) *=", text, re.MULTILINE)}
    names &= {top.name.value} if isinstance(top, DEFINITIONS) else {*re.findall(r"\w+", module.code_for_node(top))}
    naming = (i for i, line in enumerate(text.splitlines(), start=1) if names & {*re.findall(r"\w+", line)})
    yield frozenset(naming).union(*(defined[name] for name in names & {*defined}))
    yield frozenset(range(1, text.count("\n") + 1))


def equivalent() -> set[tuple[str, ...]]:
    """Return the mutants in `mutants.md`: a heading ``### path function``, a reason, and the change as a diff."""
    found, heading, before = set(), [], ""
    for line in EQUIVALENT.read_text().splitlines():
        if line.startswith("### "):
            heading = line.split()[1:]
        elif line.startswith("- "):
            before = line[2:]
        elif line.startswith("+ "):
            found.add((*heading, before, line[2:]))
    return found
