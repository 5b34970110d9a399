"""Programs made before they are needed."""

from __future__ import annotations

import pytest

from actors.data.batching import Dealer
from actors.protocol import program_cache as ahead_module
from actors.protocol.program_cache import Ahead
from orchestrator.layout.layout import choose
from orchestrator.plan.scheduling import programs_for
from orchestrator.recovery.relayout import relaid
from orchestrator.topology import Node, virtual_nodes
from tests.actors.runtime import batch_of, configured


@pytest.mark.parametrize("name", ["PP2xEP2", "EP4", "PP4"])
def test_what_one_loss_calls_for_is_there(name, monkeypatch):
    config, layout = configured(name)
    nodes = tuple(Node(node, sum(place.node == node for place in layout.places)) for node in layout.nodes)
    ahead = Ahead(config)
    ahead.after_one_loss(nodes, layout, 3).join(60)

    def refuse(*arguments, **options):
        raise AssertionError("it was not made before")

    real, left = programs_for, [nodes[:-1], nodes[1:]]
    if nodes[0].ranks > 1:
        left.append((*nodes[:-1], Node(nodes[-1].name, nodes[-1].ranks - 1)))
    monkeypatch.setattr(ahead_module, "programs_for", refuse)
    for those in left:
        found = relaid(config, those, layout)
        microbatches = Dealer(found.config, found.layout).requests(batch_of(config, 3), None, training=True)[0].microbatches
        programs = ahead.programs(found.config, found.layout.folding, microbatches, training=True)
        assert programs == real(found.config, found.layout.folding, microbatches, training=True)
    with pytest.raises(AssertionError, match="not made before"):
        ahead.programs(config, layout.folding, 4096, training=True)


def test_a_single_rank_has_nothing_to_prepare():
    config, _ = configured("one rank")
    layout = choose(virtual_nodes(1, 1), config.layout, config.model, config.stages)
    ahead = Ahead(config)
    ahead.after_one_loss((Node("virtual-0", 1),), layout, 0).join(60)
    assert not ahead._made


def test_only_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(ahead_module, "_KEPT", 2)
    config, layout = configured("EP4")
    ahead = Ahead(config)
    for microbatches in (2, 4, 6):
        ahead.programs(config, layout.folding, microbatches, training=True)
    assert [key[3] for key in ahead._made] == [4, 6]
