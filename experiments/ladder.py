"""The paper's ladder on the tiny default, at equal rollouts, forwards and nearly seconds: 8 seeds, 150 steps of 128
completions, 1,000 held-out problems per split, paired by seed.

    python experiments/ladder.py                # runs what is not there yet, then prints and draws
    python experiments/ladder.py 1 of 2         # makes every second run, to share the work; prints nothing

All rows divide advantages by their group's std. Each has the learning rate, of three, with the best validation accuracy
(256 problems) after 75 steps, over three other seeds, or that of the row named behind it. The long runs may go side by
side, so seconds are those of 20 steps alone.
"""

import itertools
import re
import time
from pathlib import Path
from statistics import mean, stdev

from common import lines, results, run, share, spread, table, tidy

SEEDS, TUNING, RATES = range(8), range(8, 11), ("3.75e-05", "7.5e-05", "1.5e-04")
T95 = 2.365  # the t distribution's 97.5% point for 8 seeds
# flags, and the row whose learning rate it has
ROWS = {
    "diffu-GRPO": ("--method diffu-grpo", None),
    "AR-like masks": ("--method maskgrpo --gamma 0", "MaskGRPO"),
    "MaskGRPO": ("--method maskgrpo", None),
    "uniform masks, gamma .6": ("--method truncation", "MaskGRPO"),
    "UniGRPO": ("--method unigrpo", None),
    "Coupled-GRPO": ("--method coupled-grpo", None),
    "AGRPO": ("--method agrpo", None),
    "TraceRL": ("--method tracerl", None),
    "rotated-trace": ("--method rotated-trace", "TraceRL"),
}
PAIRS = (
    ("MaskGRPO", "diffu-GRPO"),
    ("MaskGRPO", "UniGRPO"),
    ("MaskGRPO", "AR-like masks"),
    ("MaskGRPO", "uniform masks, gamma .6"),  # at equal expected ratios
    ("MaskGRPO", "Coupled-GRPO"),
    ("TraceRL", "MaskGRPO"),
    ("rotated-trace", "TraceRL"),
    ("AGRPO", "TraceRL"),
)


LONG, SHORT = "--max_steps 150 --eval_n 1000", "--max_steps 75 --eval_n 2"
PACE = "--max_steps 20 --eval_n 2 --eval_every 0"


def place(name: str, seed: int, lr: str, extra: str) -> str:
    """Where a run is kept."""
    return "runs/ladder-" + "-".join(re.findall("[A-Za-z0-9]+", name)) + f"-{lr}-s{seed}" + "-pace" * (extra == PACE)


def path(name: str, seed: int, lr: str, extra: str = LONG) -> Path:
    """The directory of one finished run."""
    command = f"accelerate launch maskgrpo.py --task gsm8k {ROWS[name][0]} --advantage std --lr {lr} --pass_k 0"
    return run(f"{command} --seed {seed} {extra}", place(name, seed, lr, extra))


def tuned(name: str) -> dict[str, list[float]]:
    """Learning rate -> the last validation accuracies of its short runs, on the seeds that choose it."""
    ends = lambda lr: [lines(path(name, seed, lr, SHORT), "metrics")[-1] for seed in TUNING]
    return {lr: [line["validation_accuracy"] for line in ends(lr)] for lr in RATES}


def rate(name: str) -> str:
    """The learning rate of a row."""
    found = tuned(ROWS[name][1] or name)
    return max(found, key=lambda lr: mean(found[lr]))


def pace(name: str) -> float:
    """Seconds of a step, rollout and updates."""
    spent = results(path(name, 0, rate(name), PACE))["seconds"]
    return (spent["rollout"] + spent["update"]) / 20


def accuracies(name: str, split: str, phase: str = "after") -> list[float]:
    """Of every seed."""
    found = [results(path(name, seed, rate(name))) for seed in SEEDS]
    return [r[phase + ("_unseen" if split == "unseen" else "")]["accuracy"] for r in found]


def curve(name: str, seed: int) -> list[tuple[int, float]]:
    """(completions drawn, validation accuracy) wherever it was measured."""
    rows = lines(path(name, seed, rate(name)), "metrics")
    return [(row["completions"], row["validation_accuracy"]) for row in rows if "validation_accuracy" in row]


def p_value(gains: list[float]) -> float:
    """Of a mean gain of 0, by exchanging signs: the share of all 2^n sign patterns with a sum as far from 0."""
    sums = [sum(signs) for signs in itertools.product(*[(gain, -gain) for gain in gains])]
    return sum(abs(s) >= abs(sum(gains)) - 1e-12 for s in sums) / len(sums)


def holm(ps: list[float]) -> list[float]:
    """p-values corrected for their number (Holm): in rising order p (n - i), never below the one before."""
    order, corrected, most = sorted(range(len(ps)), key=ps.__getitem__), [0.0] * len(ps), 0.0
    for i, k in enumerate(order):
        most = corrected[k] = max(most, min(1.0, ps[k] * (len(ps) - i)))
    return corrected


def compared(split: str) -> dict[str, list[str]]:
    """For each pair the points gained, ± the 95% t interval over seeds, seeds better, p and p corrected."""
    gains = [[100 * (a - b) for a, b in zip(accuracies(x, split), accuracies(y, split))] for x, y in PAIRS]
    ps, rows = list(map(p_value, gains)), {}
    for (x, y), g, p, corrected in zip(PAIRS, gains, ps, holm(ps)):
        interval = f"{mean(g):+.1f} ± {T95 * stdev(g) / len(g) ** 0.5:.1f}"
        rows[f"{x} over {y}"] = [interval, f"{sum(v > 0 for v in g)} of {len(g)}", f"{p:.3f}", f"{corrected:.2f}"]
    return rows


def make(mine: int, of: int) -> None:
    """Makes every of-th run, from the mine-th on (1 is the first): those that choose rates, and when all processes have
    made theirs, the others."""
    tuning = [(name, seed, lr, SHORT) for name in ROWS if not ROWS[name][1] for seed in TUNING for lr in RATES]
    for one in tuning[mine - 1 :: of]:
        path(*one)
    while not all(Path(place(*one), "results.json").is_file() for one in tuning):
        time.sleep(10)
    for seed, name in list(itertools.product(SEEDS, ROWS))[mine - 1 :: of]:
        path(name, seed, rate(name))


def main() -> None:
    mine, of = share()
    if of > 1:
        return make(mine, of)
    found = {name: tuned(name) for name, (_, other) in ROWS.items() if other is None}
    print(f"\nValidation accuracy after 75 steps by learning rate, seeds {TUNING[0]} to {TUNING[-1]}")
    table(["", *RATES], {name: [spread(of) for of in row.values()] for name, row in found.items()})
    rows = {"base": ["", *(spread(accuracies("MaskGRPO", split, "before")) for split in ("test", "unseen")), ""]}
    for name in ROWS:
        cells = [spread(accuracies(name, split)) for split in ("test", "unseen")]
        rows[name] = [rate(name), *cells, f"{150 * pace(name):.0f}"]
    table(["", "learning rate", "fresh", "unseen pairs", "seconds"], rows)
    for split in ("test", "unseen"):
        print(f"\nPoints on {'fresh problems' if split == 'test' else 'unseen pairs'}")
        table(["", "gain, ± 95%", "seeds better", "p", "p (Holm)"], compared(split))
    draw()


def draw() -> None:
    """assets/ladder.png: mean validation accuracy over completions."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 4))
    for i, name in enumerate(ROWS):
        points = list(zip(*[curve(name, seed) for seed in SEEDS]))
        x, y = [at[0][0] for at in points], [mean(accuracy for _, accuracy in at) for at in points]
        ax.plot(x, y, color=f"C{i}", lw=1.3, label=name)
    ax.set(xlabel="completions", ylabel=f"greedy accuracy, mean of {len(SEEDS)} seeds")
    tidy(ax)
    ax.legend(frameon=False, fontsize=8, ncols=2)
    figure.savefig("assets/ladder.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
