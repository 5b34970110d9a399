"""Selective recomputation: tensors that are cheap to make again are not kept from forward to backward.

Operations announce how an output came about (`Recipes.add`). While an island's forward runs under `Recipes.replacing()`,
every announced tensor that autograd would save is replaced by its recipe, and made again when backward asks for it.
Recipes name kept tensors or other recipes as their sources, so chains (up-projection of a norm) cost no memory either.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


class Recipe:
    """How to make some tensors again. Made at most once; the result lives as long as the graph that refers to it."""

    __slots__ = ("_made", "_make", "_sources")

    def __init__(self, make: Callable[..., Tensor | tuple[Tensor, ...]], sources: list[Tensor | Ingredient]):
        self._make, self._sources, self._made = make, sources, None

    def outputs(self) -> tuple[Tensor, ...]:
        if self._made is None:
            with torch.no_grad():
                made = self._make(*(s.tensor() if isinstance(s, Ingredient) else s for s in self._sources))
            self._made = made if isinstance(made, tuple) else (made,)
            self._sources = []
        return self._made


@dataclass(frozen=True, slots=True)
class Ingredient:
    """Output `index` of a recipe."""

    recipe: Recipe
    index: int

    def tensor(self) -> Tensor:
        return self.recipe.outputs()[self.index]


class Recipes:
    """Recipes of one layer and microbatch, by the memory of the tensors they replace.

    The tensors are held until `close`, so that no address is used twice while it is a key.
    """

    def __init__(self) -> None:
        self._by_address: dict[int, tuple[Tensor, Ingredient]] = {}

    def add(self, outputs: tuple[Tensor, ...], make: Callable[..., Tensor | tuple[Tensor, ...]], *sources: Tensor) -> None:
        """`make(*sources)` must give `outputs` again, bit for bit and with the same strides."""
        recipe = Recipe(make, [self._find(source) or source.detach() for source in sources])
        for index, output in enumerate(outputs):
            if output.numel():
                self._by_address[output.data_ptr()] = (output.detach(), Ingredient(recipe, index))

    def close(self) -> None:
        """No more tensors will be saved: let go of the originals."""
        self._by_address.clear()

    def replacing(self) -> torch.autograd.graph.saved_tensors_hooks:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _find(self, tensor: Tensor) -> Ingredient | None:
        original, ingredient = self._by_address.get(tensor.data_ptr(), (None, None))
        return ingredient if original is not None and original.numel() == tensor.numel() else None

    def _pack(self, tensor: Tensor) -> Tensor | tuple[Ingredient, torch.Size, tuple[int, ...]]:
        ingredient = self._find(tensor)
        return tensor if ingredient is None else (ingredient, tensor.shape, tensor.stride())


def _unpack(packed: Tensor | tuple[Ingredient, torch.Size, tuple[int, ...]]) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    ingredient, shape, stride = packed
    made = ingredient.tensor()
    return made.as_strided(shape, stride, made.storage_offset())
