"""The exporter, on small books made for the test."""

import nbformat
import pytest
from test_chapters import load_exporter

exporter = load_exporter()


def book(folder, **chapters):
    """Write notebooks: name -> list of code cells, under a title and a summary."""
    for name, cells in chapters.items():
        title = nbformat.v4.new_markdown_cell("# 0. Title\n\n> One sentence.\n\n## A question?")
        notebook = nbformat.v4.new_notebook(cells=[title, *map(nbformat.v4.new_code_cell, cells)])
        nbformat.write(notebook, folder / f"{name}.ipynb")
    return folder


def test_only_exported_cells_reach_the_module(tmp_path):
    modules = exporter.build(book(tmp_path, **{"00_a": ["#| default_exp a", "#| export\nx = 1", "y = 2"]}))
    assert "x = 1" in modules["a.py"] and "y = 2" not in modules["a.py"]
    assert modules["a.py"].startswith('"""One sentence.')


def test_imports_move_to_the_top_sorted_and_once(tmp_path):
    cells = ["#| default_exp a", "#| export\nimport os\nx = os.sep", "#| export\nimport ast\nimport os\n\ny = ast"]
    text = exporter.build(book(tmp_path, **{"00_a": cells}))["a.py"]
    assert text.count("import os") == 1 and text.index("import ast") < text.index("import os") < text.index("x = ")


def test_export_is_idempotent(tmp_path):
    folder = book(tmp_path, **{"00_a": ["#| default_exp a", "#| export\ndef f():\n    return 1"]})
    assert exporter.build(folder) == exporter.build(folder)


def test_a_magic_in_an_exported_cell_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="00_a.*plain Python"):
        exporter.build(book(tmp_path, **{"00_a": ["#| default_exp a", "#| export\n%time x = 1"]}))


def test_two_chapters_cannot_own_one_module(tmp_path):
    cells = ["#| default_exp a", "#| export\nx = 1"]
    with pytest.raises(SystemExit, match="00_a.ipynb and by 01_b.ipynb"):
        exporter.build(book(tmp_path, **{"00_a": cells, "01_b": cells}))


def test_a_subpackage_gets_its_folder_and_init(tmp_path):
    modules = exporter.build(book(tmp_path, **{"00_a": ["#| export kernels.fp8\nx = 1"]}))
    assert set(modules) == {"kernels/fp8.py", "kernels/__init__.py"}


def test_export_before_default_exp_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="default_exp"):
        exporter.build(book(tmp_path, **{"00_a": ["#| export\nx = 1"]}))


def test_tidy_drops_what_changes_from_run_to_run_and_keeps_outputs():
    cell = nbformat.v4.new_code_cell("1", execution_count=7, metadata={"tags": ["t"], "collapsed": True})
    view = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    cell.outputs = [
        nbformat.v4.new_output("execute_result", {"text/plain": "1"}, execution_count=7),
        nbformat.v4.new_output("display_data", view),
        nbformat.v4.new_output("stream", name="stderr", text="12 %"),
    ]
    tidied = exporter.tidy(nbformat.v4.new_notebook(cells=[cell])).cells[0]
    assert tidied.execution_count == 1 and tidied.metadata == {"tags": ["t"]} and tidied.id == cell.id
    assert [output.output_type for output in tidied.outputs] == ["execute_result"]


def test_pictures_lose_weight_not_shape():
    glyph = '<path id="a" d="M 1.23456 2\n L 3 -4.5\n " transform="scale(0.015625)"/>'
    picture = f"<svg>\n <metadata>\n  <dc:date>today</dc:date>\n </metadata>\n  {glyph}\n</svg>"
    lighter = exporter.lighter(picture)
    assert lighter == '<svg>\n<path id="a" d="M 1.23 2 L 3 -4.5" transform="scale(0.015625)"/>\n</svg>'
    assert exporter.lighter(lighter) == lighter


def test_one_text_a_cell_however_the_kernel_cut_it():
    parts = [nbformat.v4.new_output("stream", name=name, text=text) for name, text in zip("ooe", "abc", strict=True)]
    assert [output.text for output in exporter.join_streams(parts)] == ["ab", "c"]


def test_main_removes_stale_modules_and_check_reports_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(exporter, "ROOT", tmp_path)
    (tmp_path / "pyproject.toml").write_text("[tool.ruff]\nline-length = 120\n")
    (tmp_path / "chapters").mkdir()
    book(tmp_path / "chapters", **{"00_a": ["#| default_exp a", "#| export\nx = 1"]})
    assert exporter.main([]) == 0 and exporter.main(["--check"]) == 0
    stale = tmp_path / "dsv3_mini/old.py"
    stale.write_text(f'"""{exporter.HEADER}09_old.ipynb"""\n')
    assert exporter.main(["--check"]) == 1 and "old.py" in capsys.readouterr().out
    assert exporter.main([]) == 0 and not stale.exists()


def test_measured_figures_are_stamped_into_the_readme_row_of_their_chapter():
    rows = "| [A](chapters/00_a.ipynb) | x | 9 s | 9 MB | 1 |\n| [B](chapters/01_b.ipynb) | y | 9 s | 9 MB | 2 |\n"
    stamped = exporter.stamp_readme(rows, {"00_a": {"seconds": 41.6, "peak_mb": 512}})
    assert stamped == rows.replace("| x | 9 s | 9 MB |", "| x | 42 s | 512 MB |")
    assert exporter.takes({"seconds": 41.6, "peak_mb": 512}) == "about 45 s and 550 MB on two CPU cores"
