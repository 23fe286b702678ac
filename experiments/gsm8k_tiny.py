"""The table and picture of the default run: 3 seeds, both importance ratios, about 4 minutes each.

python experiments/gsm8k_tiny.py            # runs what is not there yet, then prints and draws
"""

from pathlib import Path
from statistics import mean

from common import lines, results, run, seconds, spread, table, tidy

SEEDS, RATIOS = (0, 1, 2), ("token", "sequence")


def path(ratio: str, seed: int) -> Path:
    """The directory of one finished run."""
    command = f"accelerate launch maskgrpo.py --task gsm8k --ratio {ratio} --seed {seed}"
    return run(command, f"runs/gsm8k-{ratio}-s{seed}")


def main() -> None:
    rows = {}
    for ratio in RATIOS:
        of = [results(path(ratio, seed)) for seed in SEEDS]
        names = ("before", "after", "before_unseen", "after_unseen")
        p = max(max(r["paired_p"].values()) for r in of)
        cells = [*(spread([r[name]["accuracy"] for r in of]) for name in names), f"{p:.0e}"]
        rows[f"`--ratio {ratio}`"] = [*cells, f"{mean(map(seconds, of)):.0f}"]
    table(
        ["", "fresh, before", "fresh, after", "unseen pairs, before", "unseen pairs, after", "largest p", "seconds"],
        rows,
    )
    draw()


def draw() -> None:
    """assets/gsm8k_tiny.png: validation accuracy over steps, one line per seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for ratio, colour in zip(RATIOS, ("tab:blue", "tab:orange"), strict=True):
        for seed in SEEDS:
            rows = [row for row in lines(path(ratio, seed), "metrics") if "validation_accuracy" in row]
            points = [(row["step"], row["validation_accuracy"]) for row in rows]
            label = None if seed else f"--ratio {ratio}"
            axes.plot(*zip(*points, strict=True), color=colour, marker=".", lw=1.2, label=label)
    axes.set(xlabel="RL steps (128 completions, 4 updates each)", ylabel="greedy accuracy, 256 validation problems")
    axes.set_title("MaskGRPO on the tiny default, 3 seeds each", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    tidy(axes)
    figure.savefig("assets/gsm8k_tiny.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    main()
