"""`python -m jobs.bench NAME --json`: measure one thing against a peer or a bound in the same run.

One JSON object is the last line of standard output; logs go to standard error. A bench whose bar is missed or whose
validity check fails says so in the object (`valid`: false) and exits 1. A bench may have settings of its own, a pydantic
`Settings` that `--option KEY=VALUE` fills; the run configuration (`--config`, `--set`) is every bench's.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys
from types import ModuleType
from typing import Any

import yaml
from pydantic import ValidationError

from jobs import cli
from orchestrator.refusal import ConfigError, refusal

BENCHES = {
    "chaos": "runs on raylets and on processes that are struck again and again: what they lose, and how soon they go on",
    "churn": "useful time, speed and loss of a run whose nodes are killed, drain, freeze and join every half minute",
    "commit": "step time with two owners of every optimizer shard against one, on held lanes and shaped links",
    "overlap": "dispatch and combine under compute on slow links, against none of it and torch.distributed.pipelining",
    "parity": "losses and parameters of every layout against one plain process",
    "precision": "losses in FP8 and FP32 against BF16, and errors of FP8 products, as published and coarser",
    "recovery": "what killed, cut off and frozen nodes and killed ranks cost a run, against Ray Train and torchft",
    "routing": "bytes across nodes, cost of choosing and permuting, load of ranks, against closed forms, transformers and EPLB",
    "schedule": "step time of every schedule against its simulation and torch.distributed.pipelining",
    "telemetry": "step time while all exporters are scraped every second, against nobody asking",
    "tokens": "tokens a second of the whole system against plain PyTorch on the same cores",
}
DEFAULT_CONFIG = os.path.join(os.path.dirname(__file__), "configs", "tiny.yaml")


def main() -> int:
    parser = cli.Parser(prog=cli.program("bench"), examples=("parity --json", "chaos --minutes 2 --json"),
                        description="Measure. " + "; ".join(f"{name}: {text}" for name, text in BENCHES.items()))
    parser.add_argument("name", choices=sorted(BENCHES))
    cli.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the last line)")
    parser.add_argument("--option", metavar="KEY=VALUE", action="append", default=[], dest="options",
                        help="one of the bench's own settings; repeatable")
    parser.add_argument("--minutes", metavar="N", help="the same as --option minutes=N: how long, if the bench can be told")
    parser.add_argument("--trace", metavar="FILE", help="write what was measured as a trace for Perfetto, if the bench has one")
    parser.set_defaults(config=DEFAULT_CONFIG)
    options = parser.parse_args()
    if options.minutes is not None:
        options.options.append(f"minutes={options.minutes}")
    config = cli.configuration(options)
    os.environ["OMP_NUM_THREADS"] = "1"
    bench = importlib.import_module(f"jobs.benches.{options.name}.bench")
    settings = _settings(options.name, bench, options.options, options.trace)
    result = {"bench": options.name, **bench.run(config, *settings), "machine": _machine()}
    for missed in (name for name, holds in result.get("checks", {}).items() if not holds):
        print(f"missed: {missed}", file=sys.stderr)
    if options.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=2))
    return cli.DONE if result.get("valid", True) else cli.FAILED


def _settings(name: str, bench: ModuleType, given: list[str], trace: str | None) -> tuple[Any, ...]:
    """The bench's own settings, if it has any, filled with `given`. Raises ConfigError."""
    own, tree = getattr(bench, "Settings", None), {} if trace is None else {"trace": trace}
    if own is None and (given or trace is not None):
        raise ConfigError("--option" if given else "--trace", given[0] if given else trace, f"nothing: {name} has no options")
    for text in given:
        key, separator, value = text.partition("=")
        if not separator or not key:
            raise ConfigError("--option", text, "KEY=VALUE")
        try:
            tree[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(key, value, "a YAML value") from None
    if own is None:
        return ()
    try:
        return (own.model_validate(tree),)
    except ValidationError as error:
        raise refusal(error, own, tree) from None


def _machine() -> dict[str, object]:
    import torch

    return {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(cli.run(main))
