"""Where late tokens depend on early ones: chains of four and of ten operations, and the paper's masks once more.

    python experiments/depth.py             # runs what is not there yet, then prints
    python experiments/depth.py 4           # of one depth

The default's problems have two operations and 16 tokens, and truncation loses there. Is that the length? A problem of
depth D here is a sum or difference of D + 1 numbers, worked out line by line, each with the result of the line before;
ten of them fill 63 of 64 tokens. The problems are files in GSM8K's format (--data, --eval_data): 20,000 for training,
1,000 fresh ones. A token per step, since four at once, of which some need the others, leave the base at 14% after 700
steps instead of 43% after 1,200; every other setting is the default's, but for the length and mu.
"""

import json
import random
import sys
from pathlib import Path
from statistics import mean

from common import results, run, seconds, spread, table
from ladder import holm, p_value

import rewards

SETTINGS = {4: "--gen_length 28 --mu 4 --tokens_per_step 1", 10: "--gen_length 64 --mu 12 --tokens_per_step 1"}
SEEDS = {4: range(6), 10: range(3)}
ROWS = {
    "MaskGRPO": "--method maskgrpo",
    "gamma 0": "--method maskgrpo --gamma 0",
    "uniform masks, gamma .6": "--method truncation",
    "UniGRPO": "--method unigrpo",
    "TraceRL": "--method tracerl",
}
RIVALS = {"MaskGRPO": ("gamma 0", "uniform masks, gamma .6", "UniGRPO"), "TraceRL": ("MaskGRPO",)}
VERBS = {"buys": 1, "finds": 1, "sells": -1, "loses": -1}


def problem(rng: random.Random, depth: int) -> dict:
    """A chain whose numbers are all from 1 to LARGEST."""
    have = rng.randint(1, rewards.LARGEST)
    story, lines = f"{rng.choice(rewards.NAMES)} has {have} {rng.choice(rewards.ITEMS)}", []
    while len(lines) < depth:
        verb, n = rng.choice([*VERBS]), rng.randint(2, 9)
        then = have + VERBS[verb] * n
        if 1 <= then <= rewards.LARGEST:
            story += f", {verb} {n}"
            lines.append(f"{have} {'+' if VERBS[verb] > 0 else '-'} {n} = {then}")
            have = then
    return {"question": f"{story}. How many?", "answer": "\n".join([*lines, f"#### {have}"])}


def file(depth: int, split: str, n: int) -> Path:
    """n problems of a depth, drawn once."""
    path = Path("runs", f"depth-{depth}-{split}.jsonl")
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        rng = random.Random(f"{depth} {split}")
        path.write_text("".join(json.dumps(problem(rng, depth)) + "\n" for _ in range(n)))
    return path


def path(name: str, depth: int, seed: int) -> Path:
    """The directory of one finished run."""
    data = f"--data {file(depth, 'train', 20_000)} --eval_data {file(depth, 'test', 1000)}"
    flags = f"{ROWS[name]} {SETTINGS[depth]} {data} --pass_k 0 --seed {seed}"
    return run(f"accelerate launch maskgrpo.py --task gsm8k {flags}", f"runs/depth-{depth}-{name.split()[0]}-s{seed}")


def main() -> None:
    for depth in map(int, sys.argv[1:] or SETTINGS):
        found = {name: [] for name in ROWS}
        for seed in SEEDS[depth]:
            for name in ROWS:
                found[name].append(results(path(name, depth, seed)))
        after = {name: [r["after"]["accuracy"] for r in of] for name, of in found.items()}
        print(f"\n{depth} operations: {SETTINGS[depth]}, {len(SEEDS[depth])} seeds")
        base = [r["before"]["accuracy"] for r in found["MaskGRPO"]]
        rows = {name: [spread(values), f"{mean(map(seconds, found[name])):.0f}"] for name, values in after.items()}
        table(["", "fresh problems", "seconds"], {"base": [spread(base), ""]} | rows)
        pairs = [(a, b) for a in RIVALS for b in RIVALS[a]]
        gains = {f"{a} over {b}": [100 * (x - y) for x, y in zip(after[a], after[b])] for a, b in pairs}
        ps, rows = [p_value(g) for g in gains.values()], {}
        for (name, g), p, corrected in zip(gains.items(), ps, holm(ps)):
            rows[name] = [", ".join(f"{v:+.1f}" for v in g), f"{mean(g):+.1f}", f"{p:.3f}", f"{corrected:.2f}"]
        table(["points", "by seed", "mean", "p", "p (Holm)"], rows)


if __name__ == "__main__":
    main()
