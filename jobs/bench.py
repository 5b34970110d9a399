"""`python -m jobs.bench NAME --json`: measure one thing against a peer or a bound in the same run.

One JSON object is the last line of standard output; logs go to standard error. A bench whose bar is missed or whose
validity check fails says so in the object (`valid`: false) and exits 1.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import sys

from jobs import cli

BENCHES = {
    "parity": "losses and parameters of every layout against one plain process",
    "tokens": "tokens a second of the whole system against plain PyTorch on the same cores",
}
DEFAULT_CONFIG = os.path.join(os.path.dirname(__file__), "configs", "tiny.yaml")


def main() -> int:
    parser = cli.Parser(prog="python -m jobs.bench",
                        description="Measure. " + "; ".join(f"{name}: {text}" for name, text in BENCHES.items()))
    parser.add_argument("name", choices=sorted(BENCHES))
    cli.arguments(parser)
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object (the last line)")
    parser.set_defaults(config=DEFAULT_CONFIG)
    options = parser.parse_args()
    config = cli.configuration(options)
    os.environ["OMP_NUM_THREADS"] = "1"
    bench = importlib.import_module(f"jobs.benches.{options.name}")
    result = {"bench": options.name, **bench.run(config), "machine": _machine()}
    if options.json:
        print(json.dumps(result))
    else:
        print(json.dumps(result, indent=2))
    return cli.DONE if result.get("valid", True) else cli.FAILED


def _machine() -> dict[str, object]:
    import torch

    return {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}


if __name__ == "__main__":
    sys.exit(cli.run(main))
