"""The README's tables and pictures of upo.py on sudoku: references, ablation, curves, an order. 3 seeds each.

python experiments/sudoku_upo.py            # runs what is not there yet, then prints and draws
"""

import shutil
from pathlib import Path
from statistics import mean, stdev

from common import lines, results, run, spread, table, tidy

SEEDS = (0, 1, 2)
ORDERS = ("random", "max_confidence", "margin", "entropy", "softmax_confidence", "topk_random")
REFERENCES = {ref: f"--ref {ref}" for ref in ("max_confidence", "softmax_confidence", "topk")}
ABLATION = {
    "KL, pretrained": "--ref softmax_confidence",
    "KL, random": "--ref softmax_confidence --init random",
    "no KL, pretrained": "--ref softmax_confidence --beta 0",
    "no KL, random": "--ref none",
}


def path(flags: str, seed: int) -> Path:
    """The directory of one finished run."""
    name = flags.replace("--", "").replace(" ", "-")
    return run(f"python upo.py --task sudoku {flags} --seed {seed}", f"runs/sudoku-{name}-s{seed}")


def results_of(flags: str) -> list[dict]:
    return [results(path(flags, seed)) for seed in SEEDS]


def orders() -> dict[str, list[str]]:
    """Accuracy of every order; the fixed ones are the same under each reference, their base being the same."""
    rows = {}
    for name in ORDERS:
        values = [r["accuracy"][name]["mean"] for r in results_of(REFERENCES["topk"])]
        rows[name] = [*(f"{v:.3f}" for v in values), spread(values), ""]
    for ref, flags in REFERENCES.items():
        found = results_of(flags)
        values = [r["accuracy"]["upo"]["mean"] for r in found]
        p = [max(r["paired"][rival]["p"] for r in found) for rival in ("max_confidence", "margin")]
        rows[f"**UPO**, `--ref {ref}`"] = [*(f"{v:.3f}" for v in values), spread(values), f"{p[0]:.0e}, {p[1]:.0e}"]
    return rows


def ablation() -> dict[str, list[str]]:
    rows = {}
    for name, flags in ABLATION.items():
        found = results_of(flags)
        gains = [100 * r["paired"]["max_confidence"]["difference"] for r in found]
        by_seed = ", ".join(f"{gain:+.1f}" for gain in gains)
        accuracy = spread([r["accuracy"]["upo"]["mean"] for r in found])
        rows[name] = [accuracy, f"{mean(gains):+.1f} ± {stdev(gains):.1f}", by_seed]
    return rows


def draw() -> None:
    """assets/upo_sudoku.png: validation accuracy, the reward's std in a group, g's entropy, over RL steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    panels = {
        "validation_accuracy": "accuracy, 256 validation puzzles",
        "group_reward_std": "std of the reward in a group",
        "entropy": "entropy of g, nats",
    }
    for colour, (label, flags) in zip(
        ("tab:blue", "tab:cyan", "tab:orange", "tab:red", "tab:green"),
        [*ABLATION.items(), ("topk, KL, random", REFERENCES["topk"])],
    ):
        runs = [[row for row in lines(path(flags, s), "metrics") if row["phase"] == "upo"] for s in SEEDS]
        for ax, name in zip(axes, panels):
            curves = [[row[name] for row in rows if name in row] for rows in runs]
            step = [i + 1 for i, row in enumerate(runs[0]) if name in row]
            average = [mean(values) for values in zip(*curves)]
            width = 1 if len(step) < 50 else 10  # single batches are noisy: means of 10 steps
            blocks = range(0, len(average) - width + 1, width)
            ax.plot(
                [step[i + width // 2] for i in blocks],
                [mean(average[i : i + width]) for i in blocks],
                color=colour,
                label=label,
                lw=1.3,
            )
    for ax, title in zip(axes, panels.values()):
        ax.set(xlabel="RL steps", title=title)
        ax.title.set_fontsize(9)
        tidy(ax)
    axes[2].legend(frameon=False, fontsize=7)
    figure.savefig("assets/upo_sudoku.png", dpi=140, bbox_inches="tight")
    shutil.copy(path(REFERENCES["max_confidence"], 0) / "order.png", "assets/upo_order.png")


def main() -> None:
    best_of = [r["pass_at_n"] for r in results_of(REFERENCES["topk"])]
    pass_at_n = {name: [f"{mean(r[name][n] for r in best_of):.3f}" for n in best_of[0][name]] for name in best_of[0]}
    seeds = [f"seed {seed}" for seed in SEEDS]
    table(["order", *seeds, "mean ± std", "largest p against max-confidence, margin"], orders())
    table(["N", *best_of[0]["random"]], pass_at_n)
    table(["reference, initialisation", "accuracy", "over max-confidence, points", "by seed"], ablation())
    draw()


if __name__ == "__main__":
    main()
