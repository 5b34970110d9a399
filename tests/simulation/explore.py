"""Random seeds, and every placing of two faults: `python -m tests.simulation.explore --seconds 60`.

A violation is shrunk and printed as a line for scenarios.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

from orchestrator.protocol.run import Run
from tests.simulation.draw import scenario as drawn
from tests.simulation.invariants import Violation
from tests.simulation.rank_model import RankModel
from tests.simulation.settings import Fault, Scenario
from tests.simulation.shrink import line, shrunk
from tests.simulation.world import World


@dataclass
class Explored:
    """found: by rule, the scenarios that broke it with what was seen."""

    runs: int = 0
    events: int = 0
    seconds: float = 0.0
    found: dict[str, list[tuple[Scenario, Violation]]] = field(default_factory=dict)


def tried(scenario: Scenario, run: type[Run] = Run, rank: type[RankModel] = RankModel) -> tuple[Violation | None, World | None]:
    """What a scenario violates: an invariant, or (as "error") what no code may raise."""
    world = None
    try:
        world = World(scenario, run, rank)
        world.run()
    except Violation as violation:
        return violation, world
    except Exception as error:  # of the machine: it must not raise, whatever happens
        return Violation(f"error {type(error).__name__}", _where(error)), world
    return None, world


def _where(error: Exception) -> str:
    at = error.__traceback__
    while at.tb_next is not None:
        at = at.tb_next
    return f"{error} ({at.tb_frame.f_code.co_name}, line {at.tb_lineno} of {at.tb_frame.f_code.co_filename.rsplit('/', 1)[-1]})"


def explore(scenarios: Iterable[Scenario], seconds: float, run: type[Run] = Run, rank: type[RankModel] = RankModel,
            within: Callable[[], AbstractContextManager[None]] = nullcontext,
            enough: Callable[[Violation], bool] = lambda violation: False) -> Explored:
    """As many as can be tried in these seconds of CPU. within: what holds while each runs. enough: whether to stop at a
    violation."""
    explored, began = Explored(), time.process_time()
    for scenario in scenarios:
        with within():
            violation, world = tried(scenario, run, rank)
        explored.runs += 1
        explored.events += world.count if world is not None else 0
        explored.seconds = time.process_time() - began
        if violation is not None:
            explored.found.setdefault(violation.rule, []).append((scenario, violation))
            if enough(violation):
                break
        if explored.seconds > seconds:
            break
    return explored


def seeds(first: int) -> Iterator[Scenario]:
    seed = first
    while True:
        yield drawn(seed)
        seed += 1


def pairs(ranks: int) -> Iterator[Scenario]:
    """Two faults at every two places of a run of two steps, in one order of messages."""
    plain = Scenario(nodes=(1,) * ranks, steps=2, save_every=1, place_every=1)
    length = tried(plain)[1].count
    first_kinds, second_kinds = ("kill", "coordinator", "hang", "flap", "end node"), ("kill", "coordinator", "hang", "lose node")
    for first in range(1, length):
        for second in range(first, first + 60):
            for one in first_kinds:
                for other in second_kinds:
                    yield replace(plain, faults=(Fault(first, one, 0), Fault(second, other, 1)))


def large(ranks: int) -> Scenario:
    """Some steps with many ranks, of which a node is lost."""
    return Scenario(nodes=(8,) * (ranks // 8), keys=ranks, steps=6, save_every=0, faults=(Fault(ranks * 16, "end node", 3),))


def report(explored: Explored, shrink: int, run: type[Run] = Run, rank: type[RankModel] = RankModel) -> None:
    rate = explored.events / explored.seconds if explored.seconds else 0.0
    print(f"{explored.runs} runs, {explored.events} events in {explored.seconds:.1f} s of CPU ({rate:,.0f} a second)")
    for rule, cases in sorted(explored.found.items(), key=lambda item: -len(item[1])):
        print(f"\n{rule}: {len(cases)} runs")
        kinds: dict[tuple[str, ...], None] = {}
        for scenario, _ in cases[:4 * shrink]:
            small = shrunk(scenario, lambda candidate: tried(candidate, run, rank)[0])
            key = tuple(sorted(fault.kind for fault in small.faults))
            if key not in kinds and len(kinds) < shrink:
                kinds[key] = None
                print(f"    {line(small)},\n        # {tried(small, run, rank)[0]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="of CPU")
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--defects", action="store_true", help="how soon each known defect is found")
    parser.add_argument("--exhaustive", action="store_true", help="two faults at every two places")
    parser.add_argument("--ranks", type=int, default=2, help="with --exhaustive; else, from 64 on: one run with so many")
    parser.add_argument("--scenario", help="show one: a number is a seed, else a name of scenarios.py, or a line as printed")
    parser.add_argument("--shrink", type=int, default=3, help="shrunk cases that are shown of each rule")
    parser.add_argument("--last", type=int, default=80, help="lines of a scenario that are shown")
    arguments = parser.parse_args()
    if arguments.scenario is not None:
        return show(named(arguments.scenario), arguments.last)
    if arguments.defects:
        from tests.simulation.defects import main as defects

        return defects(arguments.seconds)
    if arguments.ranks >= 64:
        scenarios: Iterable[Scenario] = (large(arguments.ranks),)
    else:
        scenarios = pairs(arguments.ranks) if arguments.exhaustive else seeds(arguments.seed)
    explored = explore(scenarios, arguments.seconds)
    report(explored, arguments.shrink)
    return 1 if explored.found else 0


def named(text: str) -> Scenario:
    if text.isdigit():
        return drawn(int(text))
    if text.startswith("Scenario("):
        return eval(text, {"Scenario": Scenario, "Fault": Fault})
    from tests.simulation.scenarios import SCENARIOS

    return SCENARIOS[text].scenario


def show(scenario: Scenario, last: int) -> int:
    print(line(scenario))
    world = World(scenario)
    world.trace = []
    try:
        text, code = str(world.run()), 0
    except Violation as violation:
        text, code = str(violation), 1
    finally:
        print("\n".join(world.trace[-last:]))
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
