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
BELOW["studies"] = BELOW["reports"] | {"reports"}
BELOW["cli"] = BELOW["studies"] | {"studies"}
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
def test_files_classes_and_functions_stay_short_and_flat(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= 450
    for node in ast.walk(ast.parse(text)):
        length = getattr(node, "end_lineno", 0) - getattr(node, "lineno", 0) + 1
        if isinstance(node, ast.ClassDef):
            assert length <= 250, f"class {node.name}: {length} lines"
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert length <= 60, f"{node.name}: {length} lines"
            assert depth(node) <= 4, f"{node.name}: blocks {depth(node)} deep"


def depth(function: ast.AST) -> int:
    """How deep blocks lie in a function; an elif is no deeper than its if."""
    deepest = 0

    def visit(node: ast.AST, level: int) -> None:
        nonlocal deepest
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                continue
            elif_of = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
            block = isinstance(child, (ast.If, ast.For, ast.While, ast.With, ast.Try)) and not elif_of
            deepest = max(deepest, level + block)
            visit(child, level + block)

    visit(function, 0)
    return deepest


# --- files import one another one way ----------------------------------------------------------------------------

MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def modules_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, wherever the import stands, but for types alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = [ast.Pass()]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            below = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= below & set(MODULES) or {node.module}
    return found & set(MODULES)


def test_no_files_import_one_another_in_a_circle():
    waiting = {name: modules_of(path) - {name} for name, path in MODULES.items()}
    while free := {name for name, needed in waiting.items() if not needed & set(waiting)}:
        waiting = {name: needed for name, needed in waiting.items() if name not in free}
    assert not waiting, f"in or behind a circle: {sorted(waiting)}"


def imports_inside_functions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    return [
        f"{path.name}:{node.lineno}"
        for function in functions
        for node in ast.walk(function)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ldmcli")
    ]


def test_our_modules_are_imported_at_the_top_outside_the_command_line():
    found = [place for path in FILES if layer(path) not in ("", "cli") for place in imports_inside_functions(path)]
    assert len(found) <= 8, found


# --- a condition is one file --------------------------------------------------------------------------------------

CONDITION_NAMES = {"text", "class", "layout", "map", "lowres", "masked", "tokens"}


def names_of_conditions(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        f"{path.name}:{node.lineno} {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in CONDITION_NAMES
    ]


def test_few_places_outside_its_file_name_a_condition():
    rooms = {"sampling", "evaluation", "training", "reports", "cli", "core"}
    found = [place for path in FILES if layer(path) in rooms for place in names_of_conditions(path)]
    assert len(found) <= 20, found


def test_nobody_reaches_through_a_model_to_its_network():
    found = [path.name for path in FILES if re.search(r"\bmodel\.model\b", path.read_text(encoding="utf-8"))]
    assert set(found) <= {"compvis.py"}  # `cond_stage_model.model.` is a key of checkpoints


# --- the paper ----------------------------------------------------------------------------------------------------


def test_what_the_architecture_names_of_the_paper_exists():
    """Each row of the table of the paper names `file.py: name`, which is defined there."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = text[text.index("## The paper in the code") :].split("\n## ")[0] if "## The paper" in text else ""
    places = re.findall(r"`([a-z_]+/[a-z_]+\.py): ([\w.]+)`", table)
    assert len(places) >= 30
    for file, name in places:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        for part in name.split("."):
            body = {getattr(node, "name", ""): node for node in tree.body}
            body |= {t.id: node for node in tree.body for t in getattr(node, "targets", []) if isinstance(t, ast.Name)}
            body |= {node.target.id: node for node in tree.body if isinstance(node, ast.AnnAssign)}
            assert part in body, f"{file}: {name}"
            tree = body[part]


def test_files_that_the_architecture_names_exist():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z_]+/(?:[a-z_]+\.py)?)", text))
    missing = [name for name in named if not ((PACKAGE / name).exists() or (ROOT / name).exists())]
    assert not missing


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
