# SPDX-License-Identifier: BSD-3-Clause
"""The Keras losses against Keras' own, and the recipes that people follow with them."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras", minversion="3.0")
if keras.backend.backend() != "torch":
    pytest.skip("Keras does not run on its torch backend", allow_module_level=True)

from softce.integrations import keras as losses  # noqa: E402 (the backend must be known first)

N, C = 12, 5
REDUCTIONS = ("sum_over_batch_size", "sum", None)


@pytest.fixture(autouse=True)
def _own_graphs() -> Iterator[None]:
    keras.utils.set_random_seed(0)
    yield


def _probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.softmax(2 * torch.randn(*shape, generator=g), -1)


def _compare(ours: Any, own: Any, y_true: torch.Tensor, y_pred: torch.Tensor, **call: Any) -> None:
    results = []
    for loss in (ours, own):
        x = y_pred.detach().clone().requires_grad_()
        value = loss(y_true, x, **{k: v.clone() for k, v in call.items()})  # Keras multiplies a mask into the weights
        (grad,) = torch.autograd.grad(value.sum(), x)
        results.append((value.detach(), grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["CategoricalCrossentropy", "CategoricalFocalCrossentropy"])
def test_categorical_equals_keras(name: str, smoothing: float, from_logits: bool, reduction: str | None) -> None:
    arguments = {"from_logits": from_logits, "label_smoothing": smoothing, "reduction": reduction}
    ours, own = getattr(losses, name)(**arguments), getattr(keras.losses, name)(**arguments)
    y_pred = torch.randn(N, C) * 3 if from_logits else _probabilities(N, C, seed=1) * 1.7  # to be renormalised
    for y_true in (_probabilities(N, C), torch.eye(C)[torch.arange(N) % C]):
        _compare(ours, own, y_true, y_pred)
        _compare(ours, own, y_true, y_pred, sample_weight=torch.rand(N))


@pytest.mark.parametrize("name", ["CategoricalCrossentropy", "CategoricalFocalCrossentropy", "BinaryCrossentropy"])
def test_python_lists(name: str) -> None:
    y_true, y_pred = [[1, 0, 0], [0, 0.5, 0.5]], [[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]
    expected = getattr(keras.losses, name)()(y_true, y_pred)
    torch.testing.assert_close(getattr(losses, name)()(y_true, y_pred), expected)
    sparse = losses.SparseCategoricalCrossentropy()  # Keras' own takes no lists of different depths
    expected = keras.losses.SparseCategoricalCrossentropy()(np.array([0, 2]), np.array(y_pred))
    torch.testing.assert_close(sparse([0, 2], y_pred), expected)


@pytest.mark.parametrize("axis", [1, -1])
def test_categorical_axis_and_clipping(axis: int) -> None:
    y_pred = torch.zeros(3, 4, 4)
    y_pred[:, 0, :] = 1.0  # probabilities of exactly 0 and 1
    y_pred[:, :, 1] = 0.25
    y_true = _probabilities(3, 4, 4)
    for smoothing in (0.0, 0.2):
        arguments = {"axis": axis, "label_smoothing": smoothing, "reduction": None}
        _compare(
            losses.CategoricalCrossentropy(**arguments),
            keras.losses.CategoricalCrossentropy(**arguments),
            y_true,
            y_pred + 1e-9,
        )
    finite = losses.CategoricalCrossentropy(axis=axis)(y_true, torch.zeros(3, 4, 4))
    assert torch.isfinite(finite), "no log(0), also for a row of zeros"


def test_class_axis_that_is_not_the_last() -> None:
    y_pred, y_true = torch.randn(2, 3, 7), torch.softmax(torch.randn(2, 3, 7), 1)
    arguments = {"axis": 1, "label_smoothing": 0.3, "from_logits": True}
    _compare(
        losses.CategoricalCrossentropy(**arguments), keras.losses.CategoricalCrossentropy(**arguments), y_true, y_pred
    )
    smoothed = losses.SoftLabelCrossEntropy(0.3, from_logits=True, axis=1)(y_true, y_pred)
    want = torch.nn.functional.cross_entropy(y_pred, y_true, label_smoothing=0.3)
    torch.testing.assert_close(smoothed, want)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("ignore", [None, 2])
def test_sparse_equals_keras(ignore: int | None, from_logits: bool, reduction: str | None) -> None:
    arguments = {"from_logits": from_logits, "ignore_class": ignore, "reduction": reduction}
    ours, own = (m.SparseCategoricalCrossentropy(**arguments) for m in (losses, keras.losses))
    y_pred = torch.randn(N, C) * 3 if from_logits else _probabilities(N, C, seed=1)
    y_true = torch.arange(N) % C
    _compare(ours, own, y_true, y_pred)
    _compare(ours, own, y_true[:, None], y_pred)
    _compare(ours, own, y_true, y_pred, sample_weight=torch.rand(N))
    sequence = y_pred.reshape(3, 4, C)
    _compare(ours, own, y_true.reshape(3, 4), sequence)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("from_logits", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_binary_equals_keras(smoothing: float, from_logits: bool, reduction: str | None) -> None:
    arguments = {"from_logits": from_logits, "label_smoothing": smoothing, "reduction": reduction}
    ours, own = (m.BinaryCrossentropy(**arguments) for m in (losses, keras.losses))
    y_pred = torch.randn(N, C) * 3 if from_logits else torch.rand(N, C)
    _compare(ours, own, torch.rand(N, C), y_pred)
    _compare(ours, own, torch.rand(N), y_pred[:, :1])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_binary_of_sure_half_precision_probabilities(dtype: str) -> None:
    """1 - 1e-7 is 1 in half precision: the clipping must not be done in it."""
    p, y = torch.tensor([[0.0, 1.0, 0.25]]), torch.tensor([[1.0, 0.0, 1.0]])
    want = keras.losses.BinaryCrossentropy()(y, p)
    found = losses.BinaryCrossentropy(dtype=dtype)(y, p)
    assert keras.backend.standardize_dtype(found.dtype) == dtype
    torch.testing.assert_close(found.float(), want, rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("CategoricalCrossentropy", {"from_logits": True, "label_smoothing": 0.1, "axis": 1}),
        ("SparseCategoricalCrossentropy", {"ignore_class": 3, "reduction": "sum"}),
        ("BinaryCrossentropy", {"label_smoothing": 0.2, "name": "mine"}),
        ("CategoricalFocalCrossentropy", {"alpha": [0.1, 0.2, 0.3, 0.4, 0.5], "gamma": 3.0}),
        ("SoftLabelCrossEntropy", {"smoothing": 0.2, "from_logits": True}),
    ],
)
def test_serialises_as_keras_losses_do(name: str, arguments: dict[str, Any]) -> None:
    loss = getattr(losses, name)(**arguments)
    again = keras.losses.deserialize(keras.losses.serialize(loss))
    assert type(again) is type(loss)
    assert again.get_config() == loss.get_config()
    for key, value in arguments.items():
        assert again.get_config()[key] == value
    assert isinstance(loss, keras.losses.Loss)


@pytest.mark.parametrize("alpha", [np.array([0.25, 0.5, 1.0]), torch.tensor([0.25, 0.5, 1.0]), np.float64(0.25)])
def test_arrays_serialise(alpha: Any) -> None:
    loss = losses.CategoricalFocalCrossentropy(alpha)
    y_true, y_pred = torch.eye(3), torch.softmax(torch.randn(3, 3), 1)
    for again in (keras.losses.deserialize(keras.losses.serialize(loss)), pickle.loads(pickle.dumps(loss))):
        assert again.get_config() == loss.get_config()
        torch.testing.assert_close(again(y_true, y_pred), loss(y_true, y_pred))


def test_signatures_are_keras_own() -> None:
    import inspect

    for name in ("CategoricalCrossentropy", "BinaryCrossentropy", "CategoricalFocalCrossentropy"):
        ours, own = (inspect.signature(getattr(m, name).__init__) for m in (losses, keras.losses))
        assert [(p.name, p.default) for p in ours.parameters.values()] == [
            (p.name, p.default) for p in own.parameters.values()
        ]
    ours, own = (inspect.signature(m.SparseCategoricalCrossentropy.__init__) for m in (losses, keras.losses))
    known = {p.name: p.default for p in ours.parameters.values()}
    assert all(known[p.name] == p.default for p in own.parameters.values())


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        losses.CategoricalCrossentropy(label_smoothing=1.5)
    with pytest.raises(ValueError, match="axis"):
        losses.CategoricalCrossentropy(axis=True)
    with pytest.raises(IndexError, match=r"axis must be in \[-2, 1\].* got 2"):
        losses.SparseCategoricalCrossentropy(axis=2)(torch.tensor([0, 1]), torch.rand(2, 3))
    with pytest.raises(IndexError, match=r"axis must be in \[-1, 0\]"):
        losses.CategoricalCrossentropy(axis=1)(torch.rand(3), torch.rand(3))
    with pytest.raises(ValueError, match="SparseCategoricalCrossentropy"):
        losses.CategoricalCrossentropy()(torch.tensor([0, 1]), torch.rand(2, 3))
    with pytest.raises(ValueError, match="class axis"):
        losses.SparseCategoricalCrossentropy()(torch.zeros(2, 3), torch.rand(2, 3))
    with pytest.raises(IndexError):
        losses.SparseCategoricalCrossentropy(from_logits=True)(torch.tensor([0, 7]), torch.rand(2, 3))


def _data(rows: int = 96, features: int = 6, classes: int = 3) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, features)).astype("float32")
    soft = rng.dirichlet(np.ones(classes), size=rows).astype("float32")
    return x, soft, np.eye(classes, dtype="float32")[x[:, :classes].argmax(1)]


def _model(classes: int = 3) -> Any:
    return keras.Sequential(
        [keras.layers.Input((6,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(classes, "softmax")]
    )


def test_recipe_softmax_model_in_a_loop_with_dirichlet_labels() -> None:
    """The same steps with softce and with Keras' own loss."""
    x, soft, _ = _data()
    history = []
    for loss_fn in (losses.CategoricalCrossentropy(), keras.losses.CategoricalCrossentropy()):
        keras.utils.set_random_seed(0)
        model, optimizer = _model(), keras.optimizers.Adam(1e-2)
        optimizer.build(model.trainable_variables)
        values = []
        for _ in range(8):
            loss = loss_fn(torch.from_numpy(soft), model(x, training=True))
            model.zero_grad()
            loss.backward()
            with torch.no_grad():
                optimizer.apply([v.value.grad for v in model.trainable_weights], model.trainable_weights)
            values.append(loss.item())
        history.append(values)
    np.testing.assert_allclose(history[0], history[1], rtol=1e-4)
    assert history[0][-1] < history[0][0]


@pytest.mark.parametrize("which", ["built in", "custom"])
def test_recipe_compile_and_fit(which: str) -> None:
    x, _, one_hot = _data()
    losses_ = {
        "built in": losses.CategoricalCrossentropy(label_smoothing=0.1),
        "custom": losses.SoftLabelCrossEntropy(smoothing=0.1),
    }
    history = []
    for loss in (losses_[which], keras.losses.CategoricalCrossentropy(label_smoothing=0.1)):
        keras.utils.set_random_seed(0)
        model = _model()
        model.compile(optimizer=keras.optimizers.Adam(1e-2), loss=loss, metrics=["accuracy"])
        history.append(model.fit(x, one_hot, epochs=3, batch_size=32, shuffle=False, verbose=0).history)
    np.testing.assert_allclose(history[0]["loss"], history[1]["loss"], rtol=1e-4)
    assert history[0]["loss"][-1] < history[0]["loss"][0]
    assert history[0]["accuracy"] == history[1]["accuracy"]


def test_compiled_model_survives_saving(tmp_path: Any) -> None:
    x, _, one_hot = _data()
    model = _model()
    model.compile(optimizer="sgd", loss=losses.SoftLabelCrossEntropy(0.1))
    model.fit(x, one_hot, epochs=1, verbose=0)
    model.save(tmp_path / "m.keras")
    again = keras.saving.load_model(tmp_path / "m.keras")
    assert again.evaluate(x, one_hot, verbose=0) == pytest.approx(model.evaluate(x, one_hot, verbose=0), rel=1e-5)
    assert isinstance(again.loss, losses.SoftLabelCrossEntropy) and again.loss.smoothing == 0.1
