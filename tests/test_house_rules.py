"""The house rules that a machine can check (CONTRIBUTING.md)."""

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(__file__).parent.parent
PACKAGE = sorted((ROOT / "deepgen_jax").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / ".ci" / "run"]
MAX_FILE, MAX_FUNCTION, MAX_METHODS = 600, 100, 25
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
LATER = re.compile("|".join(["TO" + "DO", "FIX" + "ME", "X" * 3]))  # in pieces: this file is searched too


def name(path):
  return str(path.relative_to(ROOT))


def definitions(paths, kinds):
  """(where, node) of every function or class."""
  for path in paths:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, kinds):
        yield f"{name(path)}:{node.lineno} {node.name}", node


def undocumented(tree):
  """Names of the public functions and classes of a module that have no docstring; a command's main needs none."""
  public = [node for node in tree.body if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_")]
  return [node.name for node in public if not ast.get_docstring(node) and node.name != "main"]


def test_files_are_short():
  lengths = {name(path): len(path.read_text().splitlines()) for path in [*PACKAGE, *TESTS]}
  assert {file: length for file, length in lengths.items() if length > MAX_FILE} == {}


def test_functions_are_short():
  lengths = {where: node.end_lineno - node.lineno + 1 for where, node in definitions([*PACKAGE, *TESTS], FUNCTIONS)}
  assert {where: length for where, length in lengths.items() if length > MAX_FUNCTION} == {}


def test_classes_have_few_methods():
  methods = {where: sum(isinstance(n, FUNCTIONS) for n in node.body) for where, node in definitions(PACKAGE, ast.ClassDef)}
  assert {where: count for where, count in methods.items() if count > MAX_METHODS} == {}


def test_what_is_public_is_documented():
  found = {name(path): undocumented(ast.parse(path.read_text())) for path in PACKAGE}
  assert {file: names for file, names in found.items() if names} == {}


def test_undocumented_sees_what_lacks_a_docstring():
  assert undocumented(ast.parse("def a(): pass\ndef _b(): pass\ndef c(): 'What it does.'\nclass D: pass")) == ["a", "D"]


def test_files_that_go_first_exist():
  assert {*conftest.LONGEST} <= {path.stem for path in TESTS}


def test_nothing_is_left_for_later():
  files = [*PACKAGE, *CONFIGS, *TESTS, *SCRIPTS]
  lines = [(name(path), i, line) for path in files for i, line in enumerate(path.read_text().splitlines(), 1)]
  assert [line for line in lines if LATER.search(line[2])] == []


@pytest.mark.parametrize("path", [path for path in CONFIGS if path.name != "common.py"], ids=name)
def test_configs_say_their_command(path):
  documentation = ast.get_docstring(ast.parse(path.read_text())) or ""
  assert f"python -m deepgen_jax.train --config {name(path)}" in documentation


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_scripts_parse_and_run_from_anywhere(path):
  text = path.read_text()
  assert path.stat().st_mode & 0o111, "not executable"
  assert "set -euo pipefail" in text and 'cd "$(dirname "$0")/.."' in text
  subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize(
  "reason, code",
  [("no time", 1), ("needs an accelerator", 0), ("could not import 'diffusers'", int(sys.version_info < (3, 12)))],
)
@pytest.mark.parametrize("level", ["module", "test"])
def test_a_skip_fails_the_run_unless_allowed(tmp_path, level, reason, code):
  shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
  skip = f"pytest.skip({reason!r}, allow_module_level=True)"
  (tmp_path / "test_it.py").write_text(
    f"import pytest\n{skip if level == 'module' else ''}\ndef test_a():\n  {skip}\ndef test_b(): pass\n"
  )
  (tmp_path / "test_other.py").write_text("def test_c(): pass\n")
  run = subprocess.run([sys.executable, "-m", "pytest", tmp_path, "-c", "/dev/null"], capture_output=True, text=True)
  assert run.returncode == code, run.stdout
  assert ("counts as failed" in run.stdout) == bool(code)
