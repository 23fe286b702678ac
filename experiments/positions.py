"""Several positions per forward: accuracy against forwards, of UPO trained at k positions, of fixed orders, of a
confidence threshold, on the sudoku of sudoku_upo.py. Draws assets/upo_positions.png.

python experiments/positions.py             # runs what is not there yet, then prints and draws
"""

from pathlib import Path
from statistics import mean

from common import results, run, spread, table, tidy
from sudoku_upo import FEW, TOPK, path

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


def curves(seed: int) -> dict[str, list[tuple[float, float]]]:
    """{line: (forwards, accuracy) of its points}: each policy at each k, each fixed order at each k, the threshold."""
    point = lambda r, order: (r["accuracy"][order]["nfe"], r["accuracy"][order]["mean"])
    found = {f"upo, trained at {k}": [point(at(k, seed, now), "upo") for now in KS] for k in KS}
    found |= {order: [point(at(1, seed, now), order) for now in KS] for order in ORDERS}
    looks = [evaluated(1, seed, positions_per_step=1, threshold=threshold) for threshold in THRESHOLDS]
    return found | {"threshold": [point(r, "threshold") for r in looks]}


def draw(of: dict[str, list[tuple[float, float]]]) -> None:
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3.8))
    for i, (name, points) in enumerate(of.items()):
        style = "-" if "upo" in name else ":" if name == "answer_confidence" else "--"
        ax.plot(*zip(*points), style, marker=".", color=f"C{i}", label=name, lw=1.6 if "upo" in name else 1)
    ax.set(xlabel="forwards of the base per puzzle", ylabel="share of right cells", xscale="log", xticks=(2, 4, 8))
    ax.set_xticks((2, 4, 8), ("2", "4", "8"))
    ax.minorticks_off()
    ax.legend(frameon=False, fontsize=7, bbox_to_anchor=(1, 1))
    tidy(ax)
    figure.savefig("assets/upo_positions.png", dpi=140, bbox_inches="tight")


def main() -> None:
    found = [curves(seed) for seed in FEW]
    rows, lines = {}, {}
    for name in found[0]:
        of_seeds = list(zip(*(of[name] for of in found)))  # by point, then by seed
        lines[name] = [(mean(n for n, _ in point), mean(a for _, a in point)) for point in of_seeds]
        cells = [f"{spread([a for _, a in point])} ({mean(n for n, _ in point):.1f})" for point in of_seeds]
        if name == "threshold":
            table(["threshold", *map(str, THRESHOLDS)], {"accuracy (forwards)": cells})
        else:
            rows[name] = cells
    table(["accuracy (forwards), at k =", *map(str, KS)], rows)
    draw(lines)


if __name__ == "__main__":
    main()
