"""Bytes moved by one layer: ours, addmm and eager PEFT over the frozen linear, by formula.

    python -m benchmarks.traffic --tokens 8192 --rank 16 [--dropout] [--json FILE]

The formulas are those of ``ila_kernels.roofline``; ours are compared with a count of every load
and store of the kernels in ``tests/kernels/test_triton_traffic.py``. q, k and v, and gate and up,
share one x. Training wants dx, dA and dB; base in bf16, adapters in fp32.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ila.runs.atomic import write_json_atomic
from ila_kernels.roofline import CONTESTANTS, Problem, group_backward_cost, group_forward_cost

NEEDS = {"x", "lora_a", "lora_b"}
# hidden size, width of k and v, width of the MLP: from the models' published configurations.
MODELS = {
    "Llama-2-7B": (4096, 4096, 11008),
    "Llama-3-8B": (4096, 1024, 14336),
    "Mistral-7B": (4096, 1024, 14336),
}


def layers(hidden: int, kv: int, mlp: int) -> dict[str, tuple[int, list[int]]]:
    """K and the N's of what is called together, by name."""
    return {
        "q k v": (hidden, [hidden, kv, kv]),
        "o": (hidden, [hidden]),
        "gate up": (hidden, [mlp, mlp]),
        "down": (mlp, [hidden]),
    }


def rows(tokens: int, rank: int, dropout: bool) -> list[dict]:
    """Bytes of forward and backward for every model, layer and contestant."""
    found = []
    for model, sizes in MODELS.items():
        for layer, (k, ns) in layers(*sizes).items():
            members = [Problem(tokens, k, n, rank, dropout=dropout) for n in ns]
            for contestant in CONTESTANTS:
                forward = group_forward_cost(contestant, members).bytes
                backward = group_backward_cost(contestant, members, NEEDS).bytes
                found.append(
                    {
                        "model": model,
                        "layer": layer,
                        "contestant": contestant,
                        "forward_bytes": forward,
                        "backward_bytes": backward,
                    }
                )
    return found


def table(found: list[dict]) -> str:
    """MB of forward + backward: the frozen linear, and what each contestant adds to it."""
    lines = [f"{'':10} {'':8} {'frozen':>15}" + "".join(f"{c:>23}" for c in CONTESTANTS[1:])]
    for i in range(0, len(found), len(CONTESTANTS)):
        frozen, *others = found[i : i + len(CONTESTANTS)]
        f, b = frozen["forward_bytes"], frozen["backward_bytes"]
        line = f"{frozen['model']:10} {frozen['layer']:8} {f / 1e6:6.0f} + {b / 1e6:6.0f}"
        for other in others:
            more = (other["forward_bytes"] - f, other["backward_bytes"] - b)
            line += f"  +{more[0] / 1e6:5.0f} +{more[1] / 1e6:5.0f} ({sum(more) / (f + b):+5.0%})"
        lines.append(line)
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", action="store_true")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found = rows(given.tokens, given.rank, given.dropout)
    print(f"MB, forward + backward, M = {given.tokens}, R = {given.rank}, dropout {given.dropout}")
    print(table(found))
    if given.json:
        options = {"tokens": given.tokens, "rank": given.rank, "dropout": given.dropout}
        write_json_atomic(given.json, options | {"rows": found})


if __name__ == "__main__":
    main()
