"""Where every rank stands: rows, positions, replicas and EP groups on the nodes that are alive.

A *shape* (c, k) puts c consecutive positions of one pipeline on a node, k ranks for each. A node's c*k ranks are a cell;
PP/c cells make a row, which carries whole pipelines. Rows are dealt to replicas, and the ranks of one position in the
rows of one replica are an EP group: they hold all experts of that position's stages, one node per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from orchestrator.config import ConfigError, LayoutSection, ModelConfig
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
    """Ranks are numbered row by row, position by position: rank = (row * pipeline + position) * width + w."""

    pipeline: int
    positions_per_node: int
    width: int
    cells: tuple[tuple[tuple[str, int], ...], ...]  # per row: (node, first local index) of each of its cells
    replicas: tuple[tuple[int, ...], ...]  # rows of each replica

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

    def rank_at(self, row: int, position: int, w: int) -> int:
        return (row * self.pipeline + position) * self.width + w

    def mirror(self, position: int) -> int:
        """The position that hosts the same two stages."""
        return self.pipeline - 1 - position

    def stages(self, position: int) -> tuple[int, ...]:
        """Stages of a position by slot (DualPipe placement)."""
        return (position,) if self.pipeline == 1 else (position, self.mirror(position))

    def line(self, row: int, w: int) -> tuple[int, ...]:
        """Ranks that one data stream passes, by position."""
        return tuple(self.rank_at(row, position, w) for position in range(self.pipeline))

    def expert_group(self, replica: int, position: int) -> tuple[int, ...]:
        return tuple(self.rank_at(row, position, w) for row in self.replicas[replica] for w in range(self.width))

    def describe(self) -> str:
        sizes = {len(rows) * self.width for rows in self.replicas}
        return (f"PP{self.pipeline} x EP{'/'.join(map(str, sorted(sizes)))} x DP{len(self.replicas)}: {self.size} ranks in "
                f"{self.rows} rows on {len(self.nodes)} nodes, {self.positions_per_node} positions x {self.width} ranks on a node")


def choose(nodes: tuple[Node, ...], layout: LayoutSection, model: ModelConfig) -> Layout:
    """The layout of these nodes. Pure.

    Preference: at least two nodes if there are two; then most ranks used; then whole nodes as cells; then most rows.
    Raises ConfigError naming the setting that cannot be met.
    """
    shapes = [layout.shape] if layout.shape != "auto" else [
        (c, k) for c in range(1, layout.pipeline + 1) if layout.pipeline % c == 0
        for k in range(1, max((n.ranks for n in nodes), default=0) + 1)]
    candidates = [found for c, k in shapes if (found := _with_shape(nodes, layout, model, c, k))]
    if not candidates:
        raise _refusal(nodes, layout, model)
    enough = min(2, sum(n.ranks > 0 for n in nodes))
    return max(candidates, key=lambda found: (
        len(found.nodes) >= enough, found.size, -_cells_per_node(found), found.rows, found.positions_per_node))


def _with_shape(nodes: tuple[Node, ...], layout: LayoutSection, model: ModelConfig, c: int, k: int) -> Layout | None:
    cells = _cells(nodes, c * k)
    cells_per_row = layout.pipeline // c
    replicas = _replicas(len(cells) // cells_per_row, k, layout, model)
    if replicas is None:
        return None
    rows = sum(map(len, replicas))
    grouped = tuple(tuple(cells[r * cells_per_row : (r + 1) * cells_per_row]) for r in range(rows))
    return Layout(layout.pipeline, c, k, grouped, replicas)


def _cells(nodes: tuple[Node, ...], size: int) -> list[tuple[str, int]]:
    """Every node's first cell, then every node's second: rows fill distinct nodes before they share one."""
    most = max((n.ranks for n in nodes), default=0) // size
    return [(n.name, index * size) for index in range(most) for n in nodes if (index + 1) * size <= n.ranks]


def _replicas(rows: int, k: int, layout: LayoutSection, model: ModelConfig) -> tuple[tuple[int, ...], ...] | None:
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
    bounds = [r * rows // count for r in range(count + 1)]
    replicas = tuple(tuple(range(a, b)) for a, b in zip(bounds, bounds[1:]))
    fewest_groups = model.n_group // max(map(len, replicas))
    return replicas if fewest_groups >= 1 and fewest_groups * model.experts_per_group >= k else None


def _cells_per_node(layout: Layout) -> int:
    used = [cell[0] for row in layout.cells for cell in row]
    return max(used.count(node) for node in used)


def _refusal(nodes: tuple[Node, ...], layout: LayoutSection, model: ModelConfig) -> ConfigError:
    available = sum(n.ranks for n in nodes)
    has = f"the cluster has {available} on {len(nodes)} nodes"
    if layout.expert != "auto" and layout.expert > model.n_routed_experts:
        return ConfigError("layout.expert", layout.expert, f"at most model.n_routed_experts = {model.n_routed_experts}")
    needed = layout.pipeline * (1 if layout.expert == "auto" else layout.expert) * (1 if layout.data == "auto" else layout.data)
    if needed > available:
        key, value = next(((f"layout.{name}", getattr(layout, name)) for name in ("data", "expert")
                           if getattr(layout, name) not in ("auto", 1)), ("layout.pipeline", layout.pipeline))
        return ConfigError(key, value, f"needs {needed} ranks (pipeline x expert x data), {has}")
    if layout.shape != "auto":
        return ConfigError("layout.shape", list(layout.shape), f"no row of pipeline {layout.pipeline} fits, {has} "
                           f"({', '.join(f'{n.name}: {n.ranks}' for n in nodes[:8])})")
    return ConfigError("layout.expert", layout.expert,
                       f"expert groups (model.n_group = {model.n_group} of {model.experts_per_group}) do not divide over "
                       f"these rows, or no row of pipeline {layout.pipeline} fits; {has}")
