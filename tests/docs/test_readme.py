"""The README does what it says: its code prints what is printed there, its commands are two single lines."""

import doctest
import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()
SHELL = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", TEXT, re.M | re.S)


class Checker(doctest.OutputChecker):
    """Compares what is printed but for the half-widths of intervals, which are rounding, and differ by machine."""

    def check_output(self, want, got, optionflags):
        want, got = (re.sub(r"± [0-9.e+-]+", "± ...", text) for text in (want, got))
        return super().check_output(want, got, optionflags)


def test_the_code_prints_the_printed_answer():
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.NORMALIZE_WHITESPACE)
    runner.run(doctest.DocTestParser().get_doctest(TEXT, {}, "README", str(README), 0))
    assert runner.tries > 3
    assert runner.failures == 0


def test_the_first_two_shell_blocks_are_the_two_commands():
    main, tests = SHELL[:2]
    for block in (main, tests):
        assert block.count("\n") == 1
    assert "sharpness demo" in main
    assert "pytest" in tests


def test_it_is_short_and_its_pictures_and_links_exist():
    assert len(TEXT.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in link]
    assert links
    assert [link for link in links if not (README.parent / link).exists()] == []
