"""One undamaged file of every kind that a command reads, made by the commands themselves."""

import io
import json
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import gguf
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer

from ila import cli
from ila.masks.mask import LayerMask
from tests.cli.conftest import write_rows

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }} "
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
LEARN = (
    *("learn", "--rank", "2", "--method", "ila", "--stage1-steps", "2", "--stage2-steps", "2"),
    *("--batch-size", "2", "--save-every", "1"),
)
TRAIN = ("train", "--batch-size", "2", "--save-every", "1", "--steps", "3")


class Killed(BaseException):
    """A kill: nothing that catches `Exception` sees it."""


def ila(*arguments: object, kill_at: int | None = None) -> None:
    """Run a command that must succeed, or one that is killed at a training step."""
    steps, original = [], Trainer.training_step

    def training_step(self, *args, **kwargs):
        steps.append(1)
        if len(steps) == kill_at:
            raise Killed
        return original(self, *args, **kwargs)

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(said):
        patch.setattr(sys, "argv", ["ila", *map(str, arguments)])
        patch.setattr(cli, "screen", cli.Console(width=200, markup=False))
        patch.setattr(Trainer, "training_step", training_step)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        try:
            cli.main()
        except SystemExit as done:
            assert done.code in (0, None), said.getvalue()
        except Killed:
            assert kill_at is not None


def make_all(root: Path, tiny_model_folder: Path) -> None:
    """Fill a folder."""
    model = shutil.copytree(tiny_model_folder, root / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(model, root / "pickled")
    torch.save(load_file(model / "model.safetensors"), root / "pickled" / "pytorch_model.bin")
    (root / "pickled" / "model.safetensors").unlink()
    write_gguf(root / "packed" / "model.gguf")
    write_tables(root)
    write_options(root)
    source = ("--model", model, "--data", root / "rows.jsonl")
    ila(*LEARN, *source, "--out", root / "learned")
    ila(*LEARN, *source, "--out", root / "learned-half", kill_at=3)
    ila(*TRAIN, *source, "--rank", "2", "--out", root / "trained")
    ila(*TRAIN, *source, "--rank", "2", "--out", root / "trained-half", kill_at=3)
    ila(*TRAIN, *source, "--full", "--out", root / "full")
    mask = LayerMask.load(root / "learned")
    gates = {name: ".layers.1." in name for name in mask.scores}
    LayerMask(mask.scores, gates, dict(mask.provenance)).save(root / "upper.json")
    options = ("--rank", "2", "--batch-size", "1", "--max-length", "16", "--rounds", "1")
    ila("measure", "--model", model, *options, "--out", root / "speed.json")
    cached = ("--cache-prefix", "--cache-folder", root / "cache", "--mask", root / "upper.json")
    ila(*TRAIN, *source, "--rank", "2", *cached, "--out", root / "cached")


def write_options(root: Path) -> None:
    """Write a file of --config, in YAML and in JSON, which is YAML too."""
    options = {"learning_rate": 0.01, "scheduler": "cosine", "held_out": 0.25, "eval_every": 1}
    options |= {"lr_scheduler_kwargs": {"num_cycles": 0.5}, "weight_decay": 1e-3, "optim": "sgd"}
    (root / "options.json").write_text(json.dumps(options))
    (root / "options.yaml").write_text(yaml.safe_dump(options | {"train": {"warmup": 1}}))


def write_tables(root: Path) -> None:
    """Write the same rows in every form."""
    write_rows(root / "rows.jsonl", 8)
    rows = [json.loads(line) for line in (root / "rows.jsonl").read_text().splitlines()]
    (root / "rows.json").write_text(json.dumps(rows))
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    (root / "rows.csv").write_text("\n".join(lines) + "\n")
    pq.write_table(pa.Table.from_pylist(rows), root / "rows.parquet")


def write_gguf(file: Path) -> None:
    """Write a Llama of two blocks with a byte-level tokenizer."""
    file.parent.mkdir()
    draw = np.random.default_rng(0)
    tokens = ["<s>", "</s>", *(chr(c) for c in range(33, 127)), "Ġ", "Ċ"]
    writer = gguf.GGUFWriter(file, "llama")
    sizes = {"block_count": 2, "context_length": 128, "embedding_length": 16}
    sizes |= {"feed_forward_length": 24, "head_count": 2, "head_count_kv": 1}
    for name, value in (sizes | {"vocab_size": len(tokens)}).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {"token_embd": (len(tokens), 16), "output": (len(tokens), 16), "output_norm": (16,)}
    for block in range(2):
        narrow = {"attn_q": 16, "attn_k": 8, "attn_v": 8, "ffn_gate": 24, "ffn_up": 24}
        shapes |= {f"blk.{block}.{name}": (width, 16) for name, width in narrow.items()}
        shapes |= {f"blk.{block}.attn_output": (16, 16), f"blk.{block}.ffn_down": (16, 24)}
        shapes |= {f"blk.{block}.{name}": (16,) for name in ("attn_norm", "ffn_norm")}
    for name, shape in shapes.items():
        values = draw.normal(0, 0.2, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
