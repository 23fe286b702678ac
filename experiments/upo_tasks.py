"""UPO on the other tasks of its paper, and on top of MaskGRPO: the embedded defaults, 3 seeds each.

python experiments/upo_tasks.py             # runs what is not there yet, then prints
"""

from pathlib import Path
from statistics import mean

from common import results, run, seconds, spread, table
from gsm8k_tiny import path as maskgrpo
from sudoku_upo import points

SEEDS = (0, 1, 2)
AFTER = "gsm8k, after MaskGRPO"
ORDERS = ("random", "max_confidence", "margin", "upo")


def path(name: str, seed: int) -> Path:
    """The directory of one finished run."""
    flags = f"--task gsm8k --model {maskgrpo('token', seed)}" if name == AFTER else f"--task {name}"
    return run(f"python upo.py {flags} --seed {seed}", f"runs/upo-{name.replace(', ', '-').replace(' ', '-')}-s{seed}")


def main() -> None:
    rows = {}
    for name in ("gsm8k", "math500", "zebra", AFTER):
        found = [results(path(name, seed)) for seed in SEEDS]
        accuracy = [spread([r["accuracy"][order]["mean"] for r in found]) for order in ORDERS]
        paired = [r["paired"]["max_confidence"] for r in found]
        gains = [p["difference"] for p in paired]
        cells = [", ".join(f"{100 * gain:+.1f}" for gain in gains), points(gains)]
        cells += [", ".join(f"{p['p']:.0e}" for p in paired), f"{mean(map(seconds, found)):.0f}"]
        rows[name] = [*accuracy, *cells]
    head = [*ORDERS, "upo over max_confidence, points", "mean ± 95% t", "p by seed", "seconds"]
    table(["", *head], rows)


if __name__ == "__main__":
    main()
