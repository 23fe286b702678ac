"""When a learned order pays: UPO's gain against how far the tiny sudoku base's confidence is from calibration.

python experiments/confidence.py            # runs what is not there yet, then prints and draws
python experiments/confidence.py 2 8 FLAGS  # upo.py, on a base that reads 2 spellings on 8 of the 16 squares

With one spelling, or with several on no square, confidence in a token is confidence in the answer. With several on
all squares it is wrong everywhere by one factor, and ranks positions as before. In between it ranks them wrongly.
"""

import functools
import sys
from statistics import mean

from common import lines, results, run, spread, table, tidy
from sudoku_upo import points

SEEDS = (3, 4, 5)
# squares in the order in which they become dark: of a chess board's dark ones every second row first, then the light
SQUARES = sorted(range(16), key=lambda cell: (sum(divmod(cell, 4)) % 2 == 0, cell // 4 % 2))
BY_SPELLINGS = [(1, 8), (2, 8), (3, 8), (4, 8)]
BY_SQUARES = [(4, 0), (4, 4), (4, 8), (4, 12), (4, 16)]


def train(spellings: int, dark: int, flags: list[str]) -> None:
    """upo.py with another corpus."""
    sys.path.insert(0, ".")
    import rewards
    import upo

    spell = functools.partial(rewards.spelled_sudoku, spellings=rewards.SPELLED[:spellings], dark=SQUARES[:dark])
    rewards.TASKS["sudoku"] = rewards.TASKS["sudoku"]._replace(corpus=spell)
    upo.main(["--task", "sudoku", "--ref", "topk", *flags])


def main() -> None:
    for seed in SEEDS:
        for s, d in BY_SPELLINGS+BY_SQUARES:
            if (s,d) not in ((1,8),(4,0),(4,8)):
                run(f"python experiments/confidence.py {s} {d} --seed {seed}", f"runs/sudoku-spelled-{s}-{d}-s{seed}")


if __name__ == "__main__":
    train(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]) if len(sys.argv) > 1 else main()
