"""Imports run one way: a part of the library imports only from those before it."""

import ast
import pathlib

import mem_aop_jax

ROOT = pathlib.Path(mem_aop_jax.__file__).parent
FLOORS = [
    {"_numerics", "_compat", "_progress"},
    {"_kernels"},
    {"_core"},
    {"_models", "_cost", "_tables", "transform"},
    {"_approximate"},
    {"linen", "nnx"},
    {"_analysis"},
    {"__init__"},
]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def imported_parts(path):
    """The parts of the library that a file imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == ROOT.name:
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module.startswith(f"{ROOT.name}."):
            yield node.module.split(".")[1]


def test_a_part_imports_only_from_the_floors_below():
    for path in ROOT.rglob("*.py"):
        part = path.relative_to(ROOT).with_suffix("").parts[0]
        for other in imported_parts(path):
            assert other == part or FLOOR[other] < FLOOR[part], f"{path} imports {other}"
