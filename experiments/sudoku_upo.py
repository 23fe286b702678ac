"""The tables and pictures of upo.py on sudoku: orders, references, a corpus without spellings, what the order learned.

python experiments/sudoku_upo.py            # runs what is not there yet, then prints and draws

The settings were chosen on validation puzzles of seed 0; these seeds guided nothing.
"""

import unicodedata
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

from common import lines, results, run, spread, table, tidy

SEEDS = (3, 4, 5, 6, 7)
FEW = SEEDS[:3]  # of the other references and of the plain corpus
T95 = {3: 4.303, 5: 2.776}  # the t distribution's 97.5% point by number of seeds
ORDERS = "random max_confidence margin entropy softmax_confidence topk_random answer_confidence upo".split()
TOPK = "--ref topk"
OTHERS = {
    "max_confidence": "--ref max_confidence",
    "softmax_confidence": "--ref softmax_confidence",
    "topk, `--corpus plain`": "--ref topk --corpus plain",
}


def path(flags: str, seed: int) -> Path:
    """The directory of one finished run."""
    name = flags.replace("--", "").replace(" ", "-")
    return run(f"python upo.py --task sudoku {flags} --seed {seed}", f"runs/sudoku-{name}-s{seed}")


def points(values: list[float]) -> str:
    """Mean of shares in points, ± its 95% t interval over seeds."""
    values = [100 * value for value in values]
    return f"{mean(values):+.1f} ± {T95[len(values)] * stdev(values) / len(values) ** 0.5:.1f}"


def solved_share(seed: int, order: str) -> float:
    """Share of puzzles whose every cell is right."""
    rows = [row for row in lines(path(TOPK, seed), "completions") if row["method"] == order]
    return mean(row["score"] == 1 for row in rows)


def orders() -> dict[str, list[str]]:
    """Of each order: share of right cells by seed, of whole grids, and what upo gains over it on the same puzzles."""
    rows, found = {}, [results(path(TOPK, seed)) for seed in SEEDS]
    for name in ORDERS:
        values = [r["accuracy"][name]["mean"] for r in found]
        cells = [*(f"{v:.3f}" for v in values), spread(values), spread([solved_share(seed, name) for seed in SEEDS])]
        paired = [r["paired"][name] for r in found] if name != "upo" else []
        gain = [points([p["difference"] for p in paired]), f"{max(p['p'] for p in paired):.0e}"] if paired else ["", ""]
        rows[f"**{name}**" if paired == [] else name] = cells + gain
    return rows


def references() -> dict[str, list[str]]:
    """Of each other reference and corpus: max_confidence, upo, and upo's gain, by seed and with its interval."""
    rows = {}
    for name, flags in {"topk": TOPK, **OTHERS}.items():
        found = [results(path(flags, seed)) for seed in (SEEDS if flags == TOPK else FEW)]
        gains = [r["paired"]["max_confidence"]["difference"] for r in found]
        cells = [spread([r["accuracy"][order]["mean"] for r in found]) for order in ("max_confidence", "upo")]
        largest = max(r["paired"]["max_confidence"]["p"] for r in found)
        rows[name] = [*cells, ", ".join(f"{100 * g:+.1f}" for g in gains), points(gains), f"{largest:.0e}"]
    return rows


def when(order: str) -> list[str]:
    """Mean step (of 8) at which an order reveals dark and light squares, and the share that it gets right there."""
    shade = {True: [], False: []}
    for seed in SEEDS:
        for row in lines(path(TOPK, seed), "completions"):
            for i, cell in enumerate(board(row) if row["method"] == order else ()):
                if cell.step >= 0:
                    shade[sum(divmod(i, 4)) % 2 == 1].append(cell)
    return [f"{mean(c.step + 1 for c in shade[d]):.2f} {mean(c.right for c in shade[d]):.3f}" for d in (True, False)]


def draw() -> None:
    """assets/upo_sudoku.png: validation accuracy, the reward's std in a group, g's entropy, over RL steps."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    panels = {
        "validation_accuracy": "accuracy, 256 validation puzzles",
        "group_reward_std": "std of the reward in a group",
        "entropy": "entropy of g, nats",
    }
    for i, (label, flags) in enumerate({"topk": TOPK, **OTHERS}.items()):
        runs = [[row for row in lines(path(flags, s), "metrics") if row["phase"] == "upo"] for s in FEW]
        for ax, name in zip(axes, panels):
            curves = [[row[name] for row in rows if name in row] for rows in runs]
            step = [i + 1 for i, row in enumerate(runs[0]) if name in row]
            average = [mean(values) for values in zip(*curves)]
            width = 1 if len(step) < 50 else 10  # single batches are noisy: means of 10 steps
            blocks = range(0, len(average) - width + 1, width)
            x, y = [step[i + width // 2] for i in blocks], [mean(average[i : i + width]) for i in blocks]
            ax.plot(x, y, color=f"C{i}", label=label.replace("`", ""), lw=1.3)
    for ax, title in zip(axes, panels.values()):
        ax.set(xlabel="RL steps", title=title)
        ax.title.set_fontsize(9)
        tidy(ax)
    axes[2].legend(frameon=False, fontsize=7)
    figure.savefig("assets/upo_sudoku.png", dpi=140, bbox_inches="tight")


# ---------------------------------------------------------------------------------------------
# An order: each cell of a board with the step that revealed it
# ---------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """One cell of a board: its digit, the step that revealed it (-1: a clue), and whether it is right."""

    digit: str
    step: int
    right: bool


def solved(cells: list[str]) -> list[str] | None:
    """The solution of sixteen cells, row by row, "0" for empty: the first digits that fit, depth first."""
    if "0" not in cells:
        return cells
    i = cells.index("0")
    row, column = divmod(i, 4)
    box = [4 * r + c for r in range(4) for c in range(4) if (r // 2, c // 2) == (row // 2, column // 2)]
    seen = {*cells[4 * row : 4 * row + 4], *cells[column::4], *(cells[j] for j in box)}
    fits = (solved([*cells[:i], digit, *cells[i + 1 :]]) for digit in "1234" if digit not in seen)
    return next((found for found in fits if found), None)


def board(row: dict) -> list[Cell]:
    """The sixteen cells of a line of completions.jsonl. The tiny tokenizer has a token per digit and per line break."""
    digits = [c for c in unicodedata.normalize("NFKC", row["completion"]) if c.isdigit()]
    steps = [step for i, step in enumerate(row["steps"]) if i % 5 < 4][:16]
    right = solved([d if step < 0 else "0" for d, step in zip(digits, steps)])
    return [Cell(d, step, d == r) for d, step, r in zip(digits, steps, right, strict=True)]


def differing(run_path: Path, *methods: str) -> dict[str, dict]:
    """{method: its line}: the first held-out problem that the first method solves and the second does not."""
    rows = {m: [row for row in lines(run_path, "completions") if row["method"] == m] for m in methods}
    first, second = (rows[m] for m in methods[:2])
    i = next(i for i, (a, b) in enumerate(zip(first, second)) if a["score"] == 1 > b["score"])
    return {m: of[i] for m, of in rows.items()}


def draw_board(axes, row: dict, title: str) -> None:
    """Cells coloured by step, the step below the digit; clues are grey, a wrong cell has a red frame and a cross."""
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    cells = board(row)
    last = max(cell.step for cell in cells)
    for i, cell in enumerate(cells):
        r, c = divmod(i, 4)
        face = "0.9" if cell.step < 0 else colormaps["YlGnBu"](0.05 + 0.45 * cell.step / last)
        edge = dict(edgecolor="white") if cell.right else dict(edgecolor="tab:red", linewidth=2.5, zorder=2)
        axes.add_patch(Rectangle((c + 0.04, r + 0.04), 0.92, 0.92, facecolor=face, **edge))
        axes.text(c + 0.5, r + 0.38, cell.digit, ha="center", va="center", fontsize=14, weight="bold")
        note = "" if cell.step < 0 else f"step {cell.step + 1}"
        axes.text(c + 0.5, r + 0.8, note, ha="center", va="center", fontsize=8)
        if not cell.right:
            axes.plot((c + 0.1, c + 0.9), (r + 0.1, r + 0.9), "r", alpha=0.3)
            axes.plot((c + 0.1, c + 0.9), (r + 0.9, r + 0.1), "r", alpha=0.3)
    axes.set(xlim=(0, 4), ylim=(4, 0), aspect="equal")
    axes.set_title(title, fontsize=10)
    axes.axis("off")


def draw_orders() -> None:
    """assets/upo_order.png: one puzzle under three orders."""
    import matplotlib.pyplot as plt

    rows = differing(path(TOPK, SEEDS[0]), "upo", "max_confidence", "answer_confidence")
    figure, axes = plt.subplots(1, len(rows), figsize=(9, 3.2))
    for ax, (name, row) in zip(axes, rows.items()):
        draw_board(ax, row, f"{name} {row['score']:.2f}")
    figure.savefig("assets/upo_order.png", dpi=130, bbox_inches="tight")


def main() -> None:
    head = [*(f"seed {seed}" for seed in SEEDS), "right cells", "whole grids", "upo gains, points", "largest p"]
    table(["order", *head], orders())
    head = ["max_confidence", "upo", "gain by seed, points", "mean ± 95% t", "largest p"]
    table(["reference", *head], references())
    table(["order", "dark squares: step, right", "light squares: step, right"], {name: when(name) for name in ORDERS})
    best_of = [results(path(TOPK, seed))["pass_at_n"] for seed in SEEDS]
    pass_at_n = {name: [f"{mean(r[name][n] for r in best_of):.3f}" for n in best_of[0][name]] for name in best_of[0]}
    table(["N", *best_of[0]["random"]], pass_at_n)
    draw()
    draw_orders()


if __name__ == "__main__":
    main()
