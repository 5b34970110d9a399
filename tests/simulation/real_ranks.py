"""Real ranks in processes, called by a test as a coordinator calls them."""

from __future__ import annotations

import queue
import time
from collections.abc import Mapping, Sequence

from heartbeat_tools import expect
from runtime import batch_of, meeting_place

from actors.calls.rank_calls import Arrived
from actors.protocol.dressing import OF_NONE, Dresser, Reading
from actors.protocol.heartbeat_server import HeartbeatServer
from actors.protocol.tables import Tables
from orchestrator.config.run_config import RunConfig
from orchestrator.protocol.commands import Call, CallLane, Rearrange, lane_of
from orchestrator.protocol.events import Answered, CallId, Failed
from orchestrator.protocol.members import Member
from tests.simulation.hosted import SECONDS, Processes

SITES = {"met": {"groups.meet"}, "moved": {"state.carry_over"}, "published": {"optimizer.publish"},
         "compute": {"executor.run"}, "reduced": {"executor.run"}}
"""Where a real rank is when the model has come to this."""
_BEAT = 0.1


class RealRanks:
    """One sequence of calls. answers: by call, as they come."""

    def __init__(self, processes: Processes, config: RunConfig, tables: Tables, run: str):
        self._processes, self._config, self._tables, self._run = processes, config, tables, run
        self._reading, self._open = Reading(tables), {}
        self._posted: queue.SimpleQueue = queue.SimpleQueue()
        self.answers: dict[CallId, Answered | Failed] = {}
        self.lines: HeartbeatServer | None = None
        processes.listen(self._posted.put)
        processes.heal()

    def coordinate(self, epoch: int, members: Sequence[Member]) -> None:
        """A coordinator begins: these are all that live."""
        before, self.lines = self.lines, HeartbeatServer("127.0.0.1", run=self._run, epoch=epoch)
        store = meeting_place()
        self._dresser = Dresser(self._config, self._tables, "127.0.0.1", store, batch=lambda step: batch_of(self._config, step),
                                held_out=lambda: batch_of(self._config, -1), abouts={}, manifests={}, traced=lambda step: False,
                                shows=lambda step: False)
        for member in members:
            self._processes.attach(member, self.lines.address, _BEAT, self._run, epoch)
        waited = set(members)
        while waited:
            waited -= {member for member, _ in expect(self.lines, self.lines.hello, SECONDS)}
        if before is not None:
            before.close()

    def close(self) -> None:
        if self.lines is not None:
            self.lines.close()

    def send(self, calls: list[Call], formed_as: Mapping[CallId, int]) -> None:
        """formed_as: generations that these calls are made for, where they are said to be for another one."""
        for call in calls:
            meant = formed_as.get(call.call, call.generation)
            dressed = self._dresser.dressed(Call(call.call, call.member, meant, call.request))
            if meant != call.generation and not isinstance(call.request, Rearrange):
                self._forget_programs(meant)
            self._open[call.call] = call
            self._processes.send(call.call, call.member, 0 if isinstance(call.request, OF_NONE) else call.generation,
                                 dressed.method, dressed.arguments, lane_of(call.request))

    def _forget_programs(self, generation: int) -> None:
        try:
            self._dresser.grouping(generation).known.clear()
        except KeyError:
            pass  # of another coordinator

    @property
    def waits(self) -> bool:
        """Whether some call is not answered yet."""
        return bool(self._open)

    def receive(self, seconds: float) -> None:
        """What has come, waiting so long for the first."""
        try:
            while True:
                event = self._posted.get(timeout=seconds)
                seconds = 0.0
                if not isinstance(event, Arrived | Failed):
                    continue
                call = self._open.pop(event.call, None)
                if call is None:
                    continue  # of the sequence before, which was broken off
                if isinstance(event, Arrived):
                    event = Answered(event.call, event.member, self._reading.answer(call, event.value))
                self.answers[event.call] = event
        except queue.Empty:
            pass

    def wait_for(self, calls: Sequence[Call]) -> None:
        """Until all are answered."""
        deadline = time.monotonic() + SECONDS
        while any(call.call not in self.answers for call in calls):
            left = deadline - time.monotonic()
            assert left > 0, f"not answered: {[str(call) for call in calls if call.call not in self.answers]}"
            self.receive(left)

    def come_to(self, calls: Mapping[CallId, Member], sites: Mapping[CallId, str]) -> None:
        """Until each of these is answered, or where the model came to."""
        deadline = time.monotonic() + SECONDS
        while True:
            self.receive(0.005)
            late = [(call, member) for call, member in calls.items() if call not in self.answers]
            if not late:
                return
            places = self._processes.ask([member for _, member in late], "where")
            if all(busy == call and SITES[sites[call]] & found for (call, _), (busy, found) in zip(late, places)):
                return
            assert time.monotonic() < deadline, (late, sites, places)

    def abort(self, members: Sequence[Member], generation: int) -> None:
        """And wait until they say that they have let go."""
        self.lines.abort(members, generation)
        found = self.lines.aborted(members, generation, SECONDS)
        assert found.keys() == set(members), (found, members)

    def doom(self, member: Member, place: str, signal: int) -> None:
        self._processes.ask([member], "doom", place, signal, lane=CallLane.COMPUTE)

    def contents(self, members: Sequence[Member]) -> list:
        return self._processes.ask(members, "contents")

    def kill(self, member: Member) -> None:
        """And wait until that is known here."""
        self._processes.kill(member)
        self.died(member)

    def died(self, member: Member) -> None:
        found = set()
        while member not in found:
            found |= {gone for gone, *_ in expect(self.lines, self.lines.ended, SECONDS)}
