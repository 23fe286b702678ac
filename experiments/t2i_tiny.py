"""The README's tables of text to image: 3 seeds of UniGRPO, + truncation, + emerge, from the same bases; and the
two samplers on these bases before RL, with and without guidance.

python experiments/t2i_tiny.py            # runs what is not there yet, then prints; copies one run's images.png
"""

import shutil
import sys
from pathlib import Path
from statistics import mean

from common import lines, results, run, seconds, spread, table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import rewards  # noqa: E402

SEEDS = (0, 1, 2)
METHODS = {"unigrpo": "UniGRPO", "truncation": "+ truncation", "maskgrpo": "+ emerge (default)"}
GUIDANCES = (0, 1, 3)
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")


def path(method: str, seed: int) -> Path:
    """The directory of one finished run."""
    command = f"accelerate launch maskgrpo.py --task t2i --method {method} --seed {seed}"
    return run(command, f"runs/t2i-{method}-s{seed}")


def before_rl(sampler: str, guidance: int, seed: int) -> float:
    """Accuracy of a base under another sampler or guidance."""
    base = next(Path("runs").glob(f"base-t2i-s{seed}-*"))  # which the first run of that seed has trained
    command = f"accelerate launch maskgrpo.py --task t2i --eval_only --model {base} --sampler {sampler}"
    ended = run(f"{command} --guidance {guidance} --seed {seed}", f"runs/t2i-base-{sampler}-{guidance}-s{seed}")
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
    rows = {s: [spread([before_rl(s, g, seed) for seed in SEEDS]) for g in GUIDANCES] for s in ("maskgit", "emerge")}
    table(["test prompts, before RL", *(f"guidance {g}" for g in GUIDANCES)], rows)
    shutil.copy(path("maskgrpo", 0) / "images.png", "assets/t2i.png")


if __name__ == "__main__":
    main()
