"""One page for an appendix, CSV for other programs, and what a notebook shows."""

import builtins
import csv
import dataclasses
import html
import importlib.util
import io
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

import sharpness
from sharpness import _write
from sharpness.errors import ArgumentError
from sharpness.results import Comparison, ComparisonRow, EigenResult, PerturbationResult, Spread
from sharpness.results import picture as pictures_module
from sharpness.results.comparison_lines import comparison_lines
from tests.zoo import tanh_net

EVIL = '<script>alert(\'x\')</script> & $\\frac$ "quoted" id="patch_1" --> ' + "long " * 12
WARNING = "the losses of <b>a</b> & b differ"
PROBLEM = tanh_net()
VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


class Parsed(HTMLParser):
    """A page as a browser sees it, as far as these tests look."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.ids, self.open, self.wrong, self.words = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return "".join(self.words)

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def row(name, sharp, losses, **fields):
    spreads = {key: Spread.of(value) for key, value in fields.items()}
    return ComparisonRow(
        name=name, train_loss=Spread.of(losses), metrics={"top_eigenvalues": Spread.of(sharp)}, **spreads
    )


@pytest.fixture(scope="module")
def comparison():
    measured = sharpness.compare(
        {"small": [PROBLEM.model, tanh_net(2).model], EVIL: [tanh_net(1).model, tanh_net(3).model]},
        PROBLEM.loader,
        test_loader=PROBLEM.loader,
        metrics=["top_eigenvalues", "worst_case_sharpness"],
    )
    return dataclasses.replace(measured, warnings=(WARNING,))


@pytest.fixture(scope="module")
def report():
    metrics = [("top_eigenvalues", {"k": 2}), ("average_case_sharpness", {"num_samples": 3}), "relative_flatness"]
    measured = sharpness.report(PROBLEM.model, PROBLEM.loader, metrics=metrics)
    return dataclasses.replace(measured, skipped={"pac_bayes_sharpness": WARNING})


@pytest.fixture(scope="module")
def layers():
    return sharpness.per_layer("top_eigenvalues", PROBLEM.model, PROBLEM.loader)


@pytest.fixture(scope="module")
def records(comparison, report, layers):
    return {"comparison": comparison, "report": report, "layers": layers}


@pytest.fixture(scope="module")
def pages(records):
    return {name: record.to_html() for name, record in records.items()}


KINDS = ["comparison", "report", "layers"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_is_well_formed_and_asks_for_nothing_from_outside(kind, pages):
    page = pages[kind]
    parsed = Parsed(page)
    assert page.startswith("<!DOCTYPE html>")
    assert parsed.wrong == []
    assert parsed.open == []
    assert not re.search(r"https?:|//[a-z]|@import|@font-face|<script|<link|<img|<iframe|\bsrc=", page)
    for _, attributes in parsed.tags:
        assert attributes.get("href", "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_can_be_read_by_everyone(kind, pages):
    parsed = Parsed(pages[kind])
    assert parsed.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.all("meta")
    assert len(parsed.all("h1")) == len(parsed.all("main")) == len(parsed.all("title")) == 1
    assert all(cell.get("scope") in ("col", "row") for cell in parsed.all("th"))
    for picture in parsed.all("svg"):
        assert picture["role"] == "img"
        assert picture["aria-label"]
        assert picture["viewbox"]
    names = [part for part in parsed.all("div") if "scroll" in part.get("class", "")]
    assert len(names) == len(parsed.all("table"))  # every table scrolls in a box of its own
    assert all(part["aria-label"] and part["tabindex"] == "0" for part in names)


def test_what_the_user_wrote_is_text_and_nothing_else(comparison, report, pages):
    page = pages["comparison"]
    parsed = Parsed(page)
    for shown in (EVIL, WARNING):
        assert shown in parsed.text
    assert "<script" not in page
    assert not parsed.all("b")
    assert not parsed.all("script")
    assert EVIL[:23] + "…" in parsed.text  # beside the bar of the figure, and no formula
    assert WARNING in Parsed(pages["report"]).text
    assert "<b>" not in comparison._repr_html_() + report._repr_html_()


def test_warnings_come_first_then_values_doubts_prices_and_settings(comparison, pages):
    for name, words in (
        (
            "comparison",
            ["Read with care", WARNING, "train loss", "(over small)", "Ratios", "Figures", "Every measurement"],
        ),
        ("report", ["Read with care", WARNING, "doubt", "Figures"]),
    ):
        text = Parsed(pages[name]).text
        places = [text.index(word) for word in [*words, "How to read it", "Settings"]]
        assert places == sorted(places)
        assert f"sharpness {sharpness.__version__}" in text
    text = Parsed(pages["comparison"]).text
    for one in (record for row in comparison.rows for records in row.records.values() for record in records):
        assert f"{one.headline:.5g}" in text
        assert one.doubt in text
    lines = comparison_lines(comparison)
    assert all(cell in text for line in lines for cell in line)  # the table of the terminal
    assert str(comparison.rows[0].train_loss) in text
    assert "Mean loss over the training data" in text  # the record's own words
    assert "Largest eigenvalue of the Hessian" in text


def test_the_same_record_gives_the_same_bytes(records, pages, tmp_path):
    for name, record in records.items():
        record.save(tmp_path / name)
        assert pages[name] == type(record).load(tmp_path / name).to_html()
        assert record.to_csv() == type(record).load(tmp_path / name).to_csv()


def test_the_ids_of_several_figures_do_not_clash(pages):
    for name in ("report", "comparison"):
        page = pages[name]
        parsed = Parsed(page)
        assert len(parsed.all("svg")) > 1
        assert len(set(parsed.ids)) == len(parsed.ids) > 0
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', page)
        assert used
        assert {a or b for a, b in used} <= set(parsed.ids)


def test_the_users_matplotlib_is_left_alone(comparison, pages):
    plt = pytest.importorskip("matplotlib.pyplot")
    import matplotlib as mpl

    with mpl.rc_context({"axes.facecolor": "red", "font.size": 30.0, "lines.linewidth": 9.0}):
        before, figures = dict(mpl.rcParams), plt.get_fignums()
        assert comparison.to_html() == pages["comparison"]  # drawn with none of the user's settings
        assert dict(mpl.rcParams) == before
        assert plt.get_fignums() == figures


def test_without_matplotlib_the_page_says_what_is_missing(report, comparison, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    for record in (report, comparison):
        page = record.to_html()
        assert "The figures are missing: they need matplotlib." in page
        assert "<svg" not in page


def test_single_numbers_are_not_drawn(pages):
    labels = [picture["aria-label"] for picture in Parsed(pages["report"]).all("svg")]
    assert labels == ["top_eigenvalues", "average_case_sharpness"]


def test_notebooks_show_the_table_and_the_warnings(records, pages):
    lines = len(comparison_lines(records["comparison"]))
    for name, count in (("comparison", lines), ("report", 3), ("layers", len(records["layers"]))):
        shown = records[name]._repr_html_()
        assert Parsed(shown).wrong == []
        assert shown.count("<tr>") == 1 + count
        assert "<style" not in shown
        assert shown in pages[name]
    assert html.escape(WARNING) in records["comparison"]._repr_html_()


def test_one_model_one_seed_and_no_numbers_are_pages_too():
    lone = Comparison(
        rows=(row("a", [math.nan], [math.inf]),), ratios={"top_eigenvalues": ()}, warnings=(), seconds=0.0
    )
    text = Parsed(lone.to_html()).text
    assert "nan" in text
    assert "Ratios" not in text
    assert "Read with care" not in text
    assert [line["value"] for line in csv.DictReader(io.StringIO(lone.to_csv()))] == ["inf", ""]
    zero = Comparison(rows=(), ratios={}, warnings=(), seconds=0.0)
    assert "Comparison of sharpness" in zero.to_html()
    assert zero.to_csv().count("\n") == 1


def test_fields_of_a_row_are_in_the_table():
    rows = tuple(row(name, [1.0, 2.0], [0.1, 0.2], updates=[10, 20], test_accuracy=[0.5, 0.75]) for name in ("a", "b"))
    ratios = {"top_eigenvalues": (Spread.of([1.0, 1.0]),) * 2}
    found = Comparison(rows=rows, ratios=ratios, warnings=(), seconds=0.0)
    text = Parsed(found.to_html()).text
    assert "updates" in text
    assert "test accuracy (%)" in text
    assert "62 ± 18" in text
    assert "Steps of the optimizer, likewise." in text
    found = dataclasses.replace(found, ratio_intervals={"top_eigenvalues": (None, (0.25, 4.0))}, notes=("look <i>",))
    text = Parsed(found.to_html()).text
    assert "x1 (0.25 to 4)" in text
    assert "Note: look <i>" in text


def test_a_page_of_values_that_are_not_finite_draws_what_is():
    rows = tuple(row(name, [value], [0.1]) for name, value in (("a", 2.0), ("b", math.inf)))
    ratios = {"top_eigenvalues": (Spread.of([1.0]), Spread.of([math.inf]))}
    assert "<svg" in Comparison(rows=rows, ratios=ratios, warnings=(), seconds=0.0).to_html()


def test_a_page_needs_no_docstrings(comparison, monkeypatch):
    """Python -OO takes them away."""
    for kind in (Comparison, ComparisonRow):
        monkeypatch.setattr(kind, "__doc__", None)
    assert "(over small)" in Parsed(comparison.to_html()).text


def test_a_metric_that_one_row_lacks_is_left_out_of_the_figures():
    rows = (row("a", [1.0], [0.1]), ComparisonRow(name="b", train_loss=Spread.of([0.1]), metrics={}))
    ratios = {"top_eigenvalues": (Spread.of([1.0]), Spread.of([]))}
    found = Comparison(rows=rows, ratios=ratios, warnings=(), seconds=0.0)
    assert "<svg" not in found.to_html()
    assert "top_eigenvalues" in Parsed(found.to_html()).text
    assert pictures_module.panels([]).axes == []


def test_csv_of_a_comparison_has_a_line_per_row_seed_and_quantity(comparison):
    lines = list(csv.DictReader(io.StringIO(comparison.to_csv(), newline="")))
    assert len({(line["row"], line["seed"], line["quantity"]) for line in lines}) == len(lines) == 2 * 2 * 13
    for line in lines:
        of = comparison[line["row"]]
        value = of.metrics.get(line["quantity"]) or getattr(of, line["quantity"])
        assert float(line["value"]) == value.values[int(line["seed"])]
    eigen = next(line for line in lines if line["quantity"] == "top_eigenvalues" and line["seed"] == "1")
    record = comparison["small"].records["top_eigenvalues"][1]
    assert [float(eigen["low"]), float(eigen["high"])] == record.interval[0].tolist()
    assert (eigen["converged"], int(eigen["passes"]), eigen["doubt"]) == ("True", record.num_passes, record.doubt)


def test_csv_of_a_report_and_of_layers_has_a_line_per_entry(report, layers):
    for record, key in ((report, "metric"), (layers, "layer")):
        lines = list(csv.DictReader(io.StringIO(record.to_csv(), newline="")))
        assert [line[key] for line in lines] == list(record)
        assert [float(line["value"]) for line in lines] == [one.headline for one in record.values()]
        assert [float(line["seconds"]) for line in lines] == [one.seconds for one in record.values()]
    lines = {line["metric"]: line for line in csv.DictReader(io.StringIO(report.to_csv()))}
    assert float(lines["average_case_sharpness"]["stderr"]) == report["average_case_sharpness"].stderr
    assert lines["top_eigenvalues"]["stderr"] == ""
    assert isinstance(report["top_eigenvalues"], EigenResult)
    assert isinstance(report["average_case_sharpness"], PerturbationResult)


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_what_is_returned(kind, records, pages, tmp_path):
    path = tmp_path / "é.html"
    assert records[kind].to_html(path) == pages[kind]
    assert path.read_bytes() == pages[kind].encode("utf-8")
    text = records[kind].to_csv(path)
    assert path.read_bytes() == text.encode("utf-8")
    assert "\r" not in text
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    for write, wrong, reason in (
        (records[kind].to_csv, tmp_path / "missing" / "a", "cannot be written. Choose a file in a folder that exists"),
        (records[kind].to_html, 3, "`path` must be the path of a file, got 3"),
    ):
        with pytest.raises(ArgumentError, match=reason):
            write(wrong)


def test_a_half_written_file_never_replaces_an_older_one(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("older")
    link = tmp_path / "link.csv"
    link.symlink_to(path)

    def full(target):
        target.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(ArgumentError, match=r"cannot be written \(No space left on device\). Choose a file"):
        _write.write_whole(link, full)
    assert path.read_text() == "older"
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "link.csv"]
    _write.write_whole(link, lambda target: target.write_text("newer"))
    assert link.is_symlink()
    assert path.read_text() == "newer"


def test_a_file_in_a_folder_that_takes_no_others_is_written_over(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text("older")
    monkeypatch.setattr(os, "access", lambda place, mode: os.path.isfile(place))
    inode = path.stat().st_ino
    _write.write_text(path, "newer")
    assert (path.read_text(), path.stat().st_ino) == ("newer", inode)


def test_pipes_are_written_to_as_they_are():
    _write.write_text(os.devnull, "text")
    assert not os.path.isfile(os.devnull)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
def test_a_browser_shows_the_page_on_a_phone(pages, tmp_path):
    """In a real browser: nothing is fetched, and nothing but the tables scrolls sideways, in a window of 375 pixels."""
    probe = """<script>parent.document.body.dataset[name] = JSON.stringify({
        width: innerWidth, over: document.documentElement.scrollWidth - document.documentElement.clientWidth,
        fetched: performance.getEntriesByType("resource").length, drawn: document.querySelectorAll("svg path").length,
        wide: [...document.querySelectorAll(".scroll")].some(box => box.scrollWidth > box.clientWidth)})</script>"""
    frames = ""
    for name in ("comparison", "report"):
        page = pages[name].replace("</body>", probe + "</body>")
        frames += (
            f'<iframe name="{name}" width="375" height="800" style="border:0" srcdoc="{html.escape(page)}"></iframe>'
        )
    (tmp_path / "probe.html").write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body>{frames}</body>', encoding="utf-8"
    )
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--window-size=1200,900", "--dump-dom", (tmp_path / "probe.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    body = next(attributes for tag, attributes in Parsed(shown).tags if tag == "body")
    for name in ("comparison", "report"):
        found = json.loads(body[f"data-{name}"])
        assert (found["width"], found["over"], found["fetched"]) == (375, 0, 0)
        assert found["drawn"] > 10
    assert json.loads(body["data-comparison"])["wide"]  # its table is wider than the phone, and scrolls by itself


def test_long_names_are_cut_and_aslant():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.add_subplot()
    axes.set_xticks([0, 1])
    pictures_module.shown_names(axes, ["a" * 30, "$b"])
    labels = axes.get_xticklabels()
    assert [label.get_text() for label in labels] == ["a" * 23 + "…", "$b"]
    assert [label.get_rotation() for label in labels] == [0, 0]
    pictures_module.shown_names(axes, ["a" * 30, "b" * 20])
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {25}
