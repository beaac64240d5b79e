"""What the documentation shows runs, and importing the packages brings in only what it should."""

import ast
import doctest
import importlib.util
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

import envs
import knife_jax

ROOT = Path(__file__).parents[1]
EXAMPLE = re.compile(r"^\s*>>> ", re.MULTILINE)
PYTHON_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def _source(name: str) -> str:
    """The source of a module, which is not imported for it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).read_text(encoding="utf-8")


def _sources(package) -> dict[str, str]:
    """The source of every module of a package, by its dotted name."""
    names = [package.__name__, *(found.name for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."))]
    return {name: _source(name) for name in names}


def _imported(nodes: Iterable[ast.AST]) -> set[str]:
    """The top-level packages that these nodes import by absolute name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def _run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run when a module is imported: all but those inside functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _run_on_import(child)


SOURCES = {**_sources(knife_jax), **_sources(envs)}


@pytest.mark.parametrize("name", [name for name, source in SOURCES.items() if EXAMPLE.search(source)])
def test_docstring_examples_give_what_they_show(name):
    """Doctest finds and runs every example that the source has."""
    results = doctest.testmod(importlib.import_module(name))
    assert results == (0, len(EXAMPLE.findall(SOURCES[name])))


@pytest.mark.parametrize("page", ["README.md", "docs/cures.md", "docs/smax.md"])
def test_the_pages_run(page):
    """All their Python blocks, in order, in one namespace; a traceback names the page's own line."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(PYTHON_BLOCK.finditer(text))
    assert blocks
    namespace = {"__name__": "page"}
    for block in blocks:
        lines_before = "\n" * text.count("\n", 0, block.start(1))
        exec(compile(lines_before + block[1], page, "exec"), namespace)
    if page == "docs/cures.md":
        report: Any = namespace["report"]
        assert [int(report[f"Dense_{layer}/stagnant"] + report[f"Dense_{layer}/not_stagnant"]) for layer in (0, 1)] == [32, 32]


@pytest.mark.parametrize("name", SOURCES)
def test_no_module_imports_wandb_when_imported(name):
    """Logging to Weights & Biases is paid for by those who ask for it."""
    assert "wandb" not in _imported(_run_on_import(ast.parse(SOURCES[name])))


def test_importing_the_packages_leaves_heavy_ones_out():
    """In a fresh interpreter, since this one has imported much already."""
    program = "import sys, knife_jax, envs; print(sorted({'wandb', 'jaxmarl', 'knife_jax', 'envs'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout) == (0, "['envs', 'knife_jax']\n"), finished.stderr


@pytest.mark.parametrize("name", [name for name in SOURCES if name.partition(".")[0] == "envs"])
def test_games_do_not_know_the_learners(name):
    """`envs` imports nothing of `knife_jax`, anywhere in a file."""
    assert "knife_jax" not in _imported(ast.walk(ast.parse(SOURCES[name])))
