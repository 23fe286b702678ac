"""The tables and pictures of upo.py on sudoku: references, ablation, curves, an order. 3 seeds each.

python experiments/sudoku_upo.py            # runs what is not there yet, then prints and draws
"""

from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

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
    digits = row["completion"].split()
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

    rows = differing(path(REFERENCES["max_confidence"], 0), "upo", "max_confidence", "margin")
    figure, axes = plt.subplots(1, len(rows), figsize=(9, 3.2))
    for ax, (name, row) in zip(axes, rows.items()):
        draw_board(ax, row, f"{name} {row['score']:.2f}")
    figure.savefig("assets/upo_order.png", dpi=130, bbox_inches="tight")


def main() -> None:
    best_of = [r["pass_at_n"] for r in results_of(REFERENCES["topk"])]
    pass_at_n = {name: [f"{mean(r[name][n] for r in best_of):.3f}" for n in best_of[0][name]] for name in best_of[0]}
    seeds = [f"seed {seed}" for seed in SEEDS]
    table(["order", *seeds, "mean ± std", "largest p against max-confidence, margin"], orders())
    table(["N", *best_of[0]["random"]], pass_at_n)
    table(["reference, initialisation", "accuracy", "over max-confidence, points", "by seed"], ablation())
    draw()
    draw_orders()


if __name__ == "__main__":
    main()
