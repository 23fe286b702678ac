"""The README's tables and pictures of upo.py on sudoku: references, ablation, curves, an order. 3 seeds each.

python experiments/sudoku_upo.py            # runs what is not there yet, then prints and draws
"""

import shutil
import statistics
from pathlib import Path

from common import lines, results, run, spread, tidy

SEEDS = (0, 1, 2)
ORDERS = ("random", "max_confidence", "margin", "entropy", "softmax_confidence", "topk_random", "upo")
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


def print_orders() -> None:
    """Accuracy of every order; the fixed ones are the same under each reference, their base being the same."""
    print("| order | seed 0 | seed 1 | seed 2 | mean ± std | largest p against max-confidence, margin |")
    print("|---|---|---|---|---|---|")
    for name, flags in {order: REFERENCES["topk"] for order in ORDERS[:-1]}.items():
        values = [r["accuracy"][name]["mean"] for r in results_of(flags)]
        print(f"| {name} | " + " | ".join(f"{v:.3f}" for v in values) + f" | {spread(values)} | |")
    for ref, flags in REFERENCES.items():
        found = results_of(flags)
        values = [r["accuracy"]["upo"]["mean"] for r in found]
        p = [max(r["paired"][rival]["p"] for r in found) for rival in ("max_confidence", "margin")]
        cells = " | ".join(f"{v:.3f}" for v in values)
        print(f"| **UPO**, `--ref {ref}` | {cells} | {spread(values)} | {p[0]:.0e}, {p[1]:.0e} |")


def print_pass() -> None:
    """pass@N of random and top-K orders, mean over seeds."""
    found = results_of(REFERENCES["topk"])
    print("\n| N | " + " | ".join(found[0]["pass_at_n"]["random"]) + " |\n|---|---|---|---|---|---|")
    for name in found[0]["pass_at_n"]:
        values = [[r["pass_at_n"][name][n] for r in found] for n in found[0]["pass_at_n"][name]]
        print(f"| {name} | " + " | ".join(f"{statistics.mean(v):.3f}" for v in values) + " |")


def print_ablation() -> None:
    print("\n| reference, initialisation | accuracy | over max-confidence, points | by seed |\n|---|---|---|---|")
    for name, flags in ABLATION.items():
        found = results_of(flags)
        gains = [100 * r["paired"]["max_confidence"]["difference"] for r in found]
        by_seed = ", ".join(f"{gain:+.1f}" for gain in gains)
        gain = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}"
        print(f"| {name} | {spread([r['accuracy']['upo']['mean'] for r in found])} | {gain} | {by_seed} |")


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
            mean = [statistics.mean(values) for values in zip(*curves)]
            width = 1 if len(step) < 50 else 10  # single batches are noisy: means of 10 steps
            blocks = range(0, len(mean) - width + 1, width)
            ax.plot(
                [step[i + width // 2] for i in blocks],
                [statistics.mean(mean[i : i + width]) for i in blocks],
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
    print_orders()
    print_pass()
    print_ablation()
    draw()


if __name__ == "__main__":
    main()
