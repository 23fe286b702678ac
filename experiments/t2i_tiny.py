"""The tables and the picture of text to image: 3 seeds of UniGRPO, + truncation, + emerge, from the same bases, MaskGIT
with the authors' noise and with its own; and the samplers on these bases before RL, with and without guidance.

python experiments/t2i_tiny.py                  # runs what is not there yet, then prints and draws
python experiments/t2i_tiny.py RUN FILE.png     # draws the images of one run of the embedded task
"""

import sys
import textwrap
from pathlib import Path
from statistics import mean

from common import lines, results, run, seconds, spread, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rewards  # noqa: E402

SEEDS = (0, 1, 2)
OWN_NOISE = " --gumbel 4.5 --gumbel_decay linear"
METHODS = {
    "unigrpo": "UniGRPO",
    "truncation": "+ truncation",
    "truncation" + OWN_NOISE: "+ truncation, MaskGIT's own noise",
    "maskgrpo": "+ emerge (default)",
}
SAMPLERS = {"maskgit": "maskgit", "maskgit" + OWN_NOISE: "maskgit, its own noise", "emerge": "emerge"}
GUIDANCES = (0, 1, 3)
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def path(method: str, seed: int) -> Path:
    """The directory of one finished run."""
    command = f"accelerate launch maskgrpo.py --task t2i --method {method} --seed {seed}"
    return run(command, f"runs/t2i-{plain(method)}-s{seed}")


def plain(flags: str) -> str:
    """Flags as a part of a directory's name."""
    return flags.replace("--", "").replace(" ", "-")


def before_rl(sampler: str, guidance: int, seed: int) -> float:
    """Accuracy of a base under another sampler or guidance."""
    (base,) = Path("runs").glob(f"base-t2i-s{seed}-*")  # which the first run of that seed has trained
    command = f"accelerate launch maskgrpo.py --task t2i --eval_only --model {base} --sampler {sampler}"
    ended = run(f"{command} --guidance {guidance} --seed {seed}", f"runs/t2i-base-{plain(sampler)}-{guidance}-s{seed}")
    return results(ended)["eval_only"]["accuracy"]


def objects(method: str, seed: int, phase: str) -> float:
    """Whole objects in a test image, on average."""
    rows = lines(path(method, seed), f"completions_{phase}")
    codes = [rewards.image_codes(row["completion"]) for row in rows if row["split"] == "test"]
    return mean(len(rewards.find_things(image)[0]) for image in codes)


def main() -> None:
    found = {method: [results(path(method, seed)) for seed in SEEDS] for method in METHODS}
    rows, by_category = {}, {}
    for method, of in found.items():
        names = ("before", "after", "before_unseen", "after_unseen")
        cells = [of[0]["config"]["sampler"], *(spread([r[name]["accuracy"] for r in of]) for name in names)]
        cells.append(f"{max(max(r['paired_p'].values()) for r in of):.0e}")
        # the fidelity term pays 0.25
        cells += [spread([4 * r[f"{phase}_rewards"]["test"]["fidelity"] for r in of]) for phase in ("before", "after")]
        cells += [spread([objects(method, seed, phase) for seed in SEEDS]) for phase in ("before", "after")]
        rows[METHODS[method]] = [*cells, f"{mean(map(seconds, of)):.0f}"]
        for phase in ("before", "after"):
            figures = [r[f"{phase}_categories"] for r in of]
            cells = [f"{mean(f[c]['accuracy'] for f in figures):.2f}" for c in CATEGORIES]
            by_category[f"{METHODS[method]}, {phase}"] = cells
    columns = ["", "sampler", "test, before", "after", "unseen, before", "after", "largest p"]
    table([*columns, "unbroken, before", "after", "objects, before", "after", "seconds"], rows)
    table(["test prompts", *CATEGORIES], by_category)
    accuracies = lambda s: [spread([before_rl(s, g, seed) for seed in SEEDS]) for g in GUIDANCES]
    rows = {name: accuracies(sampler) for sampler, name in SAMPLERS.items()}
    table(["test prompts, before RL", *(f"guidance {g}" for g in GUIDANCES)], rows)
    draw(path("maskgrpo", 0), "assets/t2i.png")


def draw(run_path: Path, file: str, most: int = 8) -> None:
    """The first test prompt of each category and some more, before and after RL, right ones framed in green."""
    import matplotlib.pyplot as plt

    phases = {
        phase: [row for row in lines(run_path, f"completions_{phase}") if row["split"] == "test"]
        for phase in ("before", "after")
    }
    first = {row["category"]: i for i, row in reversed(list(enumerate(phases["before"])))}
    others = [i for i in range(len(phases["before"])) if i not in first.values()]
    chosen = sorted([*first.values(), *others][:most])
    figure, grid = plt.subplots(2, len(chosen), figsize=(1.9 * len(chosen), 4.2))
    for axes, (phase, rows) in zip(grid, phases.items()):
        for ax, row in zip(axes, (rows[i] for i in chosen)):
            ax.imshow(rewards.TASKS["t2i"].render([int(code) for code in row["completion"].split()]))
            ax.set(xticks=[], yticks=[])
            ax.set_xlabel(f"{phase}: {'right' if row['score'] == 1 else 'wrong'}", fontsize=8)
            ax.spines[:].set(color="tab:green" if row["score"] == 1 else "tab:red", linewidth=2)
            if phase == "before":
                ax.set_title(textwrap.fill(row["prompt"], 24), fontsize=7)
    figure.savefig(file, dpi=130, bbox_inches="tight")


if __name__ == "__main__":
    draw(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) == 3 else main()
