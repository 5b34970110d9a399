"""Makes the Grafana dashboards in dashboards/grafana: `python dashboards/build.py`; with --check says whether they are up to date.

A panel is a title, a unit, and queries with their legends. `$run` is the run that is looked at.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueGraphMode, StackingMode, VisibilityMode
from grafana_foundation_sdk.models.dashboard import DashboardCursorSync, DataSourceRef, VariableRefresh

FOLDER = Path(__file__).parent / "grafana"
_SOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_RUN = '{run=~"$run"}'
_MOST = 10
"""Ranks that a panel draws: those that stand out. A run may have thousands."""


@dataclass(frozen=True)
class Panel:
    """queries: (PromQL, legend); a number that stands alone has one. stacked: areas on one another."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    description: str = ""
    stacked: bool = False


def one(title: str, unit: str, query: str, description: str = "") -> Panel:
    return Panel(title, unit, ((query, ""),), description)


NOW = (
    one("Step", "none", f"dualray_committed_step{_RUN}"),
    one("Loss", "none", f"dualray_loss{_RUN}", "nats a token"),
    one("Tokens a second", "short", f"dualray_tokens_per_second{_RUN}"),
    one("Goodput", "percentunit",
        f'sum(increase(dualray_spent_seconds_total{{run=~"$run", on="useful"}}[5m])) / sum(increase(dualray_spent_seconds_total{_RUN}[5m]))',
        "share of the last five minutes that trained"),
    one("Overlap", "percentunit", f"dualray_overlap_ratio{_RUN}", "share of communication that compute hides"),
    one("Nodes", "none", f"dualray_nodes{_RUN}"),
    one("Since the last step", "s", f"time() - dualray_committed_step_timestamp_seconds{_RUN}"),
    one("Since the last checkpoint", "s", f"time() - dualray_checkpoint_timestamp_seconds{_RUN}"),
)
GRAPHS = (
    Panel("Loss", "none", ((f"dualray_loss{_RUN}", "training"), (f"dualray_validation_loss{_RUN} > 0", "validation"))),
    Panel("Tokens a second", "short", ((f"dualray_tokens_per_second{_RUN}", "tokens/s"),)),
    Panel("Where the time goes", "percentunit", (
        (f"sum by (on) (increase(dualray_spent_seconds_total{_RUN}[1m])) / ignoring(on) group_left "
         f"sum(increase(dualray_spent_seconds_total{_RUN}[1m]))", "{{on}}"),), stacked=True),
    Panel("Nodes, and losses", "none", ((f"dualray_nodes{_RUN}", "nodes"), (f"increase(dualray_lost_ranks_total{_RUN}[1m])", "ranks lost"))),
)
ROWS: dict[str, tuple[Panel, ...]] = {
    "Pipeline": (
        Panel("Time of a step", "s", ((f"dualray_step_seconds{_RUN}", "step"),)),
        Panel("Bubble", "percentunit", ((f"dualray_bubble_ratio{_RUN}", "mean"), (f"topk({_MOST}, dualray_rank_bubble_ratio{_RUN})", "rank {{rank}}")),
              "share of a step that ranks wait for the pipeline"),
        Panel("Time of a step by rank", "s", ((f"topk({_MOST}, dualray_rank_step_seconds{_RUN})", "rank {{rank}}"),)),
        Panel("Sent to neighbours", "Bps", ((f"topk({_MOST}, rate(dualray_rank_pipeline_sent_bytes_total{_RUN}[1m]))", "rank {{rank}}"),)),
    ),
    "Communication": (
        Panel("Overlap", "percentunit", ((f"dualray_overlap_ratio{_RUN}", "mean"), (f"bottomk({_MOST}, dualray_rank_overlap_ratio{_RUN})", "rank {{rank}}"))),
        Panel("Exposed communication", "s", ((f"dualray_exposed_communication_seconds{_RUN}", "of a step, mean over ranks"),)),
        Panel("Dispatch and combine", "Bps", (
            (f"rate(dualray_exchange_across_nodes_bytes_total{_RUN}[1m])", "across nodes"),
            (f"rate(dualray_exchange_inside_nodes_bytes_total{_RUN}[1m])", "inside nodes"))),
        Panel("Across nodes by rank", "Bps", ((f"topk({_MOST}, rate(dualray_rank_exchange_across_nodes_bytes_total{_RUN}[1m]))", "rank {{rank}}"),)),
    ),
    "Experts": (
        Panel("Busiest expert ÷ mean", "none", ((f"dualray_expert_load_ratio{_RUN}", "worst layer"),)),
        Panel("Gradient norm", "none", ((f"dualray_gradient_norm{_RUN}", "before clipping"),)),
        Panel("Learning rate", "none", ((f"dualray_learning_rate{_RUN}", "learning rate"),)),
    ),
    "Elasticity": (
        Panel("Generation", "none", ((f"dualray_generation{_RUN}", "generation"),)),
        Panel("Recovery", "s", ((f"dualray_recovery_seconds{_RUN}", "the last change"),)),
        Panel("State moved", "bytes", ((f"increase(dualray_moved_state_bytes_total{_RUN}[1m])", "in a minute"),)),
        Panel("Lost ranks, changes", "none", ((f"increase(dualray_lost_ranks_total{_RUN}[10m])", "ranks lost in ten minutes"), (f"increase(dualray_recoveries_total{_RUN}[10m])", "changes in ten minutes"))),
    ),
    "Data and checkpoints": (
        Panel("Tokens", "short", ((f"increase(dualray_tokens_total{_RUN}[1m])", "trained in a minute"),)),
        Panel("Waiting for data", "percentunit", ((
            f'sum(increase(dualray_spent_seconds_total{{run=~"$run", on="data"}}[1m])) / sum(increase(dualray_spent_seconds_total{_RUN}[1m]))',
            "share of time"),)),
        Panel("Age of the newest checkpoint", "s", ((f"time() - dualray_checkpoint_timestamp_seconds{_RUN}", "age"),)),
    ),
    "Hardware": (
        Panel("Model FLOPs utilisation", "percentunit", ((f"dualray_model_flops_utilisation_ratio{_RUN}", "MFU"),),
              "there where it is known what an accelerator can do: by its name, or telemetry.peak_teraflops"),
        Panel("Memory", "bytes", ((f"topk({_MOST}, dualray_rank_accelerator_memory_bytes{_RUN} or dualray_rank_process_resident_memory_bytes{_RUN})",
                                   "rank {{rank}}"),), "of tensors on accelerators; of processes where there are none"),
        Panel("CPU of rank processes", "none", ((f"topk({_MOST}, rate(dualray_rank_process_cpu_seconds_total{_RUN}[1m]))", "rank {{rank}}"),)),
        Panel("Exporters that answer", "none", (('sum by (role) (up{job="dualray", run=~"$run"})', "{{role}}"),)),
    ),
}


def expressions() -> list[str]:
    """Every PromQL of every dashboard."""
    panels = [*NOW, *GRAPHS, *(panel for row in ROWS.values() for panel in row)]
    return [query for panel in panels for query, _ in panel.queries]


def overview() -> dashboard.Dashboard:
    made = _dashboard("DualRay", "dualray", "Is the run healthy, how fast is it, what slows it down").time("now-30m", "now")
    for panel in NOW:
        made.with_panel(_number(panel).span(3).height(4))
    for panel in GRAPHS:
        made.with_panel(_graph(panel).span(12).height(9))
    return made


def details() -> dashboard.Dashboard:
    made = _dashboard("DualRay in detail", "dualray-details", "Pipeline, communication, experts, elasticity, data, hardware")
    for title, panels in ROWS.items():
        made.with_row(dashboard.Row(title))
        for panel in panels:
            made.with_panel(_graph(panel).span(24 // len(panels)).height(8))
    return made


def _dashboard(title: str, name: str, description: str) -> dashboard.Dashboard:
    run = dashboard.QueryVariable("run").label("Run").query("label_values(dualray_committed_step, run)").datasource(_SOURCE).refresh(
        VariableRefresh.ON_TIME_RANGE_CHANGED)
    return (dashboard.Dashboard(title).uid(name).description(description).tags(["dualray"]).refresh("5s").timezone("browser")
            .tooltip(DashboardCursorSync.CROSSHAIR).time("now-1h", "now")
            .with_variable(dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
            .with_variable(run)
            .link(dashboard.DashboardLink("DualRay").type("dashboards").tags(["dualray"]).keep_time(True).include_vars(True)))


def _number(panel: Panel) -> stat.Panel:
    return _filled(stat.Panel(), panel).graph_mode(BigValueGraphMode.AREA).reduce_options(
        common.ReduceDataOptions().calcs(["lastNotNull"]))


def _graph(panel: Panel) -> timeseries.Panel:
    made = _filled(timeseries.Panel(), panel).show_points(VisibilityMode.NEVER).line_width(1)
    if panel.stacked:
        made.stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(60).max(1)
    return made


def _filled(made: stat.Panel | timeseries.Panel, panel: Panel) -> stat.Panel | timeseries.Panel:
    made.title(panel.title).unit(panel.unit).datasource(_SOURCE)
    if panel.description:
        made.description(panel.description)
    for query, legend in panel.queries:
        made.with_target(prometheus.Dataquery().expr(query).legend_format(legend).datasource(_SOURCE))
    return made


def built() -> dict[str, str]:
    """File name -> content."""
    made = {"overview.json": overview(), "details.json": details()}
    return {name: JSONEncoder(sort_keys=True, indent=2).encode(found.build()) + "\n" for name, found in made.items()}


def main() -> int:
    found, check = built(), sys.argv[1:] == ["--check"]
    stale = [name for name, text in found.items() if not (FOLDER / name).exists() or (FOLDER / name).read_text() != text]
    if check:
        print(f"not up to date: {', '.join(stale)}" if stale else "up to date")
        return bool(stale)
    for name in stale:
        (FOLDER / name).write_text(found[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
