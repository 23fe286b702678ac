"""rewards.py: generators against second solvers, verdicts against a table of real spellings, a sandbox from inside."""

import ast
import base64
import io
import itertools
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import unicodedata
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rewards
from rewards import TASKS, DataError

SHARED = Path(rewards.__file__).resolve().parent.parent / "shared" / "data"

# --- Generated problems, against solvers that know nothing of the generators ------------------------------------------


def gsm8k(question: str) -> list[str]:
    """A word problem worked out: its numbers in order, the operations from the verbs."""
    value, *numbers = map(int, re.findall(r"\d+", question))
    lines, signs = [], {"fills": "*", "buys": "+", "finds": "+", "sells": "-", "loses": "-"}
    for verb, n in zip(re.findall("|".join(signs), question), numbers, strict=True):
        step = f"{value} {signs[verb]} {n}"
        value = eval(step)
        lines.append(f"{step} = {value}")
    return ["\n".join([*lines, f"#### {value}"])]


def math500(question: str) -> list[str]:
    """Where the line through the sides' difference at 0 and at 1 is 0."""
    left, right = re.sub(r"(\d) [a-z]", r"\1 * x", re.sub(r"Solve |Find . if |\.$", "", question)).split(" = ")
    at_0, at_1 = (eval(f"{left} - ({right})", {"x": x}) for x in (0, 1))
    return [f"\\boxed{{{Fraction(at_0, at_0 - at_1)}}}"]


def sudoku(puzzle: str) -> list[str]:
    """All solutions by plain backtracking over sets of rows, columns and boxes: no table of grids."""
    if "0" not in puzzle:
        return [puzzle]
    cell = puzzle.index("0")
    r, c = divmod(cell, 4)
    box = [4 * (r // 2 * 2 + i) + c // 2 * 2 + j for i in range(2) for j in range(2)]
    seen = {*puzzle[4 * r : 4 * r + 4], *puzzle[c::4], *(puzzle[i] for i in box)}
    return [s for d in "1234" if d not in seen for s in sudoku(puzzle[:cell] + d + puzzle[cell + 1 :])]


def zebra(question: str) -> list[str]:
    """All arrangements that a question allows, by exhaustive search over its words."""
    *listed, clues = re.fullmatch(r".*?Color: (.*?)\. Name: (.*?)\. (.*)\.", question).groups()
    clues = [re.fullmatch(r"(\w+) (.*) (\w+)", clue).groups() for clue in clues.split(". ")]
    found, apart = [], {"is in house": 0, "lives with": 0, "is directly left of": 1}
    for colours, names in itertools.product(*(itertools.permutations(entries.split(", ")) for entries in listed)):
        at = {entry: house for row in (colours, names, "123") for house, entry in enumerate(row)}
        if all(at[b] - at[a] == apart[words] for a, words, b in clues):
            found.append("\n".join(f"{i}: {colour}, {name}" for i, colour, name in zip("123", colours, names)))
    return found


@pytest.mark.parametrize("solve", [gsm8k, math500, sudoku, zebra])
def test_generated_problems_have_one_solution(solve):
    name = solve.__name__
    for p in [p for split in rewards.SPLITS for p in TASKS[name].generate(split, 150, 3)]:
        (solution,) = solve(p["question"])
        assert TASKS[name].score(solution, p) == 1 and (solution == p["answer"] or name == "math500")
        if name == "zebra":  # no clue is to spare
            clues = [clue.rstrip(".") for clue in p["question"].split(". ")[3:]]
            assert all(len(solve(p["question"].replace(f" {clue}.", ""))) > 1 for clue in clues)


def test_countdown_against_python():
    """Random expressions that Python evaluates, too; what they make of their numbers, the search finds as well."""
    rng, task = random.Random(1), TASKS["countdown"]

    def write(depth):
        if depth == 0 or rng.random() < 0.2:
            return str(rng.randint(0, 9))
        text = f"{write(depth - 1)}{rng.choice('+-*/')}{write(depth - 1)}"
        return rng.choice([text, f"({text})", f"-({text})"])

    for text in (write(rng.randint(0, 4)) for _ in range(1000)):
        p = rewards.countdown_problem(list(map(int, re.findall(r"\d+", text))), 0)
        try:
            p["target"] = eval(re.sub(r"(\d+)", r"Fraction(\1)", text))  # our own generator's text
        except ZeroDivisionError:
            assert task.reward(f"#### {text}", p) == {"correctness": 0, "format": 0}
            continue
        for off, terms in ((0, {"correctness": 0.9, "format": 0.1}), (1, {"correctness": 0, "format": 0.1})):
            assert task.reward(f"#### {text}", p | {"target": p["target"] + off}) == terms, text
        if len(p["numbers"]) <= 4 and "-(" not in text:  # the search makes no negative of a number
            assert task.score(task.target(p), p) == 1
    with pytest.raises(DataError, match="No expression"):
        task.target(rewards.countdown_problem([1, 1], 7))


def test_spelled_puzzles_are_the_same_puzzles_and_each_spelling_is_as_frequent():
    """All grids are there, and of the dark squares' spellings as many of each."""
    assert sorted(rewards.solved_grids()) == sorted(sudoku("0" * 16)) and len(rewards.solved_grids()) == 288
    task, seen = TASKS["sudoku"], Counter()
    for i, problem in enumerate(task.generate("train", 500, 0)):
        spelled = task.corpus(problem, i)
        assert {name: unicodedata.normalize("NFKC", text) for name, text in spelled.items()} == problem
        assert task.score(task.target(spelled), problem) == 1 and task.corpus(problem, i) == spelled
        for cell, (a, b) in enumerate(zip(spelled["answer"], problem["answer"])):
            dark = sum(divmod(cell, 4)) % 2  # the others stay plain, and clues are spelled as in the answer
            assert (a == b or dark) and spelled["question"][cell] in ("0", a)
            seen.update([next(i for i, digits in enumerate(rewards.SPELLED) if a in digits)] * dark)
    assert sum((n - 1000) ** 2 / 1000 for n in seen.values()) < 16.3  # 4,000 draws of 4: false once in 1,000 keys


@pytest.mark.parametrize("name", ["gsm8k", "math500", "mbpp", "countdown", "sudoku", "zebra"])
def test_splits_are_disjoint_and_repeat_from_their_seed(name):
    task, state = TASKS[name], random.getstate()
    problems = {s: task.generate(s, 1000 if s == "train" else 200, 0) for s in rewards.SPLITS}
    again = task.generate("train", 1000, 1)
    assert task.generate("test", 200, 0) == problems["test"] and random.getstate() == state
    assert again != problems["train"]
    asked = {s: {p["question"] for p in problems[s]} for s in problems}
    asked["train"] |= {p["question"] for p in again}
    assert all(asked[a].isdisjoint(asked[b]) for a, b in itertools.combinations(asked, 2))
    assert all(len(asked[s]) == 200 for s in rewards.SPLITS[1:]) and len(asked["train"]) > 1000
    if part := {"gsm8k": r"\d+ . \d+", "sudoku": r"\d{16}", "zebra": r"[^\0]*"}.get(name):  # that training never shows
        parts = lambda of: {re.match(part, p["answer"])[0] for p in of}
        shown = parts(problems["train"] + again)
        assert shown.isdisjoint(parts(problems["unseen"])) and not shown.isdisjoint(parts(problems["test"]))
    for p in [p for split in problems.values() for p in split[:100]]:
        if task.runs_code:
            exec("\n".join([p["answer"], *p["tests"]]), {})  # our own generator's code
        else:
            assert task.score(task.target(p), p) == 1 and task.score(p["question"], p) == task.score("", p) == 0
    with pytest.raises(DataError, match="fewer than"):
        task.generate("none", 1, 0)


def test_what_a_run_holds_out(data_file, tmp_path):
    """It never trains: generated, by no run's seed; published, not even where --data and --eval_data share it."""
    none = {"data": None, "eval_data": None, "eval_n": 0, "eval_only": False, "seed": 0}
    splits_of = lambda name, made=False, **cfg: rewards.splits(TASKS[name], SimpleNamespace(**none | cfg), made)
    runs = [splits_of("gsm8k", made=True, eval_n=300, seed=seed) for seed in (1, 2)]
    trained = {p["question"] for run in runs for p in run["train"]}
    assert runs[0]["train"] != runs[1]["train"] and [len(run["train"]) for run in runs] == [20_000, 20_000]
    for split, count in (("validation", 256), ("test", 300), ("unseen", 300)):
        assert runs[0][split] == runs[1][split] and len(runs[0][split]) == count
        assert trained.isdisjoint(p["question"] for p in runs[0][split])
    splits = splits_of("gsm8k", data=str(data_file), eval_n=3)
    assert [len(splits[s]) for s in rewards.SPLITS] == [49, 5, 3, 0]
    assert len({p["question"] for s in splits for p in splits[s]}) == 57
    held = str(write(tmp_path / "held.jsonl", load("gsm8k", data_file)[:20]))
    splits = splits_of("gsm8k", data=str(data_file), eval_data=held)
    assert splits["test"] == load("gsm8k", held) and len(splits["train"] + splits["validation"]) == 40
    with pytest.raises(DataError, match="too few"):
        splits_of("gsm8k", data=held, eval_data=held)
    splits = splits_of("gsm8k", eval_only=True, eval_data=held)  # all of it, and no need of any other
    assert splits["test"] == load("gsm8k", held) and not splits["train"] + splits["validation"]
    with pytest.raises(DataError, match="--data FILE, a CSV file with the header"):
        splits_of("sudoku")


# --- Verdicts: spellings of answers, right and wrong, each kind once --------------------------------------------------

NUMBERS = {  # published number -> (what is right, what is wrong or no answer)
    "42": (
        ["####42", "#### \n42", "#### 42.0", "#### **42**", "#### 42%", "#### 42 months", "#### 42<|eot_id|>7",
         "#### 42 apples\n\\boxed{42}", "\\boxed{\\$42}", "\\fbox{42}", "\\boxed{42\\text{ apples}}", "\\boxed{42$.",
         "\\boxed{42}\\boxed{42.0}", "\\boxed{\\boxed{42}}", "\\boxed{{42}}", "\\boxed{42}<|eot_id|>\\boxed{0}",
         "<ANSWER>\n$42\n</ANSWER>", "<answer>42", "<answer>\n\\boxed{42}\n</answer>", "<answer>\\boxed{}42</answer>",
         "<answer>\\boxed{42></answer>", "<think>#### 7, no</think>\n#### 42", "**Answer:** 42", "A: The answer is 42.",
         "The final answer is $42$. I hope it is correct.", "The answer is\n\n$$42$$", '{"answer":42,"why":6}',
         'The answer is:\n```json\n{"answer": "42"}\n```', "#### Step 1: Add 6 and 7\n6 * 7\nThe answer is 42."],
        ["", "42", "so 42 it is", "### 42", "####", "#### forty", "\\boxed{}", "\\boxed{4}2", "#### 4 2", "#### 42k",
         "#### 41\n#### 42", "#### 42 or 43", "#### 41, 42", "\\boxed{42} or \\boxed{43}", "\\boxed{41}\n#### 42",
         "The answer is not 42", "#### -42", "#### minus 42", "#### 42.5", "#### 42,00", "#### \u00b2\u0664",
         "#### " + "9" * 600 + "\n42", "#### at least 42", "#### 42+", "#### 42\u00b2", "The answer is 42 dozen eggs.",
         "#### 42 and a half hours", "#### 42 per cent more", "\\boxed{42x}",
         '{"answer": 42 dozen}', '{"answer": 42/3}', '{"answer": 42,000}'],
    ),
    "3.46": (["We round the answer to the nearest cent: 3.456.\nThe answer is 3.46"], ["#### 3.456"]),
    "-7": (["#### -7", "#### \u22127", "#### -$7", "#### $-7", "\\boxed{-7.0}"], ["#### 7", "#### --7"]),
    "1234.5": (["#### $1,234.50"], ["#### 1234.5 thousand"]), "-221_3": ([], ["#### 221_3"]),
    "385000": (["\\boxed{385\\,000}", "\\boxed{385000"], ["#### 385", "#### 385 000 000"]),
    "0.5": (["#### .5", "#### 1/2", "\\boxed{\\frac12}", "#### $0.50"], ["#### 5", "#### 1/0", "#### half"]),
    "12.5": (["#### 12 1/2 hours", "\\boxed{12\\frac{1}{2}}"], ["#### 12 3/2", "#### 12\u00bd", "#### 12 1 2"]),
    "1000000": (["\\boxed{1{,}000{,}000}", "#### 1,000,000"], ["#### 1 million", "#### 1,000,00", "#### 10^6"]),
}  # fmt: skip
EXPRESSIONS = {  # without math-verify, too
    r"\frac{1}{2}": ([r"\frac12", r"\tfrac{1}{2}", "1/2", "0.5", r"x = \frac{1}{2}", r"$\frac{2}{4}$"], ["2", "12"]),
    r"\text{(C)}": (["C", "(C)", r"\textbf{(C)}"], ["(B)", "C or D"]),
    r"\text{Evelyn}": (["Evelyn", r"\mathrm{evelyn}"], ["Eve", "not Evelyn"]),
    "10,000": (["10000", "10{,}000", r"10,\!000", r"\$10,000", r"10,000\ \text{dollars}"], ["10", "(10,0)"]),
    r"90^\circ": (["90", r"90^{\circ}", r"90\text{ degrees}", "90\u00b0"], ["9", r"90\text{ hundred}"]),
    "(3,4)": ([r"\left(3, 4\right)", "( 3,4 )"], ["(4,3)", "[3,4)", "3,4", "34"]),
    "4210_5": (["4210_{5}"], ["4210_6", "421"]), "34": (["34."], ["3 4", r"3\ 4", r"\frac34"]),
}  # fmt: skip
SYMBOLIC = {  # what only math-verify finds equal, and what it must not
    "x^2+x": (["x(x+1)", "x + x^2"], ["x^2", "x^2+x=0", "x^2 + y"]), "y=2x+1": (["2x+1"], ["y > 2x+1", "y=2x"]),
    r"2\sqrt{3}": ([r"\sqrt{12}", r"2\sqrt3"], ["3.4641016151", r"2\sqrt{3}, 2\sqrt{3}", r"2\sqrt{3}\text{ hundred}"]),
    "1,-2": (["-2, 1", r"-2\text{ and }1", r"x = 1 \text{ or } x = -2"], ["1", "1,-2,3", "1,2", "(1,-2)"]),
    r"(-\infty,2)\cup(3,\infty)": ([r"(3,\infty)\cup(-\infty,2)"], [r"(-\infty,2]\cup(3,\infty)", r"(3,\infty)"]),
    "5": (["x=5"], ["x could be 3; x could be 5", "5 is wrong", r"7\text{ million}", r"5+\text{i}", r"5\ldots",
                    r"\log 5", "5!", "5'", "5:1", r"5\overline{5}", "at least 5", r"5\text{ p.m.}", "5 +",
                    r"5 \times", "5^", "2+3", r"\frac{2+3}{1}", r"2 \cdot 2.5", "1000+" * 9 + "1000!"]),
    "300000000": ([r"3 \times 10^8"], [r"3 \times 10000"]), "CAT": (["cat"], ["TAC"]), "2x-1": (["-1+2x"], ["x**2-1"]),
    r"1-\frac{1}{\mathrm{e}}": ([r"1-\frac{1}{e}"], [r"1+\frac{1}{\mathrm{e}}"]),
    r"1 \pm \sqrt{19}": ([], [r"1+\sqrt{19}", r"\pm\sqrt{19}"]), r"0.\overline{6}": ([], [r"0.\overline{3}", "0.6"]),
    "0.1234568": (["0.12345680"], ["0.1234567"]), r"8\text{ p.m.}": ([], [r"8\text{ a.m.}"]),
    r"x \leq 5": ([r"5 \geq x", "x \u2264 5"], [r"x \geq 5", "x < 5", "5"]),
    "3": ([r"\sqrt{9}"], [r"3\mathbf{i}+4\mathbf{j}", r"3_5", "3 million", "3, 3"]),
}  # fmt: skip
QUESTIONED = [  # the question is no answer, and may ask for an order
    ("x^2-1", "(x-1)(x+1)", "Factor $x^2 - 1$.", 0), (r"\frac{12}{18}", r"\frac23", r"Simplify $\frac{12}{18}$.", 0),
    ("0.5", r"\frac12", "Is it above 10.5?", 1), ("A,C,B", "C,B,A", "Write the letters in increasing order.", 0),
    ("0.4, 0.5", r"0.4, \frac12", "Order them from least to greatest.", 1), ("A,C,B", "C,B,A", "Which ones?", 1),
]  # fmt: skip
WILD = "9^{9^{9^9}} ((10^{99})^{99})^{99}^9 1000! 99999999999999999+1 2^{99999999} (x+y+z)^{99}".split()  # never tried
SYMBOLIC |= {wild: ([], [f"{wild}+0"]) for wild in WILD}


def verdict(name, completion, answer, question="Find the value."):
    return TASKS[name].score(completion, {"question": question, "answer": answer})


@pytest.mark.parametrize("library", [True, False])
def test_verdicts(library, monkeypatch):
    """The same with math-verify and without it, but for what only that finds equal."""
    tables = [("gsm8k", "{}", NUMBERS), ("math500", "So $\\boxed{{{}}}$.", EXPRESSIONS)]
    if library:
        pytest.importorskip("math_verify")
        tables.append(("math500", "\\boxed{{{}}}", SYMBOLIC))
        for answer, gold, question, right in QUESTIONED:
            assert verdict("math500", f"\\boxed{{{answer}}}", gold, question) == right
    else:
        monkeypatch.setitem(sys.modules, "math_verify", None)
    for task, form, table in tables:
        for gold, texts in table.items():
            for text, right in [(text, 1) for text in texts[0]] + [(text, 0) for text in texts[1]]:
                assert verdict(task, form.format(text), gold) == right, (gold, text)


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
def test_published_verdicts(sandbox):
    """The shared table, and what is published as right."""
    rows = [json.loads(line) for line in (SHARED / "verdicts.jsonl").read_text().splitlines()]
    assert [row for row in rows if verdict(row["task"], row["completion"], row["answer"]) != row["right"]] == []
    for name, file, n in (("gsm8k", "train_500", 500), ("countdown", "40", 40), ("mbpp", "first_60", 60)):
        problems = load(name, SHARED / f"{name}_{file}.jsonl")
        targets = [TASKS[name].target(problem) for problem in problems]
        assert not any("<<" in target for target in targets if name == "gsm8k")  # calculator marks
        assert [score for _, score in rewards.judge_all(TASKS[name], targets, problems)] == [1] * n


BOARD = "1 2 3 4\n3 4 1 2\n2 1 4 3\n"  # a sudoku's first twelve cells
HOUSES = {"House 1": {"Color": "Red", "Name": "tom"}, "House 2": {"Color": "blue", "Name": "Ann"}}
EARNED = {  # task -> (a problem, the terms of its reward -> completions that earn them)
    "gsm8k": ({"question": "?", "answer": "#### 15"}, {
        (2.0, 1.0): ["12 + 3 = 15\n#### 15", "12 + 3 = 15\n#### 15<|eot_id|>"],
        # nothing worked out; the answer is not the last line; an empty reasoning
        (2.0, 0.5): ["#### 15", "12 + 3\n#### 15\nand more", "<reasoning>\n</reasoning>\n#### 15"],
        (0.0, 1.0): ["12 + 3 = 15\n#### 14"], (0.0, 0.5): ["12 + 3\n#### 15.5"], (0.0, 0.0): ["15", "#### 14\n#### 15"],
    }),
    "math500": ({"question": "?", "answer": "15"}, {
        (2.0, 1.0): ["2 x = 30\n\\boxed{15.0}"], (2.0, 0.5): ["\\boxed{15}", "#### 15"],
        (0.0, 1.0): ["2 x = 30\n\\boxed{2}"], (0.0, 0.5): ["\\boxed{0} is \\boxed{0.0}"],
        (0.0, 0.0): ["\\boxed{15} \\boxed{2}", "15"],
    }),
    "countdown": (rewards.countdown_problem([3, 8, 5, 2], 32), {
        (0.9, 0.1): ["#### (3 + 5) * 8 / 2", "<answer>(3+5)*8/2</answer>#### (3 + 5) * 8 / 2",
                     "\\boxed{(3+5) \\times 8 \\div 2}", "#### 32 = (3 + 5) * 8 / 2",
                     "#### (3 + 5) \u00d7 8 \u00f7 2 = 32", "#### `(3 + 5) * 8 / 2`</s>",
                     "#### (3 + 5) * 8 / 2 = 8 * 8 / 2 = 64 / 2 = 32"],
        (0.0, 0.1): ["#### 3 + 5 * 8 / 2"],
        (0.0, 0.0): ["(3 + 5) * 8 / 2", "#### (3 + 5) * 8 / 2 = 33", "#### 32 = 32", "#### (3 + 5) * 8 / 2 = x",
                     "#### 8 * 2 * 2", "#### (3 + 5) * 8 / 2 * 1", "#### 3 5 8 2", "#### 2 ** 5 + 3 - 8",
                     "#### 8 * 2 * (5 ** -3)",
                     "#### ((3+5)*8/2", "#### 3/(5-5)+8+2", "#### 3.0 + 8 + 2 + 5", f"#### {'(' * 300}3{')' * 300}",
                     "#### __import__('os').system('true')", "#### (3 + 5) * 8 / 2\n#### 8 * 5 - 3 - 2"],
    }),
    "sudoku": ({"question": "1234341221430000", "answer": "1234341221434321"}, {
        (1,): [BOARD + "4 3 2 1", "1234341221434321", BOARD.replace(" ", ", ") + "[4, 3, 2, 1]",
               f"The solution is:\n```\n{BOARD}4 3 2 1\n```",
               "<answer>**1234341221434321**</answer>", "1234341221434321<|eot_id|>7",
               "Puzzle: 1234341221430000\nSolution: 1234341221434321"],
        # a wrong digit, none, or a changed clue costs a cell
        (0.75,): [BOARD + "4 3 2 2", BOARD + "4 3 2 x", BOARD + "4  2 1", f"2{BOARD[1:]}4 3 2 1"],
        (0.5,): [BOARD + "4 3 1 2"], (0,): ["", BOARD + "1 2 3 4", BOARD + "4 3 2", BOARD + "4 3 2 1 1",
                                            "1234341221430000", "1234341221434321 or 1234341221431234"],
    }),
    "zebra": (rewards.zebra_problem("?", ["House", "Color", "Name"], [["1", "red", "Tom"], ["2", "blue", "Ann"]]), {
        (1,): ["1: red, Tom\n2: blue, Ann", "So:\n\nHouse 1: red, Tom\nHouse 2: blue, Ann.\n",
               f"I think\n```json\n{json.dumps({'solution': HOUSES}, indent=1)}\n```",
               "<reasoning>1: blue, Ann</reasoning><answer>1: red, Tom\n2: blue, Ann</answer>"],
        (0.5,): ["1: red, Ann\n2: blue, Tom", "1: red, Tom"], (0,): ["1: red, Tom\n1: blue, Tom", "red Tom blue Ann"],
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", EARNED)
def test_terms_by_hand(name):
    problem, table = EARNED[name]
    for terms, completions in table.items():
        for completion in completions:
            assert tuple(TASKS[name].reward(completion, problem).values()) == pytest.approx(terms), completion
            assert TASKS[name].score(completion, problem) == terms[0] / max(terms[0] for terms in table), completion


# --- Rewards are total, and linear in the length of the text ----------------------------------------------------------

HOSTILE = [
    "#### ", "#### 1\n", "*9", "1,", "1/", "=", "^", "{", "}", "(", "-", "\\\\", "<|", "\n", " ", "\x00\n", "\u2028",
    "$", "\\boxed{", "\\boxed{1}", "\\frac{1}{", "\\text{", "<answer>", "<answer>1</answer>", "</think>", "<|eot_id|>",
    "```", "```python\n", "~~~\n", ">>> 1\n", "answer: 1. ", "A: 5\n", "1: red, Tom\n", '{"House 1": ', '"answer": "',
]  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
def test_rewards_are_total_and_linear(name, monkeypatch):
    """No exception, finite terms and scores, on noise and on pieces: 5,000 take milliseconds, not quadratic time."""
    monkeypatch.setattr(rewards, "run_program", lambda *job: [None] * len(job[3]))
    task, rng = TASKS[name], random.Random(0)
    problem = task.generate("test", 1, 0)[0]
    pieces = [*HOSTILE, task.target(problem), problem["question"]]
    noise = ["".join(chr(rng.randrange(rng.choice([128, 0x3000, 0x110000]))) for _ in range(300)) for _ in range(50)]
    mixed = ["".join(rng.choices(pieces, k=40)) for _ in range(200)]
    for text in noise + mixed + [piece * 5000 for piece in pieces]:
        began = time.process_time()
        assert all(math.isfinite(value) for value in task.reward(text, problem).values())
        assert time.process_time() - began < 1, text[:40]
        assert 0 <= task.score(text, problem) <= 1


# --- Programs: where they stand, what the sandbox leaves them, what does not pass -------------------------------------

SECRET = 987_654_321  # what the tests expect of f(2): a program that returns it has seen what it must not see
P = {"question": "?", "answer": "", "imports": "", "setup": "", "tests": ["assert f(1) == 2", "assert f(2) == 3"]}
DEF = "def f(x):\n    return x + 1"
RIGHT = [
    f"```python\n{DEF}\n```", f"Here it is:\n```py\n{DEF}\n```\nIt works.", f"~~~\n{DEF}\n~~~",
    f"```Python\n{DEF}", "```python def f(x): return x + 1```", "```python\n>>> def f(x):\n...     return x + 1\n```",
    "```python\nimport math\n```\nand\n```python\ndef f(x): return int(math.floor(x + 1.5))\n```",
    '```python\ndef f(x):\n    """Adds.\n\n    ```\n    f(1)\n    ```\n    """\n    return x + 1\n```',
    f"```bash\npip install numpy\n```\n```python\n{DEF}\n```\nUse it:\n```python\nprint(undefined)\n```<|eot_id|>",
    "1. The program:\n   ```python\n   def f(x):\n       return x + 1\n   ```\n2. Done",
]  # fmt: skip
CHEATS = [
    "import os\ndef f(x): os._exit(0)",
    "class A:\n __eq__ = lambda self, other: True\n __hash__ = lambda self: 0\ndef f(x): return A()",
    "import builtins, json\nbuiltins.bool = builtins.eval = json.dumps = lambda *a: '[true]'\ndef f(x): return 3",
    "import os\nfor fd in range(20):\n try: os.write(fd, b'[true]\\n[\"True\"]\\n')\n except OSError: pass\nf = abs",
    "import gc\ndef f(x):\n n = int(''.join(['98765432', '1']))\n return n if str(n) in str(gc.get_objects()) else 3",
    "def f(x):\n a = []\n for _ in range(100_000): a = [a]\n return a",
    "class E(BaseException):\n def __str__(self): raise self\ndef f(x): raise E",
]
CODE = """\
import math
def f(x): return [x, x]
def sum(a, b): return a * b
def doubled(x): return map(lambda a: 2 * a, x)
"""
HOLD = [
    "f(2) == [2, 2]", "(f(2)) == ([2, 2]), 'a message'", "set(f(2)) == set([2])", "f(f(1)) == [[1, 1], [1, 1]]",
    "len(f(2)) == 2 and f(1)[0] == 1", "math.isclose(f(2)[0], 2.0000001, rel_tol=0.001)", "sum(2, 3) == 6",
    "f(root) == [7, 7]", "sorted(f(2), key=lambda x: -x) == [2, 2]", "tuple(doubled([1])) == (2,)",
]  # fmt: skip
ENDLESS = {  # what the wall-clock limit ends
    "a sleep": "time.sleep(1000)",
    "signals ignored": "[signal.signal(s, signal.SIG_IGN) for s in range(1, 32) if s not in (9, 19)]; time.sleep(1000)",
    "output": "while True: os.writev(3, [b'[1]\\n' * 10_000])",
}
LIMITED = {  # what they hold back: each returns whether it could
    "fork": "os.fork(); return True",
    "a thread": "threading.Thread(target=print).start(); return True",
    "memory": "return len('a' * 3_000_000_000) > 0",
    "a big file": "open('big', 'wb').write(b'a' * 50_000_000); return True",
    "the environment": "return any('SECRET' in name for name in os.environ)",
    "the limits raised": "resource.setrlimit(resource.RLIMIT_NPROC, (100, 100)); return True",
}
SEPARATED = {  # what bubblewrap separates
    "a connection": "import socket; socket.create_connection(('127.0.0.1', PORT), timeout=1); return True",
    "the caller's file": "return open(CALLER).read() == 'secret'",
    "a file beside it": "open(CALLER + '.new', 'w').write('a'); return True",
    "the disk": "for i in range(1000): open(f'f{i}', 'wb').write(b'a' * 1_000_000)\n  return True",
    "the interpreter's library": "open(os.__file__, 'a').write('#'); return True",
    "a signal to the caller": "os.kill(CALLER_PID, 0); return True",
    "other processes": "return len([p for p in os.listdir('/proc') if p.isdigit()]) > 3",
}


@pytest.fixture
def sandbox(monkeypatch):
    monkeypatch.setattr(rewards, "code_execution_allowed", True)
    rewards.run_program.cache_clear()


@pytest.fixture(params=["bubblewrap", "limits only"])
def either(request, monkeypatch, sandbox):
    """Both ways to run programs; skipped where this system has not the one."""
    if request.param == "limits only":
        monkeypatch.setattr(rewards, "separation", tuple)
    if run("def f(x): return 3") != [3] or ("bubblewrap: " in rewards.protections()) != (request.param == "bubblewrap"):
        pytest.skip("this system does not run programs in this way")
    return request.param


def run(program, *calls):
    """What the calls come to beside a program, each a test of its own; None: it failed."""
    tests = tuple((call,) for call in calls or ["f(2)"])
    return [values and ast.literal_eval(values[0]) for values in rewards.run_program("", program, "", tests)]


def judged(completion, **changed):
    return rewards.judge_all(TASKS["mbpp"], [completion], [P | changed])[0]


def test_terms_of_programs(sandbox, monkeypatch):
    half, none = "```\ndef f(x): return 2\n```", "```\ng = 2\n```"
    nothing = ["", "```python\ndef f(x) return 2\n```", "I cannot", "1 + 1", "```\n```", "x = (" * 40_000]
    table = {(2, 1): RIGHT, (2, 0.5): [DEF], (1, 1): [half], (0, 1): [none], (0, 0): nothing}
    for (tests, form), completions in table.items():
        for text in completions:
            assert judged(text) == ({"tests": tests, "format": form}, tests == 2), text[:80]
    monkeypatch.setattr(rewards, "code_execution_allowed", False)
    with pytest.raises(DataError, match="--allow_code_execution"):
        judged("def f(x): return 'not run before'")


def test_what_programs_can_do(either, tmp_path, monkeypatch):
    """From inside, and as the caller's socket sees it."""
    assert ("NOT separated: network, files, processes" in rewards.protections()) == (either == "limits only")
    can, file = LIMITED | (SEPARATED if either == "bubblewrap" else {}), tmp_path / "file"
    file.write_text("secret")
    monkeypatch.setenv("SECRET_TOKEN", "secret")
    with socket.create_server(("127.0.0.1", 0)) as listening, ThreadPoolExecutor(8) as pool:
        listening.settimeout(0.05)
        names = f"CALLER, CALLER_PID, PORT = {str(file)!r}, {os.getpid()}, {listening.getsockname()[1]}"
        head = f"import os, resource, signal, threading, time\n{names}\ndef g(x):\n  "
        tail = "\ndef f(x):\n try: return g(x)\n except Exception: return False"
        try_all = lambda bodies: list(pool.map(lambda body: run(head + body + tail), bodies.values()))
        assert dict(zip(can, try_all(can))) == dict.fromkeys(can, [False])
        monkeypatch.setattr(rewards, "SECONDS", 1)
        began = time.monotonic()
        assert run(f"{head}while True: pass{tail}") == [None] and time.monotonic() - began < rewards.WALL
        monkeypatch.setattr(rewards, "WALL", 3)
        assert dict(zip(ENDLESS, try_all(ENDLESS))) == dict.fromkeys(ENDLESS, [None])
        with pytest.raises(TimeoutError):
            listening.accept()
    assert [p.name for p in tmp_path.iterdir()] == ["file"] and file.read_text() == "secret"


def test_honest_programs(either):
    values = [None, True, -3, 2.5, 10**50, "a\nb\u2028", b"\xff", 1j, [1, [2]], (1,), (), set(), {1}, {"a": {1: (2,)}}]
    found = run(f"values = {values!r}", *(f"values[{i}]" for i in range(len(values))))
    assert found == values and list(map(type, found)) == list(map(type, values))
    assert either == "limits only" or run("import os\ndef f(x): return os.listdir('.')") == [[]]
    modules = "import collections, math, re, typing, heapq, datetime, csv, decimal"
    assert run(f"{modules}\ndef f(x): return collections.Counter('aab')") == [{"a": 2, "b": 1}]
    assert run("def f(x): return x", "f(1)", "f()", "f(3)") == [1, None, 3]


def test_cheats_do_not_pass_and_what_is_expected_stays_outside(sandbox, monkeypatch):
    """Each program runs once for all its tests; a second process without it decides what is no plain equality."""
    jobs, run_program = [], rewards.run_program
    monkeypatch.setattr(rewards, "SECONDS", 2)
    monkeypatch.setattr(rewards, "run_program", lambda *job: jobs.append(job) or run_program(*job))
    tests = [f"assert f(5) == {SECRET}", f"assert math.isclose(f(6), {SECRET})", f"assert {{f(7)}} == {{{SECRET}}}"]
    problem, texts = P | {"tests": tests, "imports": "import math"}, [f"def f(x): return {SECRET - 1} + 1", *CHEATS]
    rows = rewards.judge_all(TASKS["mbpp"], texts, [problem] * len(texts))
    assert [(terms["tests"], score) for terms, score in rows] == [(2, 1)] + [(0, 0)] * len(CHEATS)
    programs = [job for job in jobs if job[1]]
    assert len(programs) == len(texts) and str(SECRET) not in repr(programs)


def test_how_tests_are_split(sandbox):
    """Each kind of assertion, with a program that satisfies it and one that does not."""
    row, other = {"text": "?", "code": CODE, "test_setup_code": "root = 7"}, "def f(x): return 0\nsum = max"
    for test in [*HOLD, "f(2) != [2, 2]", "not f(2)", "doubled([1]) == [2]"]:
        problem = TASKS["mbpp"].check(row | {"test_list": [f"assert {test}"]})
        assert judged(CODE, **problem)[1] == (test in HOLD), test
        assert test not in HOLD or judged(other, **problem)[1] == 0
    for test in ("assert 1 == 1", "f(2)", "assert f("):
        with pytest.raises(DataError, match="^a test is not"):
            TASKS["mbpp"].check(row | {"test_list": [test]})


# --- Figures, files, and the command line -----------------------------------------------------------------------------

ROWS = {  # task -> its published spellings
    "gsm8k": [{"question": "q", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}, {"prompt": "q", "answer": 42}],
    "math500": [{"problem": "q", "solution": "So $\\boxed{\\frac{1}{2}}$."}],
    "mbpp": [{"text": "q", "code": "import math\r\ndef f(x):\r\n return math.pi", "test_imports": ["import math"],
              "test_list": ["assert math.isclose(f(1), 3.14159, rel_tol=1e-3)"], "test_setup_code": ""}],
    "countdown": [{"nums": [3, 8, 5], "target": 6}, {"input": "3,8,5", "output": "6"},
                  {"question": "Numbers: [3, 8, 5], target: 6"}, {"question": "q", "ground_truth": [[3, 8, 5], 6]}],
    "sudoku": [{"Puzzle": "1234341221430000", "Solution": "1234341221434321"},
               {"question": "Solve 1234341221430000 now", "ground_truth": "1234341221434321"}],
    "zebra": [{"puzzle": "q", "solution": {"header": ["House", "Name"], "rows": [["1", "Eric"], ["2", "Arnold"]]}}],
}  # fmt: skip
NINE = "".join(str((3 * r + r // 3 + c) % 9 + 1) for r in range(9) for c in range(9))
FILES = [  # task, name and content of a file -> the questions in it, or the error; a spreadsheet drops zeros in front
    ("gsm8k", "a.csv", '\ufeffQuestion,Answer\r\n"a\nb, ""c""",#### 1\r\n\r\nd,#### 2\r\n', ['a\nb, "c"', "d"]),
    ("sudoku", "a.csv", "Puzzle,Solution\n234341221434321,1234341221434321\n", ["0234341221434321"]),
    ("sudoku", "a.csv", "question,answer\nSolve 34341221434321.,1234341221434321\n", ["0034341221434321"]),
    ("sudoku", "a.csv", f"quizzes,solutions\n{NINE[:78]}...,{NINE}\n", [NINE[:78] + "000"]),
    ("sudoku", "a.csv", f"quizzes,solutions\n{NINE[:78]}...,{NINE[1:]}1\n", "a.csv, line 2: .* is no solution of"),
    ("sudoku", "a.csv", "Puzzle,Solution\n1,2,3\n", "a.csv, line 2: expected .*as many fields as the header"),
    ("t2i", "a.txt", "\ufeffa red cube\r\n\n  two dogs  \na\u2028b\n", ["a red cube", "two dogs", "a\u2028b"]),
    ("t2i", "a.txt", '["a red cube",\n "two dogs"]', ["a red cube", "two dogs"]),
]
GOOD = '{"completion": "a", "answer": "#### 1"}\n'
BAD = [
    ("--task chess --score FILE", "", "argument --task: invalid choice: 'chess'"),
    ("--score FILE", "", "--score needs --task"),
    ("--task mbpp --score FILE", "", "--task mbpp runs programs that a model wrote: add --allow_code_execution"),
    ("--task gsm8k --score none.jsonl", "", "none.jsonl: cannot be read"),
    ("--task gsm8k --score FILE", "\udcff", "file.jsonl: cannot be read"),
    ("--task gsm8k --score FILE", "", "file.jsonl: no completions; expected lines"),
    ("--task gsm8k --score FILE", GOOD + '{"completion": "a"', "file.jsonl, line 2: expected a JSON object"),
    ("--task gsm8k --score FILE", GOOD + "\n[1]", "file.jsonl, line 3: expected a JSON object"),
    ("--task gsm8k --score FILE", GOOD + '{"completion": "\\ud800"}', "file.jsonl, line 2: holds half a character"),
    ("--task gsm8k --score FILE", '{"completion": 3, "answer": 1}', "file.jsonl, line 1: no completion"),
    ("--task gsm8k --score FILE", '{"completion": [], "answer": 1}', "file.jsonl, line 1: no completion"),
    ("--task gsm8k --score FILE", '{"completion": "a"}', 'file.jsonl, line 1: field "ground_truth"'),
]


def test_figures():
    stderr = round(math.sqrt(0.75 * 0.25 / 4), 6)
    assert rewards.accuracy([True, True, True, False]) == {"accuracy": 0.75, "stderr": stderr, "n": 4}
    before, after = [1] + [0] * 5 + [1], [0] + [1] * 5 + [1]
    # 1 lost, 5 won: 2 (C(6,0) + C(6,1)) / 2^6
    assert rewards.paired_p(before, after) == 14 / 64 and rewards.paired_p(before, before) == 1
    rows = np.random.default_rng(0).choice([0, 0.25, 0.5, 1], (5, 6)).tolist()
    for k in range(1, 7):  # pass@k against all subsets
        best = [max(subset) for row in rows for subset in itertools.combinations(row, k)]
        assert rewards.pass_at(rows, k) == pytest.approx(sum(best) / len(best))


def load(name, path):
    return TASKS[name].load(str(path), "train")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("name", ROWS)
def test_published_rows(name, tmp_path, capsys, sandbox):
    """Each published spelling loads; its own solution scores as right, and nonsense does not."""
    if name == "math500":
        pytest.importorskip("math_verify")
    problems = load(name, write(tmp_path / "a.jsonl", ROWS[name]))
    rows = [row | {"completion": TASKS[name].target(p)} for row, p in zip(ROWS[name], problems, strict=True)]
    rows += [row | {"completion": "I do not know."} for row in ROWS[name]]
    assert rewards.main(["--task", name, "--score", str(write(tmp_path / "b.jsonl", rows)), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert (figures["n"], figures["skipped"], figures["accuracy"], figures["no_answer"]) == (len(rows), 0, 0.5, 0.5)


def test_scoring_by_hand(tmp_path, capsys):
    """prompt, completion, answer; d1's file; several completions of one; and rows that cannot be judged."""
    good = {"prompt": "q", "completion": "5 + 1 = 6\n#### 6", "answer": "#### 6"}
    d1 = {"question": "q", "ground_truth": 6.0}
    rows = [good, d1 | {"generations": "\\boxed{6}"}, d1 | {"generations": ["#### 7", "nothing"]}]
    figures = {"task": "gsm8k", "n": 4, "accuracy": 0.5, "mean_reward": 6 / 4, "no_answer": 0.25}
    file, refused = tmp_path / "file.json", [good | {"answer": None}, good | {"answer": "#### 3 dozen"}]
    for content, skipped in ((rows, 0), ({"metrics": {"a": 1}, "generations": rows}, 0), (refused + rows, 2)):
        file.write_text(json.dumps(content))
        assert rewards.main(["--task", "gsm8k", "--score", str(file), "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == figures | {"skipped": skipped}
    assert "2 rows skipped" in err and "file.json, item 1" in err and err.count("\n") == 1
    assert rewards.main(["--task", "gsm8k", "--score", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "accuracy     0.5" in shown and "skipped      2" in shown


@pytest.mark.parametrize("name,file,text,found", FILES)
def test_other_files(tmp_path, name, file, text, found):
    (tmp_path / file).write_bytes(text.encode())
    if isinstance(found, list):
        assert [p["question"] for p in load(name, tmp_path / file)] == found
    else:
        with pytest.raises(DataError, match=found):
            load(name, tmp_path / file)


def test_fields_by_hand():
    """Nine rows of nine; what GenEval's verdict reads stays beside a prompt; a solution without a box is no answer."""
    task, puzzle = TASKS["sudoku"], {"question": NINE[:78] + "000", "answer": NINE}
    lines = task.target(puzzle)
    assert task.check(puzzle) == puzzle and lines.count("\n") == 8 and task.score(lines, puzzle) == 1
    assert task.score(lines[:-1] + "1", puzzle) == pytest.approx(2 / 3)
    scene = {"include": [{"class": "oven", "count": 3}]}
    for row, answer, tag in (({"prompt": "p"}, "", ""), ({"tag": "b", "prompt": "p"} | scene, json.dumps(scene), "b")):
        assert TASKS["t2i"].check(row) == {"question": "p", "answer": answer, "tag": tag}
    with pytest.raises(DataError, match=r"no \\boxed"):
        TASKS["math500"].check({"problem": "q", "solution": "so it is 2"})


@pytest.mark.parametrize("argv,text,message", BAD)
def test_bad_input_is_one_line(tmp_path, capsys, monkeypatch, argv, text, message):
    monkeypatch.setattr(rewards, "code_execution_allowed", False)
    (tmp_path / "file.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    assert rewards.main(argv.replace("FILE", str(tmp_path / "file.jsonl")).split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("rewards.py: error: ") and err.count("\n") == 1 and message in err


def test_the_tasks_are_shown_also_to_head(capsys):
    assert rewards.main([]) == 0 and re.findall(r"^(\w+)\n---", capsys.readouterr().out, re.MULTILINE) == list(TASKS)
    cut = subprocess.run(f"{sys.executable} {rewards.__file__} | head -n 1", shell=True, capture_output=True, text=True)
    assert cut.stdout == "gsm8k\n" and cut.stderr == ""


# --- Pixels: CLIP against a second library, scorers on the loopback address -------------------------------------------


IMAGES = torch.randint(0, 256, (9, 20, 24, 3), generator=torch.Generator().manual_seed(5))
IMAGES = (IMAGES * torch.linspace(0, 1, 9)[:, None, None, None]).to(torch.uint8)  # from dark to light


def random_clip(path):
    """A CLIP in the official format: images of 8 x 8 in patches of 4, 16 text positions, letters as tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(0)
    tokens = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    sizes = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 54, "max_position_embeddings": 16, "bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 0}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    model = CLIPModel(CLIPConfig(text_config=sizes | text, vision_config=vision, projection_dim=24))
    for p in (p for p in model.parameters() if p.dim() > 1):
        torch.nn.init.normal_(p, std=0.5)  # the default initialisation gives every image nearly the same features
    model.save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[], unk_token="<|endoftext|>", model_max_length=16)
    CLIPProcessor(images, tokenizer).save_pretrained(path)
    return model.eval(), CLIPProcessor(images, tokenizer)


@pytest.fixture
def server():
    """A scorer on the loopback address: prompt's length + image's mean; how it behaves is the URL's last part."""
    Image = pytest.importorskip("PIL.Image")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body, kind = json.loads(self.rfile.read(int(self.headers["Content-Length"]))), self.path.rpartition("/")[2]
            files = [Image.open(io.BytesIO(base64.b64decode(data)), formats=["PNG"]) for data in body["images"]]
            http.seen.append(body | {"images": [*map(np.asarray, files)]})
            scores = [float(np.asarray(file).mean()) + len(prompt) for file, prompt in zip(files, body["prompts"])]
            threading.Event().wait(float(kind == "slow"))
            self.send_response(503 if kind == "broken" or (kind == "flaky" and len(http.seen) < 3) else 200)
            self.end_headers()
            self.wfile.write(http.answers.get(kind, json.dumps({"scores": scores})).encode())

        log_message = lambda self, *args: None

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.handle_error = lambda *args: None  # a client that hangs up is what some tests are about
    http.seen, http.answers, http.url = [], {}, f"http://127.0.0.1:{http.server_port}/"
    threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}).start()
    yield http
    http.shutdown()
    http.server_close()


def test_pixel_reward(server, tmp_path, monkeypatch):
    """CLIP's term is the cosine of transformers' own features; a scorer's comes past a failure."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    model, processor = random_clip(tmp_path / "clip")
    prompts = ["a cat", "two dogs on a mat in the sun with a hat", "z", "", "red", "\u00e9\u2028", "bb", "q r s", "x y"]
    calls, text = [], f"clip:{tmp_path}/clip=0.5,{server.url}flaky=-2"
    reward = rewards.PixelReward(lambda codes: calls.append(codes) or IMAGES, text)
    scores = reward(torch.zeros(9, 4, dtype=torch.long), prompts)
    assert len(calls) == 1 and reward.weights == {"clip": 0.5, "flaky": -2}
    for image, prompt, of in zip(IMAGES, prompts, scores, strict=True):
        inputs = processor(text=prompt, images=image.numpy(), return_tensors="pt", truncation=True, max_length=16)
        with torch.no_grad():
            found = model.get_image_features(inputs["pixel_values"]), model.get_text_features(inputs["input_ids"])
        u, v = (np.asarray(getattr(f, "pooler_output", f)[0], dtype=float) for f in found)
        assert of["clip"] == pytest.approx(50 * max(0, u @ v / math.sqrt((u @ u) * (v @ v))), abs=1e-3)
        assert of["flaky"] == pytest.approx(-2 * (image.double().mean().item() + len(prompt)))
    assert len(server.seen) == 3 and server.seen[0]["name"] == "flaky"
    assert (np.stack(server.seen[2]["images"]) == IMAGES.numpy()).all()


def test_scorers_that_fail(server, monkeypatch):
    """Down, slow or nonsense, in one line."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.answers = {"html": "<html>\nbusy", "list": "[1, 2]", "few": '{"scores": [1]}', "nan": '{"scores": [1, NaN]}'}
    server.answers |= {"bool": '{"scores": [1, true]}', "text": '{"scores": "12"}', "deep": "[" * 200_000}
    urls = [server.url + kind for kind in (*server.answers, "slow", "broken")]
    for url in [*urls, "http://127.0.0.1:9/a"]:
        with pytest.raises(DataError, match=f"^{re.escape(url)}: [^\n]*is the scorer running there.$"):
            rewards.remote_score(IMAGES[:2], ["a", "b"], url, timeout=0.3 if "slow" in url else 10)


def test_rewards_that_are_not_understood():
    urls = ["http://127.0.0.1:8000/hpsv3", "https://host/a/reward.v2"]
    assert rewards.PixelReward(None, f"{urls[0]}=0.5, {urls[1]}=-2e-1").weights == {"hpsv3": 0.5, "reward.v2": -0.2}
    for text in ("", "clip", "clip=nan", "http://a/b=1,", "http://a/b=1,http://c/b=2", "clips=1", "file:///a=1"):
        with pytest.raises(DataError, match="^reward [^\n]*$"):
            rewards.PixelReward(None, text)
