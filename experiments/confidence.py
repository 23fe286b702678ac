"""When a learned order pays: UPO's gain against how far the tiny sudoku base's confidence is from calibration.

python experiments/confidence.py            # runs what is not there yet, then prints and draws
python experiments/confidence.py 2 8 FLAGS  # upo.py, on a base that reads 2 spellings on 8 of the 16 squares

With one spelling, or with several on no square, confidence in a token is confidence in the answer. With several on
all squares it is wrong everywhere by one factor, and ranks positions as before. In between it ranks them wrongly.
"""

import functools
import sys
from pathlib import Path
from statistics import mean

from common import results, run, spread, table, tidy
from sudoku_upo import TOPK, points
from sudoku_upo import path as of_the_default

SEEDS = (3, 4, 5)
# squares in the order in which they become dark: of a chess board's dark ones every second row first, then the light
SQUARES = sorted(range(16), key=lambda cell: (sum(divmod(cell, 4)) % 2 == 0, cell // 4 % 2))
BY_SPELLINGS = [(1, 8), (2, 8), (3, 8), (4, 8)]  # (spellings, squares)
BY_SQUARES = [(4, 0), (4, 4), (4, 8), (4, 12), (4, 16)]
ORDERS = ("random", "max_confidence", "answer_confidence", "upo")


def train(spellings: int, dark: int, flags: list[str]) -> None:
    """upo.py with another corpus."""
    sys.path.insert(0, ".")
    import rewards
    import upo

    spell = functools.partial(rewards.spelled_sudoku, spellings=rewards.SPELLED[:spellings], dark=SQUARES[:dark])
    rewards.TASKS["sudoku"] = rewards.TASKS["sudoku"]._replace(corpus=spell)
    upo.main(["--task", "sudoku", "--ref", "topk", *flags])


def path(spellings: int, dark: int, seed: int) -> Path:
    """The directory of one finished run; the default's and the plain corpus's are those of sudoku_upo.py."""
    if (spellings, dark) == (4, 8) or spellings == 1 or dark == 0:
        return of_the_default(TOPK + " --corpus plain" * ((spellings, dark) != (4, 8)), seed)
    command = f"python experiments/confidence.py {spellings} {dark} --seed {seed}"
    return run(command, f"runs/sudoku-spelled-{spellings}-{dark}-s{seed}")


def accuracy(case: tuple[int, int], order: str) -> list[float]:
    """Share of right cells by seed. Where digits have one spelling there is no answer_confidence: it is confidence."""
    found = [results(path(*case, seed))["accuracy"] for seed in SEEDS]
    return [of.get(order, of["max_confidence"])["mean"] for of in found]


def gains(case: tuple[int, int], order: str) -> list[float]:
    """What UPO gains over an order, by seed."""
    return [a - b for a, b in zip(accuracy(case, "upo"), accuracy(case, order))]


def draw() -> None:
    """assets/upo_confidence.png: the gain over both, a dot per seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True)
    titles = ("spellings of a digit on 8 of 16 squares", "squares of 16 with 4 spellings")
    for ax, cases, title, i in zip(axes, (BY_SPELLINGS, BY_SQUARES), titles, (0, 1)):
        for order, colour in (("max_confidence", "tab:blue"), ("answer_confidence", "tab:grey")):
            of = {case[i]: [100 * gain for gain in gains(case, order)] for case in cases}
            ax.plot(list(of), [mean(values) for values in of.values()], color=colour, label=f"over {order}")
            ax.plot([x for x in of for _ in SEEDS], [y for values in of.values() for y in values], ".", color=colour)
        ax.axhline(0, color="0.7", lw=0.8)
        ax.set(xlabel=title, xticks=[case[i] for case in cases])
        tidy(ax)
    axes[0].set_ylabel("UPO gains, points")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig("assets/upo_confidence.png", dpi=140, bbox_inches="tight")


def main() -> None:
    rows = {}
    for case in dict.fromkeys(BY_SPELLINGS + BY_SQUARES):
        cells, by_seed = [spread(accuracy(case, order)) for order in ORDERS], gains(case, "max_confidence")
        rows["{} on {}".format(*case)] = [*cells, ", ".join(f"{100 * g:+.1f}" for g in by_seed), points(by_seed)]
    table(["spellings, squares of 16", *ORDERS, "upo over max_confidence, points", "mean ± 95% t"], rows)
    draw()


if __name__ == "__main__":
    train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]) if len(sys.argv) > 1 else main()
