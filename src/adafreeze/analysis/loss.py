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
    """All adapter parameters of ``model``, frozen ones too, by name in the model before PEFT wrapped it.

    Args:
        model: with adapters of PEFT.
        head: also what PEFT trains in full (``modules_to_save``).

    Raises:
        ModelError: there are none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    PeftBackend(model)
    wanted: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            names = module.adapter_layer_names
            wanted |= {id(p) for name, p in module.named_parameters() if name.split(".")[0] in names}
        elif head and isinstance(module, ModulesToSaveWrapper):
            wanted |= {id(p) for p in module.modules_to_save.parameters()}
    return {user_name(name): p for name, p in model.named_parameters() if id(p) in wanted}


def predictions(batch: Mapping[str, Any]) -> int:
    """What the loss of a model of transformers is a mean over: the rows, of a language model its predicted tokens.

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
    """L(w) = Σ_b n_b·L_b(w) / Σ_b n_b, in evaluation mode: without dropout, and without a cache for generation.

    Vectors are flat, in the order of ``parameters``. Weights, gradients and flags of the model are after each call as
    they were.

    Args:
        model: whose parameters they are.
        batches: b.
        parameters: w, by name; all else is constant.
        loss: L_b of model and batch; default: what a model of transformers returns.
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
        self.size = sum(parameter.numel() for parameter in self.parameters.values())
        self._loss = loss
        counts = [count(batch) for batch in batches]
        self._batches = [(batch, n / sum(counts)) for batch, n in zip(batches, counts, strict=True) if n]

    def parts(self, vector: Tensor) -> list[Tensor]:
        """``vector`` in the shapes, dtypes and on the devices of the parameters."""
        own = list(self.parameters.values())
        pieces = vector.split([parameter.numel() for parameter in own])
        return [piece.view(p.shape).to(p.device, p.dtype) for piece, p in zip(pieces, own, strict=True)]

    def weights(self) -> Tensor:
        """A copy of w."""
        return _flat([parameter.detach() for parameter in self.parameters.values()])

    def value(self) -> float:
        """L(w)."""
        with quiet(self.model), torch.no_grad():
            return sum(share * float(self._loss(self.model, batch)) for batch, share in self._batches)

    def at(self, shift: Tensor) -> float:
        """L(w + shift); the weights are put back to the bit."""
        own = list(self.parameters.values())
        before = [parameter.detach().clone() for parameter in own]
        try:
            with torch.no_grad():
                for parameter, part in zip(own, self.parts(shift), strict=True):
                    parameter.add_(part)
            return self.value()
        finally:
            with torch.no_grad():
                for parameter, old in zip(own, before, strict=True):
                    parameter.copy_(old)

    def gradient(self) -> Tensor:
        """∇L(w), shape (size,), float64."""
        total = torch.zeros(self.size, dtype=torch.float64)
        with quiet(self.model), self._differentiable() as own:
            for batch, share in self._batches:
                found = torch.autograd.grad(self._loss(self.model, batch), own, materialize_grads=True)
                total += share * _flat(found)
        return total

    def products(self, vectors: Tensor) -> Tensor:
        """∇²L(w)·v for each row v of ``vectors``, shape (rows, size), float64.

        By double backward: the graph of ∇L_b·v, which is made once a batch for all rows. Attention takes SDPA's math
        path: the fused kernels have no second derivative.

        Raises:
            ModelError: an operation of the model has none either.
        """
        total = torch.zeros(len(vectors), self.size, dtype=torch.float64)
        with quiet(self.model), self._differentiable() as own, sdpa_kernel(SDPBackend.MATH):
            for batch, share in self._batches:
                gradient = torch.autograd.grad(
                    self._loss(self.model, batch), own, create_graph=True, materialize_grads=True
                )
                for row, vector in enumerate(vectors):
                    found = self._backward(gradient, self.parts(vector), own, keep=row + 1 < len(vectors))
                    total[row] += share * _flat(found)
        return total

    def _backward(
        self, gradient: Sequence[Tensor], vector: list[Tensor], own: list[nn.Parameter], keep: bool
    ) -> Sequence[Tensor]:
        curved = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
        if not curved:  # linear in w
            return [torch.zeros_like(parameter) for parameter in own]
        outputs, weights = zip(*curved, strict=True)
        try:
            return torch.autograd.grad(outputs, own, weights, retain_graph=keep, materialize_grads=True)
        except RuntimeError as error:
            if "derivative" not in str(error):
                raise
            raise ModelError(
                f"{type(self.model).__name__} cannot be differentiated twice: {str(error).splitlines()[0]}",
                cause="One of its operations is a fused kernel without a second derivative.",
                fix='from_pretrained(..., attn_implementation="eager"), and without fused kernels.',
            ) from error

    @contextmanager
    def _differentiable(self) -> Iterator[list[nn.Parameter]]:
        own = list(self.parameters.values())
        flags = [parameter.requires_grad for parameter in own]
        try:
            for parameter in own:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                yield own
        finally:
            for parameter, flag in zip(own, flags, strict=True):
                parameter.requires_grad_(flag)


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().to("cpu", torch.float64).flatten() for tensor in tensors])
