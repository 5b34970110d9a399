"""Real text for benchmarks: bytes of Python's own standard library, without a corpus on disk."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy

from actors.data.batching import Batch
from orchestrator.config.run_config import RunConfig


def batches_of_text(config: RunConfig, steps: int) -> list[Batch]:
    """`steps` batches of `training.batch_sequences` rows [S+1], consecutive bytes of the library's source files by name."""
    width, count = config.data.sequence_length + 1, config.training.batch_sequences
    wanted, content = steps * count * width, bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        content += path.read_bytes()
        if len(content) >= wanted:
            break
    repeated = numpy.resize(numpy.frombuffer(bytes(content), dtype=numpy.uint8), wanted)
    rows = repeated.astype(numpy.int32).reshape(steps, count, width)
    return [Batch(step, rows[step], numpy.full(count, width, dtype=numpy.int32)) for step in range(steps)]
