"""What all jobs share on the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from tests.cluster import REPOSITORY


def test_a_signal_while_modules_are_imported_ends_a_job_in_one_line(tmp_path):
    (tmp_path / "pyarrow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-m", "jobs.train"], cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "importing\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "interrupted\n") and process.returncode == 130
    finally:
        process.kill()
        process.communicate()
