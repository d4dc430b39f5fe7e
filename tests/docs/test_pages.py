"""Every page of the documentation and every notebook runs, as a reader would run them."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def blocks(page):
    """The code blocks of a page, each with the text block right after it: what it prints, to the letter.

    Those marked ``code-cell`` run when the documentation is built too, and what they print is put there then.
    """
    found = re.findall(
        r"^```(?:python|{code-cell} python)\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", page.read_text(), re.M | re.S
    )
    return [(code, printed) for code, printed in found]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_code_of_a_page_runs_in_order_and_prints_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for code, printed in blocks(page):
        exec(compile(code, page.name, "exec"), namespace)  # noqa: S102
        said = capsys.readouterr().out
        assert not printed or said.rstrip() == printed.rstrip()


def test_there_is_code_to_run():
    assert sum(len(blocks(page)) for page in PAGES) > 10
    assert NOTEBOOKS


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_runs(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    document = nbformat.read(notebook, as_version=4)
    nbclient.NotebookClient(document, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert all(cell.execution_count for cell in document.cells if cell.cell_type == "code" and cell.source.strip())
