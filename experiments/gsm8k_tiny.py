"""The README's table and picture of the default run: 3 seeds, both importance ratios, about 4 minutes each.

python experiments/gsm8k_tiny.py            # runs what is not there yet, then prints and draws
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS, RATIOS = (0, 1, 2), ("token", "sequence")


def run(ratio: str, seed: int) -> Path:
    """The directory of one finished run of the project's own command."""
    path = Path(f"runs/gsm8k-{ratio}-s{seed}")
    if not (path / "results.json").is_file():
        flags = ["--task", "gsm8k", "--ratio", ratio, "--seed", str(seed), "--output_dir", str(path)]
        subprocess.run(["accelerate", "launch", "maskgrpo.py", *flags], check=True)
    return path


def cell(results: list[dict], name: str) -> str:
    """Mean ± standard deviation over seeds of an accuracy."""
    values = [r[name]["accuracy"] for r in results]
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def main() -> None:
    paths = {ratio: [run(ratio, seed) for seed in SEEDS] for ratio in RATIOS}
    print("| | fresh, before | fresh, after | unseen pairs, before | unseen pairs, after | largest p | seconds |")
    print("|---|---|---|---|---|---|---|")
    for ratio in RATIOS:
        results = [json.loads((path / "results.json").read_text()) for path in paths[ratio]]
        cells = [cell(results, name) for name in ("before", "after", "before_unseen", "after_unseen")]
        p = max(max(r["paired_p"].values()) for r in results)
        seconds = [r["seconds"]["total"] + r["base_cached"] * r["seconds"]["base"] for r in results]
        cells += [f"{p:.0e}", f"{statistics.mean(seconds):.0f}"]
        print(f"| `--ratio {ratio}` | " + " | ".join(cells) + " |")
    draw(paths)


def draw(paths: dict[str, list[Path]]) -> None:
    """assets/gsm8k_tiny.png: validation accuracy over steps, one line per seed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.4))
    for ratio, colour in zip(RATIOS, ("tab:blue", "tab:orange"), strict=True):
        for i, path in enumerate(paths[ratio]):
            lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
            points = [(line["step"], line["validation_accuracy"]) for line in lines if "validation_accuracy" in line]
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=".",
                lw=1.2,
                label=f"--ratio {ratio}" if i == 0 else None,
            )
    axes.set(xlabel="RL steps (128 completions, 4 updates each)", ylabel="greedy accuracy, 256 validation problems")
    axes.set_title("MaskGRPO on the tiny default, 3 seeds each", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig("assets/gsm8k_tiny.png", dpi=150, bbox_inches="tight")


if __name__ == "__main__":
    sys.exit(main())
