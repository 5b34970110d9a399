"""What a model makes of held-out text."""

from __future__ import annotations

from collections.abc import Callable

from actors.dealing import Batch
from actors.formation import Formation
from actors.messages import LossSums
from actors.records import losses_of, scores_of
from orchestrator.config import RunConfig


class Validator:
    """held_out: the batch, read when it is needed first; None: there is none."""

    def __init__(self, config: RunConfig, held_out: Callable[[], Batch | None]):
        self._config, self._held_out, self._batch = config, held_out, None

    def scores(self, formation: Formation) -> dict[str, float] | None:
        """Losses and scores by name, of the working weights as they are. Raises RankFailed."""
        if self._batch is None:
            self._batch = self._held_out()
        if self._batch is None:
            return None
        requests = formation.dealer.requests(self._batch, None, training=False)
        formation.teach(requests[0].microbatches, training=False)
        sums = sum(formation.call("evaluate", [(request,) for request in requests]), LossSums())
        return losses_of(sums, self._batch, self._config) | scores_of(sums, self._batch, self._config)
