"""The paper's ladder on the tiny default, at equal rollouts: 5 seeds, 150 steps of 128 completions, 2,000 held-out
problems per split, paired; and four of its rows with one token per step instead of four.

    python experiments/ladder.py                # runs what is not there yet, then prints and draws

Each row changes one thing of the row above it, so all of them divide advantages by their group's std. The paper goes
from a full mask that hides 15% of the prompt to AR-like masks at once; here are two rows between them, a full mask (all
but one token in 10,000) that hides none of the prompt, and uniform masks at the ratios of the AR-like ones. What
follows MaskGRPO stands beside the ladder. Completions are counted until validation accuracy (256 problems, every 25
steps) reaches what another row ends with. The long runs may go side by side, so seconds are those of 20 steps alone.
"""

import math
import re
from pathlib import Path
from statistics import mean, median, stdev

from common import lines, results, run, spread, table, tidy

SEEDS = (0, 1, 2, 3, 4)
T95 = 2.776  # the t distribution's 97.5% point for 5 seeds
ROWS = {
    "diffu-GRPO": "--method diffu-grpo",
    "+ managed randomness": "--method diffu-grpo --managed_randomness",
    "+ clean prompt": "--method diffu-grpo --managed_randomness --remask uniform --gamma 0.9999",
    "+ uniform masks": "--method diffu-grpo --managed_randomness --remask uniform --gamma 0",
    "+ AR-like masks": "--method maskgrpo --gamma 0",
    "+ truncation: MaskGRPO": "--method maskgrpo",
    "uniform masks, gamma .6": "--method truncation",
    "UniGRPO": "--method unigrpo",
    "TraceRL": "--method tracerl",
    "rotated-trace": "--method rotated-trace",
}
# tokens per step: the rows that are run with it
STEPS = {4: tuple(ROWS), 1: ("+ AR-like masks", "+ truncation: MaskGRPO", "TraceRL", "rotated-trace")}
# tokens per step: the rows whose final accuracy the others are timed to
GOALS = {4: ("diffu-GRPO", "UniGRPO"), 1: ("+ truncation: MaskGRPO",)}
PAIRS = (
    ("+ managed randomness", "diffu-GRPO"),
    ("+ clean prompt", "+ managed randomness"),
    ("+ uniform masks", "+ clean prompt"),
    ("+ AR-like masks", "+ uniform masks"),
    ("+ truncation: MaskGRPO", "+ AR-like masks"),
    ("+ truncation: MaskGRPO", "diffu-GRPO"),
    ("uniform masks, gamma .6", "+ uniform masks"),
    ("+ truncation: MaskGRPO", "uniform masks, gamma .6"),
    ("+ truncation: MaskGRPO", "UniGRPO"),
    ("TraceRL", "+ AR-like masks"),
    ("TraceRL", "+ truncation: MaskGRPO"),
    ("rotated-trace", "TraceRL"),
)


def path(name: str, seed: int, tokens: int, extra: str = "--max_steps 150 --eval_n 2000", label: str = "") -> Path:
    """The directory of one finished run."""
    command = f"accelerate launch maskgrpo.py --task gsm8k {ROWS[name]} --tokens_per_step {tokens}"
    directory = f"runs/ladder-{tokens}-{'-'.join(re.findall('[A-Za-z0-9]+', name))}-s{seed}{label}"
    return run(f"{command} --advantage std --pass_k 0 --seed {seed} {extra}", directory)


def pace(name: str, tokens: int) -> float:
    """Seconds of a step, rollout and updates."""
    spent = results(path(name, 0, tokens, "--max_steps 20 --eval_n 2 --eval_every 0", "-pace"))["seconds"]
    return (spent["rollout"] + spent["update"]) / 20


def scores(name: str, seed: int, tokens: int, split: str) -> list[float]:
    """The score of every problem of a split after RL, in the same order for every row."""
    rows = lines(path(name, seed, tokens), "completions_after")
    return [row["score"] for row in rows if row["split"] == split]


def curve(name: str, seed: int, tokens: int) -> list[tuple[int, float, float]]:
    """(completions drawn, seconds of RL, validation accuracy) wherever it was measured."""
    rows = [row for row in lines(path(name, seed, tokens), "metrics") if "validation_accuracy" in row]
    return [(row["completions"], row["step"] * pace(name, tokens), row["validation_accuracy"]) for row in rows]


def reached(name: str, goal: str, tokens: int) -> str:
    """Completions until the final validation accuracy of `goal` is reached, the median seed; it may be none of them."""
    first = []
    for seed in SEEDS:
        end = curve(goal, seed, tokens)[-1][2]
        first.append(next((n for n, _, accuracy in curve(name, seed, tokens) if accuracy >= end), math.inf))
    return f"{median(first):,.0f}" if median(first) < math.inf else "never"


def compared(name: str, rival: str, tokens: int) -> list[str]:
    """Points that `name` gains over `rival` on both splits, ± the 95% t interval over seeds, and seeds better."""
    cells = []
    for split in ("test", "unseen"):
        pairs = [[mean(scores(n, seed, tokens, split)) for n in (name, rival)] for seed in SEEDS]
        gains = [100 * (ours - theirs) for ours, theirs in pairs]
        cells.append(f"{mean(gains):+.1f} ± {T95 * stdev(gains) / len(SEEDS) ** 0.5:.1f}")
        cells.append(f"{sum(gain > 0 for gain in gains)} of {len(SEEDS)}")
    return cells


def short(name: str) -> str:
    """A row's name outside the ladder."""
    return name.removeprefix("+ ").removeprefix("truncation: ")


def named(tokens: int) -> str:
    return f"{tokens} token{'s' * (tokens > 1)} per step"


def main() -> None:
    for tokens, names in STEPS.items():
        found = {name: [results(path(name, seed, tokens)) for seed in SEEDS] for name in names}
        accuracies = lambda of, phase: [spread([r[f"{phase}{s}"]["accuracy"] for r in of]) for s in ("", "_unseen")]
        rows = {"base": [*accuracies(found[names[0]], "before"), *([""] * len(GOALS[tokens])), ""]}
        for name, of in found.items():
            counts = [reached(name, goal, tokens) for goal in GOALS[tokens]]
            rows[name] = [*accuracies(of, "after"), *counts, f"{150 * pace(name, tokens):.0f}"]
        print(f"\n{named(tokens)}")
        counts = [f"completions to {short(goal)}'s end" for goal in GOALS[tokens]]
        table(["", "fresh", "unseen pairs", *counts, "seconds"], rows)
        pairs = {f"{short(a)} over {short(b)}": compared(a, b, tokens) for a, b in PAIRS if {a, b} <= set(names)}
        table(["points", "fresh", "seeds better", "unseen pairs", "seeds better"], pairs)
    draw()


def draw() -> None:
    """assets/ladder.png: mean validation accuracy over completions, and over seconds of RL."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), sharey=True)
    for ax, (tokens, column) in zip(axes, ((4, 0), (4, 1), (1, 0))):
        for name in STEPS[tokens]:
            points = zip(*[curve(name, seed, tokens) for seed in SEEDS])
            x, y = zip(*[(mean(p[column] for p in at), mean(p[2] for p in at)) for at in points])
            ax.plot(x, y, color=f"C{list(ROWS).index(name)}", lw=1.3, label=name)
        ax.set(xlabel=("completions", "seconds of rollouts and updates")[column])
        ax.set_title(named(tokens), fontsize=10)
        tidy(ax)
    axes[0].set(ylabel=f"greedy accuracy, mean of {len(SEEDS)} seeds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 0.0))
    figure.savefig("assets/ladder.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
