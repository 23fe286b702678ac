"""Where late tokens depend on early ones: chains of four operations in 28 tokens and in 64, and the paper's masks.

    python experiments/depth.py                 # runs what is not there yet, then prints
    python experiments/depth.py 1 of 2          # makes every second run, to share the work; prints nothing

The default's problems have two operations and 16 tokens, and truncation gives nothing there. Is it the length, or mu =
4? A problem here is a sum or difference of five numbers, worked out line by line, each with the result of the line
before: in figures, which fills 27 of 28 tokens, or in sentences, 63 of 64. The problems are files in GSM8K's format
(--data, --eval_data): 20,000 for training, 1,000 fresh ones. A token per step, since four at once, of which some need
the others, leave a base at 14% after 700 steps instead of 43% after 1,200; in rollouts a confident one takes others
along. In figures 75 rollouts have the rate that the ladder chose for MaskGRPO; with 12 updates of each, at which the
policy falls below its base, 150 have the best of three by validation (seed 8: 1e-05, 2.5e-05; seed 0: 7.5e-05). Each
kind has one base, since that in sentences takes half an hour: seeds differ in problems, completions and masks.
"""

import itertools
import json
import random
import sys
import time
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common import results, run, seconds, share, spread, table  # noqa: E402

import rewards  # noqa: E402

# what the base has, and what RL
KINDS = {
    "figures": ("--gen_length 28", "--mu 4 --max_steps 75 --threshold 0.9 --lr 7.5e-05"),
    "sentences": ("--gen_length 64", "--mu 12 --max_steps 150 --threshold 0.9 --lr 1e-05"),
}
SEEDS = range(3)
ROWS = {
    "MaskGRPO": "--method maskgrpo",
    "gamma 0": "--method maskgrpo --gamma 0",
    "uniform masks, gamma .6": "--method truncation",
}
DEPTH, VERBS = 4, {"buys": 1, "finds": 1, "sells": -1, "loses": -1}


def problem(rng: random.Random, kind: str) -> dict:
    """A chain whose numbers are all from 1 to LARGEST."""
    have, name, item = rng.randint(1, rewards.LARGEST), rng.choice(rewards.NAMES), rng.choice(rewards.ITEMS)
    story, lines = f"{name} has {have} {item}", []
    while len(lines) < DEPTH:
        verb, n = rng.choice([*VERBS]), rng.randint(2, 9)
        then = have + VERBS[verb] * n
        if 1 <= then <= rewards.LARGEST:
            story += f", {verb} {n}"
            line = f"{have} {'+' if VERBS[verb] > 0 else '-'} {n} = {then}"
            lines.append(line if kind == "figures" else f"{name} has {have} {item} and {verb} {n}: {line} {item}.")
            have = then
    return {"question": f"{story}. How many?", "answer": "\n".join([*lines, f"#### {have}"])}


def file(kind: str, split: str, n: int) -> Path:
    """n problems of a kind, drawn once."""
    path = Path("runs", f"depth-{kind}-{split}.jsonl")
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        rng = random.Random(split)
        path.write_text("".join(json.dumps(problem(rng, kind)) + "\n" for _ in range(n)))
    return path


def made(kind: str, name: str, flags: str) -> Path:
    """The directory of one finished run."""
    data = f"--data {file(kind, 'train', 20_000)} --eval_data {file(kind, 'test', 1000)} {KINDS[kind][0]}"
    command = f"accelerate launch maskgrpo.py --task gsm8k {data} --tokens_per_step 1 --pass_k 0 {flags}"
    return run(command, f"runs/depth-{kind}-{name}")


def base(kind: str) -> Path:
    """The run that trains a kind's base, and makes no step of RL."""
    return made(kind, "base", "--max_steps 0 --eval_n 2")


def path(name: str, kind: str, seed: int) -> Path:
    """A run of RL on it."""
    flags = f"--model {base(kind)} {ROWS[name]} {KINDS[kind][1]} --seed {seed}"
    return made(kind, f"{name.split()[0]}-s{seed}", flags)


def main() -> None:
    mine, of = share()
    if of > 1:
        list(map(base, [*KINDS][mine - 1 :: of]))
        while not all(Path(f"runs/depth-{kind}-base/results.json").is_file() for kind in KINDS):
            time.sleep(10)
        for seed, kind, name in list(itertools.product(SEEDS, KINDS, ROWS))[mine - 1 :: of]:
            path(name, kind, seed)
        return
    for kind, (length, steps) in KINDS.items():
        found = {name: [results(path(name, kind, seed)) for seed in SEEDS] for name in ROWS}
        print(f"\nIn {kind}: {length} {steps}, {len(SEEDS)} seeds")
        accuracy = {name: [r["after"]["accuracy"] for r in runs] for name, runs in found.items()}
        before = found["MaskGRPO"][0]["before"]["accuracy"]
        rows = {name: [spread(values), f"{mean(map(seconds, found[name])):.0f}"] for name, values in accuracy.items()}
        table(["", "fresh problems", "seconds"], {"base": [f"{before:.3f}", ""]} | rows)
        gains = {}
        for name in [*ROWS][1:]:
            gain = [100 * (x - y) for x, y in zip(accuracy["MaskGRPO"], accuracy[name])]
            gains[f"MaskGRPO over {name}"] = [", ".join(f"{points:+.1f}" for points in gain), f"{mean(gain):+.1f}"]
        table(["points", "by seed", "mean"], gains)


if __name__ == "__main__":
    main()
