"""The audit of runs that really ran: clean ones, and such whose ranks were dealt other sequences, or whose ledger was changed."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.data.batching import Batch, Dealer
from actors.data.dataset import Dataset
from actors.files.run_folder import RunFolder
from actors.hosts.processes import ProcessRanks
from actors.protocol.trainer import Sources, Trainer
from jobs import audit, cli, status
from orchestrator.config.run_config import parse
from orchestrator.config.training import BatchRamp, TrainingSection
from orchestrator.data import order
from orchestrator.data.ledger import read
from orchestrator.data.order import SplitShape
from tests.actors import corpus as small
from tests.actors.runtime import LENGTH, TIMEOUT_SECONDS, configured, host

STEPS, SEED_OF_TEXT = 7, 5
OVERRIDES = ("model.vocab_size=257", f"training.steps={STEPS}", "training.batch_ramp={start_sequences: 4, steps: 2}",
             "data.shuffle_window=3", "layout.expert=1", "layout.data=1")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Dataset:
    """Three shards."""
    return small.make(tmp_path_factory.mktemp("shards"), small.texts(SEED_OF_TEXT, 400), small.texts(6, 3), LENGTH)


@pytest.fixture(scope="module")
def config(dataset):
    return configured("PP2", *OVERRIDES, f"data.path={dataset.path}")[0]


@pytest.fixture(scope="module")
def two_ranks(config):
    with ProcessRanks(config, 2, host, start_method="forkserver") as found:
        yield found


class FromShards:
    """The batches of a run, as the feed has them."""

    def __init__(self, config, dataset, step):
        self._config, self._dataset, self._step = config, dataset, step

    def next(self):
        step, self._step = self._step, self._step + 1
        return batch_of(self._config, self._dataset, rows_of(self._config, self._dataset, step), step)

    def close(self):
        pass


def rows_of(config, dataset, step) -> list[int]:
    first, count = order.first_position(config.training, step), order.batch_size(config.training, step)
    return order.sequences_of(dataset.train.shape, config.run.seed, config.data.shuffle_window, first, count)


def batch_of(config, dataset, rows, step):
    return Batch(step, dataset.read_rows(dataset.train, rows), dataset.valid_tokens(dataset.train, rows))


@pytest.fixture(scope="module")
def run(two_ranks, config, dataset, tmp_path_factory):
    """Train in a new folder; `other[step]`: rows that ranks are dealt in that step instead of its own."""
    def go(other: dict[int, list[int]] | None = None, edit=lambda tokens: tokens) -> Path:
        deal = Dealer.requests

        def requests(self, batch, *arguments, training, **options):
            if training and batch.step in (other or {}):
                batch = batch_of(config, dataset, other[batch.step], batch.step)
                batch = replace(batch, tokens=edit(batch.tokens))
            return deal(self, batch, *arguments, training=training, **options)

        folder = tmp_path_factory.mktemp("runs")
        layout = configured("PP2", *OVERRIDES)[1]
        two_ranks.start("configure", [(config,)] * layout.size).results(TIMEOUT_SECONDS)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Dealer, "requests", requests)
            sources = Sources(lambda step: FromShards(config, dataset, step), lambda: None)
            assert Trainer(config, layout, two_ranks, RunFolder(str(folder), "run"), sources).run().step == STEPS
        return folder / "run"

    return go


@pytest.fixture(scope="module")
def clean(run) -> Path:
    return run()


@pytest.fixture
def copy(clean, tmp_path):
    """A run without fault whose ledger a test may change: the folder, and the lines of its steps, without the hashes that would
    tell of any change."""
    shutil.copytree(clean, tmp_path / "copy")
    steps = read((clean / "ledger.jsonl").read_text().splitlines()).steps
    return tmp_path / "copy", [json.dumps({key: value for key, value in line.items() if key != "previous"}) for line in steps]


def told(folder: Path, config, dataset) -> list[str]:
    return [problem.text for problem in audit.audit(str(folder), config, dataset).problems]


def command(capsys, *words: str) -> tuple[int, str, str]:
    before, sys.argv = sys.argv, ["status", *map(str, words)]
    try:
        code = cli.run(status.main)
    finally:
        sys.argv = before
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# ---- runs whose ranks were dealt something else

def test_a_run_is_clean_and_only_the_shards_needed_are_read(clean, config, dataset):
    found = audit.audit(str(clean), config, dataset)
    assert found.problems == () and found.steps == STEPS
    assert found.sequences == order.first_position(config.training, STEPS) == 4 + 6 + 5 * 8
    needed = {row // (dataset.train.rows_per_group * dataset.train.groups_per_shard)
              for step in range(STEPS) for row in rows_of(config, dataset, step)}
    assert found.shards == len(needed) < len(dataset.train.shards) == 3


def test_a_dropped_sequence(run, config, dataset):
    rows = rows_of(config, dataset, 3)
    assert told(run({3: rows[:2] + rows[3:]}), config, dataset) == [f"step 3: sequence {rows[2]} was dropped"]


def test_two_dropped_sequences(run, config, dataset):
    rows = rows_of(config, dataset, 3)
    (text,) = told(run({3: rows[2:]}), config, dataset)
    assert text in {f"step 3: sequence {a} was dropped; sequence {b} was dropped" for a, b in (rows[:2], rows[1::-1])}


def test_a_doubled_sequence(run, config, dataset):
    rows = rows_of(config, dataset, 3)
    assert told(run({3: [*rows, rows[2]]}), config, dataset) == [f"step 3: sequence {rows[2]} was used twice"]


def test_a_dropped_sequence_that_another_makes_up_for(run, config, dataset):
    rows = rows_of(config, dataset, 3)
    assert told(run({3: [*rows[:-1], rows[0]]}), config, dataset) == [
        f"step 3: sequence {rows[-1]} was dropped; sequence {rows[0]} was used twice"]


def test_two_sequences_swapped_between_steps(run, config, dataset):
    third, fifth = rows_of(config, dataset, 3), rows_of(config, dataset, 5)
    assert told(run({3: [fifth[0], *third[1:]], 5: [third[0], *fifth[1:]]}), config, dataset) == [
        f"step 3: sequence {third[0]} was dropped; sequence {fifth[0]} of step 5 was used too",
        f"step 5: sequence {fifth[0]} was dropped; sequence {third[0]} of step 3 was used too"]


def test_a_batch_that_ran_twice(run, config, dataset):
    assert told(run({3: rows_of(config, dataset, 2)}), config, dataset) == ["step 3: the sequences of step 2 were run"]


def test_other_tokens(run, config, dataset):
    def edit(tokens):
        return np.where(np.arange(tokens.size).reshape(tokens.shape) == 0, (tokens + 1) % 256, tokens).astype(np.int32)

    (text,) = told(run({3: rows_of(config, dataset, 3)}, edit), config, dataset)
    assert text.startswith("step 3: sequences were run that are not its own: digest ")


def test_who_runs_what_and_in_which_order_is_not_a_problem(run, config, dataset):
    assert told(run({3: rows_of(config, dataset, 3)[::-1]}), config, dataset) == []


# ---- ledgers that were changed

@pytest.mark.parametrize("change, problems", [
    (lambda lines: lines[:3] + lines[4:], ["step 3: no line"]),
    (lambda lines: lines[:2] + lines[5:], ["steps 2 to 4: no line"]),
    (lambda lines: lines[1:], ["step 0: no line"]),
    (lambda lines: lines[:-1], ["step 6: no line, though step 6 has left metrics"]),
    (lambda lines: lines[:4] + lines[3:], ["step 3: one more line, after that of step 3"]),
    (lambda lines: [*lines, lines[2]], ["step 2: one more line, after that of step 6"]),
    (lambda lines: [*lines[:2], lines[3], lines[2], *lines[4:]],
     ["step 2: no line", "step 2: one more line, after that of step 3"]),
    (lambda lines: [*lines[:2], "{}", *lines[2:]], ["line 3 of the ledger is not that of a step"]),
    (lambda lines: [*lines[:2], "3", *lines[2:]], ["line 3 of the ledger is not that of a step"]),
    (lambda lines: [*lines[:2], lines[2].replace('"step": 2', '"step": true'), *lines[3:]],
     ["line 3 of the ledger is not that of a step", "step 2: no line"]),
])
def test_lines_removed_doubled_or_moved(copy, config, dataset, change, problems):
    folder, lines = copy
    (folder / "ledger.jsonl").write_text("".join(line + "\n" for line in change(lines)))
    assert told(folder, config, dataset) == problems


def changed(line: str, **values) -> str:
    return json.dumps(json.loads(line) | values)


def test_a_range_that_the_configuration_does_not_give(copy, config, dataset):
    folder, lines = copy
    first = order.first_position(config.training, 3)
    for other, problems in [
            ({"first": first + 1}, 2), ({"count": 7}, 2), ({"first": -1}, 1), ({"count": 0}, 1), ({"count": 10**12}, 1)]:
        (folder / "ledger.jsonl").write_text("\n".join([*lines[:3], changed(lines[3], **other), *lines[4:]]) + "\n")
        found = told(folder, config, dataset)
        assert len(found) == problems and found[0].endswith(f"by the configuration {first} to {first + 7}"), found


def test_a_change_of_batch_size_in_mid_run_is_told(clean, config, dataset):
    other = config.model_copy(update={"training": config.training.model_copy(update={"batch_sequences": 9})})
    found = told(clean, other, dataset)
    assert any(text.startswith("step 2: positions 10 to 17 of the order, by the configuration") for text in found)


def test_what_a_crash_left_of_a_line_is_no_line(copy, config, dataset):
    folder, lines = copy
    (folder / "ledger.jsonl").write_text("".join(line + "\n" for line in lines[:-1]) + lines[-1][:20])
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": step}) + "\n" for step in range(STEPS - 1)))
    assert told(folder, config, dataset) == []


def test_lines_that_are_read_in_several_pieces(clean, config, dataset, monkeypatch):
    monkeypatch.setattr(audit, "_PIECE_BYTES", 100)
    assert told(clean, config, dataset) == []


# ---- the command

def test_the_command_on_a_clean_run(clean, capsys):
    code, out, err = command(capsys, "audit", clean)
    assert (code, err) == (0, "") and len(out.splitlines()) == 1
    assert out.startswith("audit: each sequence was used exactly once: 7 steps, 50 sequences, ")
    code, out, _ = command(capsys, "audit", clean, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["clean"] and found["problems"] == [] and (found["steps"], found["sequences"]) == (7, 50)


def test_the_command_on_a_bad_run(copy, capsys):
    folder, lines = copy
    (folder / "ledger.jsonl").write_text("\n".join([lines[0], changed(lines[1], digest="0" * 32), *lines[3:]]) + "\n")
    code, out, _ = command(capsys, "audit", folder)
    assert code == 1 and out.splitlines()[1] == "step 2: no line"
    assert out.splitlines()[0].startswith("step 1: ") and out.splitlines()[2].startswith("audit: 2 problems: ")
    code, out, _ = command(capsys, "audit", folder, "--json")
    assert code == 1 and [(p["step"], p["kind"]) for p in json.loads(out)["problems"]] == [(1, "sequences"), (2, "order")]


def test_what_cannot_be_audited_is_refused_in_one_line(clean, copy, dataset, tmp_path, capsys):
    code, out, err = command(capsys, "audit", tmp_path / "none")
    assert (code, out) == (1, "") and err.count("\n") == 1 and "no run" in err
    moved = tmp_path / "moved"
    shutil.copytree(dataset.path, moved)
    shards = {row // (64 * dataset.train.groups_per_shard)
              for step in range(STEPS) for row in rows_of_clean(clean, dataset, step)}
    for number, shard in enumerate(dataset.train.shards):
        path = moved / shard.name
        if number in shards:
            path.write_bytes(path.read_bytes()[:-1])
        else:
            path.unlink()
    code, out, err = command(capsys, "audit", clean, "--set", f"data.path={moved}")
    assert (code, out) == (1, "") and "truncated" in err and err.count("\n") == 1
    for number in shards:
        shutil.copy(Path(dataset.path) / dataset.train.shards[number].name, moved / dataset.train.shards[number].name)
    assert command(capsys, "audit", clean, "--set", f"data.path={moved}")[0] == 0  # what is not needed may be missing
    folder, _ = copy
    (folder / "config.yaml").unlink()
    code, out, err = command(capsys, "audit", folder)
    assert (code, out) == (1, "") and "config.yaml" in err


def rows_of_clean(folder, dataset, step):
    return rows_of(parse(yaml.safe_load((folder / "config.yaml").read_text())), dataset, step)


def test_the_state_of_a_run(clean, capsys):
    code, out, err = command(capsys, clean)
    assert (code, err) == (0, "")
    found = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert found["run"] == f"{clean}: finished" and found["steps"] == "7 of 7 committed" and found["checkpoints"] == "step 7"
    code, out, _ = command(capsys, clean, "--json", "--set", "training.steps=9")
    state = json.loads(out)
    assert (state["steps_committed"], state["steps"], state["newest_step"]["step"]) == (7, 9, 6)
    with RunFolder(str(clean.parent), clean.name).held():
        assert json.loads(command(capsys, clean, "--json")[1])["running"] is True
    assert json.loads(command(capsys, clean, "--json")[1])["running"] is False


def test_a_checkpoint_without_a_manifest_does_not_count(copy, capsys):
    folder, _ = copy
    shutil.copytree(folder / "checkpoints" / "step-00000007", folder / "checkpoints" / "step-00000009")
    assert json.loads(command(capsys, folder, "--json")[1])["checkpoints"] == [7, 9]
    (folder / "checkpoints" / "step-00000009" / "manifest.json").unlink()
    assert json.loads(command(capsys, folder, "--json")[1])["checkpoints"] == [7]


def test_on_a_run_of_the_real_system(cluster, undisturbed):
    done = cluster.run("-m", "jobs.status", "audit", str(undisturbed))
    assert done.returncode == 0 and done.stdout.startswith("audit: each sequence was used exactly once: 14 steps"), done.stderr


# ---- parts

@given(st.integers(1, 40), st.none() | st.tuples(st.integers(1, 40), st.integers(1, 12)), st.integers(0, 2000))
@settings(max_examples=150, deadline=None)
def test_the_step_of_a_position(batch, ramp, position):
    training = TrainingSection(batch_sequences=batch, batch_ramp=None if ramp is None else BatchRamp(
        start_sequences=min(ramp[0], batch), steps=ramp[1]))
    step, end = 0, order.batch_size(training, 0)
    while end <= position:
        step += 1
        end += order.batch_size(training, step)
    assert audit.step_at(training, position) == step


@given(st.lists(st.integers(0, (1 << 128) - 1), min_size=8, max_size=8, unique=True), st.data())
@settings(max_examples=200, deadline=None)
def test_what_is_said_of_a_sum_accounts_for_it(digests, data):
    own, known = {d: n for n, d in enumerate(digests[:5])}, {d: n for n, d in enumerate(digests)}
    gone = data.draw(st.lists(st.sampled_from(digests[:5]), max_size=2, unique=True))
    came = data.draw(st.lists(st.sampled_from(digests), max_size=2 - len(gone)))
    surplus = (sum(came) - sum(gone)) % (1 << 128)
    if surplus == 0:
        return
    found = audit.explain(surplus, own, known)
    if len(came) == 2 and not set(came) <= own.keys():
        return
    assert found is not None
    value = {n: d for d, n in known.items()}
    assert (sum(value[n] for n in found[1]) - sum(value[n] for n in found[0])) % (1 << 128) == surplus


def test_memory_does_not_grow_with_the_run(dataset):
    """Rows of the windows under way are kept, no others, however many epochs go by."""
    config = configured("PP2", *OVERRIDES, "training.batch_sequences=97", "training.batch_ramp=null")[0]
    expected = audit._Expected(config, dataset)
    most = 0
    for step in range(2 * dataset.train.sequences // 97):
        expected._rows(order.first_position(config.training, step), 97)
        expected._digests.of(rows_of(config, dataset, step))
        most = max(most, len(expected._digests._groups))
    assert expected.shards == 3 and most <= 2 * 2 * 3 < SplitShape(dataset.train.sequences, 64).groups
