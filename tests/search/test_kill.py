"""``kill -9`` at random moments of search and training, then resume: nothing is lost.

Three kills by default; ``ILA_KILLS=10`` for more. Where they fall differs from machine to machine
and run to run; what must come out does not.
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
import gc, json, os, random, signal, sys, time, traceback
from pathlib import Path
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import LlamaForCausalLM
import ila
from ila.runs.checkpoints import last_complete
from ila.search.learn import SearchConfig, learn_mask
from ila.training.config import TrainConfig
from ila.training.train import train

folder, out, kills_wanted, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(1)
gc.freeze()  # each training collects garbage, over all modules imported
rows = [{"input_ids": [1, 6 + i, 9 + i, 7 + i, 2], "labels": [-100, 6 + i, 9 + i, 7 + i, 2]}
        for i in range(10)]
STAGES = ("search/stage1", "search/stage2", "train/checkpoints")


def make():
    base = LlamaForCausalLM.from_pretrained(folder)
    torch.manual_seed(5)
    return ila.attach(base, LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, task_type="CAUSAL_LM",
                                       target_modules="all-linear"))


def work(at):
    options = {"batch_size": 2, "learning_rate": 1e-2, "save_every": 1}
    config = SearchConfig(stage1_steps=6, stage2_steps=5, epsilon=0.0, **options)
    mask = learn_mask(make(), rows, config, output_dir=at / "search", resume=True, progress=False)
    model = make()
    ila.apply_mask(model, mask.top(0.5))
    metrics = train(model, rows[:8], TrainConfig(steps=6, **options), held_out=rows[8:],
                    output_dir=at / "train", resume=True, progress=False)
    for unequal in ("step_time_ms", "peak_memory_bytes"):
        del metrics[unequal]
    log = {name: (at / name / "log.jsonl").read_text() for name in ("search", "train")}
    weights = {name: (at / name / "adapter_model.safetensors").read_bytes().hex()
               for name in ("search/adapter", "train")}
    saved = json.loads((at / "search" / "stage1.json").read_text())
    result = {"scores": dict(mask.scores), "metrics": metrics, "log": log, "weights": weights,
              "stage1": saved}
    (at / "result.json").write_text(json.dumps(result))


def start(at):
    child = os.fork()
    if child == 0:
        try:
            work(at)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return child


def wait(child, seconds):
    "Wait for a child to end; after so many seconds, kill it. Return whether it was killed."
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, f"a run failed: {status}"
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):  # it ended between the last look and the kill
        assert os.WEXITSTATUS(status) == 0, f"a run failed: {status}"
        return False
    return True


def progress(at):
    "Steps of the last complete checkpoints, after checking that what was finished can be read."
    if (at / "search" / "stage1.json").exists():
        assert load_file(at / "search" / "adapter" / "adapter_model.safetensors")
    if (at / "train" / "metrics.json").exists():
        assert load_file(at / "train" / "adapter_model.safetensors")
    steps = []
    for stage in STAGES:
        last = last_complete(at / stage)
        if last is not None:
            load_file(last / "adapter_model.safetensors")
            torch.load(last / "optimizer.pt", weights_only=True)
        steps.append(0 if last is None else int(last.name.split("-")[1]))
    return steps


(out / "whole").mkdir()
begin = time.monotonic()
assert not wait(start(out / "whole"), 600.0)
whole_s = time.monotonic() - begin
expected = json.loads((out / "whole" / "result.json").read_text())
draw, kills, trials = random.Random(seed), [], 0
while len(kills) < kills_wanted:
    at = out / f"trial-{trials}"
    at.mkdir()
    trials += 1
    before = [0, 0, 0]
    while wait(start(at), draw.uniform(0.0, whole_s)):
        after = progress(at)
        finished = (at / "train" / "metrics.json").exists()
        lost = [b > a for b, a in zip(before, after)]
        assert not any(lost[:2]) and (finished or not lost[2]), f"{before} became {after}"
        kills.append(after)
        before = after
    found = json.loads((at / "result.json").read_text())
    for name in expected:
        assert found[name] == expected[name], f"{name} differs after kills at {kills}"
print(json.dumps({"kills": kills, "runs": trials, "whole_s": whole_s}))
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_at_random_moments_and_resumed_nothing_is_lost(tiny_model_folder, tmp_path):
    wanted = int(os.environ.get("ILA_KILLS", "3"))
    command = [
        sys.executable,
        "-c",
        DRIVER,
        str(tiny_model_folder),
        str(tmp_path),
        str(wanted),
        "1",
    ]
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
