"""``kill -9`` at random moments of one run with a selection, then resume: the same bits.

On one process, and on two of DDP that die together. Three kills by default; ``ILA_KILLS=10`` for
more. Where they fall differs from run to run.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

# Children of one process that has imported everything: a start takes milliseconds, not seconds.
DRIVER = """
import gc, json, os, random, signal, socket, sys, time, traceback
from pathlib import Path
import torch
from peft import LoraConfig
from transformers import LlamaForCausalLM
import ila
from ila.price.choice import Choice
from ila.search.one_run import train_and_select
from ila.search.selection import Selection
from ila.training.config import TrainConfig

folder, out, wanted, size = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
gc.freeze()  # each training collects garbage, over all modules imported
rows = [{"input_ids": [1, 6 + i, 9 + i, 7 + i, 2], "labels": [-100, 6 + i, 9 + i, 7 + i, 2]}
        for i in range(10)]


def work(at):
    base = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    model = ila.attach(base, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, task_type="CAUSAL_LM",
                                        target_modules="all-linear"))
    config = TrainConfig(steps=8, batch_size=2 // size, learning_rate=1e-2, save_every=1)
    selection = Selection(Choice(top=0.3), at=3)
    metrics, mask = train_and_select(model, rows[:8], config, selection, held_out=rows[8:],
                                     output_dir=at / "run", resume=True, progress=False)
    if os.environ.get("RANK", "0") != "0":
        return
    for unequal in ("step_time_ms", "peak_memory_bytes", "selected"):
        del metrics[unequal]
    weights = (at / "run" / "adapter_model.safetensors").read_bytes().hex()
    log = (at / "run" / "log.jsonl").read_text()
    result = {"metrics": metrics, "scores": dict(mask.scores), "open": list(mask.open)}
    (at / "result.json").write_text(json.dumps(result | {"weights": weights, "log": log}))


def start(at):
    "Start a run; return its processes."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [start_rank(at, rank, port) for rank in range(size)]


def start_rank(at, rank, port):
    child = os.fork()
    if child == 0:
        if size > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            work(at)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def killed(children, seconds):
    "Wait for a run to end; after so many seconds, kill it. Return whether it was killed."
    deadline, left = time.monotonic() + seconds, list(children)
    while left and time.monotonic() < deadline:
        for child in list(left):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                assert status == 0, f"a run failed: {status}"
                left.remove(child)
        time.sleep(0.001)
    draw.shuffle(left)
    # All stop before one dies: none may fail because another has gone.
    for number in (signal.SIGSTOP, signal.SIGKILL):
        for child in left:
            os.kill(child, number)
    died = False
    for child in left:
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):  # it ended between the last look and the kill
            assert os.WEXITSTATUS(status) == 0, f"a run failed: {status}"
        died = died or os.WIFSIGNALED(status)
    return died


def phase(at):
    if not (at / "run" / "mask.json").exists():
        return "all layers"
    return "finished" if (at / "run" / "metrics.json").exists() else "open layers"


draw, kills, trials = random.Random(1), [], 0
(out / "whole").mkdir()
begin = time.monotonic()
assert not killed(start(out / "whole"), 600.0)
whole_s = time.monotonic() - begin
expected = json.loads((out / "whole" / "result.json").read_text())
while len(kills) < wanted:
    at = out / f"trial-{trials}"
    at.mkdir()
    trials += 1
    while killed(start(at), draw.uniform(0.0, whole_s)):
        kills.append(phase(at))
    found = json.loads((at / "result.json").read_text())
    for name in expected:
        assert found[name] == expected[name], f"{name} differs after kills in {kills}"
print(json.dumps({"kills": kills, "runs": trials, "whole_s": whole_s}))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_at_random_moments_and_resumed_nothing_is_lost(
    tiny_model_folder, tmp_path, processes
):
    wanted = int(os.environ.get("ILA_KILLS", "3"))
    arguments = map(str, (tiny_model_folder, tmp_path, wanted, processes))
    command = [sys.executable, "-c", DRIVER, *arguments]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=200 * wanted,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    assert len(report["kills"]) >= wanted
