"""python examples/skorch_search.py

A grid search over sigma of rolling RWP and over rho of SAM, in skorch. What differs from an ordinary net is marked by
(1) to (3). The data are scikit-learn's handwritten digits, a fifth of the training labels at random.
"""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV, train_test_split
from skorch import NeuralNetClassifier
from torch import nn

import flatkern
from flatkern.integrations.skorch import FollowCallback  # (1)


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def load_data():
    x, y = load_digits(return_X_y=True)
    x, test_x, y, test_y = train_test_split((x / 16).astype(np.float32), y, test_size=800, random_state=0)
    y[:200] = np.random.default_rng(1).integers(0, 10, 200)
    return x, y, test_x, test_y


def make_net(callbacks=()):
    torch.manual_seed(0)
    return NeuralNetClassifier(
        Network,
        criterion=nn.CrossEntropyLoss,
        optimizer=flatkern.AdamW,  # (2)
        lr=3e-3,
        batch_size=50,
        max_epochs=10,
        train_split=None,
        callbacks=list(callbacks),
        verbose=0,
    )


def main():
    x, y, test_x, test_y = load_data()
    rolling = [flatkern.RWP(sigma=s, rolling=True) for s in (0.0, 0.01, 0.03)]
    ascents = [flatkern.SAM(rho=r) for r in (0.02, 0.1)]
    for name, methods, callbacks in (("rolling RWP", rolling, [FollowCallback()]), ("SAM", ascents, [])):  # (3)
        search = GridSearchCV(make_net(callbacks), {"optimizer__perturb": methods}, cv=3, scoring="accuracy")
        search.fit(x, y)
        for method, score in zip(methods, search.cv_results_["mean_test_score"], strict=True):
            value = method.sigma if name == "rolling RWP" else method.rho
            print(f"{name:<12} {value:<5} accuracy in the search {100 * score:.1f} %")
        print(f"{name:<12} best: test accuracy {100 * search.score(test_x, test_y):.1f} %")


if __name__ == "__main__":
    main()
