"""The README's tables and pictures of upo.py on sudoku: references, ablation, curves, an order. 3 seeds each.

python experiments/sudoku_upo.py            # runs what is not there yet, then prints and draws
"""

import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
ORDERS = ("random", "max_confidence", "margin", "entropy", "softmax_confidence", "topk_random", "upo")
REFERENCES = {ref: ["--ref", ref] for ref in ("max_confidence", "softmax_confidence", "topk")}
ABLATION = {
    "KL, pretrained": ["--ref", "softmax_confidence"],
    "KL, random": ["--ref", "softmax_confidence", "--init", "random"],
    "no KL, pretrained": ["--ref", "softmax_confidence", "--beta", "0"],
    "no KL, random": ["--ref", "none"],
}


def run(flags: list[str], seed: int) -> Path:
    """The directory of one finished run of the project's own command."""
    path = Path("runs") / "-".join(["sudoku", *(flag.strip("-") for flag in flags), f"s{seed}"])
    if not (path / "results.json").is_file():
        command = [sys.executable, "upo.py", "--task", "sudoku", *flags, "--seed", str(seed), "--output_dir", str(path)]
        subprocess.run(command, check=True)
    return path


def results_of(flags: list[str]) -> list[dict]:
    return [json.loads((run(flags, seed) / "results.json").read_text()) for seed in SEEDS]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def print_orders() -> None:
    """Accuracy of every order; the fixed ones are the same under each reference, their base being the same."""
    print("| order | seed 0 | seed 1 | seed 2 | mean ± std | largest p against max-confidence, margin |")
    print("|---|---|---|---|---|---|")
    for name, flags in {order: REFERENCES["topk"] for order in ORDERS[:-1]}.items():
        values = [r["accuracy"][name]["mean"] for r in results_of(flags)]
        print(f"| {name} | " + " | ".join(f"{v:.3f}" for v in values) + f" | {spread(values)} | |")
    for ref, flags in REFERENCES.items():
        results = results_of(flags)
        values = [r["accuracy"]["upo"]["mean"] for r in results]
        p = [max(r["paired"][rival]["p"] for r in results) for rival in ("max_confidence", "margin")]
        cells = " | ".join(f"{v:.3f}" for v in values)
        print(f"| **UPO**, `--ref {ref}` | {cells} | {spread(values)} | {p[0]:.0e}, {p[1]:.0e} |")


def print_pass() -> None:
    """pass@N of random and top-K orders, mean over seeds."""
    results = results_of(REFERENCES["topk"])
    print("\n| N | " + " | ".join(results[0]["pass_at_n"]["random"]) + " |\n|---|---|---|---|---|---|")
    for name in results[0]["pass_at_n"]:
        values = [[r["pass_at_n"][name][n] for r in results] for n in results[0]["pass_at_n"][name]]
        print(f"| {name} | " + " | ".join(f"{statistics.mean(v):.3f}" for v in values) + " |")


def print_ablation() -> None:
    print("\n| reference, initialisation | accuracy | over max-confidence, points | by seed |\n|---|---|---|---|")
    for name, flags in ABLATION.items():
        results = results_of(flags)
        gains = [100 * r["paired"]["max_confidence"]["difference"] for r in results]
        by_seed = ", ".join(f"{gain:+.1f}" for gain in gains)
        gain = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}"
        print(f"| {name} | {spread([r['accuracy']['upo']['mean'] for r in results])} | {gain} | {by_seed} |")


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
        lines = [[json.loads(row) for row in (run(flags, s) / "metrics.jsonl").read_text().splitlines()] for s in SEEDS]
        lines = [[row for row in rows if row["phase"] == "upo"] for rows in lines]
        for ax, name in zip(axes, panels):
            curves = [[row[name] for row in rows if name in row] for rows in lines]
            step = [i + 1 for i, row in enumerate(lines[0]) if name in row]
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
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[2].legend(frameon=False, fontsize=7)
    figure.savefig("assets/upo_sudoku.png", dpi=140, bbox_inches="tight")
    shutil.copy(run(REFERENCES["max_confidence"], 0) / "order.png", "assets/upo_order.png")


def main() -> None:
    print_orders()
    print_pass()
    print_ablation()
    draw()


if __name__ == "__main__":
    sys.exit(main())
