"""The benchmark runs through on a CPU, and what it says of tokens holds there; what it says of pace means nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path


def test_the_benchmark_runs_through(tmp_path: Path) -> None:
    out = tmp_path / "pace.json"
    command = [sys.executable, "-m", "benchmarks.vllm_pace", "--shape", "tiny", "--modes", "eager", "--batch", "1", "3"]
    command += ["--prompt", "20", "--answer", "4", "--rounds", "1", "--tensor-parallel", "2", "--out", str(out)]
    workers = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"}  # else a NUMA node for each
    subprocess.run(command, check=True, env={**os.environ, **workers, "PYTHONPATH": os.pathsep.join(sys.path)})
    found = json.loads(out.read_text())
    kinds = [(row["kind"], row["batch"]) for row in found["rows"]]
    assert sorted(kinds) == sorted((kind, n) for kind in ("one", "base", "all", "top 1", "top 2") for n in (1, 3))
    assert all(row["tokens a second"] > 0 for row in found["rows"])
    checks = found["checks"]
    assert [row["kind"] for row in checks["ours"]] == ["base", "one", "top 1", "top 2"]
    for row in checks["ours"]:
        assert row["log-probabilities apart"] < 1e-4 and row["same tokens"] == 1
        assert (row["apart from the base"] > 0.1) == (row["kind"] != "base")
    assert checks["same tokens"] == 1
    assert checks["shared"]["first"] == [0, 0, 0, 0] and min(checks["shared"]["again"]) > 100
    assert all(entry["holds"] for entry in found["must"] if "pace" not in entry["name"])
