# SPDX-License-Identifier: BSD-3-Clause
"""Keras 3 losses on softce, for Keras' torch backend.

The classes have Keras' own names, signatures and results, for ``model.compile(loss=...)`` and for loops of one's own.
They are registered for serialisation, so a saved model that was compiled with one loads once this module is imported.

``from_logits=False`` is the default, as in Keras: predictions are probabilities, which are divided by their sum and
clipped to ``[1e-7, 1 - 1e-7]``. A model that ends in logits, with ``from_logits=True``, is faster and more accurate.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

try:
    import keras
except ImportError as error:
    raise ImportError("softce.integrations.keras needs Keras 3: pip install 'softce[keras]'") from error

from ..arguments import check_number
from ..binary import binary_cross_entropy_with_logits
from ..functional import cross_entropy
from ..ops import acc_dtype
from ..probs import EPSILON, clipped_probabilities
from ..targets import ClassProbabilities

if keras.backend.backend() != "torch":
    raise ImportError(
        f"softce.integrations.keras needs Keras' torch backend, but Keras runs on {keras.backend.backend()!r}: set the "
        f"environment variable KERAS_BACKEND=torch before Keras is imported (now {os.environ.get('KERAS_BACKEND')!r})"
    )

_register = keras.saving.register_keras_serializable(package="softce")


def _tensors(y_true: Any, y_pred: Any) -> tuple[Tensor, Tensor]:
    """What Keras leaves nested: of Python lists it makes a tensor for each number."""
    return keras.ops.convert_to_tensor(y_true), keras.ops.convert_to_tensor(y_pred)


def _same_rank(y_true: Any, y_pred: Any) -> tuple[Tensor, Tensor]:
    """A last dimension of 1 that only one of the two has is added to, or taken from, the other, as Keras does."""
    y_true, y_pred = _tensors(y_true, y_pred)
    if y_true.dim() == y_pred.dim() + 1 and y_true.shape[-1] == 1:
        return (y_true, y_pred.unsqueeze(-1)) if y_pred.dim() == 1 else (y_true.squeeze(-1), y_pred)
    if y_pred.dim() == y_true.dim() + 1 and y_pred.shape[-1] == 1:
        return (y_true.unsqueeze(-1), y_pred) if y_true.dim() == 1 else (y_true, y_pred.squeeze(-1))
    return y_true, y_pred


def _check_shapes(y_true: Tensor, y_pred: Tensor) -> None:
    if y_true.shape != y_pred.shape:
        raise ValueError(
            f"y_true and y_pred must have the same shape, got {list(y_true.shape)} and {list(y_pred.shape)}; for "
            "integer classes use SparseCategoricalCrossentropy"
        )


def _axis(axis: Any) -> int:
    if isinstance(axis, bool) or not isinstance(axis, int):
        raise ValueError(f"axis must be of type int, got {axis!r}")
    return axis


def _second(x: Tensor, axis: int) -> Tensor:
    """The class axis where softce has it."""
    if not -x.dim() <= axis < x.dim():
        raise IndexError(f"axis must be in [{-x.dim()}, {x.dim() - 1}] for y_pred of shape {list(x.shape)}, got {axis}")
    return x.movedim(axis, 1) if x.dim() > 1 else x


def _soft_rows(y_true: Tensor, y_pred: Tensor, smoothing: float, from_logits: bool, axis: int) -> Tensor:
    """The loss of each row; classes in ``axis``."""
    if smoothing and axis not in (-1, y_pred.dim() - 1):
        # Keras divides the smoothing by the size of the last axis, whichever the class axis is.
        y_true, smoothing = y_true * (1.0 - smoothing) + smoothing / y_true.shape[-1], 0.0
    loss = cross_entropy(
        _second(y_pred, axis),
        ClassProbabilities(_second(y_true, axis)),
        reduction="none",
        label_smoothing=smoothing,
        from_probs=not from_logits,
    )
    assert isinstance(loss, Tensor)
    return loss


class _CrossEntropy(keras.losses.Loss):  # type: ignore[misc]
    """What the losses share: the prediction's form and the class axis, in the configuration."""

    def __init__(self, from_logits: bool, axis: int, reduction: str | None, name: str, dtype: Any) -> None:
        super().__init__(name=name, reduction=reduction, dtype=dtype)
        self.from_logits, self.axis = from_logits, _axis(axis)

    def get_config(self) -> dict[str, Any]:
        config: dict[str, Any] = super().get_config()
        return {**config, "from_logits": self.from_logits, "axis": self.axis}


@_register
class CategoricalCrossentropy(_CrossEntropy):
    """``keras.losses.CategoricalCrossentropy``: one-hot or soft labels of the prediction's shape.

    Args:
        from_logits: ``y_pred`` holds logits instead of probabilities.
        label_smoothing: e in [0, 1]: ``(1 - e) * y_true + e / C``.
        axis: of the classes.
        reduction: ``"sum_over_batch_size"``, ``"sum"``, ``"mean"``, ``"mean_with_sample_weight"``, ``"none"`` or None.
        name, dtype: as in Keras.
    """

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "categorical_crossentropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits, axis, reduction, name, dtype)
        self.label_smoothing = _unit("label_smoothing", label_smoothing)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each row."""
        y_true, y_pred = _same_rank(y_true, y_pred)
        _check_shapes(y_true, y_pred)
        return _soft_rows(y_true, y_pred, self.label_smoothing, self.from_logits, self.axis)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "label_smoothing": self.label_smoothing}


@_register
class SoftLabelCrossEntropy(_CrossEntropy):
    """Cross-entropy with soft labels that are smoothed first: ``(1 - smoothing) * y_true + smoothing / C``.

    Args:
        smoothing: in [0, 1].
        from_logits, axis, reduction, name, dtype: as for :class:`CategoricalCrossentropy`.
    """

    def __init__(
        self,
        smoothing: float = 0.1,
        from_logits: bool = False,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "soft_label_cross_entropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits, axis, reduction, name, dtype)
        self.smoothing = _unit("smoothing", smoothing)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each row."""
        y_true, y_pred = _same_rank(y_true, y_pred)
        _check_shapes(y_true, y_pred)
        y_true, y_pred = y_true.movedim(self.axis, -1), y_pred.movedim(self.axis, -1)
        return _soft_rows(y_true, y_pred, self.smoothing, self.from_logits, -1)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "smoothing": self.smoothing}


@_register
class SparseCategoricalCrossentropy(_CrossEntropy):
    """``keras.losses.SparseCategoricalCrossentropy``: integer classes.

    Args:
        from_logits, axis, reduction, name, dtype: as for :class:`CategoricalCrossentropy`.
        ignore_class: rows of this class have no loss and, as a mask, are not counted by a mean.
    """

    def __init__(
        self,
        from_logits: bool = False,
        ignore_class: int | None = None,
        reduction: str | None = "sum_over_batch_size",
        axis: int = -1,
        name: str = "sparse_categorical_crossentropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits, axis, reduction, name, dtype)
        self.ignore_class = ignore_class

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each row."""
        y_true, y_pred = _tensors(y_true, y_pred)
        logits = _second(y_pred, self.axis)
        if y_true.dim() == y_pred.dim() and y_true.shape[self.axis] == 1:
            y_true = y_true.squeeze(self.axis)
        rows = list(y_pred.shape)
        del rows[self.axis]
        if list(y_true.shape) != rows:
            raise ValueError(
                f"y_true must have y_pred's shape without the class axis, {rows}, got {list(y_true.shape)} for y_pred "
                f"of shape {list(y_pred.shape)}"
            )
        index = y_true.long()
        ignore = -100 if self.ignore_class is None else self.ignore_class
        loss = cross_entropy(
            logits,
            index,
            reduction="none",
            ignore_index=ignore,
            from_probs=not self.from_logits,
        )
        assert isinstance(loss, Tensor)
        if self.ignore_class is not None:
            loss._keras_mask = index != ignore  # type: ignore[attr-defined]
        return loss

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "ignore_class": self.ignore_class}


@_register
class BinaryCrossentropy(_CrossEntropy):
    """``keras.losses.BinaryCrossentropy``: hard or soft binary labels, averaged over ``axis``.

    Args:
        from_logits, axis, reduction, name, dtype: as for :class:`CategoricalCrossentropy`.
        label_smoothing: e in [0, 1]: ``(1 - e) * y_true + e / 2``.
    """

    def __init__(
        self,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "binary_crossentropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits, axis, reduction, name, dtype)
        self.label_smoothing = _unit("label_smoothing", label_smoothing)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The mean loss of each row."""
        y_true, y_pred = _same_rank(y_true, y_pred)
        _check_shapes(y_true, y_pred)
        if self.from_logits:
            each = binary_cross_entropy_with_logits(
                y_pred, y_true, reduction="none", label_smoothing=self.label_smoothing
            )
        else:
            if self.label_smoothing:
                y_true = y_true * (1.0 - self.label_smoothing) + 0.5 * self.label_smoothing
            # In half precision 1 - EPSILON would be 1, and its loss infinite.
            p = torch.clamp(y_pred.to(acc_dtype(y_pred.dtype)), EPSILON, 1.0 - EPSILON)
            each = -(y_true * torch.log(p) + (1.0 - y_true) * torch.log1p(-p))
        return each.mean(self.axis).to(y_pred.dtype)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "label_smoothing": self.label_smoothing}


@_register
class CategoricalFocalCrossentropy(_CrossEntropy):
    """``keras.losses.CategoricalFocalCrossentropy``: ``sum_c alpha_c (1 - p_c)^gamma (-y_c log p_c)`` a row.

    The modulating factor stands at each class, so with soft or smoothed labels this is not a transform of the row loss
    (for that see :class:`softce.Focal`), and it is computed by torch operations.

    Args:
        alpha: a number or one a class.
        gamma: focusing exponent.
        from_logits, label_smoothing, axis, reduction, name, dtype: as for :class:`CategoricalCrossentropy`.
    """

    def __init__(
        self,
        alpha: Any = 0.25,
        gamma: float = 2.0,
        from_logits: bool = False,
        label_smoothing: float = 0.0,
        axis: int = -1,
        reduction: str | None = "sum_over_batch_size",
        name: str = "categorical_focal_crossentropy",
        dtype: Any = None,
    ) -> None:
        super().__init__(from_logits, axis, reduction, name, dtype)
        self.alpha, self.gamma = alpha, gamma
        self.label_smoothing = _unit("label_smoothing", label_smoothing)

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        """The loss of each row."""
        y_true, y_pred = _same_rank(y_true, y_pred)
        _check_shapes(y_true, y_pred)
        if self.label_smoothing:
            y_true = y_true * (1.0 - self.label_smoothing) + self.label_smoothing / y_true.shape[-1]
        prob = torch.softmax(y_pred, self.axis) if self.from_logits else y_pred
        prob = clipped_probabilities(prob, self.axis)
        alpha = torch.as_tensor(self.alpha, dtype=prob.dtype, device=prob.device)
        return -(alpha * torch.pow(1.0 - prob, self.gamma) * y_true * torch.log(prob)).sum(self.axis)

    def get_config(self) -> dict[str, Any]:
        alpha = self.alpha.tolist() if hasattr(self.alpha, "tolist") else self.alpha  # an array is no JSON
        own = {"alpha": alpha, "gamma": self.gamma, "label_smoothing": self.label_smoothing}
        return {**super().get_config(), **own}


def _unit(name: str, value: float) -> float:
    check_number(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name} must be in [0, 1], got {value}")
    return value
