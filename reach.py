"""Which code a function can reach in this repository, each piece with a digest: what makes a result stale.

Reached is what a function's source names, and what that names: functions, classes with all their methods, constants.
What cannot change a result does not count: comments, docstrings, layout, the texts of errors, and the defaults of flags
(a stage records their values).
"""

import ast
import dataclasses
import functools
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

from common import ROOT, InputError

# What does not count and leads nowhere: tables of which a stage records the entry that it uses and gives the function
# there as a root of its own, models, which it records by their weights, what reports progress, and descriptions of work.
APART = (
    "LOSSES", "READ", "PROTOCOL_OF", "TASKS", "ENGINES", "BUILTIN", "builtin_folder", "converted_folder", "digest", "ALONE",
    "StepLog", "Progress", "tensorboard", "print0", "model_card", "Held", "Run", "Files", "Debates", "ZeroShot",
)  # fmt: skip


@dataclasses.dataclass
class Module:
    """A source file's top-level definitions, and what it imports: local name -> (module, name in it or "")."""

    definitions: dict[str, list[ast.stmt]]
    imports: dict[str, tuple[str, str]]


def source_path(module: str) -> Path | None:
    """The file of a module of this repository; None for any other."""
    path = ROOT / module.replace(".", "/")
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@functools.cache
def parse(module: str) -> Module:
    tree = ast.parse(source_path(module).read_text(encoding="utf-8"))
    definitions: dict[str, list[ast.stmt]] = {}
    imports: dict[str, tuple[str, str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:  # `import a.b` binds a
                imported = a.name if a.asname else a.name.split(".")[0]
                imports[a.asname or imported] = imported, ""
        elif isinstance(node, ast.ImportFrom):
            imports |= {a.asname or a.name: (node.module, a.name) for a in node.names}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions.setdefault(node.name, []).append(node)
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            for name in {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and assigned(n, node)}:
                definitions.setdefault(name, []).append(node)
    return Module(definitions, imports)


def assigned(name: ast.Name, statement: ast.stmt) -> bool:
    """Whether a top-level statement sets `name`, also as NAME[key] = value."""
    targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
    keyed = any(isinstance(t, ast.Subscript) and t.value is name for t in targets)
    return isinstance(name.ctx, ast.Store) or keyed


class Plain(ast.NodeTransformer):
    """A tree without what cannot change a result."""

    def visit_Expr(self, node: ast.Expr):
        return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)  # docstrings

    def visit_Raise(self, node: ast.Raise):
        return ast.Raise()

    def visit_AnnAssign(self, node: ast.AnnAssign):
        by_flag = isinstance(node.value, ast.Call) and ast.unparse(node.value.func) == "flag"
        return None if by_flag else self.generic_visit(node)


def written(node) -> str:
    """A tree as text, without empty fields: the next Python has more of them."""
    if isinstance(node, list):
        return f"[{', '.join(map(written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = [f"{name}={written(value)}" for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({', '.join(fields)})"


def named(node: ast.AST) -> set[tuple[str, ...]]:
    """Names and dotted names that a definition reads, without a function's own arguments and variables."""
    if isinstance(node, ast.ClassDef):  # part by part: a method's variable is not another method's
        return set().union(*map(named, [*node.bases, *node.decorator_list, *node.body]))
    own, found = set(), set()
    if isinstance(node, ast.FunctionDef):
        own = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        own |= {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
    for n in ast.walk(node):
        chain, base = [], n
        while isinstance(base, ast.Attribute):
            chain.insert(0, base.attr)
            base = base.value
        if isinstance(base, ast.Name) and base.id not in own:
            found.add((base.id, *chain))
    return found


def resolve(module: str, path: tuple[str, ...]) -> tuple[str, str] | None:
    """Where a dotted name that stands in `module` is defined: (module, name); None if not in this repository."""
    here, (first, *rest) = parse(module), path
    if first in here.definitions:
        return module, first
    if first not in here.imports:
        return None
    target, name = here.imports[first]
    parts = [p for p in (*target.split("."), name, *rest) if p]
    for n in range(len(parts) - 1, 0, -1):  # the longest beginning that is a module
        if source_path(".".join(parts[:n])):
            return resolve(".".join(parts[:n]), tuple(parts[n:]))
    return None


def reached(roots: list[Callable]) -> dict[str, str]:
    """Digest of every definition that `roots` (functions, classes) can reach, by "module.name"."""
    found: dict[str, str] = {}
    main = Path(getattr(sys.modules["__main__"], "__file__", "") or "").stem
    if unnamed := next((f for f in roots if "<" in f.__qualname__), None):
        raise InputError(f"{unnamed.__module__}: a lambda has no name to find it by; give the function a name (def)")
    todo = [(main if f.__module__ == "__main__" else f.__module__, f.__qualname__.split(".")[0]) for f in roots]
    while todo:
        module, name = todo.pop()
        key = f"{module}.{name}"
        if key not in found and name not in APART:
            found[key], more = definition(module, name)
            todo += more
    return dict(sorted(found.items()))


@functools.cache
def definition(module: str, name: str) -> tuple[str, list[tuple[str, str]]]:
    """Digest of a definition, and the definitions that it names."""
    nodes = [Plain().visit(node) for node in parse(module).definitions[name]]
    paths = sorted(set().union(*(named(node) for node in nodes)))
    text = "\n".join(map(written, nodes))
    more = [at for path in paths if (at := resolve(module, path))]
    return hashlib.sha256(text.encode()).hexdigest()[:12], more
