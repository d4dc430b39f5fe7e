"""What is found out before the first training, which may take hours."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, TensorDataset

import sharpness
from sharpness.errors import ArgumentError, DataError

X = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))
DATA = (X, (X[:, 0] > 0).long())


def net():
    return nn.Linear(5, 2)


class Untouched:
    """Data that nobody may read as yet."""

    def __len__(self):
        return 24

    def __getitem__(self, i):
        raise AssertionError("trained before the options were checked")


BATCH_SIZES = {"batch_sizes": (4, 24), "seeds": 1, "epochs": 1}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (("top_eigenvalues", {"k": 0}), "`k` must be between 1 and 12"),
        (("top_eigenvalues", {"k": 13}), "`k` must be between 1 and 12"),
        (("average_case_sharpness", {"adaptive": "rows"}), "`adaptive` must be None"),
    ],
)
def test_options_of_metrics_are_refused_before_anything_is_trained(metric, message):
    data = Untouched()
    with pytest.raises(ArgumentError, match=message):
        sharpness.compare_batch_sizes(net, data, data, metrics=[metric], **BATCH_SIZES)
    with pytest.raises(ArgumentError, match=message):
        sharpness.piggyback(net, data, data, metric=metric, switch_epochs=(0, 1), **BATCH_SIZES)


def test_a_test_set_that_cannot_be_used_is_found_before_anything_is_trained():
    train_set = Untouched()
    for test_set, error, match in (
        ((X[:, :3], DATA[1]), RuntimeError, "mat1 and mat2 shapes"),
        (TensorDataset(X), DataError, "the batch holds no targets"),
    ):
        with pytest.raises(error, match=match):
            sharpness.compare_batch_sizes(net, train_set, test_set, metrics=["fisher_rao_norm"], **BATCH_SIZES)
        with pytest.raises(error, match=match):
            sharpness.piggyback(net, train_set, test_set, switch_epochs=(1,), **BATCH_SIZES)


class Stream(IterableDataset):
    def __len__(self):
        return 24

    def __iter__(self):
        raise AssertionError("read")


def test_data_without_indices_are_refused():
    with pytest.raises(ArgumentError, match="`train_set` must be a data set .* an item for each index, .* got Stream"):
        sharpness.compare_batch_sizes(net, Stream(), DATA, **BATCH_SIZES)


def test_an_untrained_model_may_overflow():
    class Scaled(nn.Linear):
        def forward(self, x):
            return super().forward(x) / self.bias.abs().sum()

    def make():
        model = Scaled(5, 2)
        nn.init.zeros_(model.bias)
        return model

    def train(model, loader):
        nn.init.ones_(model.bias)

    options = {**BATCH_SIZES, "epochs": None, "train": train, "metrics": ["fisher_rao_norm"]}
    found = sharpness.compare_batch_sizes(make, DATA, DATA, **options)
    assert found.rows[0].test_loss.mean > 0


def test_whole_numbers_of_numpy_are_whole_numbers():
    options = {**BATCH_SIZES, "batch_sizes": np.array([4, 24]), "seeds": np.int64(1), "seed": np.int64(1)}
    swept = sharpness.compare_batch_sizes(net, DATA, DATA, metrics=["fisher_rao_norm"], **options)
    ridden = sharpness.piggyback(net, DATA, DATA, metric="fisher_rao_norm", switch_epochs=np.array([0, 1]), **options)
    for found in (swept, ridden):
        assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["settings"]["seeds"] == 1
