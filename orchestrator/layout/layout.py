"""Where every rank stands: rows, positions, replicas and EP groups on the nodes that are alive.

A *shape* (c, k) puts c consecutive positions of one pipeline on a node, k ranks for each. A node's c*k ranks are a cell;
PP/c cells make a row, which carries whole pipelines. Rows are dealt to replicas, and the ranks of one position in the
rows of one replica are an EP group: they hold all experts of that position's stages, one node per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NoReturn

from orchestrator.config.run_config import ConfigError, LayoutSection, ModelConfig
from orchestrator.schedule.ir.stages import BOTH, Stages
from orchestrator.topology import Node


@dataclass(frozen=True, slots=True)
class Place:
    """Where one rank stands. `expert_rank`: its index in its EP group. `local`: its index on its node."""

    rank: int
    row: int
    position: int
    width: int
    replica: int
    expert_rank: int
    node: str
    local: int


@dataclass(frozen=True)
class Layout:
    """Ranks are numbered row by row, position by position: rank = (row * pipeline + position) * width + w.

    They sit on the cell of their position: node and local index are those of `cells[row][position // positions_per_node]`,
    plus (position % positions_per_node) * width + w. `folding`: which stages a position hosts.
    """

    folding: Stages
    positions_per_node: int
    width: int
    cells: tuple[tuple[tuple[str, int], ...], ...]  # per row: (node, first local index) of each of its cells
    replicas: tuple[tuple[int, ...], ...]  # rows of each replica

    @property
    def pipeline(self) -> int:
        """Positions of one pipeline."""
        return self.folding.positions

    @property
    def rows(self) -> int:
        return len(self.cells)

    @property
    def size(self) -> int:
        return self.rows * self.pipeline * self.width

    @property
    def streams(self) -> int:
        """Independent data streams: one for each (row, w)."""
        return self.rows * self.width

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(place.node for place in self.places))

    @cached_property
    def places(self) -> tuple[Place, ...]:
        replica_of = {row: replica for replica, rows in enumerate(self.replicas) for row in rows}
        found = []
        for row, cells in enumerate(self.cells):
            index_in_replica = self.replicas[replica_of[row]].index(row)
            for position in range(self.pipeline):
                node, first = cells[position // self.positions_per_node]
                for w in range(self.width):
                    found.append(Place(
                        rank=len(found), row=row, position=position, width=w, replica=replica_of[row],
                        expert_rank=index_in_replica * self.width + w, node=node,
                        local=first + (position % self.positions_per_node) * self.width + w))
        return tuple(found)

    def meets(self, wanted: LayoutSection, folding: Stages) -> bool:
        """Whether it is as configured: its pipeline, and all that is pinned."""
        groups = {len(rows) * self.width for rows in self.replicas}
        return (self.folding == folding and wanted.data in ("auto", len(self.replicas)) and
                (wanted.expert == "auto" or groups == {wanted.expert}) and
                wanted.shape in ("auto", (self.positions_per_node, self.width)))

    def rank_at(self, row: int, position: int, w: int) -> int:
        return (row * self.pipeline + position) * self.width + w

    def nodes_of(self, replica: int, position: int) -> tuple[str, ...]:
        """Node of a position in each row of a replica."""
        return tuple(self.cells[row][position // self.positions_per_node][0] for row in self.replicas[replica])

    def mirror(self, position: int) -> int:
        """The position that hosts the same stages: itself, unless every stage has two positions."""
        return self.pipeline - 1 - position if self.folding.placement == BOTH else position

    def stages(self, position: int) -> tuple[int, ...]:
        """Stages of a position by slot."""
        return self.folding.hosted(position)

    def holders(self, stage: int) -> tuple[int, ...]:
        """Ranks that host a stage, in every row."""
        positions = self.folding.holders(stage)
        return tuple(place.rank for place in self.places if place.position in positions)

    def peers(self, position: int) -> tuple[int, ...]:
        """Ranks that host the same stages as a position: its own and its mirror's, in every row."""
        return self.holders(self.stages(position)[0])

    @property
    def ends(self) -> tuple[int, ...]:
        """Positions that host the first or the last stage: those that work with tokens."""
        return tuple(sorted({*self.folding.holders(0), *self.folding.holders(self.folding.count - 1)}))

    def line(self, row: int, w: int) -> tuple[int, ...]:
        """Ranks that one data stream passes, by position."""
        return tuple(self.rank_at(row, position, w) for position in range(self.pipeline))

    def expert_group(self, replica: int, position: int) -> tuple[int, ...]:
        return tuple(self.rank_at(row, position, w) for row in self.replicas[replica] for w in range(self.width))

    def rail(self, replica: int, position: int, w: int) -> tuple[int, ...]:
        """Ranks of an EP group with the same width index, by row: tokens cross nodes between them."""
        return tuple(self.rank_at(row, position, w) for row in self.replicas[replica])

    def inside(self, row: int, position: int) -> tuple[int, ...]:
        """Ranks of an EP group on one node, by width index."""
        return tuple(self.rank_at(row, position, w) for w in range(self.width))

    def two_hops(self, replica: int, hops: int | str) -> bool:
        """Whether tokens of a replica reach their experts in two hops. `hops`: the setting; where all are in one row, or a row
        has one rank, there is nothing to do in a second."""
        return hops != 1 and self.width > 1 and len(self.replicas[replica]) > 1

    def describe(self) -> str:
        sizes = {len(rows) * self.width for rows in self.replicas}
        return (f"PP{self.pipeline} x EP{'/'.join(map(str, sorted(sizes)))} x DP{len(self.replicas)}: {self.size} ranks in "
                f"{self.rows} rows on {len(self.nodes)} nodes, cells of {self.positions_per_node} positions x {self.width} ranks")


def choose(nodes: tuple[Node, ...], layout: LayoutSection, model: ModelConfig, folding: Stages) -> Layout:
    """The layout of these nodes. Pure. `folding`: of the schedule, `RunConfig.stages`.

    Preference: at least two nodes if there are two; then most ranks used; then whole nodes as cells; then most rows.
    Raises ConfigError naming the setting that cannot be met.
    """
    return _best(nodes, layout, model, folding) or _refuse(nodes, layout, model, folding)


def _best(nodes: tuple[Node, ...], layout: LayoutSection, model: ModelConfig, folding: Stages) -> Layout | None:
    shapes = [layout.shape] if layout.shape != "auto" else [
        (c, k) for c in range(1, layout.pipeline + 1) if layout.pipeline % c == 0
        for k in range(1, max((n.ranks for n in nodes), default=0) + 1)]
    candidates = [found for c, k in shapes if (found := with_shape(nodes, layout, model, folding, c, k))]
    enough = min(2, sum(n.ranks > 0 for n in nodes))
    return max(candidates, default=None, key=lambda found: (
        len(found.nodes) >= enough, found.size, -cells_per_node(found), found.rows, found.positions_per_node))


def with_shape(nodes: tuple[Node, ...], layout: LayoutSection, model: ModelConfig, folding: Stages, c: int,
               k: int) -> Layout | None:
    cells = cells_of(nodes, c * k)
    cells_per_row = layout.pipeline // c
    replicas = deal_rows(len(cells) // cells_per_row, k, layout, model)
    if replicas is None:
        return None
    rows = sum(map(len, replicas))
    grouped = (tuple(cells[r * cells_per_row : (r + 1) * cells_per_row]) for r in range(rows))
    if folding.placement == BOTH:
        grouped = map(mirrors_apart, grouped)
    return Layout(folding, c, k, tuple(grouped), replicas)


def cells_of(nodes: tuple[Node, ...], size: int) -> list[tuple[str, int]]:
    """Every node's first cell, then every node's second: rows fill distinct nodes before they share one."""
    most = max((n.ranks for n in nodes), default=0) // size
    return [(n.name, index * size) for index in range(most) for n in nodes if (index + 1) * size <= n.ranks]


def mirrors_apart(row: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    """A row in which no cell shares a node with its mirror, unless one node has more than half of it.

    A row that is so already stays as it is. Else cells of one node are put together and the later half is turned round:
    cell i then mirrors cell i + half, and no run of cells of one node reaches that far.
    """
    half = len(row) // 2
    if all(a[0] != b[0] for a, b in zip(row[:half], row[::-1])):
        return row
    order = {node: index for index, (node, _) in reversed(list(enumerate(row)))}
    together = sorted(row, key=lambda cell: order[cell[0]])
    return tuple(together[: len(row) - half] + together[len(row) - half :][::-1])


def deal_rows(rows: int, k: int, layout: LayoutSection, model: ModelConfig) -> tuple[tuple[int, ...], ...] | None:
    """Deal rows to replicas in contiguous near-equal sets, or None where the settings cannot be met."""
    if layout.expert != "auto":
        if layout.expert % k:
            return None
        rows_each = layout.expert // k
        count = layout.data if layout.data != "auto" else rows // rows_each
        if count < 1 or rows_each * count > rows:
            return None
        rows = rows_each * count
    else:
        count = layout.data if layout.data != "auto" else -(-rows // model.n_group)
        if count < 1 or count > rows:
            return None
        rows = min(rows, count * model.n_group)  # a row without an expert group has nothing to do
    bounds = [r * rows // count for r in range(count + 1)]
    replicas = tuple(tuple(range(a, b)) for a, b in pairwise(bounds))
    fewest_groups = model.n_group // max(map(len, replicas))
    return replicas if fewest_groups >= 1 and fewest_groups * model.experts_per_group >= k else None


def cells_per_node(layout: Layout) -> int:
    used = [cell[0] for row in layout.cells for cell in row]
    return max(used.count(node) for node in used)


def _refuse(nodes: tuple[Node, ...], layout: LayoutSection, model: ModelConfig, folding: Stages) -> NoReturn:
    """Raise the ConfigError that names the setting to change: the first pin without which there is a layout."""
    pins = {key: getattr(layout, key) for key in ("data", "expert", "shape") if getattr(layout, key) != "auto"}
    available = sum(n.ranks for n in nodes)
    has = f"the cluster has {available} ranks on {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"
    if pins.get("expert", 1) > model.n_routed_experts:
        raise ConfigError("layout.expert", layout.expert, f"at most model.n_routed_experts = {model.n_routed_experts}")
    needed = layout.pipeline * pins.get("expert", 1) * pins.get("data", 1)
    if needed > available:
        key = next((key for key in ("data", "expert") if pins.get(key, 1) > 1), "pipeline")
        raise ConfigError(f"layout.{key}", getattr(layout, key), f"needs {needed} ranks (pipeline x expert x data), {has}")
    others = f"layout.pipeline = {layout.pipeline} and model.n_group = {model.n_group}"
    for key, value in pins.items():
        if found := _best(nodes, layout.model_copy(update={key: "auto"}), model, folding):
            raise ConfigError(f"layout.{key}", _plain(value), f"does not fit {others}, {has}; auto gives {_value(found, key)}")
    key, value = next(iter(pins.items()))
    listed = ", ".join(f"layout.{other} = {_plain(pins[other])}" for other in pins if other != key)
    raise ConfigError(f"layout.{key}", _plain(value), f"does not fit {others} with {listed}, {has}")


def _value(found: Layout, key: str) -> int | list[int]:
    """What a layout makes of a setting that may be pinned; of uneven EP groups the largest."""
    return {"data": len(found.replicas), "expert": max(map(len, found.replicas)) * found.width,
            "shape": [found.positions_per_node, found.width]}[key]


def _plain(value: int | tuple[int, int]) -> int | list[int]:
    """A pair as a user writes it."""
    return list(value) if isinstance(value, tuple) else value
