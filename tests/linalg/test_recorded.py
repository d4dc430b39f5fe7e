"""A run that was killed goes on to the same bits."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from sharpness.errors import ArgumentError, DataError
from sharpness.linalg import (
    DenseOperator,
    FunctionOperator,
    LinearOperator,
    RecordedOperator,
    arpack,
    dense,
    lanczos,
    lobpcg,
    power_iteration,
)
from tests.zoo import rotated

N = 60
MATRIX = rotated(torch.cat([7 * torch.ones(3), torch.linspace(-1, 6, N - 3)]).double())
RUNS = {
    "lanczos": lambda a: lanczos(a, 3, vectors=True, num_matvecs=N),
    "restarted": lambda a: lanczos(a, 3, vectors=True, memory=0, num_matvecs=300),
    "confirmed": lambda a: lanczos(a, 3, vectors=True, confirm=True),
    "narrow": lambda a: lanczos(a, 2, vectors=True, basis_dtype=torch.float16),
    "power": lambda a: power_iteration(a, 2, vectors=True, tol=1e-2),
    "lobpcg": lambda a: lobpcg(a, 3, vectors=True),
    "arpack": lambda a: arpack(a, 3, vectors=True),
    "dense": lambda a: dense(a, 3, vectors=True),
}
PRINT = {"data": "abc", "options": {"k": 3}}


def counted():
    spent = [0]

    def product(v):
        spent[0] += 1
        return MATRIX @ v

    return FunctionOperator(product, N, dtype=torch.float64), spent


def same(a, b):
    fields = ("eigenvalues", "residuals", "interval", "kato_temple", "eigenvectors")
    equal = all(torch.equal(getattr(a, f).nan_to_num(-9), getattr(b, f).nan_to_num(-9)) for f in fields)
    return equal and (a.num_matvecs, a.converged, a.confirmation) == (b.num_matvecs, b.converged, b.confirmation)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_continued_from_any_length_gives_the_same_bits(name, tmp_path):
    operator, spent = counted()
    plain = RUNS[name](operator)
    total, spent[0] = spent[0], 0
    path = tmp_path / "products"
    recorded = RUNS[name](RecordedOperator(operator, path, PRINT))
    assert same(recorded, plain)
    whole = path.read_bytes()
    record = 32 + 8 * N + 4
    start = len(whole) - total * record
    for kept in {0, 1, total // 2, total - 1, total}:
        path.write_bytes(whole[: start + kept * record])
        spent[0] = 0
        again = RecordedOperator(operator, path, PRINT)
        assert same(RUNS[name](again), plain)
        assert again.num_replayed == kept
        assert spent[0] == total - kept + (kept > 0)  # the first one is made again, to be compared
        assert path.read_bytes() == whole
    assert os.listdir(tmp_path) == ["products"]


@pytest.mark.parametrize("name", ["lanczos", "restarted", "power", "lobpcg", "arpack"])
def test_a_last_record_cut_at_any_byte_is_dropped(name, tmp_path):
    operator, spent = counted()
    path = tmp_path / "products"
    RUNS[name](RecordedOperator(operator, path, PRINT))
    whole, record = path.read_bytes(), 32 + 8 * N + 4
    total = spent[0]
    cut = whole[: len(whole) - 3 * record]  # three are left to do
    for extra in range(record):
        path.write_bytes(cut + whole[len(cut) : len(cut) + extra])
        again = RecordedOperator(operator, path, PRINT)
        assert again._recorded == total - 3
        assert path.stat().st_size == len(cut)
    spent[0] = 0
    RUNS[name](again)
    assert spent[0] == 3 + 1
    assert path.read_bytes() == whole
    for flipped in (0, 40, record - 1):  # a whole last record whose bytes were not all written
        damaged = bytearray(whole)
        damaged[len(whole) - record + flipped] ^= 1
        path.write_bytes(damaged)
        assert RecordedOperator(operator, path, PRINT)._recorded == total - 1


SCRIPT = """
import sys, time, torch
torch.set_num_threads(int(sys.argv[3]))  # before the matrix is made
from sharpness.linalg import FunctionOperator, RecordedOperator
from tests.linalg.test_recorded import MATRIX, N, PRINT, RUNS
def slow(v):
    time.sleep(0.02)
    return MATRIX @ v
RUNS[sys.argv[1]](RecordedOperator(FunctionOperator(slow, N, dtype=torch.float64), sys.argv[2], PRINT))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
@pytest.mark.parametrize("name", ["lanczos", "restarted", "confirmed", "power", "lobpcg", "arpack"])
def test_kill_9_in_the_middle(name, tmp_path):
    path = tmp_path / "products"
    command = [sys.executable, "-c", SCRIPT, name, str(path), str(torch.get_num_threads())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])}
    child = subprocess.Popen(command, env=environment)
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 7 * (8 * N + 36)):
        assert child.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    operator, spent = counted()
    again = RecordedOperator(operator, path, PRINT)
    result = RUNS[name](again)
    assert again.num_replayed >= 6
    assert spent[0] - 1 == result.num_matvecs - again.num_replayed > 0
    assert same(result, RUNS[name](counted()[0]))


def test_another_operator_behind_the_same_fingerprint_is_found_out(tmp_path):
    path = tmp_path / "products"
    lanczos(RecordedOperator(DenseOperator(MATRIX), path, PRINT))
    before = path.read_bytes()
    with pytest.raises(
        ArgumentError, match="the first product in the checkpoint .* is not what the operator gives now"
    ):
        lanczos(RecordedOperator(DenseOperator(1.001 * MATRIX), path, PRINT))
    assert path.read_bytes() == before


def test_a_block_is_one_block_of_the_operator(tmp_path):
    sizes = []

    class Blocks(LinearOperator):
        def _matvec(self, v):
            return MATRIX @ v

        def _matmat(self, V):
            sizes.append(V.shape[1])
            return MATRIX @ V

    eye = torch.eye(N, dtype=torch.float64)
    for expected in ([N], [N, N - 7]):
        operator = RecordedOperator(Blocks(N, dtype=torch.float64, device="cpu"), tmp_path / "products", PRINT)
        assert torch.equal(operator.matmat(eye), MATRIX @ eye)
        assert sizes == expected
        whole = (tmp_path / "products").read_bytes()
        (tmp_path / "products").write_bytes(whole[: len(whole) - (N - 7) * (32 + 8 * N + 4)])


def test_another_run_is_refused_and_what_differs_is_named(tmp_path):
    path = tmp_path / "products"
    operator = DenseOperator(torch.eye(3))
    RecordedOperator(operator, path, PRINT)
    RecordedOperator(operator, path, dict(reversed(PRINT.items())))  # the order says nothing
    for other, differing in (
        ({**PRINT, "data": "abd"}, r"these differ: data \(was 'abc', is 'abd'\)\. Make"),
        (
            {"data": "x" * 99, "options": {"k": 4}},
            r"differ: data \(was 'abc', is 'xxx.*\.\.\.\); options \(was \{'k': 3\}",
        ),
        ({"data": "abc"}, r"differ: options \(was .*, is absent\)"),
        ({**PRINT, "weights": 1}, r"differ: weights \(was absent, is 1\)"),
    ):
        with pytest.raises(ArgumentError, match=differing):
            RecordedOperator(operator, path, other)
    with pytest.raises(
        ArgumentError, match=r"differ: dtype \(was 'torch.float32', is 'torch.float64'\); n \(was 3, is 4\)"
    ):
        RecordedOperator(DenseOperator(torch.eye(4).double()), path, PRINT)


def test_a_file_that_is_something_else_is_left_alone(tmp_path):
    path, operator = tmp_path / "file", DenseOperator(torch.eye(3))
    RecordedOperator(operator, path, PRINT)
    header = path.read_bytes()
    for content in (b"nothing", header[:-1], header[:25], header[:60] + b"x" + header[61:]):
        path.write_bytes(content)
        with pytest.raises(DataError, match="is not a checkpoint of this library. Pass the path of one"):
            RecordedOperator(operator, path, PRINT)
        assert path.read_bytes() == content
    path.write_bytes(header.replace(b"products\n\x01", b"products\n\x02"))
    with pytest.raises(DataError, match="has format 2, this version of the library writes 1"):
        RecordedOperator(operator, path, PRINT)
    path.write_bytes(b"")  # a file made in advance
    assert RecordedOperator(operator, path, PRINT)._recorded == 0


def test_other_vectors_and_damaged_records_are_not_taken(tmp_path):
    path, operator = tmp_path / "file", DenseOperator(torch.eye(3))
    first = RecordedOperator(operator, path, {})
    for _ in range(2):
        first.matvec(torch.ones(3))
    with pytest.raises(ArgumentError, match="product 1 in the checkpoint .* is that of another vector"):
        RecordedOperator(operator, path, {}).matvec(torch.ones(3) * (1 + 1e-7))
    content = bytearray(path.read_bytes())
    content[-60] ^= 1  # within the first of two records
    path.write_bytes(content)
    with pytest.raises(DataError, match="record 1 of the checkpoint .* is damaged"):
        RecordedOperator(operator, path, {}).matvec(torch.ones(3))


def test_paths_and_fingerprints_are_checked_at_once(tmp_path):
    operator = DenseOperator(torch.eye(3))
    with pytest.raises(ArgumentError, match="must be a file that can be read and written"):
        RecordedOperator(operator, tmp_path / "missing" / "file", {})
    with pytest.raises(ArgumentError, match="must be a file that can be read and written"):
        RecordedOperator(operator, tmp_path, {})
    with pytest.raises(ArgumentError, match="`fingerprint` must be a mapping of names to numbers"):
        RecordedOperator(operator, tmp_path / "file", {"data": torch.ones(2)})
    assert not os.listdir(tmp_path)


def test_rounding_passes_through(tmp_path):
    operator = FunctionOperator(lambda v: v, 4)
    operator.product_error = lambda rows: 0.25
    assert RecordedOperator(operator, tmp_path / "file", {}).product_error(torch.eye(4)) == 0.25
