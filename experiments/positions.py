"""Several positions per forward: accuracy against forwards, of UPO trained at k positions, of fixed orders, of a
confidence threshold, on the sudoku of sudoku_upo.py. Draws assets/upo_positions.png.

python experiments/positions.py             # runs what is not there yet, then prints and draws
"""

from pathlib import Path
from statistics import mean

from common import results, run, spread, table, tidy
from sudoku_upo import FEW, TOPK, path, points

KS = (1, 2, 4)
THRESHOLDS = (0.9, 0.7, 0.5, 0.3, 0.2)
ORDERS = "random max_confidence margin entropy answer_confidence".split()


def trained(k: int, seed: int) -> Path:
    """A policy that was trained at k positions per step."""
    return path(TOPK if k == 1 else f"{TOPK} --positions_per_step {k}", seed)


def evaluated(k: int, seed: int, **flags) -> dict:
    """Results of the policy trained at k, with every order beside it, under other flags."""
    name = "-".join(f"{value:g}" for value in flags.values())
    more = " ".join(f"--{flag} {value}" for flag, value in flags.items())
    command = f"python upo.py --eval_only --policy {trained(k, seed)} --pass_n 0 {more}"
    return results(run(command, f"runs/positions-{k}-at-{name}-s{seed}"))


def at(k: int, seed: int, now: int) -> dict:
    return results(trained(k, seed)) if k == now else evaluated(k, seed, positions_per_step=now)


def main() -> None:
    for seed in FEW:
        for k in KS:
            for now in KS:
                at(k, seed, now)
        for threshold in THRESHOLDS:
            evaluated(1, seed, positions_per_step=1, threshold=threshold)


if __name__ == "__main__":
    main()
