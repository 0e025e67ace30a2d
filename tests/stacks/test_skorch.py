"""flatkern in skorch: closures for SAM and RWP, FollowCallback for rolling RWP; checkpoints, copies, grid search."""

import copy
import pickle

import numpy as np
import pytest
import torch
from common import (
    EVERY,
    assert_other_tensors,
    assert_same_state,
    assert_same_tensors,
    loss_of,
    make_batches,
    make_model,
    make_optimizer,
    step_by_hand,
    weights,
)
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback, Checkpoint

import flatkern
from flatkern.integrations.skorch import FollowCallback

CLOSURES = ["RWP", "rolling RWP", "m-RWP", "ARWP", "SAM", "ASAM", "m-ARWP", "LookSAM", "rolling Momentum-SAM"]
every_method = pytest.mark.parametrize("method", CLOSURES)


def data(count=4):
    x, y = (torch.cat(parts) for parts in zip(*make_batches(count), strict=True))
    return x.numpy(), y.numpy()


def make_net(method, lr=0.05, epochs=2, callbacks=(), **more):
    follow = [("follow", FollowCallback())] if method == "ASAM" or method.startswith("rolling") else []
    own = {f"optimizer__{key}": value for key, value in EVERY[method].make().items()}
    options = {
        "module": make_model,
        "optimizer": flatkern.AdamW,
        "criterion": torch.nn.CrossEntropyLoss,
        "lr": lr,
        "max_epochs": epochs,
        "batch_size": 4,
        "train_split": None,
        "iterator_train__shuffle": False,
        "verbose": 0,
        "callbacks": [*follow, *callbacks],
    }
    return NeuralNetClassifier(**{**options, **own, **more})


@pytest.mark.parametrize("method", [*CLOSURES, "GSAM", "SAM at intervals", "Momentum-SAM"])
def test_fit_equals_a_loop_by_hand(method):
    net = make_net(method).fit(*data())
    model = make_model()
    opt = make_optimizer(method, model)
    if opt.rolling:
        opt.train()
    for index, batch in enumerate(make_batches(4) * 2):
        step_by_hand(method, model, opt, [batch], index)
    opt.eval()
    assert not net.optimizer_.is_perturbed
    assert_same_tensors(weights(net.module_), weights(model))
    assert_other_tensors(weights(model), weights(make_model()))


@every_method
def test_lr_zero_returns_the_weights(method):
    net = make_net(method, lr=0.0).fit(*data())
    assert_same_tensors(weights(net.module_), weights(make_model()))


@every_method
def test_resume_is_bit_identical(method, tmp_path):
    """save_params() and load_params() into a new net, with the optimizer."""
    files = {name: str(tmp_path / name) for name in ("f_params", "f_optimizer", "f_history")}
    whole = make_net(method, epochs=4).fit(*data())
    make_net(method).fit(*data()).save_params(**files)
    second = make_net(method, lr=3.0).initialize()
    second.load_params(**files)
    second.partial_fit(*data())
    assert_same_tensors(weights(second.module_), weights(whole.module_))
    assert_same_state(second.optimizer_.state_dict(), whole.optimizer_.state_dict())


class CleanAfterEpoch(Callback):
    """What others see at the end of an epoch, where a rolling optimizer's noise is on."""

    def on_epoch_end(self, net, **kwargs):
        self.perturbed_ = net.optimizer_.is_perturbed
        with net.optimizer_.clean():
            self.clean_ = weights(net.module_)


@every_method
def test_checkpoints_hold_clean_weights(method, tmp_path):
    seen = CleanAfterEpoch()
    saved = Checkpoint(monitor=None, dirname=str(tmp_path), f_pickle="net.pkl")
    net = make_net(method, callbacks=[("seen", seen), ("saved", saved)]).fit(*data())
    assert seen.perturbed_ is method.startswith("rolling")
    assert_same_tensors(torch.load(tmp_path / "params.pt"), seen.clean_)
    with open(tmp_path / "net.pkl", "rb") as file:
        assert_same_tensors(weights(pickle.load(file).module_), seen.clean_)
    assert_same_tensors(weights(make_net(method).fit(*data()).module_), weights(net.module_))


@every_method
def test_predictions_are_of_clean_weights(method):
    """Also in the validation of every epoch, which changes nothing."""
    from skorch.dataset import ValidSplit

    plain = make_net(method).fit(*data())
    x, y = data()
    logits = make_model()
    logits.load_state_dict(plain.module_.state_dict())
    with torch.no_grad():
        expected = torch.softmax(logits(torch.from_numpy(x)), dim=1).numpy()
    np.testing.assert_array_equal(plain.predict_proba(x), expected)
    validated = make_net(method, train_split=ValidSplit(4, stratified=False)).fit(x, y)
    assert len(validated.history[:, "valid_loss"]) == 2
    assert not validated.optimizer_.is_perturbed


@every_method
def test_copies_and_grid_search_train_as_new_nets(method):
    net = make_net(method).fit(*data())
    twin = copy.deepcopy(net)
    assert_same_tensors(weights(twin.module_), weights(net.module_))
    for each in (net, twin):
        each.partial_fit(*data())
    assert_same_tensors(weights(twin.module_), weights(net.module_))
    search = GridSearchCV(make_net(method), {"lr": [0.0, 0.05]}, cv=2, scoring="accuracy", error_score="raise")
    search.fit(*data(8))
    assert len(search.cv_results_["mean_test_score"]) == 2


def test_an_exception_in_training_leaves_clean_weights():
    class Stopping(Callback):
        def on_batch_end(self, net, **kwargs):
            raise KeyboardInterrupt

    net = make_net("rolling RWP", callbacks=[("stopping", Stopping())])
    net.fit(*data())  # skorch ends a training at Ctrl-C
    assert not net.optimizer_.is_perturbed


def test_refuses_to_follow_without_a_rolling_optimizer():
    net = make_net("m-RWP", callbacks=[("follow", FollowCallback())])
    with pytest.raises(RuntimeError, match=r"optimizer__perturb=flatkern\.RWP\(rolling=True\)"):
        net.fit(*data())


def test_a_rolling_optimizer_without_the_callback_is_told():
    net = make_net("rolling RWP", epochs=3)
    net.set_params(callbacks=[])
    with pytest.warns(UserWarning, match=r"call opt\.follow\(model\) once"):
        net.fit(*data())


def test_the_loss_that_skorch_records_is_of_the_clean_pass():
    net = make_net("SAM", epochs=1).fit(*data(1))
    expected = loss_of(make_model(), make_batches(1)[0]).item()
    assert net.history[0, "batches", 0, "train_loss"] == pytest.approx(expected, rel=1e-6)


def test_says_how_skorch_is_installed(monkeypatch):
    import importlib
    import sys

    monkeypatch.setitem(sys.modules, "skorch.callbacks", None)
    monkeypatch.delitem(sys.modules, "flatkern.integrations.skorch")
    with pytest.raises(ImportError, match=r"pip install 'flatkern\[skorch\]'"):
        importlib.import_module("flatkern.integrations.skorch")
