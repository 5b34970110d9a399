"""An autograd island: the part of a layer between two communications, differentiated on its own.

Forward detaches what comes in and what goes out, so no graph ever spans a communication; backward takes the gradients of
the outputs and returns those of the inputs. An island holds neither inputs nor outputs itself, only the edges of its graph:
what stays in memory is exactly what its operations save.
"""

from __future__ import annotations

import enum
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from actors.model.recompute import Recipes


class Keep(enum.Enum):
    """What an island keeps from forward to backward."""

    NOTHING = "nothing"  # evaluation: there is no backward
    GRAPH = "graph"
    INPUTS = "inputs"  # backward runs the function again


class Island:
    """`function` maps tensors to a tuple of tensors. It must be deterministic, and is run twice with Keep.INPUTS."""

    __slots__ = ("_entries", "_exits", "_function", "_inputs", "_keep", "_recipes")

    def __init__(self, function: Callable[..., tuple[Tensor, ...]], keep: Keep, recipes: Recipes | None = None):
        self._function, self._keep, self._recipes = function, keep, recipes
        self._inputs: tuple[Tensor, ...] = ()
        self._entries: list[GradientEdge | None] = []
        self._exits: list[GradientEdge | None] = []

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The function's outputs, detached."""
        if self._keep is Keep.GRAPH:
            return tuple(output.detach() for output in self._record(inputs))
        if self._keep is Keep.INPUTS:
            self._inputs = inputs
        with torch.no_grad():
            return self._function(*inputs)

    def backward(self, *output_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs (None for integers); frees everything kept. None stands for a zero gradient."""
        if self._keep is Keep.INPUTS:
            self._record(self._inputs)
            self._inputs = ()
        entries, exits = self._entries, self._exits
        self._entries, self._exits, self._function = [], [], None
        reached = [(e, g) for e, g in zip(exits, output_gradients, strict=True) if e is not None and g is not None]
        wanted = [entry for entry in entries if entry is not None]
        if not reached:
            return (None,) * len(entries)
        found = iter(torch.autograd.grad([e for e, _ in reached], wanted, [g for _, g in reached], allow_unused=True))
        return tuple(None if entry is None else next(found) for entry in entries)

    def _record(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            anchor = torch.empty(0, requires_grad=True)
            entered = [_Enter.apply(anchor, x.detach()) if x.is_floating_point() else x for x in inputs]
            self._entries = [get_gradient_edge(x) if x.requires_grad else None for x in entered]
            if self._recipes is None:
                outputs = self._function(*entered)
            else:
                with self._recipes.replacing():
                    outputs = self._function(*entered)
        self._exits = [get_gradient_edge(y) if y.requires_grad else None for y in outputs]
        return outputs


class _Enter(torch.autograd.Function):
    """Gives an input a node to collect its gradient at. A leaf would do, but would keep the input alive."""

    @staticmethod
    def forward(ctx, anchor: Tensor, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        return None, None
