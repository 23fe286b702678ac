"""What the KL and pretraining are for: UPO on the sudoku of sudoku_upo.py with and without either, 5 seeds.

python experiments/upo_ablation.py          # runs what is not there yet, then prints and draws assets/upo_ablation.png
"""

from statistics import mean

from common import lines, results, spread, table, tidy
from sudoku_upo import SEEDS, TOPK, path, points

# g_ref max_confidence, which is 0 almost everywhere, is the one that pretraining makes a difference to; a random g is
# near the topk reference already
ROWS = {
    "topk, random, KL (the default)": TOPK,
    "none, random": "--ref none",
    "max_confidence, pretrained, KL": "--ref max_confidence",
    "max_confidence, pretrained, no KL": "--ref max_confidence --beta 0",
    "max_confidence, random, KL": "--ref max_confidence --init random",
}
PANELS = {
    "validation_accuracy": "accuracy, validation",
    "entropy": "entropy of g, nats",
    "group_reward_std": "group std",
}


def curve(flags: str, name: str) -> tuple[list[int], list[float]]:
    """(steps, a metric there, its mean over seeds) of the UPO phase; of every step, means of 10."""
    runs = [[row for row in lines(path(flags, s), "metrics") if row["phase"] == "upo"] for s in SEEDS]
    at = [i for i, row in enumerate(runs[0]) if name in row]
    values = [mean(rows[i][name] for rows in runs) for i in at]
    width = 1 if len(at) < 50 else 10
    blocks = range(0, len(at) - width + 1, width)
    return [at[i] + width // 2 + 1 for i in blocks], [mean(values[i : i + width]) for i in blocks]


def row(flags: str) -> list[str]:
    """Accuracy, gain over max_confidence with its interval, entropy and group std in the first and last 10 steps."""
    found = [results(path(flags, seed)) for seed in SEEDS]
    gains = [r["paired"]["max_confidence"]["difference"] for r in found]
    ends = [curve(flags, name)[1] for name in ("entropy", "group_reward_std")]
    by_seed = ", ".join(f"{100 * gain:+.1f}" for gain in gains)
    cells = [spread([r["accuracy"]["upo"]["mean"] for r in found]), by_seed, points(gains)]
    return [*cells, *(f"{values[0]:.2f} → {values[-1]:.2f}" for values in ends)]


def draw() -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for i, (label, flags) in enumerate(ROWS.items()):
        for ax, name in zip(axes, PANELS):
            ax.plot(*curve(flags, name), color=f"C{i}", label=label, lw=1.3)
    for ax, title in zip(axes, PANELS.values()):
        ax.set_xlabel("RL steps")
        ax.set_title(title, fontsize=9)
        tidy(ax)
    axes[1].legend(frameon=False, fontsize=7)
    figure.savefig("assets/upo_ablation.png", dpi=140, bbox_inches="tight")


def main() -> None:
    head = ["upo", "gain by seed, points", "mean ± 95% t", "entropy of g", "group std"]
    table(["reference, initial g, KL", *head], {name: row(flags) for name, flags in ROWS.items()})
    draw()


if __name__ == "__main__":
    main()
