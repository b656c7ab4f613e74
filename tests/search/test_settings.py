"""What a Python user sets: callbacks, epochs, evaluation, packing; and where it is refused."""

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

import ila
from ila.price.choice import Choice
from ila.search.one_run import train_and_select
from ila.search.selection import Selection
from ila.training.config import TrainConfig
from ila.training.train import train


class Counting(TrainerCallback):
    """Count what a Trainer tells its callbacks."""

    def __init__(self):
        self.steps, self.evaluations = [], []

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append(state.global_step)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        self.evaluations.append((state.global_step, metrics["eval_loss"]))


def test_callbacks_of_a_training_see_its_steps_and_evaluations(make_llama, rows):
    counting = Counting()
    config = TrainConfig(steps=4, batch_size=2, eval_every=2)
    metrics = train(
        make_llama(), rows, config, held_out=rows[:3], callbacks=[counting], progress=False
    )
    assert counting.steps == [1, 2, 3, 4]
    assert [list(each) for each in counting.evaluations] == metrics["evaluations"]


def test_callbacks_of_a_search_see_stage_1(make_llama, rows):
    counting = Counting()
    config = ila.SearchConfig(stage1_steps=4, stage2_steps=5, batch_size=2, eval_every=4)
    mask = ila.learn_mask(
        make_llama(), rows, config, held_out=rows[:3], callbacks=[counting], progress=False
    )
    assert counting.steps == [1, 2, 3, 4] and len(counting.evaluations) == 1
    found = mask.provenance["stage1"]["evaluations"]
    assert [tuple(each) for each in found] == counting.evaluations


def test_callbacks_of_one_run_see_both_halves(make_llama, rows):
    counting = Counting()
    train_and_select(
        make_llama(),
        rows,
        TrainConfig(epochs=1, batch_size=4, eval_every=1),
        Selection(Choice(top=0.3), at=0.5),
        held_out=rows[:3],
        callbacks=[counting],
        progress=False,
    )
    last = -(-len(rows) // 4)
    assert counting.steps == list(range(1, last + 1)) == [s for s, _ in counting.evaluations]


def test_transformers_early_stopping_ends_a_training(make_llama, rows):
    config = TrainConfig(
        steps=12,
        batch_size=2,
        learning_rate=1e-12,  # the loss does not move
        eval_every=1,
        training_args={"metric_for_best_model": "eval_loss", "greater_is_better": False},
    )
    stop = EarlyStoppingCallback(early_stopping_patience=2)
    metrics = train(make_llama(), rows, config, held_out=rows[:3], callbacks=[stop], progress=False)
    assert 2 <= metrics["steps"] < 12


def test_a_schedule_of_plateaus_reads_the_evaluations(make_llama, rows):
    plateau = {"factor": 0.1, "patience": 0, "threshold": 100.0}
    config = TrainConfig(
        steps=4,
        batch_size=2,
        eval_every=1,
        training_args={
            "lr_scheduler_type": "reduce_lr_on_plateau",
            "lr_scheduler_kwargs": plateau,
            "metric_for_best_model": "loss",
            "warmup_steps": 0,
        },
    )
    rates = []

    class Rates(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            rates.extend([logs["learning_rate"]] if "learning_rate" in logs else [])

    train(make_llama(), rows, config, held_out=rows[:3], callbacks=[Rates()], progress=False)
    assert rates[-1] < 0.11 * rates[0]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"steps": 3, "epochs": 1}, "give steps or epochs, not both, got steps=3 and epochs=1"),
        ({"epochs": 0}, "epochs must be positive, got 0"),
        ({"epochs": float("nan")}, "epochs must be positive, got nan"),
        ({"eval_every": 0}, "eval_every must be None or ≥ 1, got 0"),
        ({"eval_every": 1.5}, "eval_every must be None or ≥ 1, got 1.5"),
        ({"packing": True, "cache_prefix": True}, "packing and cache_prefix exclude each other"),
        ({"training_args": {"eval_strategy": "steps"}}, "set eval_every instead"),
        ({"training_args": {"load_best_model_at_end": True}}, "weights of its last step"),
        ({"training_args": {"lr_sheduler_type": "cosine"}}, "lr_scheduler_type is close to"),
    ],
)
def test_a_wrong_field_is_refused_by_name(fields, said):
    with pytest.raises(ValueError) as refused:
        TrainConfig(**fields)
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"eval_every": 1}, "eval_every=1 needs held-out rows to evaluate on, got none"),
        ({"training_args": {"optim": "adan"}}, "training_args optim='adan'"),
        ({"training_args": {"lr_scheduler_type": "cosin"}}, "cosin is not a valid SchedulerType"),
        ({"training_args": {"lr_scheduler_kwargs": {"x": 1}}}, "training_args lr_scheduler_kwargs"),
        ({"training_args": {"report_to": "nowhere"}}, "nowhere is not supported"),
    ],
)
def test_a_training_that_cannot_begin_leaves_no_folder(fields, said, make_llama, rows, tmp_path):
    model = make_llama()
    for run, config in (
        (train, TrainConfig(steps=2, **fields)),
        (ila.learn_mask, ila.SearchConfig(stage1_steps=2, **fields)),
    ):
        with pytest.raises(ValueError) as refused:
            run(model, rows, config, output_dir=tmp_path / "run", progress=False)
        assert said in str(refused.value) and not (tmp_path / "run" / "run.json").exists()
        assert not list(tmp_path.rglob("*.json"))


def test_packing_knows_the_columns_of_a_row(make_llama, rows):
    config = TrainConfig(steps=1, packing=True)
    model = make_llama()
    with pytest.raises(ValueError, match="packing knows no column 'token_type_ids'"):
        more = [{**row, "token_type_ids": [0] * len(row["input_ids"])} for row in rows]
        train(model, more, config, progress=False)
    with pytest.raises(ValueError, match="attention_mask of row 0 hides one"):
        masks = [[0, *(1 for _ in row["input_ids"][1:])] for row in rows]
        hiding = [{**row, "attention_mask": m} for row, m in zip(rows, masks, strict=True)]
        train(model, hiding, config, progress=False)


def test_a_search_on_packed_rows_scores_as_on_padded_ones(make_llama, rows):
    uneven = [{key: row[key][: 4 + i % 4] for key in row} for i, row in enumerate(rows)]
    assert len({len(row["labels"]) for row in uneven}) == 4
    one, other = (
        ila.learn_mask(
            make_llama(lora_dropout=0.0),
            uneven,
            ila.SearchConfig(
                stage1_steps=4, stage2_steps=5, batch_size=3, learning_rate=1e-2, packing=packing
            ),
            progress=False,
        )
        for packing in (True, False)
    )
    largest = max(map(abs, one.scores.values()))
    for name, score in one.scores.items():  # fp32: the same sums in another order
        assert other.scores[name] == pytest.approx(score, abs=1e-5 * largest)
