import ast
import functools
import graphlib
import importlib
import re
from pathlib import Path

from pydantic import BaseModel

import evolkv

ROOT = Path(evolkv.__file__).parent
#: From the lowest to the highest, as docs/architecture.md has them. What is not named here serves every floor.
FLOORS = [
    {"models"},
    {"selectors"},
    {"allocators"},
    {"profile", "profile_card", "plots"},
    {"methods"},
    {"cache"},
    {"tasks"},
    {"evaluation"},
    {"evolution"},
    {"report", "integrations"},
    {"demo", "doctor", "generation"},
    {"cli"},
    {"__main__", "integrations.lm_eval_command"},
]


def module_name(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in ROOT.rglob("*.py")}


def is_for_annotations(node):
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imported_by(name, annotations):
    """The modules of the package that a module imports anywhere in its text, functions included."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    left_out = {inner for node in ast.walk(tree) if is_for_annotations(node) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if node in left_out and not annotations:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


@functools.cache
def graph(annotations):
    return {name: set(imported_by(name, annotations)) - {name} for name in MODULES}


def floor(name):
    inner = name.removeprefix("evolkv.")
    levels = [level for level, names in enumerate(FLOORS, 1) for each in names if f"{inner}.".startswith(f"{each}.")]
    return max(levels, default=0)


def test_no_modules_import_each_other_in_a_circle():
    # What is imported for annotations alone is never loaded.
    graphlib.TopologicalSorter(graph(annotations=False)).prepare()


def test_each_floor_imports_only_from_floors_below():
    upwards = [
        f"{name} imports {other}"
        for name, others in graph(annotations=True).items()
        for other in others
        # The package itself only says where its names live, and loads them when they are asked for.
        if "evolkv" not in (name, other) and floor(other) > floor(name)
    ]
    assert upwards == []


def test_every_floor_has_modules():
    assert {floor(name) for name in MODULES} == set(range(len(FLOORS) + 1))


def test_only_its_integration_imports_the_lm_eval_harness():
    own = {"evolkv.integrations.lm_eval", "evolkv.integrations.lm_eval_command"}
    users = {
        name for name in MODULES if re.search(r"^ *(from|import) lm_eval\b", MODULES[name].read_text("utf-8"), re.M)
    }
    assert users == own
    assert {name for name, others in graph(annotations=False).items() if others & own} <= own


def calls_python(schema):
    """Whether data of a core schema of pydantic calls a Python function as it is written."""
    parts = schema.values() if isinstance(schema, dict) else schema if isinstance(schema, (list, tuple)) else ()
    if isinstance(schema, dict) and str(schema.get("serialization", {}).get("type", "")).startswith("function-"):
        return True
    return any(calls_python(part) for part in parts)


def test_no_file_of_ours_calls_python_while_pydantic_writes_it():
    """Ctrl-C in such a call comes out of pydantic as a serialization error, and the program would not end in order."""
    names = [name for name, path in MODULES.items() if re.search("pydantic|schemas", path.read_text(encoding="utf-8"))]
    kinds = {
        kind
        for name in names
        for kind in vars(importlib.import_module(name)).values()
        if isinstance(kind, type) and issubclass(kind, BaseModel) and kind.__module__ in MODULES
    }
    assert len(kinds) > 20
    assert [kind for kind in kinds if calls_python(kind.__pydantic_core_schema__)] == []
