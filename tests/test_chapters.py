"""What must hold for every notebook, beside running it (nbval does that)."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))
SOLUTIONS = sorted((ROOT / "chapters/solutions").glob("[0-9]*.ipynb"))
NAMES = [path.stem for path in CHAPTERS]


def load_exporter():
    spec = importlib.util.spec_from_file_location("export", ROOT / "chapters/export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_package_is_what_the_chapters_export():
    run = subprocess.run([sys.executable, ROOT / "chapters/export.py", "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_chapter_has_solutions():
    assert [path.name for path in SOLUTIONS] == [path.name for path in CHAPTERS]


@pytest.mark.parametrize("path", CHAPTERS + SOLUTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_notebook_was_executed_without_errors_and_names_no_machine(path):
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert outputs, "never executed"
    assert not [output for output in outputs if output.output_type == "error"]
    assert not re.search(r"/(tmp|root|home|work|Users)/\w", json.dumps(notebook))
    assert path.stat().st_size < 700_000


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_chapter_has_the_form_of_the_book(path):
    cells = nbformat.read(path, as_version=4).cells
    prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    assert re.match(r"# \d+\. .+\n\n> .+", cells[0].source)
    for heading in ("## Summary", "## Where the real V3 differs", "## Exercises"):
        assert heading in prose
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert "interact" in code and "assert" in code and "def check_exercise" in code
    shown = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/svg+xml" in output.get("data", {}) for output in shown)


def test_chapters_run_where_the_network_is_refused(tmp_path):
    log = tmp_path / "outbound"
    dial = "import socket; print(socket.socket().connect_ex(('192.0.2.1', 80)))"
    env = {**os.environ, "OUTBOUND_LOG": str(log)}
    run = subprocess.run([sys.executable, "-c", dial], capture_output=True, text=True, env=env)
    assert "the book runs offline" in run.stderr and "192.0.2.1" in log.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "dsv3_mini").rglob("*.py")), ids=lambda path: path.stem)
def test_module_fits_in_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


def test_importing_the_package_costs_little_beside_torch():
    code = "import time, torch; t = time.perf_counter(); import dsv3_mini; dsv3_mini.generate"
    code += "; print(time.perf_counter() - t)"
    seconds = [float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT)) for _ in range(3)]
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("path", CHAPTERS + SOLUTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_cells_are_counted_in_order(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@pytest.mark.parametrize("path", CHAPTERS + SOLUTIONS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_cells_printed_where_they_stand(path):
    """A checked cell that prints must hold its output: a notebook saved half-run is caught here."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code" and "NBVAL_CHECK_OUTPUT" in cell.source:
            assert cell.outputs, cell.source


@pytest.mark.parametrize("path", CHAPTERS, ids=NAMES)
def test_times_and_memory_are_the_logged_ones(path):
    figures = json.loads((ROOT / "assets/runs/chapters.json").read_text())[path.stem]
    readme = (ROOT / "README.md").read_text()
    assert (
        f"chapters/{path.stem}.ipynb" in readme and load_exporter().stamp_readme(readme, {path.stem: figures}) == readme
    )
    assert load_exporter().takes(figures) in nbformat.read(path, as_version=4).cells[0].source
    assert figures["seconds"] < 60
