"""What every test gets: a seeded global generator, and no windows."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)  # everything here is so small that threads would only wait for each other


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1234)
