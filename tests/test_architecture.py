"""The house: who may import whom, what loads late, how long files and functions are."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ldmcli"
FILES = sorted(PACKAGE.rglob("*.py"))
# folder → what it may import of ours, beside itself
BELOW = {
    "core": set(),
    "maths": {"core"},
    "data": {"core", "maths"},
    "networks": {"core", "maths"},
    "diffusion": {"core", "maths", "networks"},
    "conditions": {"core", "maths", "data", "networks"},
    "formats": {"core", "maths", "networks", "diffusion"},
    "sampling": {"core", "maths", "data", "networks", "diffusion", "conditions", "formats"},
    "evaluation": {"core", "maths", "data", "networks", "diffusion", "conditions", "formats", "sampling"},
}
BELOW["training"] = BELOW["evaluation"] | {"evaluation"}
BELOW["reports"] = BELOW["training"] | {"training"}
BELOW["cli"] = BELOW["reports"] | {"reports"}
HEAVY = {
    "torch",
    "torchvision",
    "numpy",
    "scipy",
    "datasets",
    "transformers",
    "accelerate",
    "PIL",
    "safetensors",
    "rich",
}
ids = [str(path.relative_to(ROOT)) for path in FILES]


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that the code imports, wherever it stands."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the package"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def at_import_time(tree: ast.Module) -> ast.Module:
    """The module without the bodies of its functions and without `if TYPE_CHECKING`."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return None

        visit_AsyncFunctionDef = visit_FunctionDef

        def visit_If(self, node):
            return None if "TYPE_CHECKING" in ast.unparse(node.test) else self.generic_visit(node)

    return Strip().visit(tree)


def layer(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 else ""


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_imports_go_downward(path):
    own = layer(path)
    if not own:
        return  # the package itself: names loaded on use
    wanted = {
        match[1]
        for name in imports(ast.parse(path.read_text(encoding="utf-8")))
        if (match := re.match(r"ldmcli\.([a-z_]+)", name))
    }
    allowed = BELOW[own] | {own}
    assert wanted - {"__version__"} <= allowed


def test_every_folder_has_its_place_in_the_table():
    assert {layer(path) for path in FILES} - {""} == set(BELOW)


@pytest.mark.parametrize(
    "path",
    [path for path in FILES if layer(path) in ("", "core", "cli")],
    ids=[name for name, path in zip(ids, FILES) if layer(path) in ("", "core", "cli")],
)
def test_light_layers_load_nothing_heavy_at_import_time(path):
    tree = at_import_time(ast.parse(path.read_text(encoding="utf-8")))
    assert not {name.partition(".")[0] for name in imports(tree)} & HEAVY


def test_samplers_need_no_array_library():
    tree = ast.parse((PACKAGE / "diffusion" / "samplers.py").read_text(encoding="utf-8"))
    assert not {name.partition(".")[0] for name in imports(tree)} & {"torch", "numpy"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_files_and_functions_stay_short(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 600
    long = [
        f"{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno - node.lineno + 1 > 90
    ]
    assert not long


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_but_the_command_line_ends_the_process(path):
    if path.name == "__main__.py" or path.name == "launch.py":
        return
    calls = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "exit", "quit", "os._exit")
    ]
    assert not calls


def test_the_walk_sees_what_it_should():
    tree = ast.parse("import torch.nn\ndef f():\n    import numpy\n")
    assert imports(tree) == {"torch.nn", "numpy"}
    assert imports(at_import_time(tree)) == {"torch.nn"}
