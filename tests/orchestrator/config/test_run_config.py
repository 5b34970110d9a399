"""The run configuration: what is taken, and that each refusal is one line with key, value and what is allowed."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.config.run_config import ConfigError, RunConfig, dump, load, parse
from orchestrator.schedule.ir.stages import Stages
from orchestrator.schedule.kinds.registry import KINDS

CONFIGS = sorted((Path(__file__).parents[3] / "jobs" / "configs").glob("*.yaml"))


def refused(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse({}, overrides)
    return str(caught.value)


@pytest.mark.parametrize("overrides, line", [
    # keys
    (["modl.x=3"], ('modl = {"x": 3}: unknown key; allowed here: run, model, data, training, precision, optimizer, layout, placement, '
                   "schedule, topology, elastic, checkpoint, telemetry")),
    (["run.nme=a"], "run.nme = a: unknown key; allowed here: name, directory, seed"),
    (["training.batch_ramp={start_sequence: 1, steps: 2}"],
     "training.batch_ramp.start_sequence = 1: unknown key; allowed here: start_sequences, steps"),
    (["training.batch_ramp.steps=2"], "training.batch_ramp.start_sequences = null: must be given: an integer (above 0)"),
    (["layout.expert=2", "layout.expert.x=3"], "layout.expert.x = 3: unknown key: expert is not a section"),
    (["training.steps"], "--set = training.steps: dotted.key=value"),
    (["=3"], "--set = =3: dotted.key=value"),
    (["training..steps=3"], "--set = training..steps=3: dotted.key=value"),
    (["training.steps=[3"], "training.steps = [3: a YAML value"),
    (["training.steps=!!int x"], "training.steps = !!int x: a YAML value"),
    (["training.steps=" + "[" * 3000], f"training.steps = {'[' * 120}...: a YAML value"),
    (["training.steps=&a [*a]"], "training.steps = (a value that holds itself): an integer (above 0)"),
    (['{"a\nb": 1}=3'], ('"{\\"a\\nb\\": 1}" = 3: unknown key; allowed here: run, model, data, training, precision, optimizer, layout, '
                        "placement, schedule, topology, elastic, checkpoint, telemetry")),
    # types
    (["training.steps=x"], "training.steps = x: an integer (above 0)"),
    (["training.steps=1.5"], "training.steps = 1.5: an integer (above 0)"),
    (["training.steps=1e3"], "training.steps = 1e3: an integer (above 0)"),
    (["training.steps=true"], "training.steps = true: an integer (above 0)"),
    (["training.steps="], "training.steps = null: an integer (above 0)"),
    (['training.steps="3"'], "training.steps = 3: an integer (above 0)"),
    (["model.norm_topk_prob=1"], "model.norm_topk_prob = 1: true or false"),
    (["model.q_lora_rank=x"], "model.q_lora_rank = x: an integer (above 0) or null"),
    (["optimizer.epsilon=1e-4x"], "optimizer.epsilon = 1e-4x: a finite number (above 0)"),
    (["optimizer.epsilon=.inf"], "optimizer.epsilon = Infinity: a finite number (above 0)"),
    (["optimizer.epsilon=.nan"], "optimizer.epsilon = NaN: a finite number (above 0)"),
    (["layout.expert=x"], "layout.expert = x: an integer (above 0) or auto"),
    (["layout.group_parts=0"], "layout.group_parts = 0: an integer (at least 1)"),
    (["layout.group_parts=5"], "layout.group_parts = 5: at most 4: model.n_routed_experts / model.n_group"),
    (["placement.every=-1"], "placement.every = -1: an integer (at least 0)"),
    (["placement.least_gain=-0.1"], "placement.least_gain = -0.1: a finite number (at least 0)"),
    (["placement.evry=1"], "placement.evry = 1: unknown key; allowed here: every, least_gain"),
    (["layout.expert=0"], "layout.expert = 0: an integer (above 0) or auto"),
    (["layout.data=[1]"], "layout.data = [1]: an integer (above 0) or auto"),
    (["layout.shape=[1]"], "layout.shape = [1]: a list of two integers (above 0) or auto"),
    (["layout.shape=[1,0]"], "layout.shape = [1, 0]: a list of two integers (above 0) or auto"),
    (["layout.shape=[1,2,3]"], "layout.shape = [1, 2, 3]: a list of two integers (above 0) or auto"),
    (["layout.layers_per_stage=[1,a]"], 'layout.layers_per_stage = [1, "a"]: a list of integers (above 0) or auto'),
    (["telemetry.trace_steps=[1,-1]"], "telemetry.trace_steps = [1, -1]: a list of integers (at least 0)"),
    (["training.dtype=fp8"], "training.dtype = fp8: one of float32, bfloat16, float64"),
    (["training.dispatch_precision=e5m2"], "training.dispatch_precision = e5m2: one of same, float8"),
    (["layout.hops=3"], "layout.hops = 3: one of auto, 1, 2"),
    (["schedule.kind=dualpipes"], ("schedule.kind = dualpipes: one of dualpipe, dualpipev, zb_h1, zbv, 1f1b, interleaved_1f1b, "
                                   "merged_interleaved_1f1b, gpipe, searched")),
    (["schedule.chunks=0"], "schedule.chunks = 0: an integer (above 0) or auto"),
    (["schedule.placement=w"], "schedule.placement = w: one of both, v, loop, auto"),
    (["schedule.most_activations=0.5"], "schedule.most_activations = 0.5: a finite number (at least 1) or auto"),
    (["schedule.costs.hop=-1"], "schedule.costs.hop = -1: a finite number (at least 0)"),
    (["schedule.costs.hops=1"], ("schedule.costs.hops = 1: unknown key; allowed here: forward, backward_input, backward_weight, "
                                 "dispatch, combine, hop")),
    (["model.tie_word_embeddings=true"], "model.tie_word_embeddings = true: false"),
    (["training.batch_ramp=3"], "training.batch_ramp = 3: null or a section with keys start_sequences, steps"),
    (["run=[1]"], "run = [1]: a section with keys name, directory, seed"),
    (["run.name=a b"], "run.name = a b: text of letters, digits and any of . _ -, the first a letter or a digit"),
    (['run.name="a\\nb"'], 'run.name = "a\\nb": text of letters, digits and any of . _ -, the first a letter or a digit'),
    (['run.name=""'], 'run.name = "": text of letters, digits and any of . _ -, the first a letter or a digit'),
    # ranges
    (["data.validation_fraction=0.5"], "data.validation_fraction = 0.5: a finite number (above 0, below 0.5)"),
    (["elastic.copies=3"], "elastic.copies = 3: an integer (at least 0, at most 2)"),
    (["elastic.min_nodes=0"], "elastic.min_nodes = 0: an integer (at least 1)"),
    (["elastic.max_nodes=0"], "elastic.max_nodes = 0: an integer (above 0) or auto"),
    (["elastic.cool_down_seconds=-1"], "elastic.cool_down_seconds = -1: a finite number (at least 0)"),
    (["elastic.wait_seconds=0"], "elastic.wait_seconds = 0: a finite number (above 0) or null"),
    (["topology.virtual_nodes=100000000"], "topology.virtual_nodes = 100000000: an integer (at least 0, at most 16384)"),
    (["topology.ranks_per_node=1025"], "topology.ranks_per_node = 1025: an integer (above 0, at most 1024) or auto"),
    (["topology.labels=3"], "topology.labels = 3: a mapping of text to text"),
    (["topology.labels={pool: 3}"], 'topology.labels = {"pool": 3}: a mapping of text to text'),
    (["telemetry.port=65536"], "telemetry.port = 65536: an integer (at least 0, at most 65535) or auto"),
    # rules that span keys
    (["elastic.min_nodes=3", "elastic.max_nodes=2"], "elastic.max_nodes = 2: at least elastic.min_nodes = 3"),
    (["elastic.silence_seconds=0.6"],
     "elastic.silence_seconds = 0.6: above 0.6: 3 x elastic.beat_seconds, for a beat may be late"),
    (["elastic.silence_seconds=1.0", "elastic.beat_seconds=0.5"],
     "elastic.silence_seconds = 1.0: above 1.5: 3 x elastic.beat_seconds, for a beat may be late"),
    (["model.n_group=3"], "model.n_group = 3: a divisor of model.n_routed_experts = 16"),
    (["model.n_group=16", "model.num_experts_per_tok=2"],
     "model.n_group = 16: at most 8: a group is scored by its two best experts"),
    (["model.topk_group=5"], "model.topk_group = 5: at most model.n_group = 4"),
    (["model.num_experts_per_tok=9"], "model.num_experts_per_tok = 9: at most 8, the experts of model.topk_group = 2 groups"),
    (["model.qk_rope_head_dim=7"], "model.qk_rope_head_dim = 7: an even number: rotary pairs"),
    (["model.first_k_dense_replace=5"], "model.first_k_dense_replace = 5: at most model.num_hidden_layers = 4"),
    (["layout.pipeline=3"], "layout.pipeline = 3: dualpipe takes 1 or an even number"),
    (["layout.pipeline=6"], "layout.pipeline = 6: at most model.num_hidden_layers = 4"),
    (["layout.pipeline=3", "schedule.kind=searched", "schedule.placement=both"],
     "layout.pipeline = 3: searched takes 1 or an even number with placement both"),
    (["layout.pipeline=4", "schedule.kind=zbv"],
     "layout.pipeline = 4: at most 2: zbv has 2 stages on each position, model.num_hidden_layers = 4"),
    (["layout.pipeline=1", "schedule.kind=zbv", "model.num_hidden_layers=1"],
     "model.num_hidden_layers = 1: at least 2: zbv has 2 stages on each position"),
    (["schedule.kind=interleaved_1f1b", "schedule.chunks=3"],
     ("schedule.chunks = 3: at most 2: layout.pipeline x schedule.chunks = 6 stages, model.num_hidden_layers = 4")),
    (["schedule.chunks=1"], "schedule.chunks = 1: auto: dualpipe leaves no choice"),
    (["schedule.kind=zbv", "schedule.chunks=2"], "schedule.chunks = 2: auto: zbv leaves no choice"),
    (["schedule.kind=searched", "schedule.chunks=2"], "schedule.chunks = 2: auto, unless schedule.placement is given too"),
    (["schedule.kind=searched", "schedule.placement=v", "schedule.chunks=3"],
     "schedule.chunks = 3: an even number with placement v"),
    (["schedule.kind=searched", "schedule.placement=both", "schedule.chunks=2"], "schedule.chunks = 2: 1 with placement both"),
    (["schedule.placement=v"], "schedule.placement = v: auto: dualpipe leaves no choice"),
    (["schedule.kind=zbv", "schedule.most_activations=4"], "schedule.most_activations = 4.0: auto: zbv leaves no choice"),
    (["schedule.kind=zbv", "layout.layers_per_stage=[2,2]"],
     "layout.layers_per_stage = [2, 2]: 4 positive numbers whose sum is model.num_hidden_layers = 4"),
    (["layout.pipeline=4", "layout.shape=[3,1]"], "layout.shape = [3, 1]: [c, k] with c a divisor of layout.pipeline = 4"),
    (["layout.expert=4", "layout.shape=[1,3]"], "layout.shape = [1, 3]: [c, k] with k a divisor of layout.expert = 4"),
    (["layout.layers_per_stage=[4]"],
     "layout.layers_per_stage = [4]: 2 positive numbers whose sum is model.num_hidden_layers = 4"),
    (["layout.layers_per_stage=[1,4]"],
     "layout.layers_per_stage = [1, 4]: 2 positive numbers whose sum is model.num_hidden_layers = 4"),
    (["training.dispatch_precision=float8", "model.hidden_size=192"],
     "training.dispatch_precision = float8: same: model.hidden_size = 192 is not a multiple of 128, the channels of a scale"),
    (["topology.virtual_nodes=2"], "topology.ranks_per_node = auto: a number when topology.virtual_nodes is set"),
    (["topology.virtual_nodes=2", "topology.ranks_per_node=1", "topology.labels={pool: a}"],
     'topology.labels = {"pool": "a"}: nothing with virtual nodes: topology.virtual_nodes = 2, 0 takes those that Ray has'),
    (["topology.virtual_nodes=2", "topology.ranks_per_node=1", "topology.resource=NPU"],
     "topology.resource = NPU: auto with virtual nodes: topology.virtual_nodes = 2, 0 takes those that Ray has"),
    (["topology.labels={pool: a b}"],
     "topology.labels.pool = a b: a label's value, !value, in(value, ...) or !in(value, ...)"),
    (["training.batch_ramp={start_sequences: 65, steps: 2}"],
     "training.batch_ramp.start_sequences = 65: at most training.batch_sequences = 64"),
    (["optimizer.final_learning_rate=1.0"], "optimizer.final_learning_rate = 1.0: at most optimizer.learning_rate = 0.00022"),
    (["data.sequence_length=4097"], "data.sequence_length = 4097: at most model.max_position_embeddings = 4096"),
])
def test_refusal(overrides, line):
    assert refused(*overrides) == line


@pytest.mark.parametrize("overrides, stages", [
    ([], Stages("both", 2)), (["layout.pipeline=1"], Stages("both", 1)), (["schedule.kind=zbv"], Stages("v", 2, 2)),
    (["schedule.kind=dualpipev", "layout.pipeline=1"], Stages("v", 1, 2)),
    (["schedule.kind=1f1b", "layout.pipeline=3"], Stages("loop", 3)),
    (["schedule.kind=interleaved_1f1b"], Stages("loop", 2, 2)),
    (["schedule.kind=merged_interleaved_1f1b", "schedule.chunks=4", "layout.pipeline=1"], Stages("loop", 1, 4)),
    (["schedule.kind=searched"], Stages("both", 2)), (["schedule.kind=searched", "layout.pipeline=3"], Stages("loop", 3)),
    (["schedule.kind=searched", "schedule.placement=v"], Stages("v", 2, 2)),
    (["schedule.kind=searched", "schedule.placement=v", "schedule.chunks=4", "layout.pipeline=1"], Stages("v", 1, 4)),
    (["schedule.kind=searched", "schedule.placement=loop", "schedule.chunks=2"], Stages("loop", 2, 2))])
def test_where_the_stages_of_a_kind_live(overrides, stages):
    assert parse({}, overrides).stages == stages


def test_a_refusal_passes_from_process_to_process():
    refused = pickle.loads(pickle.dumps(ConfigError("training.steps", 0, "at least 1")))
    assert (refused.key, refused.value, refused.allowed) == ("training.steps", 0, "at least 1")
    assert str(refused) == "training.steps = 0: at least 1"


def test_all_kinds_can_be_configured():
    for kind in (*KINDS, "searched"):
        assert parse({}, [f"schedule.kind={kind}"]).schedule.kind == kind


def test_a_misspelt_key_is_named_rather_than_the_missing_one():
    assert refused("model.rope_scaling={fctor: 4.0, original_max_position_embeddings: 8}").startswith(
        "model.rope_scaling.fctor = 4.0: unknown key; allowed here: type, factor, ")


def test_keys_that_are_no_text_and_trees_that_are_no_mapping():
    for tree, start in [({1: 2}, "1 = 2: unknown key"), ({"run": {True: 3}}, "run.1 = 3: unknown key"),
                        ([1], "configuration = [1]: a mapping"), (None, "configuration = null: a mapping")]:
        with pytest.raises(ConfigError) as caught:
            parse(tree)
        assert str(caught.value).startswith(start)


@given(st.sampled_from([(section, key) for section, field in RunConfig.model_fields.items()
                        for key in field.annotation.model_fields]),
       st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)))
@settings(max_examples=150, deadline=None)
def test_any_value_is_taken_or_refused_in_one_line_that_names_its_key(place, value):
    section, key = place
    try:
        parse({section: {key: value}})
    except ConfigError as error:
        line = str(error)
        assert line.isprintable() and len(line) < 700 and "input should" not in line.lower()
        assert error.allowed and (error.key.startswith(f"{section}.") or error.key.startswith(("model.", "layout.")))


@pytest.mark.parametrize("label", ["\x1f", "x\ny", "a\u2028b"])
def test_what_is_quoted_stays_on_the_line(label):
    with pytest.raises(ConfigError) as caught:
        parse({"topology": {"labels": {label: ""}}})
    assert str(caught.value).isprintable() and str(caught.value).endswith(f"not {label.encode('unicode_escape').decode()}")


@pytest.mark.parametrize("text, value", [
    ("1e-4", 1e-4), ("2E5", 2e5), ("+1.5e-3", 1.5e-3), (".5e1", 5.0), ("0.25", 0.25), ("1", 1.0)])
def test_numbers_as_people_write_them(text, value):
    found = parse({}, [f"optimizer.learning_rate={text}", "optimizer.final_learning_rate=0"]).optimizer.learning_rate
    assert (found, type(found)) == (value, float)


def test_a_date_is_a_name():
    for text in ("2024-05-01", "2024-13-45"):
        assert parse({}, [f"run.name={text}"]).run.name == text


def test_overrides():
    tree = {"layout": {"pipeline": 4}}
    config = parse(tree, ["layout.shape=[2, 1]", "layout.layers_per_stage=[1,1,1,1]", "model.q_lora_rank=null", "run.name=1e5",
                          "training.batch_ramp={start_sequences: 8, steps: 3}", "training.batch_ramp.steps=4",
                          "data.path=a=b", "telemetry.trace_steps=[3, 5]"])
    assert tree == {"layout": {"pipeline": 4}}
    assert config.layout.shape == (2, 1) and config.layout.layers_per_stage == [1, 1, 1, 1] and config.layout.pipeline == 4
    assert config.model.q_lora_rank is None and config.run.name == "1e5" and config.data.path == "a=b"
    assert config.training.batch_ramp.model_dump() == {"start_sequences": 8, "steps": 4}
    assert config.telemetry.trace_steps == [3, 5]
    assert parse({"training": {"batch_ramp": {"start_sequences": 8, "steps": 3}}}, ["training.batch_ramp=null"]
                 ).training.batch_ramp is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_that_come_along(path):
    assert load(str(path)).model.n_routed_experts in (16, 64, 256)


def test_there_are_three_of_them():
    assert [path.stem for path in CONFIGS] == ["deepseek_v3", "moe_16b", "tiny"]


@pytest.mark.parametrize("overrides", [
    [], ["layout.shape=[1, 2]", "layout.expert=4"], ["training.batch_ramp={start_sequences: 8, steps: 3}"],
    ["model.rope_scaling={factor: 40, original_max_position_embeddings: 4096}", "model.q_lora_rank=null"],
    ["optimizer.learning_rate=1e-3", "optimizer.epsilon=1e-20", "run.name=1e5", "layout.layers_per_stage=[3,1]"],
    ["schedule.kind=searched", "schedule.placement=v", "schedule.most_activations=3", "schedule.costs.hop=1e-2"]])
def test_a_dumped_configuration_reads_back_the_same(overrides):
    config = parse({}, overrides)
    assert parse(yaml.safe_load(dump(config))) == config


@pytest.mark.parametrize("text, allowed", [
    (b"run: [1", "valid YAML (line 1: expected ',' or ']', but got '<stream end>')"),
    (b"run:\n  name: a\nmodel: {}\nrun:\n  seed: 3\n", "valid YAML (line 4: 'run' is given twice)"),
    (b"? [a]\n: 1\n", "valid YAML (line 1: found unhashable key)"),
    (b"- 1", "a YAML mapping of sections"), (b"\xff\xfe\xfa", "a readable YAML file (not UTF-8 text)"),
    (None, "a readable YAML file (No such file or directory)")])
def test_files_that_cannot_be_read(tmp_path, text, allowed):
    path = tmp_path / "run.yaml"
    if text is not None:
        path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        load(str(path))
    assert (caught.value.key, caught.value.value, caught.value.allowed) == ("--config", str(path), allowed)


def test_an_empty_file_is_all_defaults(tmp_path):
    (tmp_path / "run.yaml").write_text("# nothing\n")
    assert load(str(tmp_path / "run.yaml")) == load(None) == RunConfig()
