"""Write the `#| export` cells of the chapters into the package dsv3_mini.

    python chapters/export.py              write the modules, format and tidy the notebooks
    python chapters/export.py --check      change nothing; exit 1 if a module or a notebook differs from what is due
    python chapters/export.py --run NAME   execute the named chapters first (all with no name), log seconds and memory

A chapter says `#| default_exp mla` once, and `#| export` (or `#| export kernels.fp8`) at the head of each cell
that belongs to the package. The blockquote under its title becomes the module's docstring;
a further line "> `name`: sentence" gives the module of that name its own.
"""

import argparse
import ast
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\|\s*(\w+)[: ]*(.*)$")
HEADER = "Generated from chapters/"
TAKES = re.compile(r"about \d+ s and [\d,]+ MB on two CPU cores")
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def split_directives(source):
    """Split a cell into its leading `#| name value` lines and the code below them."""
    found, lines = {}, source.splitlines()
    while lines and (match := DIRECTIVE.match(lines[0])):
        found[match[1]] = match[2].strip()
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def exported_cells(notebook, name):
    """Yield (module, section title, code) for every exported cell, in reading order."""
    module, section = None, None
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            section = next(iter(re.findall(r"^## (.+)$", cell.source, re.M)[::-1]), section)
        elif cell.cell_type == "code":
            found, code = split_directives(cell.source)
            module = found.get("default_exp", module)
            if "export" in found:
                target = found["export"] or module
                if not target:
                    raise SystemExit(f"{name}: a cell is exported before any '#| default_exp'")
                check_plain_python(code, name)
                yield target, section, code


def check_plain_python(code, name):
    """Stop at a magic, a shell line or a half-written cell: a module cannot hold them."""
    try:
        ast.parse(code)
    except SyntaxError as error:
        raise SystemExit(f"{name}: exported cell is not plain Python ({error.text!r}): no magics there") from None


def split_imports(code):
    """Separate a cell's top-level imports from the rest."""
    lines, imports = code.splitlines(), []
    for node in reversed(ast.parse(code).body):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            imports.insert(0, ast.unparse(node))
            del lines[node.lineno - 1 : node.end_lineno]
    return imports, "\n".join(lines).strip("\n")


def render(chapter, summary, cells):
    """The text of one module: docstring, imports, then the code under its section titles."""
    imports, body, previous = [], [], None
    for section, code in cells:
        found, rest = split_imports(code)
        imports += found
        if rest and section != previous:
            body.append(f"# {section}\n" if section else "")
            previous = section
        body.append(rest)
    text = f'"""{summary}\n\n{HEADER}{chapter}; edit the chapter, not this file.\n"""\n\n'
    return format_python(text + "\n".join(imports) + "\n\n\n" + "\n\n\n".join(part for part in body if part) + "\n")


def format_python(text):
    """Sort the imports and lay the code out, with the project's own ruff settings."""
    for command in (["check", "--select", "I", "--fix", "--quiet"], ["format"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--stdin-filename", "dsv3_mini/module.py", "-"],
            input=text, capture_output=True, text=True, cwd=ROOT, encoding="utf-8",
        )  # fmt: skip
        if run.returncode:
            raise SystemExit(f"ruff {command[0]}: {run.stderr.strip() or run.stdout.strip()}")
        text = run.stdout
    return text


def read(path):
    return nbformat.read(path, as_version=4)


def build(chapters):
    """Map each module's path inside the package to the text that the chapters give it."""
    owner, modules = {}, {}
    for path in sorted(chapters.glob("[0-9]*.ipynb")):
        notebook = read(path)
        prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        summary = next(iter(re.findall(r"^> (.+)$", prose, re.M)), None)
        own = dict(re.findall(r"^> `([\w.]+)`: (.+)$", prose, re.M))
        for module, section, code in exported_cells(notebook, path.name):
            if not summary:
                raise SystemExit(
                    f"{path.name}: no '> one sentence' under the title, so {module} would have no docstring"
                )
            if owner.setdefault(module, path.name) != path.name:
                raise SystemExit(f"{module} is exported by {owner[module]} and by {path.name}")
            modules.setdefault(module, (path.name, own.get(module, summary), []))[2].append((section, code))
    texts = {module.replace(".", "/") + ".py": render(*parts) for module, parts in modules.items()}
    for folder in {Path(name).parent for name in texts} - {Path(".")}:
        texts.setdefault(f"{folder}/__init__.py", f'"""{HEADER}the notebooks that export {folder}.*."""\n')
    return texts


def tidy(notebook):
    """Drop what changes from run to run: timings, dead widget views, drawing dates; count the cells from 1."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    count = 0  # nbval takes a cell with outputs and no count for one that was never run
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k == "tags"})
        if cell.cell_type == "code":
            count += 1
            cell.execution_count = count
            kept = [tidy_output(output, count) for output in cell.outputs if not is_volatile(output)]
            cell.outputs = join_streams(kept)
    return notebook


def join_streams(outputs):
    """One printed text a cell, however the kernel cut it into messages."""
    joined = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def is_volatile(output):
    """A widget's view needs a live kernel, and a progress bar says how fast this machine was today."""
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {}) or output.get("name") == "stderr"


def tidy_output(output, count):
    output.metadata = nbformat.from_dict({}) if "metadata" in output else None
    if output.metadata is None:
        del output["metadata"]
    if "execution_count" in output:
        output.execution_count = count
    if "image/svg+xml" in output.get("data", {}):
        output.data["image/svg+xml"] = lighter(output.data["image/svg+xml"])
    return output


def lighter(svg):
    """The same picture in fewer bytes: no metadata, no indentation, paths to a hundredth of a point."""
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", " ".join(path[0].split())), svg)
    return re.sub(r"\n +<", "\n<", svg)


def written(notebook):
    """The notebook's text on disk."""
    return json.dumps(json.loads(nbformat.writes(notebook)), indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def replace_file(path, text):
    """Write through a temporary name, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def run(path):
    """Execute one notebook in a fresh kernel, keep its outputs; return its seconds and its kernel's peak memory."""
    from nbclient import NotebookClient

    notebook, started = read(path), time.perf_counter()
    client = NotebookClient(notebook, timeout=180, kernel_name="python3", resources={"metadata": {"path": path.parent}})
    with client.setup_kernel():
        for index, cell in enumerate(notebook.cells):
            client.execute_cell(cell, index)
        seconds = time.perf_counter() - started
        probe = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        notebook.cells.append(nbformat.v4.new_code_cell(probe))
        peak = client.execute_cell(notebook.cells[-1], len(notebook.cells) - 1).outputs[0].text
        notebook.cells.pop()
    figures = {"seconds": round(seconds, 1), "peak_mb": int(peak) // 1024}
    notebook.cells[0].source = TAKES.sub(takes(figures), notebook.cells[0].source)
    replace_file(path, written(tidy(notebook)))
    return figures


def takes(figures):
    """What a chapter's first cell says of its cost, rounded up so that it changes seldom."""
    seconds, megabytes = -(-figures["seconds"] // 5) * 5, -(-figures["peak_mb"] // 50) * 50
    return f"about {seconds:.0f} s and {megabytes} MB on two CPU cores"


def stamp_readme(text, figures):
    """README's text with the measured seconds and memory in the rows of its chapter table."""
    for name, row in figures.items():
        cells = f"| {row['seconds']:.0f} s | {row['peak_mb']} MB |"
        text = re.sub(rf"(\(chapters/{name}\.ipynb\) \|.*?)\| \d+ s \| \d+ MB \|", rf"\g<1>{cells}", text)
    return text


def log_runs(names, notebooks):
    """Execute the notebooks whose name contains one of `names`; add the figures to assets/runs/chapters.json."""
    log = ROOT / "assets/runs/chapters.json"
    figures = json.loads(log.read_text()) if log.exists() else {}
    for path in notebooks:
        if not names or any(name in str(path.relative_to(ROOT / "chapters")) for name in names):
            figures[path.relative_to(ROOT / "chapters").with_suffix("").as_posix()] = run(path)
            replace_file(log, json.dumps(figures, indent=1, sort_keys=True) + "\n")
            print(path.name, *figures[path.relative_to(ROOT / "chapters").with_suffix("").as_posix()].values())
    replace_file(ROOT / "README.md", stamp_readme((ROOT / "README.md").read_text(encoding="utf-8"), figures))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing, exit 1 on any difference")
    parser.add_argument("--run", nargs="*", metavar="NAME", help="execute chapters before the export")
    options = parser.parse_args(arguments)
    notebooks = sorted((ROOT / "chapters").rglob("[0-9]*.ipynb"))
    notebooks = [path for path in notebooks if ".ipynb_checkpoints" not in path.parts]
    if not options.check:
        ruff = [sys.executable, "-m", "ruff"]
        subprocess.run([*ruff, "check", "--select", "I", "--fix", "--quiet", *notebooks], cwd=ROOT, check=True)
        subprocess.run([*ruff, "format", "--quiet", *notebooks], cwd=ROOT, check=True)
        if options.run is not None:
            log_runs(options.run, notebooks)
    wanted = {ROOT / "dsv3_mini" / name: text for name, text in build(ROOT / "chapters").items()}
    have = {path for path in (ROOT / "dsv3_mini").rglob("*.py") if HEADER in path.read_text(encoding="utf-8")[:2000]}
    wanted |= {path: written(tidy(read(path))) for path in notebooks}
    stale = [path for path in sorted(wanted) if not path.exists() or path.read_text(encoding="utf-8") != wanted[path]]
    unclaimed = sorted(have - wanted.keys())
    if not options.check:
        for path in stale:
            replace_file(path, wanted[path])
        for path in unclaimed:
            path.unlink()
    for path in stale + unclaimed:
        print(f"{'differs from its chapter' if options.check else 'written'}: {path.relative_to(ROOT)}")
    return int(options.check and bool(stale + unclaimed))


if __name__ == "__main__":
    sys.exit(main())
