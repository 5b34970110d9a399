"""Loss, perplexity, bits a byte, accuracy and acceptance of multi-token prediction of a checkpoint on held-out text.

    python -m jobs.evaluate --checkpoint runs/NAME/checkpoints/step-00000100 --data DIR [--sequences N] [--json]

The configuration is that of the run, two folders above the checkpoint, or `--config`'s; `--set` changes the layout, of which the
figures do not depend. Writes nothing into the run.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from argparse import Namespace
from typing import Any

from actors.data.dataset import Dataset, DatasetError
from actors.data.feed import read_validation
from actors.files import storage
from actors.state.checkpoint import CheckpointError, read_manifest
from jobs import cli
from jobs.driver import session
from jobs.driver.lost import ClusterWatch
from jobs.driver.progress import Progress
from jobs.driver.running import Interrupt, RunActors
from jobs.export import configuration
from jobs.tokenize import load_tokenizer
from orchestrator.config.run_config import ConfigError, RunConfig, parse
from orchestrator.layout.layout import choose


def main() -> int:
    """Raises ConfigError, UsageError: refused. JobFailed: a file cannot be read, or the ranks fail."""
    parser = cli.Parser(prog=cli.program("evaluate"), description=__doc__.splitlines()[0], examples=(
        "--checkpoint runs/tiny/checkpoints/step-00000120",
        "--checkpoint runs/tiny/checkpoints/step-00000120 --sequences 64 --json"))
    cli.arguments(parser)
    parser.add_argument("--checkpoint", required=True, metavar="DIR", help="a checkpoint of a run: a path or URI")
    parser.add_argument("--data", metavar="DIR", help="folder written by jobs.tokenize (default: that of the run)")
    parser.add_argument("--sequences", type=int, metavar="N", help="of the held-out text (default: all)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.sequences is not None and options.sequences < 1:
        raise ConfigError("--sequences", options.sequences, "at least 1")
    interrupt = Interrupt()
    try:
        manifest = read_manifest(options.checkpoint)
        config, dataset = _prepared(options, manifest.model)
        session.connect()
        interrupt.install()
        with ClusterWatch("nothing was evaluated"):
            found = evaluate(config, dataset, options.checkpoint, interrupt)
    except (CheckpointError, DatasetError, storage.StorageError) as error:
        raise cli.JobFailed(str(error)) from error
    finally:
        session.disconnect()
    if found is None:
        return cli.INTERRUPTED
    _show({"checkpoint": options.checkpoint, "step": manifest.step, "data": config.data.path, **found}, options.json)
    return cli.DONE


def evaluate(config: RunConfig, dataset: Dataset, checkpoint: str, interrupt: Interrupt) -> dict[str, Any] | None:
    """On the nodes that there are; None: interrupted. Raises JobFailed."""
    started = time.perf_counter()
    layout = choose(session.nodes(config), config.layout, config.model, config.stages)
    with tempfile.TemporaryDirectory(prefix="dualray-evaluate-") as folder:
        config = parse(config.model_dump(), [f"run.directory={folder}", "run.name=evaluate"])
        with Progress(0, sys.stderr) as progress, RunActors(config, layout, config.data.path, evaluate=checkpoint) as run:
            outcome = run.follow(progress, interrupt)
    if interrupt.requested:
        return None
    batch = read_validation(dataset, config.training.validation_sequences)
    nats = outcome.scores["loss"] * batch.divisors.next_token
    size = text_bytes(config, batch)
    return {"sequences": len(batch.valid), "tokens": batch.divisors.next_token, "bytes": size, **outcome.scores,
            "perplexity": math.exp(outcome.scores["loss"]), "bits_per_byte": nats / math.log(2) / size,
            "layout": layout.describe(), "seconds": round(time.perf_counter() - started, 3)}


def text_bytes(config: RunConfig, batch: Any) -> int:
    """Of the text whose tokens are predicted: all but the first of each sequence, and no ends of documents."""
    tokenizer = load_tokenizer(config.data.tokenizer)
    return sum(len(tokenizer.decode_bytes(row[1:valid])) for row, valid in zip(batch.tokens, batch.valid))


def _prepared(options: Namespace, model: dict) -> tuple[RunConfig, Dataset]:
    """Raises ConfigError: nothing to evaluate on, or data of another kind. DatasetError: damaged."""
    config = configuration(options, model)
    data = options.data or session.data_path(config)
    dataset = Dataset.open(data)
    if not dataset.validation.sequences:
        raise ConfigError("--data", data, "a folder with held-out text: data.validation_fraction above 0 when it was tokenized")
    dataset.check(config.data.tokenizer, load_tokenizer(config.data.tokenizer).fingerprint, config.model.vocab_size,
                  config.data.sequence_length)
    count = options.sequences or dataset.validation.sequences
    return parse(config.model_dump(), [f"data.path={data}", f"training.validation_sequences={count}"]), dataset


def _show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<16}{value:,.6g}" if isinstance(value, float) else f"{name.replace('_', ' '):<16}{value}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
