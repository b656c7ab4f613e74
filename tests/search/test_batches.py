"""Batches of rows of like length: Trainer makes them, and the note counts their padding."""

import pytest
from transformers import TrainingArguments

from ila.data import Collator
from ila.training.arguments import check_training_args
from ila.training.batches import by_length, is_by_length, padding_note, padding_share
from ila.training.config import TrainConfig
from ila.training.train import train

LENGTHS = [2 + i * 7 % 30 for i in range(256)]


def rows(lengths=LENGTHS) -> list[dict]:
    return [{"input_ids": [5] * n, "labels": [-100] + [5] * (n - 1)} for n in lengths]


def test_the_option_is_one_that_this_transformers_knows():
    check_training_args(by_length(), "steps")
    (name,) = by_length()
    assert name in TrainingArguments.__dataclass_fields__
    assert is_by_length(by_length()) and not is_by_length({}) and not is_by_length({name: "random"})


def test_padding_is_what_a_batch_has_beside_its_rows():
    assert padding_share([3] * 10, 4) == padding_share(LENGTHS, 1) == 0.0
    assert padding_share([1, 9], 2, True) == pytest.approx(8 / 18)
    at_random, grouped = (padding_share(LENGTHS, 8, on) for on in (False, True))
    assert 0.0 < grouped < at_random


def test_the_note_says_what_there_is_and_what_there_would_be():
    plain, grouped = padding_note(rows(), 8, {}), padding_note(rows(), 8, by_length())
    shares = [f"{padding_share(LENGTHS, 8, on):.0%}" for on in (False, True)]
    assert plain == f"Padding: {shares[0]} of the positions of a batch; {shares[1]} with " + (
        "--group-by-length."
    )
    assert grouped.startswith(f"Padding: {shares[1]}") and shares[0] in grouped


@pytest.mark.parametrize("cached", [False, True])
def test_trainer_makes_narrower_batches_of_the_same_rows(make_llama, cached):
    widths = {}

    class Watched(Collator):
        def __call__(self, batch):
            made = super().__call__(batch)
            widths[grouped].append(made["input_ids"].numel())
            return made

    for grouped in (False, True):
        model, config = make_llama(lora_dropout=0.0), TrainConfig(
            steps=8, batch_size=8, training_args=by_length() if grouped else {},
            cache_prefix=cached,
        )  # fmt: skip
        if cached:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_("layers.1." in name and "lora" in name)
        widths[grouped] = []
        train(model, rows(), config, collator=Watched(0), progress=False)
    assert len(widths[False]) == len(widths[True])
    assert sum(widths[True]) < sum(widths[False])
