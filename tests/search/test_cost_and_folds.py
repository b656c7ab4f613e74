"""What a mask says of its scores: their cost, the size of the layers, and how well they repeat."""

import json
import runpy
from pathlib import Path

import pytest
import torch

import ila
from ila.models.edit import masked_layers
from ila.search.baselines import FORWARD, UNTRAINED
from ila.search.config import SearchConfig
from ila.search.learn import METHODS, begin, mask_of, score
from ila.search.spectra import SPECTRA
from ila.search.stage1 import run_stage1

JOB = Path(__file__).with_name("ranks_job.py")
READS_BATCHES = ("ila", "path", "gradient_norm", *FORWARD)


@pytest.mark.parametrize("method", METHODS)
def test_every_mask_says_what_it_cost_and_how_large_its_layers_are(
    method, make_llama, rows, search
):
    model = make_llama()
    mask = search(model, rows, method=method)
    bases = {name: x.get_base_layer() for name, x in masked_layers(model, "default").items()}
    sizes = {name: 2 * (base.in_features + base.out_features) for name, base in bases.items()}
    assert dict(mask.provenance["parameters"]) == sizes
    cost = mask.provenance["cost"]
    assert cost["stage1"]["steps"] == (0 if method in UNTRAINED else 8)
    assert cost["scores"]["steps"] == (7 if method in READS_BATCHES else 0)
    assert (cost["scores"]["seconds"] > 0) == (method in (*READS_BATCHES, *SPECTRA, "update_norm"))
    assert (cost["stage1"]["seconds"] > 0) == (method not in UNTRAINED)


@pytest.mark.parametrize("method", ["path", "gate_gradient", "gradient_norm"])
def test_folds_are_the_scores_of_disjoint_batches(method, make_toy, rows, search):
    # As many steps as make eight folds of one size, of single steps or of walks along the path.
    steps = {"stage1_steps": 16, "stage2_steps": 40 if method == "path" else 16}
    options = steps | ({} if method != "gradient_norm" else {"training_args": {}})
    model = make_toy(init_lora_weights=True) if method == "gradient_norm" else make_toy()
    mask = search(model, rows, method=method, **options)
    folds = torch.tensor(mask.provenance["folds"], dtype=torch.float64)
    assert folds.shape == (8, len(mask)) and folds.std(0).min() > 0
    mean = dict(zip(mask.scores, folds.mean(0).tolist(), strict=True))
    assert dict(mask.scores) == pytest.approx(mean, rel=1e-12)  # fp64, in another order


@pytest.mark.parametrize("method", FORWARD)
def test_folds_of_token_means_weigh_their_tokens(method, make_llama, rows, search):
    # One row a batch, all of one length: every fold of 8 has as many tokens.
    mask = search(make_llama(), rows, method=method, batch_size=1, stage2_steps=16)
    folds = torch.tensor(mask.provenance["folds"], dtype=torch.float64)
    assert folds.shape == (8, len(mask)) and folds.std(0).min() > 0
    mean = dict(zip(mask.scores, folds.mean(0).tolist(), strict=True))
    assert dict(mask.scores) == pytest.approx(mean, rel=1e-12)


def test_a_fold_without_every_point_of_the_path_is_left_out(make_toy, rows, search):
    mask = search(make_toy(), rows, method="path", stage2_steps=7)
    assert len(mask.provenance["folds"]) == 1  # five steps are a walk, two are none


def test_one_stage_1_scored_in_several_ways(make_llama, rows, search, tmp_path):
    config = {"stage1_steps": 4, "stage2_steps": 5, "batch_size": 2, "epsilon": 0.0}
    config |= {"learning_rate": 1e-2, "save_every": None}
    where = {"folder": tmp_path, "keep": False, "resume": False, "progress": False}
    model, seen = make_llama(), []
    work = begin(
        *(model, rows, SearchConfig(**config)),
        after_step=lambda step, signal: seen.append((step, signal.mean())),
        **where,
    )
    stage1 = run_stage1(work)
    assert [step for step, _ in seen] == [1, 2, 3, 4] and seen[-1][1] == stage1["gate_gradient"]
    for method in ("path", "ila", "update_norm"):
        alike = begin(model, rows, SearchConfig(**config, method=method), **where)
        mask = mask_of(alike, stage1, score(alike, stage1))
        alone = search(make_llama(), rows, method=method, **config)
        assert dict(mask.scores) == dict(alone.scores)


RANKS = """
import json, os, runpy, sys
import torch
import ila
from ila.runs.processes import leave_process_group
torch.set_num_threads(1)
job = runpy.run_path(sys.argv[1], run_name="job")
found = {}
for method in json.loads(sys.argv[4]):
    config = ila.SearchConfig(method=method, stage1_steps=2, stage2_steps=3, batch_size=2,
                              epsilon=0.0, learning_rate=1e-2, save_every=None)
    model = job["make_model"](sys.argv[2])
    mask = ila.learn_mask(model, job["make_rows"](), config, progress=False)
    found[method] = [dict(mask.scores), mask.provenance["cost"]["scores"]["seconds"]]
with open(sys.argv[3] + os.environ["RANK"], "w") as file:
    json.dump(found, file)
leave_process_group()
"""


def test_two_processes_score_cheaply_as_one_does(run_ranks, tiny_model_folder, tmp_path):
    methods = ("gradient_norm", "update_norm", *FORWARD)
    run_ranks(RANKS, JOB, tiny_model_folder, tmp_path / "found", json.dumps(methods))
    two, other = (json.loads((tmp_path / f"found{rank}").read_text()) for rank in range(2))
    assert two == other  # the seconds are those of the main process
    job = runpy.run_path(str(JOB), run_name="job")
    options = {"stage1_steps": 2, "stage2_steps": 3, "batch_size": 4, "epsilon": 0.0}
    for method in methods:
        config = SearchConfig(method=method, learning_rate=1e-2, save_every=None, **options)
        model = job["make_model"](str(tiny_model_folder))
        mask = ila.learn_mask(model, job["make_rows"](), config, progress=False)
        assert job["close"](list(two[method][0].values()), list(mask.scores.values())), method
