"""Layouts and owners as the state machine sees them: against the plan that ranks themselves make of a change."""

from __future__ import annotations

import itertools

import pytest

from actors.protocol.planning import RealPlanner
from actors.protocol.tables import Tables
from orchestrator.protocol.events import Base, WorkerAssignment
from orchestrator.protocol.members import Member
from orchestrator.state import transfer
from orchestrator.topology import Node
from tests.actors.runtime import configured, placement_of


def begun(name: str, *overrides: str) -> tuple[RealPlanner, Tables, Base]:
    """A planner, and the generation of a run on a layout of the tests."""
    config, layout = configured(name, *overrides)
    tables = Tables()
    planner = RealPlanner(config, tables, layout)
    plan = planner.plan(nodes_of(layout), None, [Member(place.node, place.local) for place in layout.places])
    assert tables.layout(plan.layout) == layout and tables.placement(plan.placement) == placement_of(config, layout)
    return planner, tables, Base(1, plan.layout, plan.placement, plan.members)


def nodes_of(layout) -> tuple[Node, ...]:
    return tuple(Node(node, sum(place.node == node for place in layout.places)) for node in layout.nodes)


def held(tables: Tables, found: Base | WorkerAssignment) -> tuple:
    return tables.config(found.layout), tables.layout(found.layout), tables.placement(found.placement)


@pytest.mark.parametrize("name", ["PP2xEP2", "EP4", "PP4", "EP2xDP2", "PP2xDP2"])
@pytest.mark.parametrize("copies", [0, 1, 2])
def test_what_is_covered_is_what_the_ranks_could_move(name, copies):
    """Every set of survivors: the words are those of the plan that would be refused."""
    planner, tables, base = begun(name, f"elastic.copies={copies}")
    nodes = [place.node for place in tables.layout(base.layout).places]
    for count in range(len(base.members) + 1):
        for having in itertools.combinations(base.members, count):
            came_from = [rank if member in having else None for rank, member in enumerate(base.members)]
            try:
                transfer.plan_between(held(tables, base), held(tables, base), came_from)
                lost = None
            except transfer.StateLost as error:
                lost = str(error)
            found = planner.covered(base, having)
            assert (found is None) == (lost is None), having
            assert found is None or "no owner is left of" in found and "values" in found
    assert nodes and planner.covered(base, [Member("elsewhere", 0)]) is not None


@pytest.mark.parametrize("copies", [0, 1])
def test_who_leaves_hands_over_what_nobody_else_has(copies):
    planner, tables, base = begun("EP4", f"elastic.copies={copies}")
    nodes = tuple(Node(f"virtual-{number}", 1) for number in (0, 1, 3))
    staying = tuple(member for member in base.members if member.node != "virtual-2")
    plan = planner.plan(nodes, base, staying)
    leaving = planner.hands_over(base, plan, base.members)
    assert leaving == (() if copies else (Member("virtual-2", 0),))
    came_from = [base.members.index(member) for member in (*plan.members, *leaving)]
    transfer.plan_between(held(tables, base), held(tables, plan), came_from, [member.node for member in leaving])


def test_places_are_given_to_the_newest_incarnation():
    planner, tables, base = begun("EP4")
    nodes = tuple(Node(f"virtual-{number}", 1) for number in range(4))
    plan = planner.plan(nodes, base, [*base.members, Member("virtual-2", 0, 1)])
    assert Member("virtual-2", 0, 1) in plan.members and Member("virtual-2", 0) not in plan.members
    assert planner.same_layout(base, plan) and plan.planned == nodes


def test_a_place_without_anybody_gives_no_plan():
    planner, tables, base = begun("EP4")
    nodes = tuple(Node(f"virtual-{number}", 1) for number in range(4))
    assert planner.plan(nodes, base, base.members[:3]) is None
    assert planner.recorded(base.layout, base.placement, base.members[:3]) is None
    assert planner.recorded(base.layout, base.placement, base.members).members == base.members
    assert planner.plan((), base, ()) is None


def test_with_fewer_nodes_there_is_another_layout_and_its_notes():
    planner, tables, base = begun("PP4")
    plan = planner.plan((Node("virtual-0", 2), Node("virtual-1", 1)), base, base.members)
    assert not planner.same_layout(base, plan) and len(plan.members) == 3
    assert any("layout.pipeline = 4" in note for note in planner.notes)


def test_equal_layouts_and_placements_have_one_number():
    tables = Tables()
    numbers = []
    for _ in range(2):
        for name in ("EP4", "PP2xEP2"):
            config, layout = configured(name)
            numbers.append((tables.layout_ref(config, layout), tables.placement_ref(placement_of(config, layout))))
    assert numbers[:2] == numbers[2:] and numbers[0] != numbers[1]
    config, layout = configured("EP4", "elastic.copies=2")
    assert tables.layout_ref(config, layout) not in (numbers[0][0], numbers[1][0])
    assert tables.config(tables.layout_ref(config, layout)) == config
