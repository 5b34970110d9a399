"""What all jobs share on the command line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.cluster import REPOSITORY


@pytest.mark.parametrize("script", [False, True], ids=["python -m", "dualray"])
def test_a_signal_while_modules_are_imported_ends_a_job_in_one_line(tmp_path, script):
    (tmp_path / "pyarrow.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    (tmp_path / "dualray").write_text("import sys\nfrom jobs.command import main\nsys.exit(main())\n")
    words = [str(tmp_path / "dualray"), "train"] if script else ["-m", "jobs.train"]
    process = subprocess.Popen([sys.executable, *words], cwd=REPOSITORY, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "importing\n", process.stderr.read()
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20) == ("", "interrupted\n") and process.returncode == 130
    finally:
        process.kill()
        process.communicate()
