"""Loss: the mean loss over fixed batches as a function of some of a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..errors import ModelError
from ..model.backends.peft import PeftBackend
from ..model.blocks import quiet, user_name

__all__ = ["Loss", "adapter_parameters", "predictions"]


def adapter_parameters(model: nn.Module, *, head: bool = False) -> dict[str, nn.Parameter]:
    """All PEFT adapter parameters, frozen ones too, by name; with ``head`` also those in ``modules_to_save``.

    Raises:
        ModelError: there are none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    PeftBackend(model)  # raises for a model without adapters
    wanted: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            names = module.adapter_layer_names
            wanted |= {id(p) for name, p in module.named_parameters() if name.split(".")[0] in names}
        elif head and isinstance(module, ModulesToSaveWrapper):
            wanted |= {id(p) for p in module.modules_to_save.parameters()}
    return {user_name(name): p for name, p in model.named_parameters() if id(p) in wanted}


def predictions(batch: Mapping[str, Any]) -> int:
    """What the loss of a transformers model is the mean over: rows, or for a language model predicted tokens.

    >>> predictions({"input_ids": torch.zeros(3, 5), "labels": torch.tensor([0, 1, 1])})
    3
    >>> predictions({"labels": torch.tensor([[7, 8, 9], [7, 8, -100]])})
    3
    """
    labels = batch.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return int((labels[:, 1:] != -100).sum())
    return len(next(iter(batch.values())))


class Loss:
    """L(w) = Σ_b n_b·L_b(w) / Σ_b n_b, in evaluation mode.

    Vectors are flat, in the order of ``parameters``. Each call leaves the weights, gradients and flags of the model
    unchanged.

    Args:
        model: with the parameters.
        batches: b.
        parameters: w, by name; all other parameters are constant.
        loss: L_b of model and batch; default: the loss that a transformers model returns.
        count: n_b of a batch.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> square = Loss(model, [torch.ones(1, 1)], dict(model.named_parameters()), lambda f, x: f(x).sum() ** 2, len)
    >>> float(square.at(1 - square.weights())), square.products(torch.ones(1, 1)).tolist()
    (1.0, [[2.0]])
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        parameters: Mapping[str, nn.Parameter],
        loss: Callable[[nn.Module, Any], Tensor] = lambda model, batch: model(**batch).loss,
        count: Callable[[Any], int] = predictions,
    ) -> None:
        self.model, self.parameters = model, dict(parameters)
        self._own = list(self.parameters.values())
        self.size = sum(parameter.numel() for parameter in self._own)
        self._loss = loss
        counts = [count(batch) for batch in batches]
        self._batches = [(batch, n / sum(counts)) for batch, n in zip(batches, counts, strict=True) if n]

    def split(self, vector: Tensor) -> list[Tensor]:
        """``vector`` in the shapes of the parameters."""
        pieces = vector.split([parameter.numel() for parameter in self._own])
        return [piece.view(p.shape) for piece, p in zip(pieces, self._own, strict=True)]

    def parts(self, vector: Tensor) -> list[Tensor]:
        """``vector`` in the shapes and dtypes and on the devices of the parameters."""
        return [piece.to(p.device, p.dtype) for piece, p in zip(self.split(vector), self._own, strict=True)]

    def weights(self) -> Tensor:
        """A copy of w, shape (size,), float64."""
        return _flat(self._own)

    def value(self) -> float:
        """L(w)."""
        with quiet(self.model), torch.no_grad():
            return sum(share * float(self._loss(self.model, batch)) for batch, share in self._batches)

    def at(self, shift: Tensor) -> float:
        """L(w + shift)."""
        before = [parameter.detach().clone() for parameter in self._own]
        try:
            for parameter, part in zip(self._own, self.parts(shift), strict=True):
                parameter.data.add_(part)
            return self.value()
        finally:
            for parameter, old in zip(self._own, before, strict=True):
                parameter.data.copy_(old)

    def gradient(self) -> Tensor:
        """∇L(w), shape (size,), float64."""
        total = torch.zeros(self.size, dtype=torch.float64)
        with quiet(self.model), self._differentiable():
            for batch, share in self._batches:
                found = torch.autograd.grad(self._loss(self.model, batch), self._own, materialize_grads=True)
                total += share * _flat(found)
        return total

    def products(self, vectors: Tensor) -> Tensor:
        """∇²L(w)·v for each row v of ``vectors``, shape (rows, size), float64.

        By double backward; the graph of ∇L_b is built once per batch. Uses SDPA's math backend, because fused kernels
        have no second derivative.

        Raises:
            ModelError: another operation of the model has no second derivative.
        """
        total = torch.zeros(len(vectors), self.size, dtype=torch.float64)
        with quiet(self.model), self._differentiable(), sdpa_kernel(SDPBackend.MATH):
            for batch, share in self._batches:
                loss = self._loss(self.model, batch)
                gradient = torch.autograd.grad(loss, self._own, create_graph=True, materialize_grads=True)
                curved = [i for i, g in enumerate(gradient) if g.requires_grad]
                if not curved:  # linear in w
                    continue
                for row, vector in enumerate(vectors):
                    parts = self.parts(vector)
                    try:
                        found = torch.autograd.grad(
                            [gradient[i] for i in curved],
                            self._own,
                            [parts[i] for i in curved],
                            retain_graph=row + 1 < len(vectors),
                            materialize_grads=True,
                        )
                    except RuntimeError as error:
                        if "derivative" not in str(error):
                            raise
                        raise ModelError(
                            f"{type(self.model).__name__} has no second derivative: {str(error).splitlines()[0]}",
                            fix='from_pretrained(..., attn_implementation="eager"), and no other fused kernels.',
                        ) from error
                    total[row] += share * _flat(found)
        return total

    @contextmanager
    def _differentiable(self) -> Iterator[None]:
        flags = [parameter.requires_grad for parameter in self._own]
        try:
            for parameter in self._own:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield
        finally:
            for parameter, flag in zip(self._own, flags, strict=True):
                parameter.requires_grad_(flag)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().to("cpu", torch.float64).flatten() for tensor in tensors])
