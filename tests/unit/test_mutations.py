"""The list of deliberate bugs stays true: each can still be put in, and its test is still there."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.mutations.table import MUTATIONS, Mutation

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_can_be_put_in(mutation: Mutation) -> None:
    right = (ROOT / mutation.file).read_text(encoding="utf-8")
    assert right.count(mutation.old) == 1, "the code moved on: write this mutation anew"
    ast.parse(right.replace(mutation.old, mutation.new))


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_its_test_is_there(mutation: Mutation) -> None:
    file, _, function = mutation.test.partition("::")
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert function.partition("[")[0] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_readme_lists_them_all() -> None:
    readme = (ROOT / "tests/README.md").read_text(encoding="utf-8")
    for mutation in MUTATIONS:
        assert f"| {mutation.name} |" in readme
        assert f"`{mutation.test.rpartition('/')[2]}`" in readme
