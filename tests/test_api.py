"""The structure of the package, read from its source: exports, documentation, and the direction of imports."""

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

import jaxcnn
from jaxcnn.ops.kinds import KINDS
from tests.cases import CASES, LONG_SUMS, OPS, covering, one_each, shows

PACKAGE = Path(jaxcnn.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}

#: Which modules each module may import; `__init__` is the table of contents and imports what it lists.
IMPORTS = {
    "arguments": set(),
    "geometry": {"arguments"},
    "platforms": set(),
    "native": {"native"},
    "kernels": {"geometry", "kernels", "native", "platforms"},
    "ops": {"arguments", "geometry", "kernels", "ops"},
    "rules": {"arguments", "geometry", "kernels", "ops", "rules"},  # kernels: for rules that route elements
    "caching": set(),
    "text": set(),
    "statistics": {"arguments"},
    "layers": {"arguments", "geometry", "ops", "statistics"},
    "taps": {"arguments"},  # separate from backprop, which imports nets, because nets tap their layers
    "selection": {"arguments", "layers", "ops"},
    "summary": {"layers", "text"},
    # kernels: the dtype of sums
    "net": {"arguments", "geometry", "kernels", "ops", "layers", "selection", "summary", "taps"},
    "branches": {"arguments", "layers", "net", "ops", "selection", "summary"},
    "tracing": {"arguments", "geometry", "ops", "taps", "text", "tracing"},
    "explicit": {"arguments", "taps", "tracing"},
    "lax": {"tracing"},
    "backprop": {"arguments", "explicit", "net", "taps"},
    "propagation": {"arguments", "ops", "rules", "tracing"},
    "folding": {"arguments", "branches", "geometry", "layers", "net", "ops"},
    "traced_model": {"arguments", "net", "ops", "propagation", "selection", "taps", "tracing"},
    "composites": {"layers", "net", "ops", "rules", "selection"},
    # kernels: the dtype of sums
    "attribution": {
        "arguments", "composites", "geometry", "kernels", "net", "ops", "selection", "taps", "traced_model",
    },
    # kernels: per-example products, which no op has
    "per_example": {"arguments", "geometry", "kernels", "ops", "layers", "net", "taps", "tracing"},
    "curvature": {"arguments", "geometry"},
    "stages": {"arguments", "caching", "kernels", "net", "statistics"},  # kernels: moments
    "calibration": {"arguments", "kernels", "layers", "net", "stages", "statistics"},  # kernels: merging of moments
    "training": {"arguments", "backprop", "caching", "layers", "net", "selection"},
}  # fmt: skip

#: Functions that take derivatives.
DERIVATIVES = {
    "vjp", "jvp", "grad", "value_and_grad", "linearize", "linear_transpose", "jacobian", "jacfwd", "jacrev", "hessian",
}  # fmt: skip


def exports() -> list[tuple[str, str]]:
    """Return (module, name) for each line of the table of contents."""
    lines = [node for node in MODULES["__init__.py"].body if isinstance(node, ast.ImportFrom)]
    return [(line.module, alias.name) for line in lines for alias in line.names]


#: Exported functions of the ops; all of them are differentiable.
EXPORTED_OPS = [name for module, name in exports() if module.startswith("jaxcnn.ops.")]
FUNCTIONS = [name for _, name in exports() if inspect.isfunction(getattr(jaxcnn, name))]


def imported(tree: ast.Module) -> Iterator[str]:
    """Return the full names of all imports in a module, at any level: ``jaxcnn.ops.rule.arrays``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


# ---------------------------------------------------------------------------------------------------------------------
# The case table


@pytest.mark.parametrize("op", EXPORTED_OPS)
def test_every_exported_op_has_rows(op):
    assert op in {case.op for case in CASES}, f"{op} is exported, and has no row in tests/cases.py"


def test_every_option_of_every_op_has_a_row():
    shown = {(case.op, option) for case in CASES for option in case.options}
    for op in EXPORTED_OPS:
        parameters = inspect.signature(getattr(jaxcnn, op)).parameters.values()
        options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        options -= {"rule", "axis_name"}  # tests/ops/test_rule.py; tests of batch_norm inside a named axis
        assert options <= {option for of, option in shown if of == op}, op


def test_no_row_twice():
    names = [str(case) for case in [*CASES, *LONG_SUMS]]
    assert len(names) == len(set(names))


def test_covering_rows_show_all_that_the_table_shows():
    few = list(covering(CASES))
    assert set().union(*map(shows, few)) == set().union(*map(shows, CASES))
    assert len(few) < len(CASES) / 2
    assert [case.op for case in one_each(CASES)] == list(OPS)


# ---------------------------------------------------------------------------------------------------------------------
# The table of kinds


def test_every_op_has_one_kind():
    listed = [op for ops in KINDS.values() for op in ops]
    assert len(listed) == len(set(listed))
    assert set(listed) == {*EXPORTED_OPS, "add"}


@pytest.mark.parametrize("case", [case for case in one_each(CASES) if case.takes_rule], ids=str)
def test_a_rule_reads_the_kind_of_its_op(case):
    """The name that an op passes to `apply_rule` is in the table, so its kind is not a guess."""
    seen = []

    def rule(call, delta):
        seen.append((call.name, call.kind))
        return call.exact(delta)

    def backward(*args):
        y, pull = jax.vjp(functools.partial(case.function, rule=rule), *args)
        return pull(y)

    jax.eval_shape(backward, *case.arrays())
    assert {name for name, _ in seen} == {case.op}
    assert all(case.op in KINDS[kind] for _, kind in seen)


# ---------------------------------------------------------------------------------------------------------------------
# The table of contents


def test_init_is_a_sorted_table_of_contents():
    docstring, *lines = MODULES["__init__.py"].body
    assert isinstance(docstring, ast.Expr)
    for line in lines:
        assert isinstance(line, ast.ImportFrom), ast.unparse(line)
        (alias,) = line.names
        assert alias.asname == alias.name, f"{ast.unparse(line)}: expected `{alias.name} as {alias.name}`"
    assert exports() == sorted(exports())


def test_nothing_else_is_public():
    listed = {name for _, name in exports()}
    modules = {Path(path).parts[0].removesuffix(".py") for path in MODULES}
    assert {name for name in vars(jaxcnn) if not name.startswith("_")} <= listed | modules


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_has_an_example_and_what_is_raised(name):
    documentation = inspect.getdoc(getattr(jaxcnn, name)) or ""
    assert ">>> " in documentation, f"{name}: no example"
    assert "Raises:" in documentation, f"{name}: does not say what is raised"


@pytest.mark.parametrize("name", EXPORTED_OPS)
def test_options_are_keyword_only_and_arrays_are_not(name):
    """All arguments with defaults are keyword-only options, except optional arrays and NumPy's `mode`."""
    for parameter in inspect.signature(getattr(jaxcnn, name)).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            assert parameter.default is not parameter.empty, f"{name}: option {parameter.name} has no default"
        elif parameter.name != "mode":
            assert parameter.default in (parameter.empty, None), f"{name}: option {parameter.name} may be positional"


# ---------------------------------------------------------------------------------------------------------------------
# Modules


@pytest.mark.parametrize("path", [path for path in MODULES if path != "__init__.py"])
def test_imports_run_one_way(path):
    module = Path(path).parts[0].removesuffix(".py")
    assert module in IMPORTS, f"{path} has no entry in IMPORTS"
    for name in imported(MODULES[path]):
        package, *rest = name.split(".")
        assert package not in ("experiments", "tests"), f"{path} imports {name}"
        if package == "jaxcnn":
            assert rest, f"{path} imports all of jaxcnn"
            assert rest[0] in IMPORTS[module], f"{path} imports {name}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.startswith(("ops/", "kernels/"))])
def test_rules_take_no_derivatives(path):
    """Rules use neither ``jax.vjp`` nor ``from jax import vjp`` or similar functions, under any name."""
    used = {ast.unparse(node) for node in ast.walk(MODULES[path]) if isinstance(node, ast.Attribute)}
    names = [name.split(".") for name in used | set(imported(MODULES[path]))]
    found = [".".join(parts) for parts in names if parts[0] == "jax" and parts[-1] in DERIVATIVES]
    assert not found, f"{path} uses {', '.join(sorted(found))}"


@pytest.mark.parametrize("path", [path for path in MODULES if path.startswith("kernels/")])
def test_kernels_know_no_derivatives(path):
    source = (PACKAGE / path).read_text()
    assert "custom_vjp" not in source


def private_names(tree: ast.Module) -> Iterator[str]:
    """Yield the private names of other modules that a module imports, or reads as ``module._name``."""
    aliases = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names if is_private(alias.name))
        if isinstance(node, ast.Import | ast.ImportFrom):
            aliases |= {(alias.asname or alias.name).split(".")[0]: alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            root = ast.unparse(node.value).split(".")[0]
            if root in aliases and ast.unparse(node) != "os._exit":  # which is documented
                yield ast.unparse(node)


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize(
    "source",
    [
        "from jaxcnn.net import _located",
        "from jaxcnn.ops import hidden\nhidden._forward(1)",
        "import jaxcnn.ops.hidden\njaxcnn.ops.hidden._forward(1)",
        "from jaxcnn.ops import hidden as h\nh._TABLE['relu']",
    ],
)
def test_private_names_are_found(source):
    assert len(list(private_names(ast.parse(source)))) == 1


FILES = sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "experiments").rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE.parent)))
def test_no_private_name_of_another_module(path):
    assert not list(private_names(ast.parse(path.read_text())))
