"""What every test gets: a seeded global generator, and no windows."""

import os

os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)  # everything here is so small that threads would only wait for each other


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory):
    """Keep compiled code of the tests, and of what they start, apart from the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARPNESS_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(1234)
