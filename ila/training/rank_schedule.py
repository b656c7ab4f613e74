"""Run AdaLoRA's schedule of ranks in ``Trainer``, and keep it in the checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from peft.tuners.adalora import AdaLoraModel
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from ila.models.adalora import tuner_of, whole_ranks

FILE = "rank_allocator.pt"
# Moving sums of PEFT's allocator.
_SUMS = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankSchedule(TrainerCallback):
    """Let PEFT move the ranks after each step of the optimiser, where the adapter trains."""

    def __init__(self, tuner: AdaLoraModel):
        self.tuner = tuner

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Score the triplets by their gradients, which are still there."""
        named = self.tuner.model.named_parameters()
        # While a search scores the layers, the adapter is frozen.
        if any(p.requires_grad for name, p in named if ".lora_E." in name):
            self.tuner.update_and_allocate(state.global_step)


class RankedTrainer(Trainer):
    """A ``Trainer`` that moves ranks. Its checkpoints hold closed ranks too, and the scores."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled:
            raise ValueError("AdaLoRA cannot train under FSDP: its ranks move in whole tensors")
        self.tuner = tuner_of(self.model)
        self.add_callback(RankSchedule(self.tuner))

    def _save_checkpoint(self, *args: object, **kwargs: object) -> None:
        config = self._config()
        with whole_ranks(config):
            super()._save_checkpoint(*args, **kwargs)
        if self.args.should_save:
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            sums = {name: getattr(self.tuner.rankallocator, name) for name in _SUMS}
            torch.save({**sums, "rank_pattern": config.rank_pattern}, folder / FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: object) -> None:
        config = self._config()
        with whole_ranks(config):
            super()._load_from_checkpoint(resume_from_checkpoint, *args)
        kept = torch.load(
            Path(resume_from_checkpoint) / FILE, map_location=self.args.device, weights_only=True
        )
        for name in _SUMS:
            setattr(self.tuner.rankallocator, name, kept[name])
        config.rank_pattern = kept["rank_pattern"]

    def _config(self):
        return self.tuner.peft_config[self.tuner.trainable_adapter_name]


def ranked(kind: type[Trainer]) -> type[Trainer]:
    """Return the form of ``kind`` that moves ranks."""
    return type(f"Ranked{kind.__name__}", (RankedTrainer, kind), {})
