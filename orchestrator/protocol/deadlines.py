"""Every bound on a wait of the protocol, in one table, in seconds."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.config.run_config import RunConfig
from orchestrator.protocol.members import MembershipRules
from orchestrator.refusal import ConfigError

_MARGIN_SECONDS = 30.0
_LEAST_RELEASE_SECONDS = 10.0
_TRIES_OF_A_CONNECTION = 5
"""Of gloo, where a group is made over a link that carries nothing: each takes the bound on making it (measured, torch 2.13)."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """silence: without a beat, a member is lost. start: from a process being asked for to its first beat. adopt: for processes that
    another coordinator left to say hello. release: from an abort until every compute lane is free; more than silence, so that a stall
    which is tolerated is tolerated here, too. making: of process groups, which no abort ends. finish, form, load: of the calls of these names. step: on any call of a step. stuck:
    nobody finishes anything, where that is less than `stuck_times` the median step. files: for the pieces of a checkpoint. probe: of
    one link. storage: storage may be away so long. give_up: without a committed step. wait: for `elastic.min_nodes`; None: for ever.
    """

    silence: float = 1.5
    start: float = 180.0
    adopt: float = 2.5
    release: float = 10.0
    making: float = 25.0
    finish: float = 60.0
    form: float = 180.0
    load: float = 600.0
    step: float = 630.0
    stuck: float = 10.0
    stuck_times: float = 10.0
    files: float = 600.0
    probe: float = 2.0
    storage: float = 300.0
    give_up: float = 1800.0
    wait: float | None = None
    first_pause: float = 0.1
    last_pause: float = 30.0
    recall: float = 1.0

    @classmethod
    def of(cls, config: RunConfig) -> Deadlines:
        """Raises ConfigError: bounds that contradict each other."""
        elastic, timeout = config.elastic, config.training.step_timeout_seconds
        silence = MembershipRules.of(elastic, one_host=config.topology.virtual_nodes > 0).silence_seconds
        release = max(_LEAST_RELEASE_SECONDS, 1.5 * silence + 2 * elastic.abort_seconds)
        found = cls(silence=silence, adopt=silence + 1.0, release=release,
                    making=_TRIES_OF_A_CONNECTION * elastic.form_seconds, finish=release + elastic.form_seconds,
                    form=max(180.0, release + elastic.form_seconds), load=max(600.0, timeout), step=timeout + _MARGIN_SECONDS,
                    stuck=10.0 if elastic.stuck_seconds == "auto" else elastic.stuck_seconds,
                    stuck_times=10.0 if elastic.stuck_seconds == "auto" else 0.0, files=timeout,
                    storage=elastic.storage_seconds, give_up=elastic.give_up_seconds, wait=elastic.wait_seconds)
        found.check()
        return found

    def check(self) -> None:
        """Raises ConfigError."""
        if self.release <= self.silence:
            raise ConfigError("elastic.abort_seconds", self.release, "more than elastic.silence_seconds together with the silence")
        if self.give_up <= self.release + self.form:
            raise ConfigError("elastic.give_up_seconds", self.give_up, f"more than {self.release + self.form:g}: one recovery may take "
                              "so long")
