"""Train a tokenizer and a small Llama with as many key heads as query heads, from a fixed seed."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import TensorDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)

from ila.runs.atomic import write_folder_atomic

SEED, VOCABULARY, LENGTH, ROWS, RATE = 0, 4096, 256, 16, 2e-3
END = "<|endoftext|>"
# 5.2 million parameters in 10 blocks of 7 layers; multi-head attention: 6 query and 6 key heads.
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 10,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": True,
}


def learn_tokenizer(texts: Sequence[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Learn byte-level BPE merges from the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END
    )


def packed(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return all tokens, an end after each text, in rows (rows, LENGTH); the rest is dropped."""
    rows = tokenizer(list(texts))["input_ids"]
    stream = torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])
    return stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)


def pretrain(texts: Sequence[str], out: Path, *, steps: int = -1, progress: bool = True) -> float:
    """Train on the texts once, and write the model in bfloat16 with its tokenizer.

    Args:
        texts: What is read.
        out: Folder that is written; it must not exist.
        steps: Steps of ``ROWS`` x ``LENGTH`` tokens; -1 reads everything once.
        progress: Whether to draw a bar.

    Returns:
        Mean loss of the last tenth of the steps, in nats a token.
    """
    set_seed(SEED)
    tokenizer = learn_tokenizer(texts)
    rows = packed(texts, tokenizer)
    token = tokenizer.eos_token_id
    config = LlamaConfig(vocab_size=len(tokenizer), bos_token_id=token, eos_token_id=token, **SHAPE)
    model = LlamaForCausalLM(config)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(model, _arguments(scratch, steps, progress), _batch, TensorDataset(rows))
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    with write_folder_atomic(out) as target:
        model.to(torch.bfloat16).save_pretrained(target)
        tokenizer.save_pretrained(target)
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last)


def _batch(rows: Sequence[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    tokens = torch.stack([tokens for (tokens,) in rows])
    return {"input_ids": tokens, "labels": tokens}


def _arguments(folder: str, steps: int, progress: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=ROWS,
        num_train_epochs=1,
        max_steps=steps,
        learning_rate=RATE,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        weight_decay=0.1,
        adam_beta2=0.95,
        bf16=True,
        use_cpu=True,
        seed=SEED,
        logging_steps=0.01,
        save_strategy="no",
        report_to=[],
        disable_tqdm=not progress,
    )
