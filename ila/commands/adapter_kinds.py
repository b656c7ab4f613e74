"""Options of the kind of adapter, by PEFT's names, and PEFT's configuration of them.

PiSSA and OLoRA begin after the mask: see ``ila.models.base_starts``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from peft import AdaLoraConfig, LoraConfig

from ila.models.base_starts import takes_base

LORA, ADALORA = "lora", "adalora"
_OF_ADALORA = ("tinit", "tfinal", "deltaT", "orth_reg_weight")
_OF_LORA = ("use_rslora", "use_dora")
_INITS = {"true": True, "false": False, **{n: n for n in ("gaussian", "orthogonal", "mica")}}
# PEFT makes them in steps of its own, which the commands do not run.
_PREPARED = ("eva", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, kw_only=True)
class AdapterKind:
    """Options of the kind of adapter; None takes PEFT's default."""

    adapter: str = LORA
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int | None = None  # noqa: N815 (PEFT's name)
    orth_reg_weight: float | None = None
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: str | None = None

    def check_kind(self) -> None:
        """Raise if an option is out of range, or of the other kind of adapter."""
        if self.adapter not in (LORA, ADALORA):
            raise ValueError(f"adapter must be one of {(LORA, ADALORA)}, got {self.adapter!r}")
        for name in (*_OF_LORA, "init_lora_weights") if self.adapter == ADALORA else _OF_ADALORA:
            if getattr(self, name):
                raise ValueError(f"{name} does nothing with adapter {self.adapter!r}; leave it out")
        for name, least in (("tinit", 0), ("tfinal", 0), ("deltaT", 1), ("orth_reg_weight", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise ValueError(f"{name} must be ≥ {least}, got {value}")
        _check_init(self.init_lora_weights)

    def as_dict(self) -> dict[str, object]:
        """Return the fields, without options of the kind that stand at their defaults."""
        usual = {field.name: field.default for field in fields(AdapterKind)}
        mine = asdict(self)
        return {n: value for n, value in mine.items() if n not in usual or value != usual[n]}


def _check_init(init: str | None) -> None:
    if init in _PREPARED:
        raise ValueError(
            f"init_lora_weights={init!r} needs a step of PEFT's before the adapter is attached; "
            "take ila.attach in Python"
        )
    if init is not None and init not in _INITS and not takes_base(init):
        names = (*_INITS, "olora", "pissa", "pissa_niter_N")
        raise ValueError(f"init_lora_weights must be one of {', '.join(names)}, got {init!r}")


def adapter_config(
    kind: AdapterKind, rank: int, alpha: float, dropout: float, targets: str | list[str]
) -> LoraConfig:
    """Make PEFT's configuration of an adapter.

    AdaLoRA ends at an average of ``rank`` and begins at half as much again, PEFT's own ratio of 8
    and 12. ``ila.models.adalora.set_total_step`` then sets the steps of its schedule.
    """
    init = kind.init_lora_weights
    init = True if init is None or takes_base(init) else _INITS[init]
    common = {
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
    }
    if kind.adapter == LORA:
        named = {name: getattr(kind, name) for name in _OF_LORA}
        return LoraConfig(r=rank, init_lora_weights=init, **named, **common)
    given = {name: getattr(kind, name) for name in _OF_ADALORA}
    given = {name: value for name, value in given.items() if value is not None}
    some = given.get("tinit", 0) + given.get("tfinal", 0) + 1
    return AdaLoraConfig(
        init_r=rank + (rank + 1) // 2, target_r=rank, total_step=some, **given, **common
    )
