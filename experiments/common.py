"""What the experiments share: a run is made once, by the project's own command, and read from its files."""

import json
import statistics
import subprocess
import sys
from pathlib import Path


def run(command: str, path: str) -> Path:
    """The run directory `path` of `command`, which is run now if that has no results yet; another's are refused."""
    root, kept = Path(path), Path(path, "command.txt")
    if not (root / "results.json").is_file():
        subprocess.run([*command.split(), "--output_dir", path], check=True)
        kept.write_text(command)
    elif kept.is_file() and kept.read_text() != command:
        sys.exit(f"{path} holds the results of another command, {kept.read_text()}: move it away, and run this again")
    return root


def share() -> tuple[int, int]:
    """(2, 3) of a command line that ends with `2 of 3`: of three processes that share the work this is the second."""
    words = sys.argv[-3:]
    return (int(words[0]), int(words[2])) if len(words) == 3 and words[1] == "of" else (1, 1)


def results(path: Path) -> dict:
    return json.loads((path / "results.json").read_text())


def lines(path: Path, name: str) -> list[dict]:
    """The rows of a run's `metrics.jsonl`, `completions_before.jsonl` or `completions_after.jsonl`."""
    return [json.loads(line) for line in (path / f"{name}.jsonl").read_text().splitlines()]


def seconds(of: dict) -> float:
    """What a run took, its base included, whichever run has trained that."""
    return of["seconds"]["total"] + of["base_cached"] * of["seconds"]["base"]


def spread(values: list[float]) -> str:
    """Mean ± standard deviation over seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def table(head: list[str], rows: dict[str, list[str]]) -> None:
    """A markdown table."""
    print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def tidy(axes) -> None:
    """A light grid, and no frame at the top and right."""
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
