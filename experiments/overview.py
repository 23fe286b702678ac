"""The picture of both papers: what each re-masking hides, and a sudoku under the learned order and a fixed one.

python experiments/overview.py            # makes the default run of upo.py if it is not there, then draws
"""

import sys
from pathlib import Path

from common import run
from sudoku_upo import differing, draw_board

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402

import remask  # noqa: E402

PROMPT, LENGTH, MU = 6, 24, 4
ROWS = {
    "fading_out": "MaskGRPO, text: late tokens more often, $\\gamma = .6$",
    "uniform": "MaskGRPO, images: every token alike, $\\gamma = .8$",
    "full": "diffu-GRPO: everything, and 15% of the prompt",
    "whole_range": "UniGRPO: every token alike, from a random ratio up to all",
    "trace": "TraceRL: the recorded order, one slice each",
}
COLOURS = {"prompt": "#e9e4d8", "visible": "#e3e7ec", "hidden": "#9db7d5", "scored": "#1f4e8c"}
DRAW = 37  # whose masks are shown


def colours(scheme: str, j: int) -> list[str]:
    """The colour of every position, prompt first, under one draw of the masks of update j."""
    width = PROMPT + LENGTH
    completion = torch.arange(width)[None] >= PROMPT
    order = ((torch.arange(width)[None] - PROMPT) // 2).clamp(min=-1)  # left to right, two tokens a step
    noise = lambda j: (torch.rand(1, width, generator=remask.seeded(DRAW, j)), torch.tensor([0.7]))  # UniGRPO: from .3
    masks = remask.by_name(scheme, completion, ~completion, order, noise, j, MU, 0.8 if scheme == "uniform" else 0.6)
    kinds = []
    for n in range(width):
        hidden = "scored" if masks.scored[0, n] else "hidden"
        kinds.append(hidden if masks.masked[0, n] else "visible" if completion[0, n] else "prompt")
    return [COLOURS[kind] for kind in kinds]


def draw_masks(axes) -> None:
    """One band of MU lines for each scheme; a gap separates the prompt from the completion."""
    from matplotlib.patches import Rectangle

    for band, (scheme, label) in enumerate(ROWS.items()):
        top = band * (MU + 2.6)
        axes.text(0, top - 0.45, label, fontsize=9, va="bottom")
        for j in range(1, MU + 1):
            y = top + j - 1
            for n, colour in enumerate(colours(scheme, j)):
                axes.add_patch(Rectangle((n + 0.6 * (n >= PROMPT), y), 0.9, 0.86, facecolor=colour))
            if band == 0:
                axes.text(-0.5, y + 0.45, f"j = {j}", fontsize=7.5, ha="right", va="center", color="0.35")
    bottom = len(ROWS) * (MU + 2.6) - 1.2
    names = {"prompt": "prompt", "visible": "visible", "hidden": "hidden", "scored": "hidden and predicted"}
    for x, (kind, name) in zip((0, 5.6, 11.4, 17.2), names.items()):
        axes.add_patch(Rectangle((x, bottom), 0.9, 0.9, facecolor=COLOURS[kind]))
        axes.text(x + 1.3, bottom + 0.45, name, fontsize=8, va="center")
    axes.set(xlim=(-2.6, PROMPT + LENGTH + 1), ylim=(bottom + 1.2, -2))
    axes.set_title("MaskGRPO: which tokens each update hides", fontsize=11, weight="bold", loc="left")
    axes.axis("off")


def main() -> None:
    import matplotlib.pyplot as plt

    rows = differing(
        run("python upo.py --task sudoku --ref topk", "runs/upo-sudoku-topk-tiny-s0"), "upo", "max_confidence"
    )
    figure = plt.figure(figsize=(9.4, 5.6))
    draw_masks(figure.add_axes((0, 0, 0.6, 0.94)))
    for bottom, (name, row) in zip((0.48, 0), rows.items()):
        title = {"upo": "learned order", "max_confidence": "most confident cell first"}[name]
        draw_board(figure.add_axes((0.64, bottom, 0.36, 0.4)), row, f"{title}: {row['score']:.0%} of the blanks right")
    figure.text(0.64, 0.945, "UPO: which cell is revealed next", fontsize=11, weight="bold")
    figure.savefig("assets/overview.png", dpi=160, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
