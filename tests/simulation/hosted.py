"""What runs in the processes of the conformance test: a rank behind its call server, both made anew for each sequence."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import faults
import torch
from runtime import Host

from actors.hosts.processes import ProcessRanks
from actors.runtime.call_server import CallServer
from actors.runtime.meeting import MeetingPlace
from orchestrator.config.run_config import RunConfig
from orchestrator.protocol.commands import CallLane
from orchestrator.protocol.events import CallId
from orchestrator.protocol.members import Member

SECONDS = 60.0
STRIDE = 16
"""Of the elements of each weight that are looked at."""
Key = tuple[str, int]
"""An element of a weight; or a gate's layer, and -1."""


class Hosted:
    """What a process hosts."""

    def __init__(self, config: RunConfig):
        self._config, self._meeting_place = config, MeetingPlace()
        self._begin()

    def anew(self) -> None:
        """As if the process had just been made."""
        self._rank.close()
        client, listener = self._rank._reached or (None, None)
        if client is not None:
            client.close()
            listener.close()
        self._begin()

    def _begin(self) -> None:
        self._rank = Host(self._config, "127.0.0.1")
        self._rank._meeting_place = self._meeting_place
        self._server = CallServer(self._rank)
        self.serve, self.arrives, self.attach = self._server.serve, self._server.arrives, self._rank.attach

    def where(self) -> tuple[CallId | None, set[str]]:
        """The call under way, and the functions that it is in. From any thread."""
        busy, found = self._server._busy, set()
        frame = sys._current_frames().get(threading.main_thread().ident)
        while frame is not None:
            found.add(f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}")
            frame = frame.f_back
        return busy, found

    def doom(self, place: str, signal: int) -> None:
        """As faults.doom, the next time."""
        faults.doom(self._rank, place, 0, signal)

    def contents(self) -> tuple[dict[int, dict[Key, tuple[float, ...]]], dict[Key, float]]:
        """By generation, values of what the rank owns; and its working weights. While no call is under way."""
        owned = {generation: self._owned(state) for generation, state in self._rank._held._states.items()}
        working = {}
        for name, weight in (self._rank.optimizer.weights if self._rank.optimizer else {}).items():
            flat = weight.value.detach().flatten()
            working |= {(name, at): float(flat[at]) for at in range(0, flat.numel(), STRIDE)}
        return owned, working

    def _owned(self, state: Any) -> dict[Key, tuple[float, ...]]:
        found: dict[Key, tuple[float, ...]] = {}
        for owned in state.shards:
            flats = torch.stack([owned.master, owned.moment("exp_avg"), owned.moment("exp_avg_sq")], dim=1)
            for spec, start, stop, offset in owned.bucket.pieces(owned.shard):
                first = -(-start // STRIDE) * STRIDE
                rows = flats[offset + first - start : offset + stop - start : STRIDE].tolist()
                found |= {(spec.name, first + STRIDE * index): tuple(row) for index, row in enumerate(rows)}
        return found | {(str(layer), -1): tuple(bias.tolist()) for layer, bias in state.biases.items()}


class Processes(ProcessRanks):
    """Such processes, by member; whole again for each sequence."""

    def __init__(self, config: RunConfig, members: Sequence[Member]):
        self.members = tuple(members)
        super().__init__(config, len(members), Hosted, start_method="forkserver")
        self.enlist(self.members)

    def ask(self, members: Sequence[Member], method: str, *arguments: Any, lane: CallLane = CallLane.CONTROL) -> list[Any]:
        """What the hosts answer, beside their calls or (lane COMPUTE) after them."""
        with self._changed:
            self._call += 1
            call = self._call
            self._awaited.add(call)
            found = [self._processes[self._of_member[member]] for member in members]
        for process in found:
            (process.control if lane is CallLane.CONTROL else process.calls).send((call, lane, 0, method, arguments))
        answers = self.answers(call, [process.number for process in found], SECONDS)
        self.forget(call)
        assert all(answer is not None and answer[0] for answer in answers), answers
        return [answer[1] for answer in answers]

    def kill(self, member: Member) -> None:
        self._processes[self._of_member[member]].handle.kill()

    def spoil(self) -> None:
        """Whatever they are doing is of no interest any more."""
        for process in self._processes.values():
            process.handle.kill()
            process.handle.join()

    def heal(self) -> None:
        """A fresh rank for everybody."""
        for number, process in list(self._processes.items()):
            if process.gone or not process.handle.is_alive():
                self._end(self._processes.pop(number), at_once=True)
        while len(self._processes) < len(self.members):
            self._make(())
        self.enlist(self.members)
        self.ask(self.members, "anew", lane=CallLane.COMPUTE)
