"""What TensorBoard's own reader finds in a run's event files."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from actors.telemetry.tensorboard import EventFiles
from tests.told_events import told


def step(number: int, loss: float) -> dict:
    return {"step": number, "time": 100.0 + number, "loss": loss, "tokens_per_second": 10.0, "learning_rate": 1e-3, "mfu": None}


def written(folder: str) -> EventAccumulator:
    found = EventAccumulator(folder)
    found.Reload()
    return found


def test_what_is_told_is_found(tmp_path):
    files = EventFiles(str(tmp_path))
    files.observe("event", told("generation", step=0))
    for number in range(3):
        files.observe("step", step(number, 3.0 - number))
    files.observe("event", told("validation", step=3, time=104.0, loss=1.5, accuracy=0.25))
    files.close()
    found = written(str(tmp_path))
    assert [(entry.step, entry.value, entry.wall_time) for entry in found.Scalars("loss/training")] == [
        (0, 3.0, 100.0), (1, 2.0, 101.0), (2, 1.0, 102.0)]
    assert found.Scalars("validation/accuracy")[0].value == 0.25 and "speed/mfu" not in found.Tags()["scalars"]


def test_a_run_that_goes_back_shows_each_step_once(tmp_path):
    for begin, losses in ((0, (5.0, 4.0, 3.0)), (1, (4.5, 3.5))):
        files = EventFiles(str(tmp_path))
        files.observe("event", told("generation", step=begin))
        for number, loss in enumerate(losses, begin):
            files.observe("step", step(number, loss))
        files.observe("event", told("generation", step=begin + len(losses), seconds=0.5))  # of a loss: nothing is hidden
        files.close()
    assert [(entry.step, entry.value) for entry in written(str(tmp_path)).Scalars("loss/training")] == [(0, 5.0), (1, 4.5), (2, 3.5)]


def test_where_another_coordinator_goes_on_each_step_is_shown_once(tmp_path):
    """It may commit a step anew that the one before had told."""
    files = EventFiles(str(tmp_path))
    files.observe("event", told("generation", step=0))
    for number, loss in enumerate((5.0, 4.0, 3.0)):
        files.observe("step", step(number, loss))
    files.observe("event", told("coordinator_restarted", step=2, members=4))
    files.observe("event", told("validation", step=2, time=101.5, loss=4.5))
    for number, loss in ((2, 2.5), (3, 1.5)):
        files.observe("step", step(number, loss))
    files.close()
    found = written(str(tmp_path))
    assert [(entry.step, entry.value) for entry in found.Scalars("loss/training")] == [(0, 5.0), (1, 4.0), (2, 2.5), (3, 1.5)]
    assert [(entry.step, entry.value) for entry in found.Scalars("validation/loss")] == [(2, 4.5)]


def test_a_coordinator_that_takes_over_keeps_a_score_that_comes_before_its_first_step(tmp_path):
    files = EventFiles(str(tmp_path))
    files.observe("event", told("coordinator_restarted", step=2, members=4))
    files.observe("event", told("validation", step=2, time=101.5, loss=4.5))
    files.close()
    assert [(entry.step, entry.value) for entry in written(str(tmp_path)).Scalars("validation/loss")] == [(2, 4.5)]


def test_what_fails_is_said_and_begun_anew_later(tmp_path, monkeypatch):
    """torch's writer says for ever what its thread met once, as on a disk that was full."""
    files = EventFiles(str(tmp_path))
    files.observe("event", told("generation", step=0))

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files._writer, "add_scalar", full)
    with pytest.raises(OSError):
        files.observe("step", step(0, 3.0))
    files.observe("step", step(1, 2.0))
    files._again_at = 0.0
    files.observe("step", step(2, 1.0))
    files.close()
    assert [(entry.step, entry.value) for entry in written(str(tmp_path)).Scalars("loss/training")] == [(2, 1.0)]
