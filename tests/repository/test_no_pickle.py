"""Loading must not be able to run code."""

import ast
from pathlib import Path

import pytest

import sonoforge_operator
import sonoforge_trainer

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "torch.serialization",
}
FORBIDDEN_NAMES = {
    ("torch", "load"),
    ("torch", "save"),
    ("dist", "broadcast_object_list"),
    ("dist", "all_gather_object"),
    ("dist", "gather_object"),
    ("dist", "scatter_object_list"),
}


def _restricted(tree: ast.AST):
    """The `torch.load` of calls that say `weights_only=True` in so many words: tensors and plain values only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            restriction = given.get("weights_only")
            if node.func.attr == "load" and isinstance(restriction, ast.Constant) and restriction.value is True:
                yield node.func


def _faults(tree: ast.AST):
    restricted = set(_restricted(tree))
    for node in ast.walk(tree):
        if node in restricted:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FORBIDDEN_MODULES)
        elif isinstance(node, ast.ImportFrom):
            names = {(node.module or "", alias.name) for alias in node.names}
            yield from (f"{module}.{name}" for module, name in names if module in FORBIDDEN_MODULES)
            yield from (f"{module}.{name}" for module, name in names & FORBIDDEN_NAMES)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in FORBIDDEN_NAMES:
                yield f"{node.value.id}.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            yield "allow_pickle"


@pytest.mark.parametrize("package", [sonoforge_trainer, sonoforge_operator], ids=lambda package: package.__name__)
def test_no_module_can_unpickle(package):
    root = Path(package.__file__).parent
    modules = sorted(root.rglob("*.py"))
    assert len(modules) > 10
    faults = {str(path.relative_to(root)): sorted(_faults(ast.parse(path.read_text()))) for path in modules}
    assert {path: found for path, found in faults.items() if found} == {}


def test_one_module_takes_pickles_apart_and_runs_nothing():
    """`pickletools.genops` only names the operations of a pickle; everything else of that module may load more."""
    root = Path(sonoforge_trainer.__file__).parent
    users = [path for path in root.rglob("*.py") if "pickletools" in path.read_text()]
    assert [str(path.relative_to(root)) for path in users] == ["datasets/formats/objectarray.py"]
    tree = ast.parse(users[0].read_text())
    used = {ast.unparse(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute) and "pickletools" in ast.unparse(n)}
    assert used == {"pickletools.genops"}
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert calls.isdisjoint({"getattr", "eval", "exec", "compile", "__import__", "importlib.import_module"})


def test_one_module_reads_files_of_torch_and_only_the_restricted_way():
    root = Path(sonoforge_trainer.__file__).parent
    reading = {str(p.relative_to(root)) for p in root.rglob("*.py") if set(_restricted(ast.parse(p.read_text())))}
    assert reading == {"weights/files.py"}


def test_the_search_itself_finds_each_way():
    loads = "torch.load(0, weights_only=False)\ntorch.load(0, weights_only=flag)\ntorch.load(0, weights_only=True)\n"
    assert sorted(_faults(ast.parse(loads))) == ["torch.load", "torch.load"]
    text = "import pickle\nfrom torch import load\nfrom pickle import loads\ntorch.load(0, allow_pickle=1)\n"
    assert sorted(_faults(ast.parse(text))) == ["allow_pickle", "pickle", "pickle.loads", "torch.load", "torch.load"]
