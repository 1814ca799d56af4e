"""The tree as CONTRIBUTING.md draws it: who may import whom, and one name for one thing."""

import ast
import re
from collections import defaultdict

import pytest
from paths import ROOT

CODE = ("cat_core", "nodes", "tools")
FILES = sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py"))
# Modules of the host. comfy_api is its public interface and open to all nodes.
HOST = {"comfy", "comfy_extras", "comfy_execution", "comfyui_version"}
HOST |= {"folder_paths", "server", "node_helpers", "nodes", "execution"}
# From the commands inwards: a folder imports those after it, never one before it.
ROOMS = ["tools", "release", "benchmark", "demo_model", "evaluation", "training", "official"]
ROOMS += ["comfyui", "nodes", "nodes/host", "cat_core"]
SIDE_BY_SIDE = {"evaluation", "training", "official"}


def room(path) -> str:
    """The folder of the tree that a file stands in."""
    *folders, _ = path.relative_to(ROOT).parts
    if folders[0] == "tools":
        return folders[1] if len(folders) > 1 else "tools"
    if folders[:2] == ["nodes", "host"]:
        return "nodes/host"
    return folders[0]


def imported(path):
    """(module, name or None) of each import; the pack's own modules from the checkout on."""
    package = path.relative_to(ROOT).parts[:-1]
    if package[0] == "tools":
        package = package[1:]
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name != "nodes":  # the host's: the pack's own is never imported so
                    yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = package[: len(package) - node.level + 1]
                module = ".".join((*above, module)).rstrip(".")
            for alias in node.names:
                yield module.removeprefix("cat_diffusion."), alias.name


def room_of(module: str, name: str | None) -> str | None:
    """The folder of the tree that an import leads to, None for anything else."""
    parts = module.split(".") + ([name] if name else [])
    if parts[:2] == ["nodes", "host"]:
        return "nodes/host"
    commands = {path.stem for path in (ROOT / "tools").glob("*.py")}
    if parts[0] in commands:
        return "tools"
    return parts[0] if parts[0] in ROOMS else None


def name_of(path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_lead_inwards(path):
    here = room(path)
    for module, name in imported(path):
        there = room_of(module, name)
        if there is None or there == here:
            continue
        assert ROOMS.index(there) > ROOMS.index(here), f"{here} imports {module}"
        assert not {here, there} <= SIDE_BY_SIDE, f"{here} imports {module} beside it"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_only_the_door_imports_the_host(path):
    if room(path) == "nodes/host":
        return
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        for module in modules:
            assert module.split(".")[0] not in HOST, f"line {node.lineno} imports {module}"


def test_the_core_knows_no_node():
    for path in FILES:
        if room(path) == "cat_core":
            for module, _ in imported(path):
                assert module.split(".")[0] not in {"nodes", "tools", "comfy_api", "cat_diffusion"}


def test_tools_use_no_private_name_of_the_pack():
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "tools":
            continue
        tree = ast.parse(path.read_text("utf-8"))
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cat_diffusion"):
                for alias in node.names:
                    assert not alias.name.startswith("_"), f"{name_of(path)} imports {alias.name}"
                    modules.add(alias.asname or alias.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                private = node.attr.startswith("_") and not node.attr.startswith("__")
                assert not (private and node.value.id in modules), (
                    f"{name_of(path)}, line {node.lineno} uses {node.value.id}.{node.attr}"
                )


def test_no_two_files_have_one_name():
    places = defaultdict(list)
    for path in FILES:
        if path.name != "__init__.py":
            places[path.name].append(name_of(path))
    assert [names for names in places.values() if len(names) > 1] == []


def test_no_two_classes_have_one_name():
    places = defaultdict(list)
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{name_of(path)}, line {node.lineno}")
    assert [names for names in places.values() if len(names) > 1] == []


def test_contributing_draws_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    drawn = set(re.findall(r"^ *(\w+(?:/\w+)*)/ {2,}\S", text, re.M))
    folders = {str(path.parent.relative_to(ROOT)) for path in FILES}
    assert folders <= drawn
    assert [folder for folder in drawn if not (ROOT / folder).is_dir()] == []


def test_what_contributing_names_exists():
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = re.findall(r"\b((?:tests|tools|nodes|cat_core)/[\w/]+\.py)(?:::(\w+))?", text)
    assert len(named) > 5
    for path, test in named:
        code = (ROOT / path).read_text("utf-8")
        assert not test or f"def {test}(" in code, f"{path} has no {test}"


def test_all_code_parses_as_python_3_10():
    for path in [*FILES, ROOT / "__init__.py", *(ROOT / "tests").rglob("*.py")]:
        ast.parse(path.read_text("utf-8"), str(path), feature_version=(3, 10))


def test_late_imports_of_commands_let_ctrl_c_end_them_at_once():
    """launch.importing stands around each, as an exception would come out of the import."""
    for path in (ROOT / "tools").glob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        late = {node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        late -= {node for node in tree.body if isinstance(node, ast.ImportFrom)}
        for block in ast.walk(tree):
            if isinstance(block, ast.With) and "launch.importing()" in ast.unparse(block.items[0]):
                late -= set(ast.walk(block))
        assert not late, f"{path.name}, line {next(iter(late)).lineno}"
