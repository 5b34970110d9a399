"""`jobs.plan` as a user runs it, and what jobs share on the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import pytest

from actors.telemetry.trace import trace_json
from jobs.cli import JobFailed, Parser, UsageError, arguments, configuration, run
from jobs.plan import main
from orchestrator.config.run_config import ConfigError, dump, parse
from orchestrator.plan.compare import searched_contestants
from orchestrator.schedule.ir.actions import ActionKind, parse_csv
from orchestrator.schedule.ir.spans import Span
from orchestrator.schedule.kinds.registry import KINDS, generate, stages_of
from orchestrator.schedule.search import searched
from orchestrator.schedule.timing.durations import UNIT, Durations, per_chunk
from orchestrator.schedule.timing.simulate import makespan, simulate

ROOT = Path(__file__).parents[2]


def plan(*words):
    return subprocess.run([sys.executable, "-m", "jobs.plan", *words], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          check=False)


def test_csv():
    done = plan("schedule", "--kind", "dualpipe", "--ranks", "2", "--microbatches", "4", "--format", "csv")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ("F0.0,F1.0,F0.1,B1.0,F1.1|B0.0,B1.1,I0.1,W0.1\n"
                           "F1.0,F0.0,F1.1,B0.0,F0.1|B1.0,B0.1,I1.1,W1.1\n")


def test_refusal():
    done = plan("schedule", "--ranks", "3", "--microbatches", "8")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "--ranks = 3: dualpipe takes 1 or an even number\n"


@pytest.mark.parametrize("words, line", [
    (["schedule", "--kind", "zigzag"], f"--kind = zigzag: one of {', '.join(dict.fromkeys([*KINDS, 'searched']))}"),
    (["schedule", "--ranks", "0"], "--ranks = 0: dualpipe takes 1 or an even number"),
    (["schedule", "--ranks", "4", "--microbatches", "9"],
     "--microbatches = 9: dualpipe takes an even number, at least 8 (2 x positions)"),
    (["schedule", "--ranks", "four"], "python -m jobs.plan schedule: argument --ranks: invalid int value: 'four'"),
    (["schedule", "--set", "layout.pipline=2"], "layout.pipline = 2: unknown key; allowed here: pipeline, "),
    (["schedule", "--form", "csv"], "python -m jobs.plan: unrecognized arguments: --form csv"),
    (["schedule", "--config", "/no/such.yaml"], "--config = /no/such.yaml: a readable YAML file (No such file or directory)"),
    (["schedule", "--kind", "zbv", "--chunks", "3"], "--chunks = 3: zbv takes 2"),
    (["schedule", "--kind", "gpipe", "--placement", "v"], "--placement = v: only --kind searched takes it"),
    (["schedule", "--most-activations", "3"], "--most-activations = 3: only --kind searched takes it"),
    (["schedule", "--kind", "searched", "--placement", "w"], "--placement = w: one of both, v, loop"),
    (["schedule", "--kind", "searched", "--ranks", "0"], "--ranks = 0: searched takes at least 1"),
    (["schedule", "--kind", "searched", "--placement", "v", "--chunks", "3"], "--chunks = 3: an even number with placement v"),
    (["schedule", "--forward", "0"], "--forward = 0.0: a finite number (above 0)"),
    (["schedule", "--backward-input", "nan"], "--backward-input = NaN: a finite number (above 0)"),
    (["schedule", "--backward-weight=-1"], "--backward-weight = -1.0: a finite number (above 0)"),
    (["schedule", "--communication", "inf"], "--communication = Infinity: a finite number (at least 0)"),
    (["schedule", "--hop=-0.5"], "--hop = -0.5: a finite number (at least 0)"),
    (["schedule", "--measured", "x.json"], "--measured = x.json: with --format json, svg, trace; csv has no times"),
    (["schedule", "--measured", "/no/x.json", "--format", "svg"], "--measured = /no/x.json: a readable trace (No such file"),
    (["schedule", "--measured", "README.md#3", "--format", "svg"],
     "--measured = README.md#3: the trace of a run's steps, which this file is not"),
    (["compare", "--ranks", "0"], "--ranks = 0: at least 1"),
    (["compare", "--microbatches", "0"], "--microbatches = 0: at least 1"),
    (["compare", "--most-activations", "0"], "--most-activations = 0: at least 1"),
    (["compare", "--hop", "nan"], "--hop = NaN: a finite number (at least 0)"),
    ([], "python -m jobs.plan: the following arguments are required: SUBCOMMAND"),
])
def test_refused_in_one_line(words, line, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run(lambda: main(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1


def test_defaults_are_the_configuration(capsys):
    assert run(lambda: main(["schedule", "--set", "layout.pipeline=4", "--format", "json"])) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["kind"], shown["ranks"], shown["microbatches"], shown["makespan"]) == ("dualpipe", 4, 8, 26)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_format(kind, capsys):
    shown = {}
    for name in ("csv", "json", "svg", "trace"):
        assert run(partial(main, ["schedule", "--kind", kind, "--ranks", "2", "--format", name])) == 0
        shown[name] = capsys.readouterr().out
    schedule = parse_csv(shown["csv"], kind, stages_of(kind, 2))
    data = json.loads(shown["json"])
    assert ([list(map(str, row)) for row in schedule.rows], schedule.microbatches) == (data["rows"], data["microbatches"])
    assert data["kind"] == kind and data["makespan"] == simulate(schedule, per_chunk(UNIT, schedule.stages)).makespan
    assert ElementTree.fromstring(shown["svg"]).get("aria-label").startswith(f"{kind}: 2 ranks")
    events = [event for event in json.loads(shown["trace"])["traceEvents"] if event["ph"] == "X"]
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(1e3 * data["makespan"])
    assert len(events) == sum(map(len, schedule.rows))


def test_costs_are_of_a_whole_rank(capsys):
    words = ["schedule", "--kind", "interleaved_1f1b", "--ranks", "2", "--microbatches", "4", "--chunks", "4", "--format", "json",
             "--forward", "2", "--backward-input", "3", "--backward-weight", "1", "--communication", "0.5", "--hop", "0.25"]
    assert run(lambda: main(words)) == 0
    data = json.loads(capsys.readouterr().out)
    schedule = generate("interleaved_1f1b", 2, 4, 4)
    assert data["spans"][0][0] == [0, (2 + 1.5) / 4]                # 0.5 x (2 + 3 + 1) of communication, half of it a forward's
    chunk = Durations(0.5, 0.75, 0.25, dispatch=0.1875, combine=0.1875, hop=0.25, layers=1)
    assert data["makespan"] == pytest.approx(simulate(schedule, chunk).makespan)


def test_the_configuration_speaks_for_its_own_kind_only(capsys):
    def chunks(*words):
        settings = ("schedule.kind=interleaved_1f1b", "schedule.chunks=4", "model.num_hidden_layers=16")
        given = [word for setting in settings for word in ("--set", setting)]
        assert run(lambda: main(["schedule", "--ranks", "2", "--format", "json", *given, *words])) == 0
        return json.loads(capsys.readouterr().out)["chunks"]

    assert (chunks(), chunks("--chunks", "3")) == (4, 3)
    assert (chunks("--kind", "merged_interleaved_1f1b"), chunks("--kind", "1f1b")) == (2, 1)


def test_searched(capsys):
    words = ["schedule", "--kind", "searched", "--ranks", "2", "--microbatches", "4", "--format", "json"]
    assert run(lambda: main([*words, "--placement", "v", "--most-activations", "2"])) == 0
    shown = capsys.readouterr()
    data, bound = json.loads(shown.out), re.fullmatch(r"searched: makespan (\S+), (\S+) % above (\S+), which .*\n", shown.err)
    assert float(bound[1]) == pytest.approx(data["makespan"], rel=1e-5)
    assert float(bound[2]) == pytest.approx(100 * (float(bound[1]) / float(bound[3]) - 1), abs=0.06)
    assert (data["placement"], data["chunks"], data["microbatches"]) == ("v", 2, 4) and data["relative_activations"] <= 2
    assert any(data["exchange"])                                    # of `schedule.costs`, where a run has it from


def trace(path, schedule, step, scale):
    """A run's trace in which every action took `scale` times the unit, in seconds, without communication."""
    spans = [Span(span.rank, span.lane, name, scale * span.start, scale * span.end)
             for row, spans in zip(schedule.rows, simulate(schedule).rows, strict=True)
             for action, span in zip(row, spans, strict=True) for name in str(action).split("|")]
    path.write_text(trace_json({step: spans, step + 1: spans[:1]}))
    return f"{path}#{step}"


@pytest.mark.parametrize("kind", ["dualpipe", "1f1b", "zb_h1"])
def test_measured_beside_simulated(kind, tmp_path, capsys):
    schedule = generate(kind, 4, 8)
    step = trace(tmp_path / "trace.json", schedule, 7, 0.010)
    words = ["schedule", "--kind", kind, "--ranks", "4", "--measured", step, "--format"]
    makespan = 10 * simulate(schedule).makespan
    assert run(lambda: main([*words, "json"])) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["microbatches"], data["measured"]["step"]) == (8, 7)
    assert (data["makespan"], data["measured"]["makespan"]) == pytest.approx((makespan, makespan))
    assert run(lambda: main([*words, "svg"])) == 0
    picture = capsys.readouterr().out
    assert f"simulated: makespan {makespan:.4g} ms" in picture and f"measured (step 7): makespan {makespan:.4g} ms" in picture
    assert run(lambda: main([*words, "trace"])) == 0
    events = json.loads(capsys.readouterr().out)["traceEvents"]
    names = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert {"rank 0 simulated", "rank 0 measured", "rank 3 simulated", "rank 3 measured"} <= names


def test_what_does_not_go_with_measured(tmp_path, capsys):
    path = trace(tmp_path / "trace.json", generate("1f1b", 2, 4), 7, 1.0)
    words = ["schedule", "--kind", "1f1b", "--ranks", "2", "--format", "svg", "--measured"]
    for more, line in [
        ([path, "--communication", "1"], "--communication = 1.0: not with --measured, whose durations are used"),
        ([path, "--ranks", "4"], f"--measured = {path}: the trace of a pipeline of 4 ranks; this one has 2"),
        ([path, "--microbatches", "5"], f"--measured = {path}: the trace of this schedule (1f1b, 5 microbatches); rank 0 "),
        ([path.replace("#7", "#9")], f"--measured = {path.replace('#7', '#9')}: a step that the trace has: 7, 8"),
        ([path.replace("#7", "")], f"--measured = {path.replace('#7', '')}: the trace of a pipeline of 2 ranks; this one has 1"),
    ]:
        assert run(partial(main, [*words, *more])) == 2
        assert capsys.readouterr().err.startswith(line)


OF_A_RUN = Durations(0.010, 0.010, 0.010, dispatch=0.004, combine=0.004, layers=1)


def recorded(folder, schedule, durations, *settings):
    """A run's folder with the trace of a step, 7, that did one action after the other in these durations (in seconds), of a B
    first I, then W. Returns its makespan."""
    folder.mkdir()
    (folder / "config.yaml").write_text(dump(parse({}, [f"layout.pipeline={schedule.positions}", *settings])))
    parts, of = [], {}
    for row in schedule.rows:
        parts.append([])
        for compute in (compute for action in row for compute in action.computes):
            halves = (ActionKind.BACKWARD_INPUT, ActionKind.BACKWARD_WEIGHT)
            kinds = halves if compute.kind is ActionKind.BACKWARD else (compute.kind,)
            parts[-1] += [replace(compute, kind=kind) for kind in kinds]
            of |= dict.fromkeys(parts[-1][-len(kinds):], compute)
    timeline, spans = simulate(replace(schedule, rows=tuple(map(tuple, parts))), durations), []
    for position, row in enumerate(parts):
        lanes = iter(timeline.lanes[position])
        for compute in row:
            forward = ["attention", "dispatch", "experts", "combine"]
            segments = {"F": forward, "I": forward[::-1]}
            for segment in segments.get(compute.kind, [""]):
                span = next(lanes)
                spans.append(replace(span, label=f"{of[compute]} {segment} 0" if segment else str(of[compute])))
    (folder / "trace.json").write_text(trace_json({7: spans}))
    return timeline.makespan


@pytest.mark.parametrize("slow", [(), (1.0, 4.0)])
def test_what_a_run_would_gain_from_another_schedule(slow, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jobs.plan_run.searched", partial(searched, effort=200_000))
    schedule = generate("dualpipe", 2, 8)
    durations = replace(OF_A_RUN, exchange_slowdown=slow)
    taken = recorded(tmp_path / "run", schedule, durations)
    assert run(lambda: main(["run", str(tmp_path / "run"), "--json"])) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["settings"]["measured_milliseconds"] == pytest.approx(1e3 * taken)
    assert data["settings"]["exchange_slowdown"] == pytest.approx(list(slow))
    first, *others, best = data["schedules"]
    assert first["schedule"] == "dualpipe, as it ran" and not others  # no other kind has its stages there
    assert first["makespan"] == pytest.approx(makespan(schedule, durations) / 0.010, rel=1e-3)
    assert best["schedule"] == "searched" and best["lower_bound"] <= best["makespan"] < first["makespan"]
    assert run(lambda: main(["run", f"{tmp_path / 'run'}#7", "--hop", "1"])) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"step 7 of {tmp_path / 'run'}#7: 2 ranks, 8 microbatches, {1e3 * taken:.4g} ms")
    assert ("rank 1 communicates 4.00 times as long" in text) == bool(slow)


def test_kinds_of_the_same_stages_are_compared(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jobs.plan_run.searched", partial(searched, effort=100_000))
    recorded(tmp_path / "run", generate("1f1b", 2, 4), OF_A_RUN, "schedule.kind=1f1b")
    assert run(lambda: main(["run", str(tmp_path / "run"), "--json"])) == 0
    names = [row["schedule"] for row in json.loads(capsys.readouterr().out)["schedules"]]
    assert names[0] == "1f1b, as it ran" and {"zb_h1", "gpipe"} <= set(names) and names[-1] == "searched"


def test_runs_without_such_a_step_are_refused_in_one_line(tmp_path, capsys):
    recorded(tmp_path / "run", generate("1f1b", 2, 4), OF_A_RUN, "schedule.kind=1f1b")
    recorded(tmp_path / "other", generate("1f1b", 2, 4), OF_A_RUN, "schedule.kind=zb_h1")
    (tmp_path / "run" / "trace.json").rename(tmp_path / "trace.json")
    path = f"{tmp_path}/run"
    for words, line in [
        ([path], f"run = {path}: the folder of a run with a trace.json, as telemetry.trace_steps makes one (No such"),
        ([f"{tmp_path}/other#5"], f"run = {tmp_path}/other#5: a step that the trace has: 7"),
        ([f"{tmp_path}/other"], f"run = {tmp_path}/other: the trace of this schedule (zb_h1, 4 microbatches)"),
        ([f"{tmp_path}/none"], "--config = "), ([path, "--hop", "-1"], "--hop = -1.0: a finite number (at least 0)")]:
        assert run(partial(main, ["run", *words])) == 2
        error = capsys.readouterr().err
        assert error.startswith(line) and error.count("\n") == 1, error


def test_compare(capsys, monkeypatch):
    monkeypatch.setattr("jobs.plan.searched_contestants", partial(searched_contestants, effort=100_000))
    assert run(lambda: main(["compare", "--ranks", "4", "--microbatches", "8", "--most-activations", "3"])) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "4 ranks, 8 microbatches, communication 0, hop 0; F = a forward on all layers of a rank"
    assert lines[2].split()[:2] == ["schedule", "makespan"]
    makespans = dict(line.split()[:2] for line in lines if line.startswith(("1f1b", "dualpipe ")))
    assert makespans == {"dualpipe": "26.00", "1f1b": "33.00"}
    assert sum("no schedule with the same choices is below" in line for line in lines) == 2
    assert run(lambda: main(["compare", "--ranks", "3", "--microbatches", "5", "--communication", "0.5", "--json"])) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["settings"] == {"ranks": 3, "microbatches": 5, "communication": 0.5, "hop": 0}
    assert {"dualpipe", "dualpipev"} <= data["refused"].keys()
    shown = {row["schedule"]: row for row in data["schedules"]}
    assert shown["1f1b"]["exposed"] > 0 and shown["1f1b"]["lower_bound"] is None
    assert any(name.startswith("searched within 5 activations") and row["above_bound"] >= 0 for name, row in shown.items())


def test_output_file(tmp_path, capsys):
    path = tmp_path / "schedule.svg"
    assert run(lambda: main(["schedule", "--ranks", "4", "--format", "svg", "--output", str(path)])) == 0
    assert ElementTree.parse(path).getroot().tag.endswith("svg")
    assert run(lambda: main(["schedule", "--output", str(tmp_path / "no" / "file")])) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("cannot be written (No such file or directory)\n")


def test_a_reader_that_goes_away_ends_the_job_quietly():
    with subprocess.Popen([sys.executable, "-m", "jobs.plan", "schedule"], cwd=ROOT, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 1)


@pytest.mark.parametrize("error, code, line", [
    (ConfigError("a.b", 3, "at most 2"), 2, "a.b = 3: at most 2\n"),
    (UsageError("no such job"), 2, "no such job\n"),
    (JobFailed("step 3 failed:\nrank 1 is gone"), 1, "step 3 failed: rank 1 is gone\n"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_exit_codes(error, code, line, capsys):
    def job():
        raise error

    assert run(job) == code
    assert capsys.readouterr().err == line


def test_what_nobody_foresaw_keeps_its_traceback():
    def job():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(job)
    assert run(lambda: None) == 0
    assert run(lambda: 1) == 1


def test_what_every_job_takes(tmp_path):
    (tmp_path / "run.yaml").write_text("training: {steps: 7}\n")
    parser = Parser(prog="job")
    arguments(parser)
    options = parser.parse_args(["--config", str(tmp_path / "run.yaml"), "--set", "layout.pipeline=4", "--set", "run.seed=5"])
    config = configuration(options)
    assert (config.training.steps, config.layout.pipeline, config.run.seed) == (7, 4, 5)
