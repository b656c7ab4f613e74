"""Two processes, started by ``accelerate launch``, run the file that one process runs."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from ila.runs.metrics import load_run

REPOSITORY = Path(__file__).resolve().parents[2]
RUN = """
model: {model}
data: {data}
out: {out}
limit: 10
held_out: 0.2  # eight rows train: every step is whole
rank: 2
batch_size: 2
steps: 4
scheduler: cosine
learning_rate: 1e-2
gradient_checkpointing: true
eval_every: 2
"""


@pytest.mark.slow
def test_accelerate_launches_a_file_on_two_processes(tiny_model_folder, data, ila, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(RUN.format(model=tiny_model_folder, data=data, out=tmp_path / "two"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # `--cpu` starts one process, whatever their number; without it, and without a GPU, each of
    # the two takes a CPU.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    launch += ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", str(port)]
    shared = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*launch, "-m", "ila", "train", "--config", str(file)],
        env={**os.environ, **shared},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # One process with all rows of a step is the same training.
    alone = ila("train", "--config", file, "--batch-size", 4, "--out", tmp_path / "one")
    assert alone.code == 0, alone.err
    two, one = load_run(tmp_path / "two"), load_run(tmp_path / "one")
    assert two["tokens_per_step"] == one["tokens_per_step"]
    for name in ("losses", "evaluations"):
        assert len(two[name]) == len(one[name]) > 0
        for mine, theirs in zip(two[name], one[name], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5)  # fp32, summed in another order
    log = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in log if "held_out_loss" in entry] == [2, 4]
