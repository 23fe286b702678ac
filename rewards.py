"""Completions -> numbers: the tasks, their data, and their rewards. Text, or an image's codes, in; numbers out.

A task is one row of `TASKS`: where its problems come from, what the model is asked, what it is rewarded for, and how
much of it is solved. A problem is a dict of its question, its answer, and what else its reward reads:

    gsm8k      {"question": "Tom has 12 apples ...", "answer": "12 + 7 = 19\\n#### 19"}
    math500    {"question": "Solve 2 x + 3 = 4.", "answer": "\\frac{1}{2}", "solution": "2 x = 1\\n\\boxed{...}"}
    mbpp       {"question": "Write ...", "answer": "def f(x): ...", "tests": ["assert f(2) == 7"], "imports", "setup"}
    countdown  {"question": "Numbers: 3, 8, 5. Target: 6.", "answer": "3 + 8 - 5", "numbers": [3, 8, 5], "target": 6}
    sudoku     {"question": "1000034000200003", "answer": "1234..."}, 16 or 81 cells, row by row, 0 for empty
    zebra      {"question": "Houses: 1, 2, 3. ...", "answer": "1: red, Tom\\n...", "header": [...], "rows": [[...]]}
    t2i        {"question": "a photo of a red circle", "answer": "0 0 5 6 ..."}, 8 x 8 codes, row by row

Problems come from a generator (offline, from a seed), from a file in the published format, or by `datasets`. The
generator's splits: train; validation, which decides when base training stops; test, new questions made of parts that
training has shown; unseen, with a part that training never shows: an eighth of all first pairs of numbers (gsm8k,
math500, mbpp), of all sets of numbers (countdown), of all solutions (sudoku, zebra), a fifth of all scenes (t2i).

A verdict is a contract, not a search: an answer is read in the few forms that models write, and where any part of
it is not understood it earns nothing. Leniency is what a policy learns to exploit.

Departures from the papers (MaskGRPO; UPO, arXiv 2510.05725) and from their official code
 1. The prompt asks for GSM8K's own last line, `#### 42`, not for <reasoning>/<answer> tags. The weights are official.
 2. The integer bonus needs an answer that can be told apart. The official code pays for any digits.
 3. GSM8K's calculator marks (<<48/2=24>>) are removed from the solutions that SFT trains on.
 4. A sudoku's reward is, as in the paper, the share of empty cells that are right, filled in place between the clues
    as in UPO's code; here a changed clue costs as much as a wrong cell.
 5. Several different answers are none. Published evaluations take the last of them, or any.
 6. MBPP's prompt shows one of a problem's tests, where MBPP's own shows all: it pays less to recite them. What the
    tests expect never enters the process that runs the program.
 7. Countdown is d1's task, in neither paper. Its expressions are parsed; d1 hands them to Python's eval.
 8. Zebra: UPO's README names github.com/kulinshah98/llm-reasoning-logic-puzzles as its puzzles' source. Ours, and the
    files that are read, are ZebraLogic's: a table of houses and attributes. Reward: the share of right entries.
 9. The embedded text-to-image task is a miniature: GenEval's six categories over 4 shapes and 4 colours, drawn in
    65 codes. Its verifier reads the codes, where GenEval runs a detector on pixels.
10. On pixels: CLIP's score is 100 x the cosine, at least 0, where the official code has the bare cosine; remote
    scorers are asked by JSON and PNG, where it unpickles their answers.

    python rewards.py                                     # problems of each task, and what a few completions earn
    python rewards.py --task gsm8k --score FILE.jsonl     # accuracy and mean reward of a file of completions
"""

import argparse
import ast
import base64
import builtins
import contextlib
import csv
import functools
import importlib.util
import io
import itertools
import json
import math
import operator
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unicodedata
import urllib.request
import warnings
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Problem = dict[str, Any]
Reward = dict[str, float]


class Verdict(NamedTuple):
    """What a task makes of a completion."""

    answer: Any  # the one answer that it gives; None: none, or several
    terms: Reward  # by name; the reward is their sum
    score: float  # how much of the problem is solved, 0 to 1; of most tasks 0 or 1


class DataError(ValueError):
    """Data that cannot be used: what is wrong, in which file and line, and what would be right."""


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def read(text: str, parse: Callable = json.loads) -> Any:
    """What a text stands for in JSON, or to another parser, such as Python's; NotImplemented where it is none."""
    try:
        with warnings.catch_warnings(action="ignore"):  # "\d" in a program is no concern of ours
            return parse(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return NotImplemented


# --- Verdicts: what a completion announces as its answer --------------------------------------------------------------

LONGEST = 500  # characters; what is longer is no answer
END = re.compile(r"<\|(?:eot_id|endoftext|im_end|end_of_text|end|eos)\|>|</s>|<eos>|<end_of_turn>")
BALANCED = r"(?:[^\\{}]++|\\.)*+"  # an escaped brace is no brace
for _ in range(8):  # levels of braces
    BALANCED = rf"(?:[^\\{{}}]++|\\.|\{{{BALANCED}\}})*+"
BOXED = re.compile(rf"(?s)\\(?:boxed|fbox)\s*\{{(?:({BALANCED})\}}|([^\n<]{{0,{LONGEST}}}))")
TAGGED = re.compile(r"<answer>(.*?)(?:</answer>|\Z)", re.IGNORECASE | re.DOTALL)
HASHES = re.compile(r"#{4,}\s*([^\n<]*)")
# "The answer is 4", "**Answer:** 4", "A: 4", to the sentence's end. What a fence or an object follows is JSON's.
SAID = re.compile(r"(?im)(?:\banswer\b[*_]*(?:\s+is\b|\s*[:=])|^A:)(?=[:*\s]*(?![`{\s*:])([^\n\x22]{1,200}))")
FIELD = re.compile(r'(?i)"(?:final_)?answer"\s*:\s*("(?:[^"\\\n]|\\.){1,500}"|-?[\d.]+(?=\s*(?:[}\]\n]|,(?!\d)|\Z)))')
# A heading or a sentence of the working: "#### Step 2: ...", "#### 1. Add 5", "Answer: Tom has 5 ..."
HEADING = re.compile(r"[\s*]*(?:[A-Za-z]{2}|\d+[.):][ \t]+\**[A-Za-z])")
SAYS = re.compile(r"[^\W_]|[<>=∞∅]")  # what an answer holds at least: a letter, a digit, a relation


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""(start, end, content) of each \boxed{...} with balanced braces that holds anything, of nested ones the inner.
    One that is never closed ends with its line, or with the tag around it."""
    found = []
    for box in BOXED.finditer(text):
        content = re.sub(r"(?:[\s>$.]|\\[\])])*\Z", "", box[2]) if box[1] is None else box[1]
        inner = boxes(content)
        if SAYS.search(content):
            found.append((*box.span(), inner[0][2] if len(inner) == 1 else content))
    return found


def announced(text: str) -> list[str]:
    r"""What a text announces as its answers, each spelling once, in the first of these forms that it has: \boxed{},
    <answer>...</answer> and `#### 42`, where a box in another form stands for it; "the answer is 42"; headings in these
    places, `#### Step 2` and "Answer: Tom has"; JSON's "answer"."""
    inside = boxes(text)
    free = lambda match: not any(start < match.end() and match.start() < end for start, end, _ in inside)
    tagged, hashes = ([match[1] for match in form.finditer(text) if free(match)] for form in (TAGGED, HASHES))
    tagged = [re.sub(r"\\(?:boxed|fbox)\s*\{\s*\}", " ", content).lstrip(" #\n") for content in tagged]
    said = [re.split(r"[.!](?:\s|\Z)", match[1], maxsplit=1)[0] for match in SAID.finditer(text)]
    said = [sentence for sentence in said if not SAID.search(sentence)]  # the last of "Answer: the answer is 4"
    fields = [value.strip('"').replace("\\\\", "\\") for value in FIELD.findall(text)]
    values, spoken = ([text for text in texts if not HEADING.match(text)] for texts in (hashes, said))
    for form in ([content for *_, content in inside] + tagged + values, spoken, hashes, said, fields):
        form = [text.strip(" \t\r\n*`").removesuffix(".").rstrip("\\ *`") for text in form if len(text) <= LONGEST]
        if found := [text for text in dict.fromkeys(form) if SAYS.search(text)]:
            return found
    return []


def written(completion: str) -> str:
    """What stands before the first end token; of that, what stands behind marked reasoning if an answer does."""
    text = END.split(completion, maxsplit=1)[0]
    behind = re.split(r"</(?:reasoning|think)>", text)[-1]
    return behind if behind != text and announced(behind) else text


# --- Verdicts: numbers, all of whose text is understood ---------------------------------------------------------------

SPELLINGS = (  # the LaTeX of a number or an expression -> its plain spelling, one after the other
    ("[\u2212\u2013]", "-"),
    (r"\A\s*\{([^{}]*)\}\s*\Z", r"\1"),  # \boxed{{5}}
    (r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mathit|mbox|hbox)\s*\{([^{}]*)\}", r" \1 "),
    (r"(?<=\d)(?:\{,\}|,?\\[,!])\s*(?=\d{3}(?!\d))", ","),  # 385\,000
    (r"(?<!\\)\\[!,;:> ]|(?<=[\w}])~|\\q?quad\b|\\(?:left|right|displaystyle)(?![a-zA-Z])|\*\*(?!\s*[-+\d(])", " "),
    (r"(?<!\\)\\(?:([$%])|[()\[\]])", r"\1"),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\\frac(?:\s*(\d)|\s+([a-zA-Z]))", r"\\frac{\1\2}"),  # \frac12, \frac1e
    (r"(\\frac\s*\{[^{}]*\})\s*([\da-zA-Z])", r"\1{\2}"),
    (r"\\frac\s*\{\s*-", r"-\\frac{"),
)
# What scales a number, relates it, doubts it or is a number itself is no unit; nor is one letter, but for these few.
NO_UNIT = (
    r"(?:hundred|thousand|[mbtrz]+illion|dozen|lakh|crore|grand|k|mil|mn|bn|tn|hal[fv]e?|third|quarter|couple|gross|"
    r"score|fold|(?:four|fif|six|seven|eigh|nin|ten|hundred|thousand|[mb]illion)th|squared?|cubed?|factorial|double|"
    r"triple|twice|time|plus|minus|negative|mod|sqrt|root|log|ln|exp|pi|and|or|over|under|above|below|remainder|am|pm|"
    r"not|no|wrong|incorrect|false|maybe|perhaps|possibly|approximately|about|roughly|almost|nearly|ish|"
    r"one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|[a-z]+teen|"
    r"twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety)s?"
)
UNIT = rf"(?!{NO_UNIT}\b)(?:[A-Za-z]{{2,30}}|(?<=\s)[mglsh])"
VALUE = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
NUMBER = re.compile(
    rf"(?i)\$*\s*([-+]?)\s*[$€£]?\s*([-+]?)(?:({VALUE})(?:\s+([0-9]+)/([0-9]+))?|([0-9]+)\s*/\s*([0-9]+))"
    rf"\s*(?:%|{UNIT})?[\s$]*\.?"
)


def plain(text: str, spellings: tuple = SPELLINGS) -> str:
    """A text with its LaTeX's layout and spellings made plain."""
    for pattern, spelling in spellings:
        text = re.sub(pattern, spelling, text)
    return text.strip()


def parse_number(text: str) -> Fraction | None:
    r"""The exact value of "$1,234.50", "-7", "3/4", "\frac{1}{2}", "2 1/2", "50%", "42 apples"; None for any text that
    holds something else beside it, such as "2 million", "5x", "at least 5" or "2 and a half"."""
    text = re.sub(r"\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2", plain(text)) if len(text) <= 100 else ""
    match = NUMBER.fullmatch(text.strip())
    if not match or (match[1] and match[2]):
        return None
    value, top, bottom = match[3], int(match[4] or match[6] or 0), int(match[5] or match[7] or 1)
    if bottom == 0 or (match[4] and (not value.isdecimal() or top >= bottom)):  # 2 1/2, but not 2.5 1/2 or 2 3/2
        return None
    number = Fraction((value or "0").replace(",", "")) + Fraction(top, bottom)
    return -number if "-" in (match[1], match[2]) else number


# --- Verdicts: MATH. Exact numbers and tidied text; what these do not decide is math-verify's -------------------------

UNICODE = str.maketrans(dict(zip("π∞±∪≤≥°", map("{} ".format, r"\pi \infty \pm \cup \le \ge ^\circ".split()))))
UNITS = rf"(?<=[^\s\\])(?:\\?\s)*\\(?:text|mathrm|mbox)\s*\{{\s*(?:square |cubic )?{UNIT}\.?\s*\}}(?:\^\{{?[23]\}}?)?$"
TIDY = (  # spellings that mean the same, one after the other
    (r",?\s*(?<![\w\\])(?:and|or)(?!\w)", ","),
    (r"(?<!\\)\$", ""),
    (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*\Z", ""),
    (r"\\(begin|end)\{[bp]?matrix\}", r"\\\1{pmatrix}"),
    (r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2"),
    (r"\\sqrt\s*(\w)", r"\\sqrt{\1}"),
    (r"\\([lg])eq?(?![a-z])", r"\\\1e "),
    (r"\A\s*\(\s*([A-Za-z])\s*\)\s*\Z", r"\1"),  # (C)
    (r"\\varnothing(?![a-z])", r"\\emptyset"),
    (r"(?<!\.)\.\s*\Z", ""),
)
NAME = re.compile(r"\s*([a-zA-Z](?:_\w)?(?:\([a-z]\))?)\s*(?:=|\\in(?![a-z]))\s*(?=[^=\s])")  # x = 5, x \in [0, 1]


def tidy(text: str) -> str:
    """An expression in one of the spellings that mean the same."""
    return plain(plain(re.sub(UNITS, "", text.translate(UNICODE).strip())), TIDY).strip(" ,")


def squeeze(text: str) -> str:
    """A text without its spaces, but for those between digits: 3 4 is not 34."""
    return re.sub(r"(?<![\d\s])\s+|\s+(?![\d\s])", "", text)


# All that may stand in an expression for math-verify, which skips what it cannot read: "8 a.m.", 0.\overline{3}, 42_5;
# and to which CAT is a product, equal to TAC.
READ = re.compile(
    r"(?:\\(?:frac|sqrt|pi|infty|pm|cup|cap|setminus|cdot|times|div|le|ge|lt|gt|neq?|in|emptyset|sin|cos|tan|cot|ln|log|"
    r"theta|alpha|beta|gamma|phi|omega|lambda|(?:begin|end)\{pmatrix\})(?![a-zA-Z])|\\\\|\\[{}]|\d+(?:\.\d+)?(?!\s*_)|"
    r"(?<![a-zA-Z])(?:[a-zA-Z]|[a-z]{2,3})(?![a-zA-Z])|[-+*/^_=<>|(),&{}\[\] ])++"
)
# What could keep sympy busy: long numbers, high powers, powers of powers, deep nesting.
WILD = re.compile(
    r"\\frac(?!\s*\{)|\\frac\s*\{[^{}]*\}(?!\s*\{)|"  # and what it reads only half of: \frac\pi 2
    r"\d{16}|\^\s*\{?\s*-?\d{3}|\^[^-+,=]*\^[^-+,=]*\^|\^\s*\{[^{}]*\^|[)}\]]\s*\^\s*\{?\d\d|(?:[({][^(){}]*){20}|\d\s+\d|"
    r"(?:[-+*/^&]|\\(?:cap|cup|cdot|times|div|pm|sin|cos|tan|cot|ln|log))[\\{}\s]*(?:,|\Z)"  # cut short: 2^
)
# A list is in an order; a number is still to be worked out, unless it is written as 3*10^8.
ORDERED = re.compile(r"(?i)(?:creas|scend)ing order|(?:least|smallest|greatest|largest) to (?:great|large|least|small)")
WORK = re.compile(r"[\d)}]\s*(?:[-+/(]|(?:\*|\\cdot|\\times|\\div)(?!\s*10\s*\^))")
# What an answer has as many of as the published one: relations of each kind, parts, signs, brackets around parts.
OUTLINE = (r"[<>]|\\[lg][et](?![a-z])", "=", r"\\neq?", r"\\in(?![a-z])", ",", r"\\pm", r"[(\[](?=[^()\[\]]*,)")


def same_by_math_verify(answer: str, gold: str, question: str) -> bool:
    """Whether math-verify finds two tidied expressions equal and reads all of them; False where it is not installed. No
    answer has a variable that the gold lacks. Parts may stand in any order, unless the question asks for one."""
    if "," in gold and ORDERED.search(question):
        answer, gold = f"({answer})", f"({gold})"
    both = f"{gold} , {answer}"
    if len(both) > 300 or WILD.search(both) or not (READ.fullmatch(answer) and READ.fullmatch(gold)):
        return False
    letters = [set("".join(re.findall(r"(?<![a-zA-Z\\])[a-zA-Z]+", text))) for text in (answer, gold)]
    outlines = [[len(re.findall(sign, text)) for sign in OUTLINE] for text in (answer, gold)]
    if not letters[0] <= letters[1] | {"e", "i"} or outlines[0] != outlines[1]:
        return False
    # its time limit is an alarm signal, which only the main thread can set
    limit = 3 if threading.current_thread() is threading.main_thread() else None
    try:
        from math_verify import parse, verify

        parsed = [parse(f"${text}$", parsing_timeout=limit) for text in (gold, answer)]
        all_of_it = all(p and squeeze(p[-1]) == squeeze(text) for p, text in zip(parsed, (gold, answer)))
        return bool(all_of_it and verify(*parsed, float_rounding=15, timeout_seconds=limit))
    except Exception:  # sympy's errors have no common class
        return False


def same_answer(answer: str, gold: str, question: str) -> bool:
    """Whether an answer to a MATH problem is right: equal as tidied text, as exact numbers or to math-verify. Unless it
    is spelled as published it may not be copied from the question ("Simplify 12/18") or left to be worked out, 7*8."""
    texts = [tidy(answer), tidy(gold)]
    names = [NAME.match(text) for text in texts]
    for i, (name, other) in enumerate(zip(names, names[::-1])):
        if name and not other and "=" not in texts[1 - i]:
            texts[i] = texts[i].replace(name[0], "")  # x = 5 is 5
    numbers, squeezed = [parse_number(text) for text in texts], [squeeze(text) for text in texts]
    words = squeezed[0].isalpha() and squeezed[0].casefold() == squeezed[1].casefold()
    if squeezed[0] == squeezed[1] or words:
        return True
    if re.search(r"\W" if numbers[0] is None else r"[/.]|\\frac", squeezed[0]):
        copied = rf"(?<![\d.]){re.escape(squeezed[0])}(?!\d)"
        if re.search(copied, squeeze(tidy(question[:10_000]))):
            return False
    if numbers[1] is not None and (numbers[0] is not None or WORK.search(texts[0])):
        return numbers[0] == numbers[1]
    return same_by_math_verify(*texts, question)


# --- Problems: what the generators share, and published files: rows, and the names that their fields go by ------------

SPLITS = ("train", "validation", "test", "unseen")


def part_of(key: str, *pairs: str) -> str | None:
    """The one split that may hold the problem with this key: "unseen" for an eighth of all its first pairs, which as
    second pairs are in no split, None. By a hash that no run, machine or version changes."""
    crc = lambda text: zlib.crc32(text.encode())
    reserved = [crc(pair) % 8 == 0 for pair in pairs]
    if any(reserved):
        return "unseen" if reserved[0] else None
    return {0: "test", 1: "validation"}.get(crc(key) % 16, "train")


def generator(draw: Callable) -> Callable[[str, int, int], list[Problem]]:
    """From draw(rng, split) -> a problem, or None if not of the split: (split, n, seed) -> n different problems."""
    task = draw.__name__.removeprefix("generate_")

    def generate(split: str, n: int, seed: int) -> list[Problem]:
        """As many different problems of a split, a function of the seed; DataError where there are not as many."""
        rng, problems = random.Random(f"{task} {split} {seed}"), {}
        for _ in range(1000 * n + 100_000):
            if len(problems) == n:
                return list(problems.values())
            if problem := draw(rng, split):
                problems[problem["question"]] = problem
        raise DataError(f"the generator has fewer than {n} different {task} problems in its {split} split")

    return generate


QUESTION = ("question", "problem", "text", "prompt", "puzzle", "quizzes", "prompt_input", "input")
ANSWER = ("ground_truth", "gold", "target", "reference_answer", "answer", "expected_answer", "final_answer")
GOLD = (*ANSWER, "solution", "solutions")
COMPLETION = ("completion", "completions", "generation", "generations", "response", "output", "model_output")


def pick(row: dict, names: tuple[str, ...]):
    """The first of several fields that a row has and that is not empty; None if there is none."""
    return next((row[name] for name in names if row.get(name) not in (None, "", [], {})), None)


def pick_text(row: dict, names: tuple[str, ...]) -> str:
    """A text or a number, as text, under any of its names. DataError where it is missing."""
    value = pick(row, names)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(f'field "{names[0]}" (or {", ".join(names[1:])}) is missing or not text')
    return str(value).strip()


def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of each row of a file, names of fields in small letters: .csv with a header; JSON, a list or an
    object with a list of objects in it, as d1 writes; JSONL; else a prompt per line. A text is a prompt. DataError for
    what is none of these, and for a lone surrogate, which no tokenizer takes."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            table, rows = csv.DictReader(file), []
            if path.lower().endswith(".csv"):
                rows = [(f"line {table.line_num}", row) for row in table if any(row.values())]
            text = file.read()
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
    whole = read(text)
    if isinstance(whole, dict) and pick(whole, QUESTION) is None:
        whole = next((of for of in whole.values() if isinstance(of, list) and of and isinstance(of[0], dict)), whole)
    if isinstance(whole, list):
        rows = [(f"item {number}", row) for number, row in enumerate(whole, 1)]
    elif not rows:
        as_json = path.lower().endswith((".json", ".jsonl")) or text.lstrip().startswith("{")
        value = read if as_json else str.strip
        rows = [(f"line {number}", value(line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for place, row in rows:
        row = {"prompt": row} if isinstance(row, str) else row
        if not isinstance(row, dict) or None in row:
            raise DataError(f"{path}, {place}: expected a JSON object, or as many fields as the header has")
        if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise DataError(f"{path}, {place}: holds half a character (a lone surrogate); write it as valid Unicode")
        yield f"{path}, {place}", {name.strip().lower(): value for name, value in row.items()}


def usable(name: str, check: Callable, rows: Iterator[tuple[str, dict]], none: str, expected: str) -> tuple[list, int]:
    """(check(row) of each row that it does not refuse, how many it refuses); the first of these is named on stderr.
    DataError if none is left: the first refusal, or `none`, and what was expected; or without MATH's library."""
    if name == "math500" and not importlib.util.find_spec("math_verify"):
        raise DataError("MATH's published answers are compared by math-verify: pip install math-verify")
    kept, refused = [], []
    for where, row in rows:
        try:
            kept.append(check(row))
        except DataError as error:
            refused.append(f"{where}: {error}")
    if not kept:
        raise DataError(f"{[*refused, none][0]}; expected {expected}")
    if refused:
        print(f"warning: {len(refused)} rows skipped; the first: {refused[0]}", file=sys.stderr)
    return kept, len(refused)


HUB = {  # task -> its training split and its test split, as (name, configuration, split) of `datasets`
    "gsm8k": (("openai/gsm8k", "main", "train"), ("openai/gsm8k", "main", "test")),
    "math500": (("DigitalLearningGmbH/MATH-lighteval", None, "train"), ("HuggingFaceH4/MATH-500", None, "test")),
    "mbpp": tuple(("google-research-datasets/mbpp", "full", part) for part in ("train", "test")),
    # one split: its last 1,024 problems are held out
    "countdown": tuple(("Jiayi-Pan/Countdown-Tasks-3to4", None, f"train[{part}]") for part in (":-1024", "-1024:")),
}
INSTRUCTIONS = {
    "gsm8k": "Solve the problem step by step. Write the final answer on a last line of its own, "
    "as four hash signs and the number, like this:\n#### 42",
    "math500": "Solve the problem step by step. Write the final answer in \\boxed{}, once.",
    "mbpp": "Write a Python program that solves the task. Write all of it in one ```python block.",
    "countdown": "Make the target from the numbers with +, -, *, / and parentheses. Use every number exactly once. "
    "Write the expression on a last line of its own, behind four hash signs, like this:\n#### (3 + 8) * 2",
    "sudoku": "Fill in the empty cells of a sudoku. Every row, every column and every box holds each digit from 1 to "
    "the number of its cells once. Write the grid as lines of digits.",
    "zebra": "Solve the logic puzzle. Write one line per house: its number, a colon, and its entries, "
    "separated by commas, like this:\n1: red, Tom",
}


# --- GSM8K: word problems ---------------------------------------------------------------------------------------------

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea")
ITEMS = ("apples", "books", "coins", "eggs", "pens", "stamps")
TEMPLATES = (  # the story of a problem and its two operations: (a op1 b) op2 c
    ("{name} has {a} {item}, buys {b}, sells {c}. How many?", "+", "-"),
    ("{name} has {a} {item}, loses {b}, finds {c}. How many?", "-", "+"),
    ("{name} has {a} {item}, sells {b}, loses {c}. How many?", "-", "-"),
    ("{name} has {a} {item}, finds {b}, buys {c}. How many?", "+", "+"),
    ("{name} fills {a} bags, {b} {item} each, sells {c}. How many?", "*", "-"),
    ("{name} fills {a} bags, {b} {item} each, buys {c}. How many?", "*", "+"),
)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
LARGEST = 20  # of all numbers in a problem: some 250 different sums, differences and products


@generator
def generate_gsm8k(rng: random.Random, split: str) -> Problem | None:
    """One grade-school word problem with a worked solution, in GSM8K's format; None if its split is another."""
    story, op1, op2 = rng.choice(TEMPLATES)
    a, b, c = rng.randint(2, 9 if op1 == "*" else LARGEST), rng.randint(2, 9), rng.randint(2, 9)
    middle = OPERATIONS[op1](a, b)
    result = OPERATIONS[op2](middle, c)
    question = story.format(name=rng.choice(NAMES), item=rng.choice(ITEMS), a=a, b=b, c=c)
    first, second = f"{a} {op1} {b}", f"{middle} {op2} {c}"
    small = 1 <= middle <= LARGEST and 1 <= result <= LARGEST
    if small and part_of(question, first, second) == split:
        return {"question": question, "answer": f"{first} = {middle}\n{second} = {result}\n#### {result}"}


def check_gsm8k(row: dict) -> Problem:
    """lines {"question": "...", "answer": "... #### 42"}; the answer may be the number alone."""
    question, answer = (pick_text(row, names) for names in (QUESTION, GOLD))
    if parse_number(answer.rpartition("####")[2]) is None:
        raise DataError(f"the answer ends in no number, such as #### 42: {answer[-40:]!r}")
    return {"question": question, "answer": answer if "####" in answer else f"#### {answer}"}


# Something besides tags: an empty reasoning earns no format reward.
WORKED = re.compile(r"(?:<[^<>\n]{0,20}>|[\W_])*+[^\W_]")


def gsm8k_verdict(completion: str, problem: Problem) -> Verdict:
    """correctness 2.0; format: 0.5 for an integer answer, 0.5 for a worked solution with a last line `#### N`. Nothing
    if no number is announced, or if announcements disagree."""
    found = {parse_number(text) for text in announced(written(completion))}
    answer = found.pop() if len(found) == 1 else None
    if answer is None:
        return Verdict(None, {"correctness": 0.0, "format": 0.0}, 0.0)
    working, _, last = END.split(completion, maxsplit=1)[0].strip().rpartition("\n")
    in_form = WORKED.match(working) and re.fullmatch(r"#### \S[^\n]{0,40}", last.strip())
    right = answer == parse_number(problem["answer"].rpartition("####")[2])
    form = 0.5 * (answer.denominator == 1) + 0.5 * bool(in_form)
    return Verdict(answer, {"correctness": 2.0 * right, "format": form}, float(right))


# --- MATH: equations with one unknown ---------------------------------------------------------------------------------

UNKNOWNS = ("x", "y", "z", "n", "m", "k")
EQUATIONS = ("Solve {a} {x} + {b} = {c}.", "Solve {b} + {a} {x} = {c}.", "Find {x} if {c} = {a} {x} + {b}.")
# Equivalent notations of p/q, by the name of the unknown: a model that has seen one must not be paid for it alone.
NOTATIONS = {"z": "\\dfrac{{{p}}}{{{q}}}", "k": "{p}/{q}", "m": "\\tfrac{{{p}}}{{{q}}}"}


@generator
def generate_math500(rng: random.Random, split: str) -> Problem | None:
    r"""One linear equation with a worked solution that ends in \boxed{}, as in MATH; None if its split is another."""
    x, a, b, right = rng.choice(UNKNOWNS), rng.randint(2, 9), rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    value = Fraction(right, a)
    notation = "{p}" if value.denominator == 1 else NOTATIONS.get(x, "\\frac{{{p}}}{{{q}}}")
    answer = notation.format(p=value.numerator, q=value.denominator)
    question = rng.choice(EQUATIONS).format(a=a, b=b, c=right + b, x=x)
    if part_of(question, f"{right + b} - {b}", f"{right} / {a}") == split:
        return {"question": question, "answer": answer, "solution": f"{a} {x} = {right}\n\\boxed{{{answer}}}"}


def check_math500(row: dict) -> Problem:
    r"""lines {"problem": "...", "solution": "... \boxed{42}"}; or an answer beside it. Of boxes the last counts."""
    question, text = (pick_text(row, names) for names in (QUESTION, GOLD))
    found = boxes(text)
    if not found and pick(row, ANSWER) is None:
        raise DataError('no "answer", and no \\boxed{} in "solution"')
    solution = row.get("solution") or (text if found else f"\\boxed{{{text}}}")
    return {"question": question, "answer": found[-1][2].strip() if found else text, "solution": solution}


def math500_verdict(completion: str, problem: Problem) -> Verdict:
    r"""correctness 2.0; format: 0.5 for an answer that can be told apart, 0.5 for working that ends in one \boxed{}."""
    text, tidied = END.split(completion, maxsplit=1)[0], {}
    for spelling in announced(written(completion)):  # two spellings of a number are one answer
        number = parse_number(tidy(spelling))
        tidied[squeeze(tidy(spelling)) if number is None else number] = spelling
    answer = next(iter(tidied.values())) if len(tidied) == 1 else None
    if answer is None:
        return Verdict(None, {"correctness": 0.0, "format": 0.0}, 0.0)
    found, right = boxes(text), same_answer(answer, problem["answer"], problem["question"])
    in_form = len(found) == 1 and WORKED.match(text[: found[0][0]])
    return Verdict(answer, {"correctness": 2.0 * right, "format": 0.5 + 0.5 * bool(in_form)}, float(right))


# --- MBPP: small functions and their tests ----------------------------------------------------------------------------

FORMULAS = {
    "{f}(x): {a} times x, plus {b}": "x * {a} + {b}",
    "{f}(x): {b} less than {a} times x": "x * {a} - {b}",
    "{f}(x): x plus {a}, all times {b}": "(x + {a}) * {b}",
    "{f}(x): {a} minus x, all times {b}": "({a} - x) * {b}",
    "{f}(x): the larger of x + {a} and {b}": "max(x + {a}, {b})",
    "{f}(x): the rest of x + {a} divided by {b}": "(x + {a}) % {b}",
}
FUNCTIONS = ("f", "g", "h", "change", "result", "value", "compute", "apply", "answer", "number", "solve", "update")


@generator
def generate_mbpp(rng: random.Random, split: str) -> Problem | None:
    """One function to write and three tests of it; None if its split is another."""
    words, formula = rng.choice(list(FORMULAS.items()))
    name, a, b = rng.choice(FUNCTIONS), rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    question, body = words.format(f=name, a=a, b=b), formula.format(a=a, b=b)
    tests = [f"assert {name}({x}) == {eval(body, {'x': x})}" for x in rng.sample(range(LARGEST), 3)]
    if part_of(question, f"{a} f {b}") == split:
        code = f"def {name}(x):\n return {body}"
        return {"question": question, "answer": code, "tests": tests, "imports": "", "setup": ""}


def check_mbpp(row: dict) -> Problem:
    """lines {"text": "...", "code": "...", "test_list": ["assert ..."]}; test_imports and test_setup_code, too.
    Challenge tests are left out, as in MBPP's own evaluation. DataError for a test that `split_tests` cannot split."""
    problem = {"question": pick_text(row, QUESTION)}
    for name, published in (("answer", "code"), ("imports", "test_imports"), ("setup", "test_setup_code")):
        value = pick(row, (published, name)) or ""
        problem[name] = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
    try:
        problem["tests"] = list(pick(row, ("test_list", "tests", "test")))
        split_tests(problem)
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise DataError(f"a test is not an assertion of the program's results ({error})") from None
    return problem


LONGEST_PROGRAM = 100_000  # characters
FENCE = r"(?i:(?:```|~~~)(?:[ \t]*(?:python|py)\d?(?=\s)|[ \t]*[\w+#.-]*[ \t]*(?=\n))?)"
DEFINES = re.compile(r"^(?:(?:async )?def|class)\s+(\w+)|^(\w+)\s*=", re.MULTILINE)


def extract_code(completion: str) -> str | None:
    """The program of a completion: its fenced blocks one after the other, up to the last that defines a function or a
    class; all of its text where nothing is fenced. None if that is no Python, or defines nothing.

    A fence within a docstring is a part of it: where the blocks are none, all from the first fence to the last is. Of a
    block that is no Python its doctest lines (>>> ...) count.
    """
    python = lambda block: block != "" and read(block, ast.parse) is not NotImplemented
    prompted = lambda block: "\n".join(re.findall(r"^(?:>>>|\.\.\.) ?(.*)", block, re.MULTILINE))
    text = END.split(completion, maxsplit=1)[0].replace("\r\n", "\n")[:LONGEST_PROGRAM]
    for form in (rf"{FENCE}(.*?)(?:```|~~~|\Z)", f"{FENCE}(.*)(?:```|~~~)", r"\A(.*)"):
        blocks = [textwrap.dedent(part).strip("\n").rstrip() for part in re.findall(form, text, re.DOTALL)]
        blocks = list(filter(python, [block if python(block) else prompted(block) for block in blocks]))
        while len(blocks) > 1 and not re.search(r"^(?:(?:async )?def|class)\s", blocks[-1], re.MULTILINE):
            blocks.pop()  # how to use it
        if DEFINES.search(program := "\n\n".join(blocks)):
            return program
    return None


class Calls(ast.NodeTransformer):
    """Replaces the program's calls in a test, the outermost, by names _0, _1, ...; keeps their texts in `found`."""

    def __init__(self, names: set[str]):
        self.names, self.found = names, []

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """The call, or the placeholder of what it comes to."""
        if not isinstance(node.func, ast.Name) or node.func.id not in self.names:
            return self.generic_visit(node)
        self.found.append(ast.unparse(node))
        return ast.Name(f"_{len(self.found) - 1}", ast.Load())


def split_tests(problem: Problem) -> tuple[str, list[tuple[tuple[str, ...], str]]]:
    """(imports for the judge, (calls, condition) of each test). SyntaxError or ValueError for what is no test.

    `assert set(f(3)) == {1, 2}` becomes the call "f(3)", which the program's process takes, and the condition
    "set(_0) == {1, 2}", which that process never sees.
    """
    names = lambda tree: [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    code = ast.parse(f"{problem['answer']}\n{problem['imports']}").body
    imports = [node for node in code if isinstance(node, ast.Import | ast.ImportFrom)]
    known = {*dir(builtins), *(alias.asname or alias.name for node in imports for alias in node.names)}
    known -= {function for function, _ in DEFINES.findall(problem["answer"])}
    tests = []
    for test in problem["tests"]:
        (tree,) = ast.parse(test.strip()).body
        own = {name.id for name in names(tree) if isinstance(name.ctx, ast.Store)}
        calls = Calls({name.id for name in names(tree)} - known)
        condition = calls.visit(tree.test) if isinstance(tree, ast.Assert) else None
        if not calls.found or any(name.id in own for call in calls.found for name in names(ast.parse(call))):
            raise ValueError(f"it asserts nothing of the program, or calls it in a loop of its own: {test[:80]}")
        tests.append((tuple(calls.found), ast.unparse(condition)))
    return "\n".join(map(ast.unparse, imports)), tests


def holds(imports: str, condition: str, values: list | None) -> bool:
    """Whether a condition holds of the values that came out of a sandbox, texts of plain data; what is none, or forged,
    holds nowhere. Equality with a literal is decided here; anything else in a second sandbox, without the program."""
    found, (name, _, expected) = [read(text, ast.literal_eval) for text in values or [""]], condition.partition(" == ")
    if NotImplemented in found:
        return False
    if name == "_0" and read(expected, ast.literal_eval) is not NotImplemented:
        return found == [read(expected, ast.literal_eval)]
    named = "\n".join(f"_{i} = {text}" for i, text in enumerate(values))
    return run_program(f"{imports}\n{named}", "", "", ((f"bool({condition})",),))[0] == ["True"]


def mbpp_verdict(completion: str, problem: Problem) -> Verdict:
    """tests: 2.0 times the share that passes; format: 0.5 for a program that compiles, 0.5 for one in a fence. Solved
    is what passes all tests: the mean of its score is pass@1."""
    program = extract_code(completion)
    if program is None:
        return Verdict(None, {"tests": 0.0, "format": 0.0}, 0.0)
    imports, tests = split_tests(problem)
    found = run_program(problem["imports"], program, problem["setup"], tuple(calls for calls, _ in tests))
    passes = [holds(imports, condition, values) for (_, condition), values in zip(tests, found)]
    passed, form = sum(passes) / len(tests), 0.5 + 0.5 * (re.search(FENCE, completion) is not None)
    return Verdict(program, {"tests": 2.0 * passed, "format": form}, float(passed == 1))


# --- The sandbox: programs that a model wrote -------------------------------------------------------------------------
# The program runs in a process of its own, which has limits and, by bubblewrap, an empty directory, the interpreter's
# files to read, and nothing else. What it returns comes back as plain data, and is judged elsewhere. It can forge what
# it returns, which is no more than returning it.

SECONDS, WALL = 5, 20  # of CPU time per program; of wall-clock time, for a right program on a busy machine
MEMORY, FILE_SIZE, DISK = 2**30, 2**20, 2**24  # bytes: address space; one file, and what comes back; all files
CODE_REFUSED = "--task {} runs programs that a model wrote: add --allow_code_execution if you want that"
code_execution_allowed = False


def allow_code_execution() -> None:
    """From now on this process may run programs that a model wrote (--allow_code_execution)."""
    global code_execution_allowed
    code_execution_allowed = True


# The sandbox's process: read a job, give up rights and time, run the program, write what each test comes to: one line.
INSIDE = r'''
import collections.abc, json, os, resource, sys, types  # the first: a program could not load it by the paths below

def plain(value):
    """A value without classes of its own; what can only be gone through becomes a tuple."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    if isinstance(value, dict):
        return {plain(k): plain(v) for k, v in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(plain, value))
    if hasattr(type(value), "__iter__") and not isinstance(value, (str, bytes)):
        return tuple(plain(part) for _, part in zip(range(100_000), value))
    return value

job = json.loads(sys.stdin.buffer.read())
results, null = os.dup(1), os.open("/dev/null", os.O_RDWR)
for stream in (0, 1, 2):
    os.dup2(null, stream)
if os.geteuid() == 0:  # root has no limit on processes
    if os.path.isdir("/proc/self/fd"):  # the way to the interpreter's modules may be closed to the user it becomes
        folders = filter(os.path.isdir, sys.path)
        sys.path[:] = ["/proc/self/fd/%d" % os.open(folder, os.O_RDONLY) for folder in folders]
    user = 60_000 + os.getpid() % 5000  # of those that a container knows as well
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
for name, most in job["limits"].items():
    try:
        resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
    except (AttributeError, ValueError, OSError):  # a system that does not know it
        pass
scope = sys.modules.setdefault("program", types.ModuleType("program")).__dict__
try:
    for part in ("imports", "program", "setup"):
        exec(compile(job[part], part, "exec"), scope)
except BaseException:  # also SystemExit: the program is to define something, not to leave
    os._exit(0)
for pieces in job["tests"]:
    try:
        line = json.dumps([repr(plain(eval(piece, scope))) for piece in pieces])
    except BaseException:
        line = "null"
    os.write(results, (line if len(line) < 60_000 else "null").encode() + b"\n")
os._exit(0)
'''


@functools.cache
def separation() -> tuple[str, ...]:
    """The command in front of the interpreter: bubblewrap, in an empty file system, without network and other
    processes; () where that does not work; probed once. DataError where programs cannot be run at all."""
    # root needs no user namespace, in which it would stay root; it becomes a user that nobody else is
    rights = "--cap-drop ALL --cap-add CAP_SETUID --cap-add CAP_SETGID" if os.geteuid() == 0 else "--unshare-user"
    command = f"bwrap --unshare-ipc --unshare-pid --unshare-net --unshare-uts --die-with-parent {rights}".split()
    places = ("/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix)
    for path in sorted({*map(os.path.abspath, places), *map(os.path.realpath, places)}):
        for parent in [*Path(path).parents][-2::-1]:
            command += ["--perms", "0755", "--dir", str(parent)]
        command += ["--ro-bind-try", path, path]
    box = f"--perms 1777 --size {DISK} --tmpfs /box --dev-bind /dev/null /dev/null --remount-ro / --chdir /box"
    for front in [(*command, *box.split()), ()] if shutil.which("bwrap") else [()]:
        if run_program("import collections, csv, decimal", "", "", (("1 + 1",),), front) == [["2"]]:
            return front
    raise DataError("programs cannot be run here: install bubblewrap, or be a user whom the system lets start Python")


def protections() -> str:
    """One line: how programs are run on this system, and what is not separated."""
    kept_out = "limits only, NOT separated: network, files, processes (apt-get install bubblewrap)"
    if separation():
        kept_out = "bubblewrap: no network, no files but the interpreter's, no other processes, no environment"
    return f"{kept_out}; {SECONDS} s of CPU, {WALL} s at most, {MEMORY >> 20} MiB, no further process"


@functools.lru_cache(maxsize=4096)  # a group of rollouts often holds the same program twice
def run_program(imports: str, program: str, setup: str, tests: tuple, command: tuple | None = None) -> list:
    """What the tests' calls, see `split_tests`, come to beside a program: their texts per test, None where it failed.
    command: see `separation`. Raises DataError unless code execution was allowed."""
    if not code_execution_allowed:
        raise DataError(CODE_REFUSED.format("mbpp"))
    limits = {"CPU": SECONDS, "AS": MEMORY, "FSIZE": FILE_SIZE, "NOFILE": 64, "CORE": 0, "NPROC": 1}
    job = {"imports": imports, "program": program, "setup": setup, "tests": tests, "limits": limits}
    # as isolated as -I, but for the environment: this one is ours, and -I would ignore its hash seed
    env = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    argv = [*(separation() if command is None else command), sys.executable, "-s", "-c", INSIDE]
    with tempfile.TemporaryFile() as file:  # the limit on files ends endless output, too
        places = {"stdout": file, "stderr": subprocess.DEVNULL, "cwd": "/", "env": env, "start_new_session": True}
        with contextlib.suppress(subprocess.TimeoutExpired):  # killed; behind bubblewrap, all that it started with it
            subprocess.run(argv, input=json.dumps(job).encode(), timeout=WALL, check=False, **places)
        file.seek(0)
        lines = file.read().decode(errors="replace").split("\n")
    values = [*map(read, lines), *[None] * len(tests)][: len(tests)]  # what is no list of texts was forged
    return [of if isinstance(of, list) and all(isinstance(text, str) for text in of) else None for of in values]


# --- Countdown: make the target of all the numbers. Expressions are parsed here, never run ----------------------------

SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS |= {ast.UAdd: operator.pos, ast.USub: operator.neg}


@generator
def generate_countdown(rng: random.Random, split: str) -> Problem | None:
    """Three numbers in any order, a target, and one way to make it; None if its split is another."""
    a, b, c = (rng.randint(1, LARGEST) for _ in range(3))
    op1, op2 = rng.choice("+-*"), rng.choice("+-")
    target = OPERATIONS[op2](OPERATIONS[op1](a, b), c)
    numbers = rng.sample([a, b, c], 3)
    key = " ".join(map(str, sorted(numbers)))  # the same numbers in another order are the same problem
    if 1 <= target <= 2 * LARGEST and part_of(f"{key} {target}", key) == split:
        return countdown_problem(numbers, target) | {"answer": f"{a} {op1} {b} {op2} {c}"}


def countdown_problem(numbers: list[int], target: int) -> Problem:
    """The problem in words and in numbers, without a solution."""
    question = f"Numbers: {', '.join(map(str, numbers))}. Target: {target}."
    return {"question": question, "answer": "", "numbers": list(numbers), "target": target}


def check_countdown(row: dict) -> Problem:
    """lines {"nums": [3, 8, 5], "target": 6} or {"input": "3,8,5", "output": "6"}; or a question in our or d1's words,
    or d1's ground_truth, [[3, 8, 5], 6]."""
    said = re.search(r"numbers: \[?([\d, ]+)\]?\W+target: (\d+)", str(pick(row, ("question", "prompt"))), re.IGNORECASE)
    fields = pick(row, ("input", "nums")), pick(row, ("output", "target"))
    given = str(said.groups() if said else row.get("ground_truth") if None in fields else fields)
    *numbers, target = map(int, re.findall(r"\d+", given) or [0])
    if not numbers or not re.fullmatch(r"[\d\s,()'\[\]]+", given):
        raise DataError("no numbers and target")
    return countdown_problem(numbers, target)


def ways_to_make(numbers: tuple[tuple[Fraction, str], ...]) -> Iterator[tuple[Fraction, str]]:
    """Every (value, expression) that uses all of some (value, expression) pairs once, by joining two at a time."""
    if len(numbers) == 1:
        yield numbers[0]
    for i, j in itertools.permutations(range(len(numbers)), 2):
        (x, left), (y, right) = numbers[i], numbers[j]
        rest = tuple(pair for k, pair in enumerate(numbers) if k not in (i, j))
        for op in "+-*/" if i < j else "-/":  # x + y is y + x
            if op != "/" or y != 0:
                yield from ways_to_make((*rest, (OPERATIONS[op](x, y), f"({left} {op} {right})")))


def countdown_target(problem: Problem) -> str:
    """A solution that SFT trains on: the generator's, else the first that a search over all expressions finds."""
    numbers = tuple((Fraction(n), str(n)) for n in problem["numbers"])
    found = (text for value, text in ways_to_make(numbers) if value == problem["target"])
    if answer := problem["answer"] or next(found, None):
        return f"#### {answer}"
    raise DataError(f"countdown: {problem['question']} No expression makes it")


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """(exact value, the numbers used) of whole numbers, + - * / and parentheses; None for anything else."""

    def value(node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        operands = [node.operand] if isinstance(node, ast.UnaryOp) else [node.left, node.right]
        return SIGNS[type(node.op)](*map(value, operands))

    try:
        if len(expression) > LONGEST or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
            return None
        return value(ast.parse(expression.strip(), mode="eval").body), list(map(int, re.findall("[0-9]+", expression)))
    except (SyntaxError, KeyError, AttributeError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def countdown_verdict(completion: str, problem: Problem) -> Verdict:
    """d1's: 1 for the target made of all the numbers, each once; 0.1 for another value made of all of them. Of
    "E = 23" or "E = 3 + 20 = 23" the side that uses all numbers counts; sides that differ are no answer."""
    found, whole = set(), lambda made: made is not None and sorted(made[1]) == sorted(problem["numbers"])
    for text in map(plain, announced(written(completion))):
        text = re.sub(r"\\div|\u00f7", "/", re.sub(r"\\times|\\cdot|[\u00d7\u00b7]", "*", text))
        made = {side: evaluate(side) for side in (squeeze(side.strip(" .`$")) for side in text.split("="))}
        equal = None not in made.values() and len({value for value, _ in made.values()}) == 1
        found.add(next((side for side in made if whole(made[side])), next(iter(made))) if equal else None)
    answer = found.pop() if len(found) == 1 else None
    made = evaluate(answer or "")
    right = whole(made) and made[0] == problem["target"]
    return Verdict(answer, {"correctness": 0.9 * right, "format": 0.1 * whole(made)}, float(right))


# --- Sudoku, 4 x 4: 288 solved grids, so that uniqueness and marginals are counted and not searched -------------------

EMPTY = "0"
# What 1234 may look like: plain, fullwidth, bold, double-struck. NFKC makes them equal.
SPELLED = ["".join(chr(one + i) for i in range(4)) for one in (0x31, 0xFF11, 0x1D7CF, 0x1D7D9)]
DARK = [cell for cell in range(16) if sum(divmod(cell, 4)) % 2]  # the dark squares of a chess board


def is_solved(grid: str) -> bool:
    """Whether a grid of 16 or 81 digits has each of its digits once in every row, column and box."""
    side = math.isqrt(len(grid))
    box = math.isqrt(side)
    places = [(i // side, i % side) for i in range(len(grid))]
    seen = {(*unit, d) for (r, c), d in zip(places, grid) for unit in ((r, -1, 0), (-1, c, 0), (r // box, c // box, 1))}
    return len(grid) in (16, 81) and {*grid} == {*"123456789"[:side]} and len(seen) == 3 * len(grid)


@functools.cache
def solved_grids() -> tuple[str, ...]:
    """All 288 solved 4 x 4 grids, 16 digits each, row by row, in ascending order."""
    rows = list(map("".join, itertools.permutations("1234")))
    bands = [a + b for a in rows for b in rows if not {*a[:2]} & {*b[:2]}]  # its boxes hold no digit twice
    return tuple(a + b for a in bands for b in bands if is_solved(a + b))


@generator
def generate_sudoku(rng: random.Random, split: str) -> Problem | None:
    """One puzzle with its only solution; None if it has others, or its split is another: its solution decides "unseen",
    an eighth of the 288, and its own digits the rest."""
    solution = rng.choice(solved_grids())
    clues = set(rng.sample(range(16), 8))
    puzzle = "".join(digit if cell in clues else EMPTY for cell, digit in enumerate(solution))
    agree = re.findall(puzzle.replace(EMPTY, "."), "\n".join(solved_grids()))  # every solution that it has
    if part_of(puzzle, solution) == split and agree == [solution]:
        return {"question": puzzle, "answer": solution}


def spelled_sudoku(problem: Problem, index: int, spellings=SPELLED, dark=DARK) -> Problem:
    """The problem as upo.py's tiny base reads it: on the dark squares each digit is in one of the spellings.

    One answer with several spellings shares its probability among them ("surface form competition", Holtzman et al.,
    2021): on a dark square the base is a quarter as sure as it is right, and no confidence, margin or entropy can tell.
    """
    rng = random.Random(f"spelling {index} {problem['question']}")
    tables = {cell: str.maketrans(SPELLED[0], rng.choice(spellings)) for cell in dark}
    write = lambda digits: "".join(digit.translate(tables.get(cell, {})) for cell, digit in enumerate(digits))
    return {name: write(digits) for name, digits in problem.items()}


def check_sudoku(row: dict) -> Problem:
    """a CSV file with the header Puzzle,Solution: 16 or 81 digits each, row by row, 0 for empty; the puzzle may stand
    in a sentence, and may have other solutions."""
    text, solution = (pick_text(row, names) for names in (QUESTION, GOLD))
    cells = len(solution)
    found, *_ = [*re.findall(rf"[0-9.]{{{cells // 2},{cells}}}", text), ""]
    # a spreadsheet drops the zeros that a puzzle begins with; a full stop may end its sentence
    puzzle = (found if len(found) == cells else found.rstrip(".")).replace(".", EMPTY).zfill(cells)
    agree = all(a in (EMPTY, b) for a, b in zip(puzzle, solution))
    if not ({EMPTY} < {*puzzle} and is_solved(solution) and agree):
        raise DataError(f"{solution!r} is no solution of {text!r}, or that has no empty cell, or no other")
    return {"question": puzzle, "answer": solution}


def grid_text(digits: str) -> str:
    """Lines of digits with spaces between: one token per cell in most vocabularies."""
    side = math.isqrt(len(digits))
    return "\n".join(" ".join(digits[i : i + side]) for i in range(0, len(digits), side))


def sudoku_verdict(completion: str, problem: Problem) -> Verdict:
    """cells: the share of the empty cells that are right, less one cell for each clue that was changed.

    The cells are those of four lines of four (or nine of nine), "?" for one that holds no digit; of another text the
    only sixteen digits in a row that are not the puzzle itself. Without a grid, or with several, nothing."""
    text, clues = unicodedata.normalize("NFKC", written(completion)), problem["question"]
    side = math.isqrt(len(clues))
    text = "\n".join(TAGGED.findall(text)) or text
    lines = re.sub("[][,]", "", text).strip("\r\n").splitlines()
    rows = [line.split(" ") if " " in line else list(line) for line in lines]
    runs = {re.sub("[^0-9]", "", run) for run in re.findall(r"[0-9\s|,*\[\]+-]+", text)} - {clues}
    grids = [run for run in runs if len(run) == len(clues)]
    if [len(row) for row in rows] == [side] * side:
        grids = ["".join(cell if re.fullmatch("[0-9]", cell) else "?" for row in rows for cell in row)]
    if len(grids) != 1:
        return Verdict(None, {"cells": 0.0}, 0.0)
    right = sum(a == b for a, b, clue in zip(grids[0], problem["answer"], clues) if clue == EMPTY)
    changed = sum(a != clue for a, clue in zip(grids[0], clues) if clue != EMPTY)
    share = max(right - changed, 0) / clues.count(EMPTY)
    return Verdict(grids[0], {"cells": share}, share)


# --- Text to image, in miniature: GenEval's categories on grids of codes ----------------------------------------------

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 98, 217), "yellow": (250, 200, 40)}
KINDS = list(itertools.product(SHAPES, COLOURS))
OPENINGS = ("a photo of", "a picture of", "a drawing of", "an image of", "a sketch of", "a view of")
WIDTH, TILE = 8, 8  # codes along an image's side; pixels along a code's
# An object is four codes, 2 x 2, row by row: the k-th kind has 1 + 4 k + PARTS. Code 0 is the background.
PARTS = np.arange(4).reshape(2, 2)
CODEBOOK = 1 + len(KINDS) * PARTS.size
# The way from a to b, in rows and columns. They share no column (no row): at least the 2 of an object lie between.
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
stands = lambda way, a, b: way[0] * (b.row - a.row) + way[1] * (b.column - a.column) >= 2
# An object, by its upper left part; what a prompt asks for: (shape, colour or None for any, how many) each, and the
# relation between two, if any.
Thing = NamedTuple("Thing", [("shape", str), ("colour", str), ("row", int), ("column", int)])
Scene = NamedTuple("Scene", [("category", str), ("wanted", tuple), ("relation", str | None)])


@functools.cache
def scene_table() -> dict[str, Scene]:
    """Every prompt of the miniature and what it asks for: GenEval's categories, each scene in all its wordings."""
    pairs, numbers = list(itertools.permutations(SHAPES, 2)), ((2, "two"), (3, "three"), (4, "four"))
    dressed = itertools.product(pairs, itertools.product(COLOURS, repeat=2))
    one = lambda shape, colour=None: (shape, colour, 1)
    scenes = [
        *((f"a {a}", ("single_object", (one(a),), None)) for a in SHAPES),
        *((f"a {a} and a {b}", ("two_object", (one(a), one(b)), None)) for a, b in pairs),
        *((f"{words} {a}s", ("counting", ((a, None, n),), None)) for a in SHAPES for n, words in numbers),
        *((f"a {c} {a}", ("colors", (one(a, c),), None)) for a, c in KINDS),
        *((f"a {a} {r} a {b}", ("position", (one(a), one(b)), r)) for a, b in pairs for r in RELATIONS),
        *((f"a {s} {a} and a {t} {b}", ("color_attr", (one(a, s), one(b, t)), None)) for (a, b), (s, t) in dressed),
    ]
    return {f"{opening} {words}": Scene(*scene) for words, scene in scenes for opening in OPENINGS}


def paint(things: list[Thing]) -> list[int]:
    """The 64 codes of an image that shows these objects."""
    grid = np.zeros((WIDTH, WIDTH), int)
    for shape, colour, row, column in things:
        grid[row : row + 2, column : column + 2] = 1 + PARTS.size * KINDS.index((shape, colour)) + PARTS
    return grid.ravel().tolist()


def image_codes(text: str) -> list[int] | None:
    """The codes of an image, spelled with spaces between; None for anything but 64 of the codebook's."""
    words = text[:1000].split()
    codes = [int(word) for word in words if re.fullmatch("[0-9]{1,3}", word)]
    return codes if len(codes) == len(words) == WIDTH * WIDTH and max(codes) < CODEBOOK else None


def find_things(codes: list[int]) -> tuple[list[Thing], int]:
    """(the objects with all four parts in place, the number of cells that belong to none of them)."""
    grid, found = np.array(codes).reshape(WIDTH, WIDTH), []
    for row, column in np.argwhere(grid[:-1, :-1] % PARTS.size == 1).tolist():  # the first part of an object
        first = grid[row, column]
        if (grid[row : row + 2, column : column + 2] == first + PARTS).all():
            found.append(Thing(*KINDS[first // PARTS.size], row, column))
    return found, np.count_nonzero(grid) - PARTS.size * len(found)


def t2i_verdict(completion: str, problem: Problem) -> Verdict:
    """geneval: 1 if the image shows all that the prompt asks for, GenEval's strict verdict: a count is exact, more may
    be there besides. fidelity: 0.25 if it shows objects and none is broken. Nothing for what is not the miniature's."""
    codes, scene = image_codes(completion), scene_table().get(problem["question"])
    if codes is None or scene is None:
        return Verdict(codes, {"geneval": 0.0, "fidelity": 0.0}, 0.0)
    things, broken = find_things(codes)
    matching = [[t for t in things if t.shape == shape and c in (None, t.colour)] for shape, c, _ in scene.wanted]
    enough = operator.eq if scene.category == "counting" else operator.ge
    shown = all(enough(len(found), n) for found, (*_, n) in zip(matching, scene.wanted))
    if scene.relation:
        shown = any(stands(RELATIONS[scene.relation], a, b) for a in matching[0] for b in matching[1])
    fidelity = 0.25 * (bool(things) and not broken)
    return Verdict(codes, {"geneval": float(shown), "fidelity": fidelity}, float(shown))


@functools.cache
def prompts_of(split: str) -> dict[str, list[str]]:
    """A split's prompts by category. Every fifth scene of a category is unseen in any wording; of the others each has
    one wording that only the test split has, one that only validation has, and four to train on."""
    found: dict[str, list[str]] = {}
    for i, (prompt, scene) in enumerate(scene_table().items()):
        number, wording = divmod(i, len(OPENINGS))
        unseen = scene.category != "single_object" and number % 5 == 4
        part = {0: "test", 1: "validation"}.get((number + wording) % len(OPENINGS), "train")
        if split == ("unseen" if unseen else part):
            found.setdefault(scene.category, []).append(prompt)
    return found


def generate_t2i(split: str, n: int, seed: int) -> list[Problem]:
    """n prompts of a split, every category as often, each with an image that shows it, on even rows and columns, in any
    colour where none is asked for. Prompts repeat, images differ. No single object is unseen: there are only four."""
    rng, prompts, problems = random.Random(f"t2i {split} {seed}"), prompts_of(split), []
    place, any_colour = lambda: 2 * rng.randrange(WIDTH // 2), lambda: rng.choice(list(COLOURS))
    places = lambda things: len({(thing.row, thing.column) for thing in things})
    for category in itertools.islice(itertools.cycle(prompts), n):
        prompt = rng.choice(prompts[category])
        _, wanted, relation = scene_table()[prompt]
        asked, things = [(shape, colour) for shape, colour, number in wanted for _ in range(number)], []
        while places(things) < len(asked) or (relation and not stands(RELATIONS[relation], *things)):
            things = [Thing(row=place(), column=place(), shape=s, colour=colour or any_colour()) for s, colour in asked]
        problems.append({"question": prompt, "answer": " ".join(map(str, paint(things))), "tag": category})
    return problems


def check_t2i(row: dict) -> Problem:
    """prompts, one per line of a .txt file, or GenEval's metadata .jsonl; the answer is what that says of a prompt,
    {"include": [...], "exclude": [...]} as JSON."""
    prompt = pick_text(row, ("prompt", "question", "text"))
    scene = {field: row[field] for field in ("include", "exclude") if field in row}
    return {"question": prompt, "answer": json.dumps(scene) if scene else "", "tag": str(row.get("tag") or "")}


def render(codes: list[int]) -> np.ndarray:
    """The decoder: 64 codes -> pixels (64, 64, 3) uint8."""
    y, x = (np.mgrid[: 2 * TILE, : 2 * TILE] - TILE + 0.5) / (TILE - 1)  # an object's pixels, about -1 ... 1
    circle, square = x**2 + y**2 <= 0.9, np.maximum(abs(x), abs(y)) <= 0.85
    triangle, star = (y <= 0.85) & (abs(x) <= (y + 1) / 2), np.sqrt(abs(x)) + np.sqrt(abs(y)) <= 1.1
    inside = np.stack([circle, square, triangle, star]).reshape(4, 1, 2, TILE, 2, TILE, 1)  # in the order of SHAPES
    objects = np.where(inside, np.array([*COLOURS.values()]).reshape(1, 4, 1, 1, 1, 1, 3), 245)
    tiles = objects.swapaxes(3, 4).reshape(-1, TILE, TILE, 3)  # one per code, from 1
    tiles = np.concatenate([np.full_like(tiles[:1], 245), tiles]).astype(np.uint8)
    image = tiles[np.reshape(codes, (WIDTH, WIDTH))]  # (rows, columns, TILE, TILE, 3)
    return image.swapaxes(1, 2).reshape(WIDTH * TILE, WIDTH * TILE, 3)


# --- Zebra: houses and their attributes -------------------------------------------------------------------------------

HOUSES, ATTRIBUTES = (1, 2, 3), {"Color": ("red", "green", "blue"), "Name": ("Tom", "Ann", "Sam")}
ENTRIES = [entry for entries in ATTRIBUTES.values() for entry in entries]
# Every way to put the entries into the houses, entry -> house: 36 of them.
ORDERS = itertools.product(itertools.permutations(HOUSES), repeat=len(ATTRIBUTES))
ARRANGEMENTS = [dict(zip(ENTRIES, itertools.chain(*order))) for order in ORDERS]


@functools.cache
def clues() -> dict[str, set[int]]:
    """Every clue, of kinds that a tiny model can learn -> the arrangements that it allows, by number."""
    where = {entry: np.array([houses[entry] for houses in ARRANGEMENTS]) for entry in ENTRIES}
    found = {f"{a} is in house {house}.": where[a] == house for a in ENTRIES for house in HOUSES}
    for a, b in itertools.permutations(ENTRIES, 2):
        found[f"{a} is directly left of {b}."] = where[a] == where[b] - 1
        if ENTRIES.index(a) < ENTRIES.index(b):
            found[f"{a} lives with {b}."] = where[a] == where[b]
    return {text: set(np.flatnonzero(allowed).tolist()) for text, allowed in found.items() if allowed.any()}


@generator
def generate_zebra(rng: random.Random, split: str) -> Problem | None:
    """A puzzle with one solution and no clue to spare; None if its split is another. The solution decides "unseen"."""
    chosen = rng.randrange(len(ARRANGEMENTS))
    if (part_of("", f"arrangement {chosen}") == "unseen") != (split == "unseen"):
        return None
    true = [text for text, allowed in clues().items() if chosen in allowed]
    picked, left = [], set(range(len(ARRANGEMENTS)))
    for text in rng.sample(true, len(true)):
        if not left <= clues()[text]:  # it says something new
            picked.append(text)
            left &= clues()[text]
    for text in list(picked):
        rest = [other for other in picked if other != text]
        if rest and set.intersection(*map(clues().get, rest)) == {chosen}:
            picked = rest
    rows = [[str(house), *(e for e in ENTRIES if ARRANGEMENTS[chosen][e] == house)] for house in HOUSES]
    listed = " ".join(f"{name}: {', '.join(entries)}." for name, entries in ATTRIBUTES.items())
    question = f"Houses: {', '.join(map(str, HOUSES))}. {listed} {' '.join(picked)}"
    return zebra_problem(question, ["House", *ATTRIBUTES], rows) if split in ("unseen", part_of(question)) else None


def zebra_problem(question: str, header: list[str], rows: list[list[str]]) -> Problem:
    """A puzzle with its solution as a table, and as the lines that a model is to write."""
    answer = "\n".join(f"{house}: {', '.join(entries)}" for house, *entries in rows)
    return {"question": question, "answer": answer, "header": header, "rows": rows}


def check_zebra(row: dict) -> Problem:
    """lines {"puzzle": "...", "solution": {"header": ["House", "Name"], "rows": [["1", "Eric"], ...]}}; or its JSON."""
    question, table = pick_text(row, QUESTION), pick(row, GOLD)
    try:
        table = read(table) if isinstance(table, str) else table
        header, rows = [*map(str, table["header"])], [list(map(str, entries)) for entries in table["rows"]]
    except (TypeError, LookupError):
        header, rows = [], []
    if not rows or any(not 2 <= len(entries) == len(header) or "___" in entries for entries in rows):
        raise DataError("the solution is no table, or blank (___) as in ZebraLogic's public copy")
    return zebra_problem(question, header, rows)


def zebra_verdict(completion: str, problem: Problem) -> Verdict:
    """entries: the share of the table's entries that are right, in the header's order.

    They are read from lines "1: red, Tom" or "House 1: red, Tom", or from JSON's "House 1": {"Color": "red", ...}, as
    ZebraLogic asks for. Without them, or where a house has two different rows, nothing."""
    text, names = written(completion), problem["header"][1:]
    text = "\n".join(TAGGED.findall(text)) or text
    lines = re.findall(r"^[ \t]*(?:House )?(\d{1,2}):(.*)", text, re.MULTILINE)
    rows = [(house, line.split(",")) for house, line in lines if line.count(",") == len(names) - 1]
    for house, inside in re.findall(r'"House (\d{1,2})"\s*:\s*\{([^{}]*)\}', text):
        of = dict(re.findall(r'"([^"]+)"\s*:\s*"([^"]*)"', inside))
        rows.append((house, [of.get(name, "") for name in names]))
    rows = [(house, [entry.strip(" .*;\t\r").casefold() for entry in entries]) for house, entries in rows]
    found = dict(rows)
    if not all(found[house] == entries for house, entries in rows):
        found = {}
    pairs = [pair for house, *gold in problem["rows"] for pair in itertools.zip_longest(gold, found.get(house, []))]
    share = sum(entry.strip().casefold() == of for entry, of in pairs) / len(pairs)
    return Verdict(found or None, {"entries": share}, share)


# --- The table of tasks, and their splits -----------------------------------------------------------------------------


class Task(NamedTuple):
    """One task, as callables on text."""

    name: str
    generate: Callable[[str, int, int], list[Problem]]  # (split, n, seed) -> n different problems
    check: Callable[[dict], Problem]  # a row of a published file -> problem; DataError says why not
    verdict: Callable[[str, Problem], Verdict]  # (completion, problem) -> answer, reward, score
    ask: Callable[[Problem], str] = operator.itemgetter("question")  # what the model reads below the instruction
    target: Callable[[Problem], str] = operator.itemgetter("answer")  # what SFT teaches it to write
    blanks: Callable[[Problem], str] | None = None  # the target with other characters where it is to be filled in
    codebook: int = 0  # how many codes there are, where the completion is an image
    render: Callable[[list[int]], np.ndarray] | None = None  # an image's codes -> its pixels
    category: Callable[[Problem], str] | None = None  # what accuracy is reported by, besides overall
    corpus: Callable[[Problem, int], Problem] | None = None  # (problem, its index) -> as upo.py's tiny base reads it
    test_draw: int = 1  # the seed of generated test and unseen problems; a new one once figures on them guided a choice
    runs_code: bool = False  # its reward runs what the model wrote: only with --allow_code_execution

    def reward(self, completion: str, problem: Problem) -> Reward:
        """Its reward's named terms; the reward is their sum."""
        return self.verdict(completion, problem).terms

    def score(self, completion: str, problem: Problem) -> float:
        """How much of the problem it solves, 0 to 1."""
        return self.verdict(completion, problem).score

    def messages(self, problem: Problem) -> list[dict[str, str]]:
        """What the model is asked, for a chat template."""
        system = [{"role": "system", "content": text} for name, text in INSTRUCTIONS.items() if name == self.name]
        return [*system, {"role": "user", "content": self.ask(problem)}]

    def load(self, path: str | None, split: str) -> list[Problem]:
        """Problems from a file in the published format, or the published split by `datasets` where path is None."""
        expected = self.check.__doc__.split(";")[0]  # what a file looks like
        if path is None and self.name not in HUB:
            raise DataError(f"{self.name} cannot be downloaded: give --data FILE, {expected}, or --data generated")
        if path is not None:
            rows = read_rows(path)
        else:
            path, configuration, part = HUB[self.name][split == "test"]
            try:
                from datasets import load_dataset

                found = load_dataset(path, configuration, split=part)
            except Exception as error:  # the hub's errors have no common class; without `datasets` an ImportError
                raise DataError(f"{path}: `datasets` cannot load it ({first_line(error)}); give --data FILE") from None
            rows = ((f"{path} {part}, row {i}", row) for i, row in enumerate(found))
        return usable(self.name, self.check, rows, f"{path}: no problems", expected)[0]


TABLE = (
    Task(
        *("gsm8k", generate_gsm8k, check_gsm8k, gsm8k_verdict),
        target=lambda problem: re.sub(r"<<[^<>\n]*>>", "", problem["answer"]),  # without its calculator marks
    ),
    Task("math500", generate_math500, check_math500, math500_verdict, target=operator.itemgetter("solution")),
    Task(
        *("mbpp", generate_mbpp, check_mbpp, mbpp_verdict),
        ask=lambda problem: f"{problem['question']}\n{problem['tests'][0]}",  # the function's name and arguments
        target=lambda problem: f"```python\n{problem['answer']}\n```",
        runs_code=True,
    ),
    Task("countdown", generate_countdown, check_countdown, countdown_verdict, target=countdown_target),
    Task(
        *("sudoku", generate_sudoku, check_sudoku, sudoku_verdict),
        ask=lambda problem: "Sudoku:",  # the clues stand in the completion itself
        target=lambda problem: grid_text(problem["answer"]),
        blanks=lambda problem: grid_text(problem["question"]),
        corpus=spelled_sudoku,
        test_draw=3,
    ),
    Task(
        *("t2i", generate_t2i, check_t2i, t2i_verdict),
        category=operator.itemgetter("tag"),
        codebook=CODEBOOK,
        render=render,
    ),
    Task("zebra", generate_zebra, check_zebra, zebra_verdict),
)
TASKS = {task.name: task for task in TABLE}
gsm8k_correct, t2i_reward = TASKS["gsm8k"].score, TASKS["t2i"].reward  # by name


def judge_all(task: Task, completions: list[str], problems: list[Problem], pixels=None) -> list[tuple[Reward, float]]:
    """(the terms of its reward, which is their sum; its score) of each completion. Programs run side by side. pixels, a
    PixelReward: images are judged by it, and score what they earn."""
    if pixels is not None and completions:
        codes = torch.tensor([[int(code) for code in text.split()] for text in completions])
        terms = pixels(codes, [problem["question"] for problem in problems])
        return [(of, sum(of.values())) for of in terms]
    if not task.runs_code:
        return [task.verdict(text, problem)[1:] for text, problem in zip(completions, problems)]
    with ThreadPoolExecutor(2 * (os.cpu_count() or 1)) as pool:
        return [(terms, score) for _, terms, score in pool.map(task.verdict, completions, problems)]


def splits(task: Task, cfg, generated: bool) -> dict[str, list[Problem]]:
    """train, validation, test and unseen problems of a run. cfg: --data, --eval_data, --eval_n, --eval_only, --seed.

    Generated ones: train from the run's seed; held-out problems are the same for every run, validation for choices,
    test and unseen for figures only. Published ones, from files or by `datasets`: test is --eval_data, else the
    published test split, else every tenth problem of --data, and never trains; validation is the last tenth of the
    rest, 256 at most; there is no unseen split. --eval_only needs no more than a test split.
    """
    none = {split: [] for split in SPLITS}
    if cfg.eval_only and (cfg.eval_data or not (generated or cfg.data)):
        return none | {"test": task.load(cfg.eval_data, "test")[: cfg.eval_n or None]}
    if generated:
        held_out = cfg.eval_n or 1000, task.test_draw  # how many, and their seed
        draws = {"train": (20_000, cfg.seed), "validation": (256, 0), "test": held_out, "unseen": held_out}
        return {split: task.generate(split, *draw) for split, draw in draws.items()}
    train = task.load(cfg.data, "train")
    test = task.load(cfg.eval_data, "test") if cfg.eval_data or cfg.data is None else train[9::10]
    held_out = {problem["question"] for problem in test}
    train = list({p["question"]: p for p in train if p["question"] not in held_out}.values())  # each problem once
    held = min(256, len(train) // 10)
    if not test or not held:
        raise DataError(f"{cfg.data}: {len(train)} problems are too few to hold some out; give 20, or --eval_data")
    return none | {"train": train[:-held], "validation": train[-held:], "test": test[: cfg.eval_n or None]}


# --- Figures ----------------------------------------------------------------------------------------------------------


def mean_of(rows: list[dict]) -> dict:
    """Key-wise means of dicts with the same keys."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def accuracy(scores: list[float]) -> dict[str, float]:
    """{"accuracy", "stderr", "n"} of one score per problem; of verdicts 0 and 1 the stderr is the binomial one."""
    n, spread = len(scores), statistics.pstdev(scores)
    return {"accuracy": round(statistics.fmean(scores), 6), "stderr": round(spread / math.sqrt(n), 6), "n": n}


def pass_at(scores: list[list[float]], k: int) -> float:
    """pass@k: the mean over problems of the best of k samples' expected score, from n >= k samples each, unbiased.

    The i-th lowest of n scores is the best of C(i - 1, k - 1) of the C(n, k) subsets of size k. With c of n verdicts 1
    and the others 0 it is the usual 1 - C(n - c, k) / C(n, k)."""
    best = lambda row: sum(math.comb(i, k - 1) * score for i, score in enumerate(sorted(row))) / math.comb(len(row), k)
    return sum(map(best, scores)) / len(scores)


def paired_p(before: list[float], after: list[float]) -> float:
    """Two-sided exact sign test on the same problems (McNemar's, for verdicts): how likely so uneven a split of the
    changed scores into better and worse is by chance."""
    won = sum(a > b for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


def figures(phases: dict[str, list[dict]], k: int) -> dict[str, Any]:
    """The figures of a run under their names in results.json, None where there is nothing to report. phases: name ->
    judged completions, with split, sample (None: greedy), score, terms, category; k: samples per problem."""
    found, pairs = {}, {"test": [], "unseen": []}
    scores, of = lambda rows: [row["score"] for row in rows], lambda rows: accuracy(scores(rows)) if rows else None
    for phase, rows in phases.items():
        parts = {split: [r for r in rows if r["split"] == split and r["sample"] is None] for split in pairs}
        sampled = scores([row for row in rows if row["sample"] is not None])
        groups = [sampled[i : i + k] for i in range(0, len(sampled), k or 1)]
        kinds = dict.fromkeys(row["category"] for row in parts["test"])
        by_kind = {kind: of([row for row in parts["test"] if row["category"] == kind]) for kind in kinds}
        found |= {phase: of(parts["test"]), f"{phase}_unseen": of(parts["unseen"])}
        sizes = [n for n in sorted({1, 2, 4, 8, 16, 32, k}) if 0 < n <= k]
        found[f"{phase}_pass_at"] = {n: round(pass_at(groups, n), 6) for n in sizes} or None
        found[f"{phase}_rewards"] = {name: mean_of([r["terms"] for r in part]) for name, part in parts.items() if part}
        found[f"{phase}_categories"] = None if None in kinds else by_kind
        pairs = {split: [*pairs[split], scores(part)] for split, part in parts.items()}
    if len(phases) == 2:
        found["paired_p"] = {split: paired_p(*pair) for split, pair in pairs.items() if pair[0]}
    return found


def table(results: dict[str, Any], phases: list[str]) -> str:
    """The figures of results.json as a person reads them."""
    lines = [f"accuracy ± standard error; {results['decoding']}"]
    for split, suffix in (("test", ""), ("unseen", "_unseen")):
        if cells := {phase: of for phase in phases if (of := results[phase + suffix])}:
            shown = "   ".join(f"{phase} {of['accuracy']:.3f} ± {of['stderr']:.3f}" for phase, of in cells.items())
            paired = f"   paired p = {results['paired_p'][split]:.1e}" if "paired_p" in results else ""
            lines.append(f"  {split:<7} {shown}{paired}   n = {cells[phases[0]]['n']}")
    for phase in phases:
        best = {f"pass@{n}": value for n, value in (results[f"{phase}_pass_at"] or {}).items()}
        means = results[f"{phase}_rewards"]["test"] | best
        lines.append(f"  {phase:<7} " + "  ".join(f"{name} {value:.3f}" for name, value in means.items()))
    return "\n".join([*lines, "seconds   " + "  ".join(f"{k} {v:.0f}" for k, v in results["seconds"].items())])


# --- Pixels: images -> numbers, by CLIP and by scorers that the user serves -------------------------------------------


def clip_score(where: str, device: str | torch.device) -> Callable[[Tensor, list[str]], list[float]]:
    """CLIP from a folder or the hub, as (images, prompts) -> 100 max(0, cosine) of each pair, prompts cut at CLIP's 77
    tokens, after Hessel et al. (arXiv 2104.08718, eq. 1), who have 2.5 for 100. The official scale has 1."""
    from transformers import CLIPModel, CLIPProcessor  # slow to import, and the other rewards do without

    model, processor = CLIPModel.from_pretrained(where).to(device).eval(), CLIPProcessor.from_pretrained(where)

    @torch.no_grad()
    def score(images: Tensor, prompts: list[str]) -> list[float]:
        settings = {"return_tensors": "pt", "padding": True, "truncation": True}
        out = model(**processor(text=prompts, images=list(images.cpu().numpy()), **settings).to(device))
        cosine = (out.image_embeds * out.text_embeds).sum(-1)  # (B,), both of length 1
        return (100 * cosine.clamp(min=0)).tolist()

    return score


def remote_score(images: Tensor, prompts: list[str], url: str, timeout: float = 120) -> list[float]:
    """Scores by a reward model that the user serves (HPSv3, UnifiedReward ...): it gets a POST of JSON {"name": ...,
    "prompts": [...], "images": [base64 of a PNG, ...]} and answers {"scores": [...]}, one finite number per image. It
    is asked three times before DataError says what is wrong."""
    from PIL import Image

    files = [io.BytesIO() for _ in prompts]
    for image, file in zip(images.cpu().numpy(), files):
        Image.fromarray(image).save(file, "PNG")
    pngs = [base64.b64encode(file.getvalue()).decode() for file in files]
    body = json.dumps({"name": url.rpartition("/")[2], "prompts": prompts, "images": pngs}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy: a process of the user's own
    for pause in (1, 5, None):
        try:
            with opener.open(request, timeout=timeout) as response:
                scores = json.load(response)["scores"]
            if len(scores) == len(prompts) and all(type(x) in (int, float) and math.isfinite(x) for x in scores):
                return scores
            raise ValueError(f"expected {len(prompts)} finite numbers in scores")
        except Exception as error:  # what a scorer and the way to it can do has no common class
            if pause is None:
                raise DataError(f"{url}: {first_line(error)}; is the scorer running there?") from None
            time.sleep(pause)


class PixelReward:
    """Codes and prompts -> the terms of a reward on pixels. decode: (B, L) long codes -> (B, H, W, 3) uint8. text: the
    rewards and their weights, "clip=1,http://127.0.0.1:8000/hpsv3=0.5", a URL's last part being the name, or
    clip:FOLDER=1; the official mixture is clip=0.01, and 0.2 for each of HPSv3 and UnifiedReward. DataError for a
    text that it does not understand."""

    def __init__(self, decode: Callable, text: str, device: str | torch.device = "cpu"):
        self.decode, self.weights, self.scorers = decode, {}, {}
        for term in map(str.strip, text.split(",")):
            match = re.fullmatch(r"(?:(clip)(?::(.+))?|(https?://\S+/([\w.-]+)))=([-+]?\d*\.?\d+(?:e[-+]?\d+)?)", term)
            name = match and (match[1] or match[4])
            if not match or name in self.weights:
                raise DataError(f"reward {term!r}: not clip=1, clip:PATH=1 or http://HOST:PORT/NAME=1, each name once")
            clip = match[2] or "openai/clip-vit-large-patch14"  # the official code's
            self.weights[name] = float(match[5])
            self.scorers[name] = functools.partial(remote_score, url=match[3]) if match[3] else clip_score(clip, device)

    def __call__(self, codes: Tensor, prompts: list[str]) -> list[Reward]:
        """The weighed terms of each of the B images, by name. Raises DataError."""
        images = self.decode(codes)
        found = {name: scorer(images, prompts) for name, scorer in self.scorers.items()}
        return [{name: self.weights[name] * found[name][i] for name in found} for i in range(len(prompts))]


# --- Files of completions -> figures; the command line ----------------------------------------------------------------

SCALE = (  # measured on published LLaDA-8B generations of 256 tokens
    "On LLaDA's outputs these verdicts give 2.6 points more on MATH, 1.0 on GSM8K than the MaskGRPO paper's parser."
)


def score_file(task: Task, path: str) -> dict[str, Any]:
    """The figures of a file of completions: accuracy, mean reward, the share without an answer, rows skipped."""

    def judge(row: dict) -> list[Verdict]:
        """The verdict of each completion of a row; DataError where one cannot be judged."""
        texts = pick(row, COMPLETION) or row.get("completion")  # the latter may be ""
        texts = texts if isinstance(texts, list) else [texts]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise DataError(f'no completion; expected a text in "completion" (or {", ".join(COMPLETION[1:])})')
        problem = task.check(row if pick(row, QUESTION) else row | {"question": "(not given)"})
        return [task.verdict(text, problem) for text in texts]

    if task.runs_code and not code_execution_allowed:
        raise DataError(CODE_REFUSED.format(task.name))
    expected = 'lines {"prompt": ..., "completion": ..., "answer": ...}'
    rows, skipped = usable(task.name, judge, read_rows(path), f"{path}: no completions", expected)
    verdicts = list(itertools.chain(*rows))
    mean = lambda figure: round(sum(map(figure, verdicts)) / len(verdicts), 6)
    found = {"accuracy": mean(lambda v: v.score), "mean_reward": mean(lambda v: sum(v.terms.values()))}
    found |= {"no_answer": mean(lambda v: v.answer is None)} | ({"sandbox": protections()} if task.runs_code else {})
    return {"task": task.name, "n": len(verdicts), "skipped": skipped} | found


def show(task: Task) -> None:
    """A problem of each split, and what a few completions of the last one earn."""
    print(f"{task.name}\n" + "-" * len(task.name))
    for split in SPLITS:
        problem = task.generate(split, 1, 0)[0]
        target = task.target(problem)
        print(f"{split:<11} {problem['question']}\n" + textwrap.indent(target, " " * 12 + "| ") + "\n")
    tries = [target, target[: len(target) // 2], f"{target}\n#### 99", ""]
    for text in tries if not task.runs_code or code_execution_allowed else []:
        _, terms, score = task.verdict(text, problem)
        print(f"{repr(text)[:58]:<60}", *(f"{name} {x:.2f} " for name, x in (terms | {"score": score}).items()))
    print()


def main(argv: list[str] | None = None) -> int:
    """Show the tasks, or score a file of completions; 0, or 2 with one line that says what to change."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], exit_on_error=False)
    parser.add_argument("--task", choices=tuple(TASKS), help="which task; default: show all")
    parser.add_argument("--score", metavar="FILE", help="score completions: rows of prompt, completion, answer")
    parser.add_argument("--json", action="store_true", help="with --score: one line of JSON")
    parser.add_argument("--allow_code_execution", action="store_true", help="task mbpp: run the programs, in a sandbox")
    try:
        flags = parser.parse_args(argv)
        if (flags.score or flags.json) and not (flags.task and flags.score):
            raise DataError("--score needs --task, and --json needs --score")
        if flags.allow_code_execution:
            allow_code_execution()
        if flags.score:
            found = score_file(TASKS[flags.task], flags.score)
            shown = "\n".join(f"{key:<12} {value}" for key, value in found.items()) + "\n" + SCALE
            print(json.dumps(found) if flags.json else shown)
        else:
            for name in [flags.task] if flags.task else TASKS:
                show(TASKS[name])
        sys.stdout.flush()
    except (DataError, argparse.ArgumentError) as error:
        print(f"rewards.py: error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # python rewards.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
