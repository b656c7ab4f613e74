"""Batches arrive whole: every column of the rows, padded as transformers pads it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import (
    DataCollatorWithPadding,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

import ila
from ila.data import Collator, token_count
from ila.data.row_encoder import IGNORED
from ila.training.config import TrainConfig
from ila.training.train import train


def row(length: int, **columns: object) -> dict:
    ids = list(range(5, 5 + length))
    return {"input_ids": ids, "labels": [IGNORED, *ids[1:]], **columns}


COLUMNS = {
    "attention_mask": lambda n: [0] + [1] * (n - 1),
    "position_ids": lambda n: [i % 3 for i in range(n)],
    "token_type_ids": lambda n: [i % 2 for i in range(n)],
    "special_tokens_mask": lambda n: [1] + [0] * (n - 1),
    "seen": lambda n: n,
    "weight": lambda n: n / 2,
    "wanted": lambda n: n > 3,
    "pair": lambda n: [n, n + 1],
}


@given(names=st.sets(st.sampled_from(sorted(COLUMNS))), count=st.integers(1, 3))
@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_rows_of_one_length_make_the_batch_of_default_data_collator(kind, names, count):
    def whole(length: int) -> dict:
        return row(length, **{name: COLUMNS[name](length) for name in names})

    # A length that no other column has.
    rows = [{k: kind(v) if isinstance(v, list) else v for k, v in whole(7).items()}] * count
    batch, wanted = Collator(0)(rows), default_data_collator(rows)
    if not names & {"attention_mask", "position_ids"}:
        wanted["attention_mask"] = torch.ones(count, 7, dtype=torch.long)
    assert batch.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(batch[name], tensor), name
        assert batch[name].dtype == tensor.dtype, name


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    names=st.sets(st.sampled_from(["attention_mask", "token_type_ids", "special_tokens_mask"])),
    multiple=st.sampled_from([None, 4]),
)
def test_rows_of_other_lengths_are_padded_as_by_the_tokenizer(
    tiny_model_folder, lengths, names, multiple
):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    rows = [row(n, **{name: COLUMNS[name](n) for name in names}) for n in lengths]
    batch = Collator(tokenizer.pad_token_id, multiple)(rows)
    labels = batch.pop("labels")
    for one in rows:
        del one["labels"]
    wanted = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=multiple)(rows)
    assert batch.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(batch[name], tensor), name
    assert torch.equal(
        labels == IGNORED,
        (batch["input_ids"] == tokenizer.pad_token_id) | (torch.arange(labels.shape[1]) == 0),
    )


def test_positions_are_padded_and_bring_no_mask():
    rows = [row(3, position_ids=[0, 1, 0]), row(5, position_ids=[0, 0, 1, 2, 0])]
    batch = Collator(0)(rows)
    assert batch["position_ids"].tolist() == [[0, 1, 0, 0, 0], [0, 0, 1, 2, 0]]
    assert batch.keys() == {"input_ids", "labels", "position_ids"}


@pytest.mark.parametrize("name", ["label", "label_ids"])
def test_labels_of_whole_rows_are_called_labels(name):
    rows = [{"input_ids": [5, 6], name: 1}, {"input_ids": [7], name: 0}]
    assert Collator(0)(rows)["labels"].tolist() == [1, 0]
    with pytest.raises(ValueError, match="one column of labels"):
        Collator(0)([{"input_ids": [5], "labels": [5], name: 1}])


def test_columns_without_a_value_are_left_out():
    rows = [
        row(3, token_type_ids=None, attention_mask=None),
        row(2, token_type_ids=None, attention_mask=None),
    ]
    assert Collator(0)(rows)["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (({"text": "a"}, {"text": "b"}), "column 'text' of rows cannot become a tensor, got 'a'"),
        (({"meta": {"a": 1}}, {"meta": {}}), "column 'meta'"),
        (({"names": ["a"]}, {"names": ["b"]}), "column 'names'"),
        (({"seen": 1}, {"seen": None}), "column 'seen' .* got None"),
        (({"seen": 1}, {}), r"rows 0 and 1 of the batch do not share \['seen'\]"),
        (({"seen": [1, 2]}, {"seen": [1]}), "one value for each token in seen"),
        (
            ({"position_ids": [0]}, {"position_ids": [0]}),
            "one value for each token in position_ids",
        ),
        (({"attention_mask": [[1]]}, {"attention_mask": [[1]]}), "each token in attention_mask"),
        (({"input_ids": [0.5] * 3}, {}), "input_ids must be integers"),
        (({"labels": [1]}, {"labels": [1]}), "one value for each token in labels"),
    ],
)
def test_columns_that_make_no_batch_are_refused_by_name(columns, message):
    rows = [{**row(3), **columns[0]}, {**row(2), **columns[1]}]
    with pytest.raises(ValueError, match=message):
        Collator(0)(rows)


def test_a_mask_of_more_dimensions_passes_where_nothing_is_padded():
    mask = torch.ones(1, 3, 3, dtype=torch.long).tril()
    rows = [row(3, attention_mask=mask, position_ids=[[0, 1, 2]] * 3)] * 2
    batch = Collator(0)(rows)
    assert batch["attention_mask"].shape == (2, 1, 3, 3)
    assert batch["position_ids"].shape == (2, 3, 3)


def test_tokens_are_counted_without_padding():
    assert token_count(row(5)) == 5
    assert token_count(row(5, attention_mask=[0, 0, 1, 1, 1])) == 3


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config)


def padded_left(length: int) -> dict:
    whole = row(length)
    pads = 9 - length
    return {
        "input_ids": [0] * pads + whole["input_ids"],
        "attention_mask": [0] * pads + [1] * length,
        "labels": [IGNORED] * pads + whole["labels"],
    }


def packed(first: int) -> dict:
    positions = [*range(first), *range(9 - first)]
    whole = row(9, position_ids=positions)
    whole["labels"][first] = IGNORED
    return whole


def attached():
    model = tiny()
    torch.manual_seed(2)
    return ila.attach(model, LoraConfig(r=2, target_modules="all-linear"))


def losses(rows: list[dict], collator: object = None) -> torch.Tensor:
    config = TrainConfig(steps=3, batch_size=2, learning_rate=0.05, save_every=None)
    metrics = train(attached(), rows, config, collator=collator, progress=False)
    return torch.tensor([loss for _, loss in metrics["losses"]])


@pytest.mark.parametrize("make", [padded_left, packed, lambda length: row(9)])
def test_training_gives_the_losses_of_the_default_collator(make):
    rows = [make(length) for length in (4, 6, 3, 5, 7, 2)]
    assert torch.equal(losses(rows), losses(rows, default_data_collator))


@pytest.mark.parametrize("make", [padded_left, packed])
def test_the_first_loss_is_the_one_of_trainer(make, tmp_path):
    rows = [make(length) for length in (4, 6, 3, 5, 7, 2)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        warmup_steps=0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=0,
    )
    collator = default_data_collator
    trainer = Trainer(attached(), arguments, train_dataset=rows, data_collator=collator)
    trainer.train()
    theirs = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    lost = losses([{name: one[name] for name in ("input_ids", "labels")} for one in rows])
    # Sums in another order, against columns that are not there. Before the first update: Adam makes
    # a whole step of a gradient that is nothing but rounding, as dA is while B is 0.
    assert (losses(rows) - theirs)[0].abs() < 1e-3 * (lost - theirs)[0].abs()
