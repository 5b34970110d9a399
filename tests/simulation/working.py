"""What runs on the ranks of a simulated world: calls that arrive, lanes that work them off, answers that go back."""

from __future__ import annotations

from orchestrator.protocol import commands as orders
from orchestrator.protocol import events as happened
from orchestrator.protocol.commands import Call, CallLane
from orchestrator.protocol.events import Answered, Done, Failed, FailKind, Probed
from orchestrator.protocol.members import Member
from tests.simulation.network import meet
from tests.simulation.rank_model import RankModel, Refused


class RanksAtWork:
    """A part of World."""

    def common_fault(self, request: object) -> Refused | None:
        """What every rank fails with here."""
        if self.failing_step is not None and type(request) is orders.Step and request.step == self.failing_step:
            return Refused(FailKind.OWN, f"step {request.step} cannot be computed")
        return None

    def arrive(self, rank: RankModel, call: Call, lane: CallLane) -> None:
        if not rank.alive:
            self._gone(rank, call)
            return
        until = rank.thaws if rank.thaws > rank.deaf else rank.deaf
        if until > self.now:
            self.later(until - self.now, self.arrive, rank, call, lane)
            return
        refused = rank.refusal(call)
        if refused is not None:
            self.fail(rank, call, refused)
        elif lane is CallLane.COMPUTE:
            self.invariants.begins(rank, call)
            rank.queue.append(call)
            if rank.work is None:
                self._next(rank)
        elif lane is CallLane.FILES:
            self._collect(rank, call)
        elif type(call.request) is orders.Probe:
            self._probe(rank, call)
        elif rank.work is None:
            self.answer(rank, call, rank.recalled())
        else:
            rank.recalls.append(call)
            self.later(call.request.seconds, self._recall_anyway, rank, call)

    def _recall_anyway(self, rank: RankModel, call: Call) -> None:
        if call in rank.recalls:
            if rank.thaws > self.now:
                self.later(rank.thaws - self.now, self._recall_anyway, rank, call)
                return
            rank.recalls.remove(call)
            self.answer(rank, call, rank.recalled())

    def _next(self, rank: RankModel) -> None:
        """The next call of the compute lane, or whoever waits for it to be free."""
        while rank.queue:
            call = rank.queue.popleft()
            refused = rank.refusal(call)
            if refused is None:
                try:
                    rank.work = rank.begin(call)
                except Refused as refusal:
                    refused = refusal
            if refused is None:
                rank.call, rank.fault = call, None
                self.go(rank, None)
                return
            self._failed(rank, call, refused)
        for call in rank.recalls:
            self.answer(rank, call, rank.recalled())
        rank.recalls.clear()

    def resume(self, rank: RankModel, value: object) -> None:
        """What it waited for has come, or will not come."""
        rank.ticket += 1
        self.later(self.delay(), self._resumed, rank, rank.ticket, value)

    _goes_on = resume

    def _resumed(self, rank: RankModel, ticket: int, value: object) -> None:
        if rank.ticket != ticket or not rank.alive or rank.hung:
            return
        if rank.thaws > self.now:
            self.later(rank.thaws - self.now, self._resumed, rank, ticket, value)
            return
        self.go(rank, value)

    def go(self, rank: RankModel, value: object) -> None:
        work = rank.work
        try:
            if type(value) is Refused:
                wanted = work.throw(value)
            else:
                rank.operation += 1
                wanted = work.send(value)
            if type(wanted) is float:
                rank.ticket += 1
                self.later(wanted, self._resumed, rank, rank.ticket, None)
                return
            kind, payload = wanted if type(wanted) is tuple else (wanted, None)
            group = rank.group
            if rank.finds_broken(group, kind):
                self.go(rank, Refused(FailKind.ABORTED, "told to let go, or a peer has gone"))
                return
            meet(group, rank, kind, payload, self.links, self._goes_on, self.invariants.broken)
        except StopIteration as done:
            call, rank.work, rank.call = rank.call, None, None
            self.answer(rank, call, done.value)
            self._next(rank)
        except Refused as refused:
            call, rank.work, rank.call = rank.call, None, None
            if rank.waits is not None:
                raise AssertionError("a call ended while it waits") from refused
            self._failed(rank, call, refused)
            self._next(rank)

    def _failed(self, rank: RankModel, call: Call, refused: Refused) -> None:
        rank.fault = happened.Fault(refused.kind, refused.text, call.call)
        self.fail(rank, call, refused)

    def _collect(self, rank: RankModel, call: Call) -> None:
        begun = rank.writing.get(call.request.directory)
        if begun is None:
            self.fail(rank, call, Refused(FailKind.UNREADABLE, "nothing was begun"))
        else:
            done, keys = begun
            self.later(max(0.0, done - self.now) + 0.001, self._collected, rank, call, keys)

    def _collected(self, rank: RankModel, call: Call, keys: tuple[tuple[int, int], ...]) -> None:
        if not rank.alive:
            return
        if self.storage.has(call.request.directory, keys):
            self.answer(rank, call, Done())
        else:
            self.fail(rank, call, Refused(FailKind.UNREADABLE, "it could not be written"))

    def _probe(self, rank: RankModel, call: Call) -> None:
        lost = []
        for peer in call.request.peers:
            other = self.ranks.get(peer)
            if other is None or not other.alive or other.thaws > self.now or not self.links.both_ways(rank.member, peer):
                lost.append(peer)
        self.later(call.request.seconds if lost else self.delay(), self._probed, rank, call, tuple(lost))

    def _probed(self, rank: RankModel, call: Call, lost: tuple[Member, ...]) -> None:
        if rank.alive:
            self.answer(rank, call, Probed(lost))

    def _gone(self, rank: RankModel, call: Call) -> None:
        """A call to a process that is not there: a dead host says nothing."""
        coordinator = self.coordinator
        if self.hosts[rank.member.node].up and coordinator is not None and coordinator.epoch == call.call.epoch:
            coordinator.post(Failed(call.call, rank.member, FailKind.GONE, "its process has ended"), self.delay())

    def answer(self, rank: RankModel, call: Call, value: happened.Answer) -> None:
        self._reply(rank, Answered(call.call, rank.member, value))

    def fail(self, rank: RankModel, call: Call, refused: Refused) -> None:
        self._reply(rank, Failed(call.call, rank.member, refused.kind, refused.text))

    def _reply(self, rank: RankModel, event: Answered | Failed) -> None:
        coordinator = self.by_epoch(event.call.epoch)
        if coordinator is not None:
            coordinator.post(event, self.delay() + (rank.deaf - self.now if rank.deaf > self.now else 0.0))
