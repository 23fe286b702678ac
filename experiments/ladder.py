"""The paper's ladder on the tiny default, at equal rollouts: 5 seeds, 150 steps of 128 completions, 2,000 held-out
problems per split, paired.

    python experiments/ladder.py                # runs what is not there yet, then prints and draws

Each row changes one thing of the row above it, so all of them divide advantages by their group's std; UniGRPO, TraceRL
and rotated-trace stand beside the ladder. Rollouts are counted until validation accuracy (256 problems, every 25 steps)
reaches what the first row ends with. The long runs may go side by side, so seconds are those of 20 steps run alone.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rewards import paired_p  # noqa: E402

SEEDS = (0, 1, 2, 3, 4)
ROWS = {
    "diffu-GRPO": "--method diffu-grpo",
    "+ managed randomness": "--method diffu-grpo --managed_randomness",
    "+ AR-like masks": "--method maskgrpo --gamma 0",
    "+ truncation: MaskGRPO": "--method maskgrpo",
    "UniGRPO": "--method unigrpo",
    "TraceRL": "--method tracerl",
    "rotated-trace": "--method rotated-trace",
}
FIRST = next(iter(ROWS))


def run(name: str, seed: int, extra: str = "--max_steps 150 --eval_n 2000", label: str = "") -> Path:
    """The directory of one finished run of the project's own command."""
    path = Path("runs") / f"ladder-{list(ROWS).index(name)}-s{seed}{label}"
    if not (path / "results.json").is_file():
        flags = f"--task gsm8k {ROWS[name]} --advantage std --pass_k 0 --seed {seed} --output_dir {path} {extra}"
        subprocess.run([sys.executable, "maskgrpo.py", *flags.split()], check=True)
    return path


def pace(name: str) -> float:
    """Seconds of a step, rollout and updates."""
    path = run(name, 0, "--max_steps 20 --eval_n 2 --eval_every 0", "-pace")
    spent = json.loads((path / "results.json").read_text())["seconds"]
    return (spent["rollout"] + spent["update"]) / 20


def results(name: str) -> list[dict]:
    return [json.loads((run(name, seed) / "results.json").read_text()) for seed in SEEDS]


def scores(name: str, seed: int) -> list[float]:
    """The score of every test problem after RL, in the same order for every row."""
    lines = (run(name, seed) / "completions_after.jsonl").read_text().splitlines()
    return [row["score"] for row in map(json.loads, lines) if row["split"] == "test"]


def curve(name: str, seed: int) -> list[tuple[int, float, float]]:
    """(completions drawn, seconds of RL, validation accuracy) wherever it was measured."""
    path = run(name, seed)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    kept = [line for line in lines if "validation_accuracy" in line]
    return [(line["completions"], line["step"] * pace(name), line["validation_accuracy"]) for line in kept]


def reached(name: str) -> str:
    """Completions until the first row's final validation accuracy: mean over the seeds that reach it, and how many."""
    goals = [curve(FIRST, seed)[-1][2] for seed in SEEDS]
    first = [next((n for n, _, a in curve(name, seed) if a >= goal), None) for seed, goal in zip(SEEDS, goals)]
    there = [n for n in first if n is not None]
    return f"{statistics.mean(there):,.0f} ({len(there)} of {len(SEEDS)})" if there else "never"


def cell(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main() -> None:
    print("| | fresh | unseen pairs | points over diffu-GRPO | largest p | rollouts to its end | seconds |")
    print("|---|---|---|---|---|---|---|")
    before = results(FIRST)
    cells = [cell([r[f"before{suffix}"]["accuracy"] for r in before]) for suffix in ("", "_unseen")]
    print(f"| base | {cells[0]} | {cells[1]} | | | | |")
    for name in ROWS:
        after = results(name)
        cells = [cell([r[f"after{suffix}"]["accuracy"] for r in after]) for suffix in ("", "_unseen")]
        pairs = [(scores(FIRST, seed), scores(name, seed)) for seed in SEEDS]
        gains = [100 * (statistics.mean(ours) - statistics.mean(theirs)) for theirs, ours in pairs]
        gain = f"{statistics.mean(gains):+.1f} ± {statistics.stdev(gains):.1f}"
        cells += [gain, f"{max(paired_p(*pair) for pair in pairs):.0e}", reached(name), f"{150 * pace(name):.0f}"]
        print(f"| {name} | " + " | ".join(cells) + " |")
    draw()


def draw() -> None:
    """assets/ladder.png: mean validation accuracy over completions and over seconds of RL."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for i, name in enumerate(ROWS):
        curves = [curve(name, seed) for seed in SEEDS]
        mean = [[statistics.mean(values) for values in zip(*points)] for points in zip(*curves)]
        for ax, column in zip(axes, (0, 1)):
            ax.plot([p[column] for p in mean], [p[2] for p in mean], color=f"C{i}", lw=1.3, label=name)
    for ax, label in zip(axes, ("completions", "seconds of rollouts and updates")):
        ax.set(xlabel=label)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel=f"greedy accuracy, mean of {len(SEEDS)} seeds")
    axes[1].legend(frameon=False, fontsize=8)
    figure.savefig("assets/ladder.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
