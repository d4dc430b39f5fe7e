"""The README does what it says: its code prints what is printed there, its commands are two single lines."""

import doctest
import re
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()
SHELL = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", TEXT, re.M | re.S)


def test_the_code_prints_the_printed_answer():
    found = doctest.testfile(str(README), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 3
    assert found.failed == 0


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
