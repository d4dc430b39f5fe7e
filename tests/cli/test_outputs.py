"""Files are written, whatever becomes of the table on the terminal."""

import argparse
import io

import pytest
import torch

import sharpness
from sharpness.cli.outputs import check_outputs, write_outputs
from sharpness.errors import ArgumentError


class Gone(io.StringIO):
    def write(self, text):
        raise BrokenPipeError


class Narrow(io.StringIO):
    def write(self, text):
        return len(text.encode("ascii"))


@pytest.mark.parametrize(("terminal", "error"), [(Gone(), BrokenPipeError), (Narrow(), UnicodeEncodeError)])
def test_a_table_that_cannot_be_printed_loses_no_file(tmp_path, monkeypatch, terminal, error):
    inputs = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    data = [(inputs, (inputs[:, 0] > 0).long())]
    found = sharpness.report(torch.nn.Linear(3, 2), data, metrics=["top_eigenvalues"])
    options = argparse.Namespace(json=None, csv=tmp_path / "a.csv", html=None, plot=None)
    monkeypatch.setattr("sys.stdout", terminal)
    with pytest.raises(error):
        write_outputs(options, found, [])
    assert (tmp_path / "a.csv").read_text() == found.to_csv()


def test_one_file_by_two_names_is_one_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "a.json")
    for other in ("./a.json", str(tmp_path / "a.json"), "link"):
        options = argparse.Namespace(json="a.json", csv=other, html=None, plot=None)
        with pytest.raises(ArgumentError, match="--json and --csv would both be written to"):
            check_outputs(options)
