"""Checkpoints: every usual form is loaded completely, everything else is refused, and nothing is ever unpickled."""

import builtins
import pickle

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from sharpness.cli.checkpoints import load_weights, read_weights
from sharpness.errors import ArgumentError


def net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 3), nn.Linear(3, 3)
        self.last.weight = self.first.weight


FORMS = {
    "a state dict": lambda state: state,
    "state_dict": lambda state: {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "model": lambda state: {"model": state, "args": None},
    "DataParallel": lambda state: {f"module.{key}": value for key, value in state.items()},
    "compiled": lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    "both": lambda state: {"model": {f"module._orig_mod.{key}": value for key, value in state.items()}},
    "half precision": lambda state: {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()},
}


@pytest.mark.parametrize("form", FORMS)
def test_usual_forms(form, tmp_path):
    saved, fresh = net(), net()
    torch.save(FORMS[form](saved.state_dict()), tmp_path / "a.pt")
    load_weights(fresh, tmp_path / "a.pt")
    for key, value in saved.state_dict().items():
        expected = value.bfloat16().float() if form == "half precision" and value.is_floating_point() else value
        assert torch.equal(fresh.state_dict()[key], expected)


def test_safetensors_and_prefixes_that_the_model_has_itself(tmp_path):
    saved, fresh = nn.DataParallel(net()), nn.DataParallel(net())
    save_file(saved.state_dict(), tmp_path / "a.safetensors")
    load_weights(fresh, tmp_path / "a.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), fresh.parameters(), strict=True))


def test_tied_weights_that_are_saved_once(tmp_path):
    saved, fresh = Tied(), Tied()
    save_file({k: v for k, v in saved.state_dict().items() if k != "last.weight"}, tmp_path / "a.safetensors")
    load_weights(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh.last.weight, saved.first.weight)
    save_file({k: v for k, v in saved.state_dict().items() if not k.startswith("last")}, tmp_path / "b.safetensors")
    with pytest.raises(ArgumentError, match=r"missing last.bias. Let MAKE_MODEL"):
        load_weights(fresh, tmp_path / "b.safetensors")


def test_keys_and_shapes_that_do_not_fit(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({f"net.{key}": value for key, value in net().state_dict().items()}, path)
    with pytest.raises(
        ArgumentError,
        match=r"does not fit the model: missing 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean and 3 more; "
        r"unexpected net.0.weight, .* and 4 more. Let MAKE_MODEL build.* Without 'net.' at the beginning",
    ):
        load_weights(net(), path)
    torch.save({**net().state_dict(), "n_averaged": torch.tensor(1)}, path)
    with pytest.raises(ArgumentError, match=r"does not fit the model: unexpected n_averaged\. Let MAKE_MODEL.*keys\.$"):
        load_weights(net(), path)
    torch.save(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).state_dict(), path)
    with pytest.raises(
        ArgumentError,
        match=r"does not fit the model: 0.weight is \[5, 3\] in the file and \[4, 3\] in the model; .* and 2 more. Let",
    ):
        load_weights(net(), path)


def test_what_would_run_code_is_refused(tmp_path):
    path, touched = tmp_path / "evil.pt", tmp_path / "touched"

    class Evil:
        def __reduce__(self):
            return (touched.touch, ())

    with path.open("wb") as file:
        pickle.dump({"state_dict": Evil()}, file)
    torch.save({"state_dict": Evil()}, tmp_path / "evil2.pt")
    torch.save(net(), tmp_path / "whole.pt")
    with pytest.raises(ArgumentError, match=r"can read safely \(more than weights and plain containers"):
        read_weights(tmp_path / "evil.pt")
    for name, what in (("evil2.pt", r"\((builtins.getattr|getattr|pathlib)"), ("whole.pt", r"\(torch.nn.modules")):
        with pytest.raises(
            ArgumentError, match=rf"was refused: it holds objects of Python {what}.*Save the weights alone"
        ):
            read_weights(tmp_path / name)
    assert not touched.exists()


def test_files_that_are_no_checkpoints(tmp_path):
    path = tmp_path / "a.pt"
    with pytest.raises(ArgumentError, match=r"there is no such file. Pass --checkpoint FILE"):
        read_weights(path)
    for content in (b"", b"nothing of the kind", b"PK\x03\x04 and no more"):
        path.write_bytes(content)
        with pytest.raises(ArgumentError, match=r"is no file that torch.load can read safely \("):
            read_weights(path)
    torch.save({"epoch": 3, "model": None}, path)
    with pytest.raises(ArgumentError, match=r"holds no weights but the keys epoch, model. A state dict is needed"):
        read_weights(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(ArgumentError, match="holds no weights but Tensor"):
        read_weights(path)
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ArgumentError, match=r"is no file of safetensors \(.*Save it once more"):
        read_weights(path)


def test_safetensors_missing(tmp_path, monkeypatch):
    save_file(net().state_dict(), tmp_path / "a.safetensors")
    original = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(
        ArgumentError, match=r'needs the package safetensors. Install it with: pip install "sharpness\['
    ):
        read_weights(tmp_path / "a.safetensors")
