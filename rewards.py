"""Completions -> numbers: the tasks, their data, and their rewards. Text, or an image's codes, in; numbers out.

A task is one row of `TASKS`: where its problems come from, what the model is asked, what it is rewarded
for, and how much of it is solved. A problem is a dict of its question, its answer, and what else its reward reads:

    gsm8k      {"question": "Tom has 12 apples ...", "answer": "12 + 7 = 19\\n#### 19"}
    math500    {"question": "Solve 2 x + 3 = 4.", "answer": "\\frac{1}{2}", "solution": "2 x = 1\\n\\boxed{...}"}
    mbpp       {"question": "Write ...", "answer": "def f(x): ...", "tests": ["assert f(2) == 7"], "imports", "setup"}
    countdown  {"question": "Numbers: 3, 8, 5. Target: 6.", "answer": "3 + 8 - 5", "numbers": [3, 8, 5], "target": 6}
    sudoku     {"question": "1000034000200003", "answer": "1234..."}, 4 x 4, row by row, 0 for empty
    zebra      {"question": "Houses: 1, 2, 3. ...", "answer": "1: red, Tom\\n...", "header": [...], "rows": [[...]]}
    t2i        {"question": "a photo of a red circle", "answer": "0 0 5 6 ..."}, 8 x 8 codes, row by row

Problems come from a generator (offline, from a seed), from a file in the published format, or from the
published data set by `datasets`. The generator's splits:

    train        what the model learns from
    validation   decides when base training stops
    test         fresh problems: new questions, made of parts that training has shown
    unseen       problems with a part that training never shows: an eighth of all first pairs of numbers (gsm8k,
                 math500, mbpp), of all sets of numbers (countdown), of all solutions (sudoku, zebra),
                 a fifth of all scenes but single objects (t2i)

Departures from the papers and from their official code
 1. The prompt asks for GSM8K's own last line, `#### 42`, instead of <reasoning>/<answer> tags. Reward:
    2 for a correct answer, 0.5 for an integer, 0.5 for the format, the official weights; the same for MATH (0.5 for
    an answer that can be told apart) and for code (2 times the share of tests that pass, 0.5 for code that compiles).
 2. The integer bonus needs an answer that can be told apart. The official code pays for any digits.
 3. GSM8K's calculator marks (<<48/2=24>>) are removed from the solutions that SFT trains on.
 4. A sudoku's clues stand in the completion and its empty cells are filled in, instead of 16 digits being
    written behind a prompt that holds the puzzle. Reward, as in the paper: the share of right empty cells.
 5. Several different answers are none. Published evaluations take the last of them, or any.
 6. MBPP's prompt shows one of a problem's tests, where MBPP's own shows all: it pays less to recite them. What the
    tests expect never enters the process that runs the program.
 7. Countdown is d1's task, in neither paper: 1 for an expression that makes the target of all the numbers, 0.1 for
    one of all the numbers that does not. It is parsed; d1 hands it to Python's eval.
 8. Zebra: which puzzles the paper has is not known here. Ours, and the files that are read, are ZebraLogic's: a
    table of houses and attributes. Reward: the share of its entries that are right.
 9. The embedded text-to-image task is a miniature: GenEval's six categories over 4 shapes and 4 colours, drawn in
    65 codes. Its verifier reads the codes, where GenEval runs a detector on pixels.
10. On pixels: CLIP's score is 100 x the cosine, at least 0, where the official code has the bare cosine; remote
    scorers are asked by JSON and PNG, where it unpickles their answers.

    python rewards.py                                     # problems of each split, and what a few completions earn
    python rewards.py --task gsm8k --score FILE.jsonl     # accuracy and mean reward of a file of completions
"""

import argparse
import ast
import base64
import bisect
import builtins
import csv
import ctypes
import functools
import http.client
import importlib.util
import inspect
import itertools
import json
import math
import operator
import os
import random
import re
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import types
import urllib.error
import urllib.parse
import urllib.request
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn

Problem = dict[str, Any]
Reward = dict[str, float]


class DataError(ValueError):
    """Data that cannot be used: what is wrong, in which file and line, and what would be right."""


# ---------------------------------------------------------------------------------------------
# Files and published data: rows, and the names that their fields go by
# ---------------------------------------------------------------------------------------------


QUESTION = ("question", "problem", "prompt", "text", "instruction", "puzzle", "query", "input_question", "input")
# what nobody would call a model's own answer, as "answer" may be
GOLD = (
    *("ground_truth", "gold", "gt", "target", "expected_answer", "gold_answer", "correct_answer", "reference_answer"),
    *("reference", "gts", "input_correct_responses"),
)
ANSWER = ("answer", *GOLD, "label", "final_answer", "solution")
COMPLETION = (
    *("completion", "completions", "generation", "generations", "response", "responses", "model_output", "raw_output"),
    *("generated_text", "generated_solution", "resps", "output", "outputs", "model_response", "response_text"),
    *("output_prediction_text", "model_answer", "samples", "messages", "conversations"),
)
PARSED = ("prediction", "predictions", "pred", "filtered_resps")  # a whole completion, or only its answer
VERDICT = ("correct", "is_correct", "verdict", "passed", "exact_match", "acc", "correctness", "score")


def read_text(path: str) -> str:
    """A whole UTF-8 file; DataError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as a text file ({error})") from None


def read_rows(path: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of each row of a file: JSONL; JSON, a list or an object that holds one; CSV with a header."""
    text = read_text(path)
    if path.lower().endswith(".csv"):
        yield from read_csv(path, text)
        return
    rows = json_rows(text)
    if isinstance(rows, dict):
        yield f"{path}, line 1", rows
        return
    if rows is not None:
        for number, row in enumerate(rows, 1):
            yield f"{path}, item {number}", an_object(row, f"{path}, item {number}")
        return
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at U+2028
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise DataError(f"{where}: not JSON ({reason}); expected one object per line") from None
        yield where, an_object(row, where)


def an_object(row, where: str) -> dict:
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    return row


def json_rows(text: str) -> list | dict | None:
    """The rows of a file that is one JSON value: a list, the one list of objects in an object, or an object that is a
    row itself; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict):
        return value if isinstance(value, list) else None
    if pick(value, ANSWER) is not None or any(isinstance(value.get(name), str) for name in COMPLETION):
        return value
    if value and all(isinstance(row, dict) for row in value.values()):  # by number, as OpenCompass has them
        return list(value.values())
    lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict) and not is_chat(v)]
    return lists[0] if len(lists) == 1 else value


def read_csv(path: str, text: str) -> Iterator[tuple[str, dict]]:
    """(where, row) of each row of a CSV file, its fields under the header's names in lower case."""
    try:
        rows = list(csv.reader(text.splitlines()))
    except csv.Error as error:
        raise DataError(f"{path}: cannot be read as a CSV file ({error})") from None
    header = [name.strip().lower() for name in rows[0]] if rows else []
    for number, row in enumerate(rows[1:], 2):
        if any(field.strip() for field in row):
            if len(row) != len(header):
                raise DataError(f"{path}, line {number}: {len(row)} fields where the header has {len(header)}")
            yield f"{path}, line {number}", dict(zip(header, row))


def pick(row: dict, names: tuple[str, ...]):
    """The first of several fields that a row has and that is not empty; None if there is none."""
    return next((row[name] for name in names if row.get(name) not in (None, "", [], {})), None)


def pick_text(row: dict, names: tuple[str, ...], where: str, example: str) -> str:
    """A text field under any of its names; DataError with an example where it is missing."""
    value = pick(row, names)
    if not isinstance(value, str) or not value.strip():
        others = f" (or {', '.join(names[1:])})" if names[1:] else ""
        raise DataError(f'{where}: field "{names[0]}"{others} is missing or not text; {example}')
    return value.strip()


def load_rows(check: Callable, hub: dict, example: str, path: str | None = None, split: str = "train") -> list[Problem]:
    """Problems from a file in the published format, or by `datasets` where path is None.

    check(row, where) -> problem; hub: split -> (name, configuration, split) of `datasets`, {} where there is none.
    """
    if path is not None:
        problems = [check(row, where) for where, row in read_rows(path)]
        if not problems:
            raise DataError(f"{path}: no problems; expected {example}")
        return problems
    if not hub:
        raise DataError(f"this task has no published data to download: give --data FILE, {example}, or generated")
    name, config, part = hub[split]
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{name} is downloaded by `datasets`: pip install datasets, or give --data FILE") from None
    try:
        rows = load_dataset(name, config, split=part)
    except Exception as error:  # the hub's errors have no common class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name} could not be loaded ({reason}); give --data FILE") from None
    return [check(row, f"{name} {part}, row {i}") for i, row in enumerate(rows)]


# ---------------------------------------------------------------------------------------------
# Generators: what they share
# ---------------------------------------------------------------------------------------------

SPLITS = ("train", "validation", "test", "unseen")


def crc(text: str) -> int:
    """A hash of text that no run, machine or version changes."""
    return zlib.crc32(text.encode())


def part_of(key: str) -> str:
    """The one split of train, validation and test that may hold the problem with this key."""
    return {0: "test", 1: "validation"}.get(crc(key) % 16, "train")


def generate(task: str, draw: Callable, split: str, n: int, seed: int) -> list[Problem]:
    """n different problems of a split, from a seed. draw(rng, split) -> a problem, or None if not of the split."""
    rng = random.Random(f"{task} {split} {seed}")
    problems: dict[str, Problem] = {}
    for _ in range(1000 * n + 100_000):
        if len(problems) == n:
            return list(problems.values())
        if problem := draw(rng, split):
            problems[problem["question"]] = problem
    raise DataError(f"the generator has fewer than {n} different {task} problems in its {split} split")


def reserved(x: int, op: str, y: int) -> bool:
    """Whether the pair x op y is one of the eighth of all pairs that training never shows."""
    return crc(f"{x} {op} {y}") % 8 == 0


# ---------------------------------------------------------------------------------------------
# Answers: what a completion announces as its answer
# ---------------------------------------------------------------------------------------------

LONGEST = 500  # characters; what is longer is no answer
SPECIAL = re.compile(r"<\|[^<>|\n]{1,40}\|>|</s>|\A<s>")  # <|eot_id|> and its like, where a file kept them
BRACES = re.compile(r"\\\\|\\(?:boxed|fbox)\s*\{|\\[{}]|[{}]")
BARE_BOX = re.compile(  # \boxed 42, \boxed2, \boxed\frac12
    r"\\(?:boxed|fbox)\s*((?:(?<=\s)|(?=\d))[^\s${}\\]+|\\(?:[dtc]?frac|sqrt|text|pi)(?:\s*(?:\d|\{[^{}]{0,80}\})){0,2})"
)
TAGS = re.compile(r"</?answer>", re.IGNORECASE)
HASHES = re.compile(r"#{4,}\s*(?:\**(?:final\s+)?answer\b[*: \t]{0,8}\s*)?([^\n]*)", re.IGNORECASE)
# A heading of the working, not an answer: "#### Step 2: ...", "#### 1. **Add**", "#### Day 1: ...", "#### The cost:"
HEADING = re.compile(
    r"\**(?:(?:step|part|case|solution|problem|question|method|example|explanation)\b|\d{1,2}[.):]\s+\**[a-z]|"
    r"[a-z]{2,20}\s\d{1,2}\s?:|[^\n]{0,100}:[* \t]*$)",
    re.IGNORECASE,
)
WORDS = re.compile(r"\**[a-z]{2}", re.IGNORECASE)
VALUE = (  # how an answer on its own line starts; or all of a short line without words
    r"(?:(?!(?:-|\d{1,2}[.)])\s+\**[a-z])[-+\u2212\d.$\\(\[{]|\S{1,40}[ \t]*$|[a-zA-Z]\w{0,9}(?:\([a-z]\))?\s?=|"
    r"(?![^\n]{0,60}(?<![\\a-zA-Z])(?!and\b)[a-zA-Z]{3})[^\n]{1,60}$)"
)
DISPLAY = r"(?:\$\$|\\\[)((?:(?!\$\$|\\\]).){0,500}?)(?:\$\$|\\\])"
SAID = re.compile(
    r"(?:\bans(?:wer)?(?:\s+(?:to|for)\s[^\n.:]{1,80}?)?(?:\s+(?:is|(?:should|would|will|must)\s+be)\b|\**\s*[:=])(?:\s+is\b)?"
    rf"|^[#*]{{1,6}}[ \t]*(?:final\s+)?answer(?=[* \t]{{0,8}}\n)|^A:(?=\s{{0,4}}\**{VALUE}))"
    rf"[:* \t]{{0,8}}(?:[\s*]{{0,12}}(?={VALUE}))?(?=((?s:{DISPLAY})|[^\n]{{0,200}}))",
    re.IGNORECASE | re.MULTILINE,
)
FINAL = re.compile(  # a heading, and nothing below it but a sentence, or one with a formula below it
    rf"final\s+answer[:* \t]{{0,8}}\n\s{{0,9}}([^\n]{{1,200}}(?:\n\s{{0,9}}(?s:{DISPLAY})\.?)?)\s{{0,9}}\Z",
    re.IGNORECASE,
)
REASON = re.compile(r"\.\s|,?\s+(?:because|since|as)\b|,\s+(?:which|where|given)\b")  # what ends an announcement
ALNUM = re.compile(r"[^\W_]")
SAYS = re.compile(r"[^\W_]|[<>=\u221e\u2205]")  # what an answer holds at least; dots and lines wait to be filled in


class Span(NamedTuple):
    """A part of a text that announces an answer: where it starts and ends, and the answer's text."""

    start: int
    end: int
    text: str


def boxes(text: str) -> list[Span]:
    r"""The outermost \boxed{...} with balanced braces, in one pass; also \fbox{...} and \boxed 42."""
    stack: list[tuple[int, int] | None] = []  # open braces: (start, start of the content) of a box, None of others
    spans: list[Span] = []
    for token in BRACES.finditer(text):
        if token[0][-1] == "{" and token[0] != "\\{":
            stack.append((token.start(), token.end()) if token[0] != "{" else None)
        elif token[0] == "}" and stack and (box := stack.pop()):
            while spans and spans[-1].start > box[0]:
                spans.pop()  # it lies inside this one
            spans.append(Span(box[0], token.end(), text[box[1] : token.start()][: LONGEST + 1]))
    spans += [Span(m.start(), m.end(), m[1].rstrip(".,;")) for m in BARE_BOX.finditer(text)]
    return sorted(spans)


def answer_tags(text: str) -> list[Span]:
    """<answer>...</answer>, closed or not, in one pass."""
    spans, opened = [], None
    for tag in itertools.chain(TAGS.finditer(text), [None]):
        if opened is not None:
            end = tag.start() if tag else len(text)
            spans.append(Span(opened, end, text[opened : min(end, opened + LONGEST + 1)]))
        opened = tag.end() if tag and tag[0][1] != "/" else None
    return spans


def announcements(completion: str, problem: Problem) -> list[str]:
    r"""What a completion announces as its answers, each spelling once: \boxed{}, <answer>, `#### 42`; else what follows
    "the answer is".

    A text that is one JSON object announces its "answer". A box within one of the others stands for it. An echo of the
    prompt, and working that is marked as such and has an answer behind it, do not count; nor does what has no letter,
    digit or relation, or is too long.
    """
    return announced_beside(completion, problem.get("prompt", ""), problem["question"])


@functools.lru_cache(maxsize=4)  # a completion is asked for its answer several times in a row
def announced_beside(completion: str, *prompts: str) -> list[str]:
    """announcements of a completion to these prompts."""
    text = SPECIAL.sub("", completion)
    for message in (*prompts, *INSTRUCTIONS.values()):
        text = without_echo(text, message)
    for tag in ("</reasoning>", "</think>"):
        behind = text.rpartition(tag)[2]
        text = behind if announced(behind) else text
    return announced(text)


ECHO = 20  # characters, spaces apart: what is shorter may well be the completion's own


def without_echo(text: str, message: str) -> str:
    """A text without a message that it repeats, in whatever spaces, or whose end it begins with."""
    own, wanted = "".join(text.split()), "".join(message.split())
    if len(wanted) < ECHO or len(own) < ECHO:
        return text
    at = wanted.find(own[:ECHO])
    while at >= 0 and not own.startswith(wanted[at:]):
        at = wanted.find(own[:ECHO], at + 1)
    if at < 0 and wanted not in own:
        return text
    places = [i for i, c in enumerate(text) if not c.isspace()]  # of own's characters
    start, kept = len(wanted) - at if at >= 0 else 0, []
    for piece in own[start:].split(wanted):
        kept += [text[places[start] : places[start + len(piece) - 1] + 1]] if piece else []
        start += len(piece) + len(wanted)
    return "\n".join(kept)


def announced(text: str) -> list[str]:
    """announcements of a text without echoes and marked working."""
    inner, outer = boxes(text), answer_tags(text)
    hashes = [Span(m.start(), m.end(), m[1][: LONGEST + 1]) for m in HASHES.finditer(text)]
    last = max((span.start for span in inner + outer), default=-1)
    # words behind #### are a heading before the last box or tag; without digits or formulas also behind it, and where
    # an answer is only said, but for the last line
    end = len(text) + 1 if last >= 0 else len(text.rstrip()) if hashes and SAID.search(text) else 0
    titles = [s.start < last or (s.end < end and not re.search(r"[\d\\$]", s.text)) for s in hashes]
    titles = [title and WORDS.match(s.text) and not SAID.search(s.text) for s, title in zip(hashes, titles)]
    hashes = [span for span, title in zip(hashes, titles) if not title and not HEADING.match(span.text)]
    spans = sorted(inner + without(outer, inner + hashes) + without(hashes, inner))
    found = [span.text for span in spans] or answer_field(text) or said(text)
    answers = (answer.strip() for answer in dict.fromkeys(found) if len(answer) <= LONGEST)
    return [answer for answer in answers if SAYS.search(answer)]


def answer_field(text: str) -> list[str]:
    """The answer of a text that is one JSON object, in a fence or not."""
    whole = re.fullmatch(r"\s*(?:```\w*\s*)?(\{.*\})\s*(?:```\s*)?", text, re.DOTALL) if 'answer"' in text else None
    value = read_object(whole[1]) if whole else None
    answer = pick(value, ("final_answer", "answer")) if isinstance(value, dict) else None
    return [str(answer)] if isinstance(answer, (str, int, float)) else []


def last_objects(text: str) -> list[str]:
    """The last balanced {...} of a text, at most three, in one pass; where none is, an unclosed one, closed."""
    depth, start, found = 0, 0, []
    for match in re.finditer(r"[{}]", text):
        if match[0] == "{":
            start = match.start() if depth == 0 else start
            depth += 1
        elif depth:
            depth -= 1
            if depth == 0:
                found.append((start, match.end()))
    if depth and not found:
        return [text[start:].rstrip("`\n ") + "}" * depth] if depth < 4 else []
    return [text[start:end] for start, end in found[-3:]]


def read_object(text: str):
    """The last object of a text that is JSON, or nearly so: line breaks and stray backslashes in its texts, comments,
    commas too many, single quotes; None without one."""
    for found in reversed(last_objects(text)):
        loose = re.sub(r",(?=\s*[}\]])", "", re.sub(r"\s//[^\n\"]*$", "", found, flags=re.MULTILINE))
        loose = re.sub(r'(\\["\\/bfnrtu])|\\', lambda match: match[1] or "\\\\", loose)
        for spelling in (found, loose if '"' in loose else loose.replace("'", '"')):
            try:
                return json.loads(spelling, strict=False)
            except (ValueError, RecursionError):
                pass
    return None


def said(text: str) -> list[str]:
    """What follows "the answer is" and its like, up to a sentence's end or a reason. Words that lead to a further
    announcement are none: "Answer: the final answer is 5"."""
    matches, found = [*SAID.finditer(text)], []
    for match, after in zip(matches, [*matches[1:], None]):
        led = after is not None and after.start() < match.end(1)
        sentence, *rest = REASON.split(text[match.end() : after.start()] if led else match[1], maxsplit=1)
        if not sentence.rstrip("* ").endswith(":") and (rest or not led or re.search(r"[\d\\]", sentence)):
            found.append(sentence)
    return [part for part in found if SAYS.search(part)] or [match[1] for match in FINAL.finditer(text)]


def without(spans: list[Span], others: list[Span]) -> list[Span]:
    """The spans in which none of the others starts."""
    starts = sorted(span.start for span in others)
    return [s for s in spans if bisect.bisect_left(starts, s.start) == bisect.bisect_left(starts, s.end)]


NUMBER = re.compile(r"-?(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")
UNIT_POWER = re.compile(r"(?:(?<=[A-Za-z}])\s*\^\s*\{?[23]\}?|(?:(?<=\b[ckm]m)|(?<=\bm))[23])(?![\d.])")  # cm^2, m3
LATEX_TEXT = re.compile(r"\\(?:text(?:bf|it|rm|sf)?|mathrm|mathbf|mathit|mbox|hbox|operatorname)\s*\{([^{}]*)\}")
FRACTION = re.compile(r"\\[dtc]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
BRACED = [  # \frac12 and its like, with all their braces
    (re.compile(r"\\[dtc]frac"), r"\\frac"),
    (re.compile(r"\\frac\s*([^\s{\\])\s*([^\s{\\])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([^\s{\\])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"(\\frac\s*\{[^{}]*\})\s*([^\s{\\])"), r"\1{\2}"),
]
NEGATED = re.compile(r"\b(?:not|wrong|incorrect|maybe|perhaps|possibly|either|neither)\b|n't\b", re.IGNORECASE)
# "10 cookies (5 + 5)", "10 (= 2 * 5)": where the number comes from
ASIDE = re.compile(r"(?<=[a-z])\s?\([^()a-zA-Z]*[=+*/][^()a-zA-Z]*\)|\(\s*=[^()]*\)")


def without_working(text: str) -> str:
    """A number without what stands in brackets behind it, where that comes to the same: "18 (9 eggs x $2)", "2280 g
    (2.28 kg)"."""
    aside = re.fullmatch(r"([^()]*\d[^()]*)\(([^()]*\d[^()]*)\)[\s.*$]*", text)
    value = parse_number(aside[1]) if aside else None
    if value is None:
        return text
    made, other = evaluate(re.sub(r"[A-Za-z]{2,}|\$", "", aside[2])), parse_number(aside[2])
    same = made is not None and len(made[1]) > 1 and made[0] == Fraction(value)
    if other is not None and re.search("[a-z]", aside[2]):  # 2.28 kg
        same = same or other.as_tuple()[1] == value.as_tuple()[1]
    return aside[1] if same else text


def parse_number(text: str) -> Decimal | None:
    r"""The one number in a short text: "$1,234.50", "42 apples", "5 + 37 = 42." ; None if there is none, or several.

    Of an equation the right side counts; a fraction of two numbers is one, and so is a whole number with one.
    """
    text = without_working(text)
    text = LATEX_TEXT.sub(r" \1 ", re.sub("[\u2212\u2013]", "-", text).replace("{,}", ","))
    for pattern, spelling in BRACED:
        text = pattern.sub(spelling, text)
    text = FRACTION.sub(r"\1/\2", re.sub(r"(?<=\d)\\frac", r" \\frac", text))
    text = re.sub(r"\\[!,;: ]|[$*\\]+(?=[\d.$)-])|[$*]", "", ASIDE.sub("", text)).rstrip(" .")
    text = UNIT_POWER.sub("", text.rpartition("=")[2])
    numbers = NUMBER.findall(text)
    try:
        values = [Decimal(re.sub("[, ]", "", number)) for number in numbers]
        ratio = r"\s*/\s*".join(map(re.escape, numbers[-2:]))
        if len(values) == 2 and re.search(rf"(?:^|\s){ratio}", text):
            values = [values[0] / values[1]]
        elif len(values) == 3 and 0 <= values[1] < values[2] and re.search(rf"{re.escape(numbers[0])}\s+{ratio}", text):
            values = [values[0] + (values[1] / values[2]).copy_sign(values[0])]
        return values[0].normalize() if len(values) == 1 and values[0].is_finite() else None
    except (InvalidOperation, ZeroDivisionError, OverflowError):
        return None


# ---------------------------------------------------------------------------------------------
# GSM8K: the embedded generator
# ---------------------------------------------------------------------------------------------

NAMES = ("Tom", "Ann", "Sam", "Eva", "Max", "Lea")
ITEMS = ("apples", "books", "coins", "eggs", "pens", "stamps")
# The story of a problem and its two operations: (a op1 b) op2 c.
TEMPLATES = (
    ("{name} has {a} {item}, buys {b}, sells {c}. How many?", "+", "-"),
    ("{name} has {a} {item}, loses {b}, finds {c}. How many?", "-", "+"),
    ("{name} has {a} {item}, sells {b}, loses {c}. How many?", "-", "-"),
    ("{name} has {a} {item}, finds {b}, buys {c}. How many?", "+", "+"),
    ("{name} fills {a} bags, {b} {item} each, sells {c}. How many?", "*", "-"),
    ("{name} fills {a} bags, {b} {item} each, buys {c}. How many?", "*", "+"),
)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
LARGEST = 20  # of all numbers in a problem: some 250 different sums, differences and products


def split_of(question: str, first: tuple[int, str, int], second: tuple[int, str, int]) -> str | None:
    """The one split that may hold a problem, decided by its numbers and words alone; None: no split."""
    if reserved(*first):
        return "unseen"
    return None if reserved(*second) else part_of(question)


def draw_gsm8k(rng: random.Random, split: str) -> Problem | None:
    """One grade-school word problem with a worked solution, in GSM8K's format; None if its split is another."""
    story, op1, op2 = rng.choice(TEMPLATES)
    a, b, c = rng.randint(2, 9 if op1 == "*" else LARGEST), rng.randint(2, 9), rng.randint(2, 9)
    middle = OPERATIONS[op1](a, b)
    result = OPERATIONS[op2](middle, c)
    question = story.format(name=rng.choice(NAMES), item=rng.choice(ITEMS), a=a, b=b, c=c)
    small = 1 <= middle <= LARGEST and 1 <= result <= LARGEST
    if not small or split_of(question, (a, op1, b), (middle, op2, c)) != split:
        return None
    answer = f"{a} {op1} {b} = {middle}\n{middle} {op2} {c} = {result}\n#### {result}"
    return {"question": question, "answer": answer}


# ---------------------------------------------------------------------------------------------
# GSM8K: published data, the question, the answer, the reward
# ---------------------------------------------------------------------------------------------


def check_gsm8k(row: dict, where: str) -> Problem:
    """The two fields of a GSM8K problem; DataError says what is missing from `where`."""
    example = 'GSM8K has "question" and "answer"'
    question = pick_text(row, QUESTION, where, example)
    problem = {"question": question, "answer": pick_text(row, ANSWER, where, example)}
    if gold_answer(problem) is None:
        raise DataError(f'{where}: "answer" must end with a line like "#### 42"')
    return problem


INSTRUCTIONS = {
    "gsm8k": (
        "Solve the problem step by step. Write the final answer on a last line of its own, "
        "as four hash signs and the number, like this:\n#### 42"
    ),
    "math500": "Solve the problem step by step. Write the final answer in \\boxed{}, once.",
    "mbpp": "Write a Python program that solves the task. Write all of it in one ```python block.",
    "countdown": (
        "Make the target from the numbers with +, -, *, / and parentheses. Use every number exactly once. "
        "Write the expression on a last line of its own, behind four hash signs, like this:\n#### (3 + 8) * 2"
    ),
    "sudoku": (
        "Fill in the empty cells of a 4x4 sudoku. Every row, every column and every 2x2 box holds each of the "
        "digits 1, 2, 3 and 4 once. Write the grid as four lines of four digits."
    ),
    "zebra": (
        "Solve the logic puzzle. Write one line per house: its number, a colon, and its entries, "
        "separated by commas, like this:\n1: red, Tom"
    ),
}


def chat(task: str, content: str) -> list[dict[str, str]]:
    """A task's instruction and one problem, for the tokenizer's chat template."""
    return [{"role": "system", "content": INSTRUCTIONS[task]}, {"role": "user", "content": content}]


def gsm8k_target(problem: Problem) -> str:
    """The solution that SFT trains on: the worked answer without its calculator marks."""
    return re.sub(r"<<[^<>\n]*>>", "", problem["answer"])


def gsm8k_answer(completion: str, problem: Problem) -> Decimal | None:
    """The announced number of a completion; None if none is announced, or if announcements disagree: naming several
    numbers is not answering."""
    answers: set[Decimal | None] = set()
    for text in announcements(completion, problem):
        if re.search(r"\d", text):
            answers.add(None if NEGATED.search(text) else parse_number(text))
        if len(answers) > 1:
            return None
    return answers.pop() if answers else None


def gold_answer(problem: Problem) -> Decimal | None:
    """The number after the last `####` of a published answer; without one, what it announces in another way."""
    _, mark, tail = problem["answer"].rpartition("####")
    numbers = {parse_number(text) for text in ([tail[:LONGEST]] if mark else announced(problem["answer"]))}
    return numbers.pop() if len(numbers) == 1 else None


def gsm8k_correct(completion: str, problem: Problem) -> float:
    """1 if the announced answer is the right number, else 0."""
    answer = gsm8k_answer(completion, problem)
    return float(answer is not None and answer == gold_answer(problem))


def worked(text: str) -> bool:
    """Whether something stands there besides tags: an empty reasoning earns no format reward."""
    return ALNUM.search(re.sub(r"<[^<>\n]{0,20}>", "", text)) is not None


def gsm8k_reward(completion: str, problem: Problem) -> Reward:
    """correctness 2.0; format: 0.5 for an integer answer, 0.5 for a worked solution with a last line `#### N`."""
    answer = gsm8k_answer(completion, problem)
    integer = answer is not None and answer == answer.to_integral_value()
    working, _, last = SPECIAL.sub("", completion).strip().rpartition("\n")
    in_form = worked(working) and re.fullmatch(r"#### \S[^\n]{0,40}", last.strip()) is not None
    return {
        "correctness": 2.0 * gsm8k_correct(completion, problem),
        "format": 0.5 * integer + 0.5 * (in_form and answer is not None),
    }


# ---------------------------------------------------------------------------------------------
# MATH: equations with one unknown, and when two answers are the same
# ---------------------------------------------------------------------------------------------

UNKNOWNS = ("x", "y", "z", "n", "m", "k")
EQUATIONS = ("Solve {a} {x} + {b} = {c}.", "Solve {b} + {a} {x} = {c}.", "Find {x} if {c} = {a} {x} + {b}.")
# Equivalent notations of p/q, by the name of the unknown: a model that has seen one must not be paid for it alone.
NOTATIONS = {"z": "\\dfrac{{{p}}}{{{q}}}", "k": "{p}/{q}", "m": "\\tfrac{{{p}}}{{{q}}}"}


def draw_math500(rng: random.Random, split: str) -> Problem | None:
    r"""One linear equation with a worked solution that ends in \boxed{}, as in MATH; None if its split is another."""
    x, a, b, right = rng.choice(UNKNOWNS), rng.randint(2, 9), rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    value = Fraction(right, a)
    notation = "{p}" if value.denominator == 1 else NOTATIONS.get(x, "\\frac{{{p}}}{{{q}}}")
    answer = notation.format(p=value.numerator, q=value.denominator)
    question = rng.choice(EQUATIONS).format(a=a, b=b, c=right + b, x=x)
    if split_of(question, (right + b, "-", b), (right, "/", a)) != split:
        return None
    return {"question": question, "answer": answer, "solution": f"{a} {x} = {right}\n\\boxed{{{answer}}}"}


def check_math500(row: dict, where: str) -> Problem:
    r"""problem, answer, solution; the answer is the solution's last \boxed{} where the row has none of its own."""
    example = 'MATH has "problem", "solution" with a \\boxed{} in it, and perhaps "answer"'
    question = pick_text(row, QUESTION, where, example)
    solution = row.get("solution") if isinstance(row.get("solution"), str) else ""
    answer = pick(row, ANSWER[:-1])
    answer = str(answer).strip() if isinstance(answer, (str, int, float)) else ""
    if found := boxes(solution or answer):
        solution, answer = solution or answer, answer if solution and answer else found[-1].text.strip()
    if not answer:
        raise DataError(f'{where}: no "answer", and no \\boxed{{}} in "solution"; {example}')
    return {"question": question, "answer": answer, "solution": solution or f"\\boxed{{{answer}}}"}


UNICODE = str.maketrans(
    {"\u2212": "-", "\u00b1": r"\pm ", "\u221e": r"\infty ", "\u03c0": r"\pi ", "\u00b0": r"^\circ", "\u222a": r"\cup "}
    | {"\u2044": "/", "\u00b2": "^2", "\u00b3": "^3", "\u2264": r"\le ", "\u2265": r"\ge ", "\u00b7": r"\cdot "}
    | {"\u00d7": r"\times ", "\u2205": r"\emptyset ", "\u211d": r"\mathbb{R}", "\u2248": r"\approx "}
)
# Layout, and spellings that math-verify would misread; applied one after the other.
TIDY = [
    (re.compile(r"\\(?:text)?color\s*\{\w*\}|\\(?:bf|rm|it|left|right|displaystyle)\b|\\[bB]ig[lrg]?\b|\*\*"), " "),
    (re.compile(r"\\\\\s*\[[\d.]+\s*\w*\]|\\cr\b"), r"\\\\"),
    (re.compile(r"\\\$|(?<!\\)\$|(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"[(\[]?\s*\\(begin|end)\s*\{[bp]?(?:matrix|array)\}(?:\{[clr|]*\})?\s*[)\]]?"), r"\\\1{pmatrix}"),
    (re.compile(r"(?:\\\\\s*)+(?=\\end)"), ""),
    (re.compile(r"\^\s*(?:\{\s*(?:\\circ|o)\s*\}|\\circ|o\b|\\text\s*\{o\})|\\deg(?:ree)?\b"), r"^\\circ "),
    (re.compile(r"(?:\u221a|(?<![\\a-z])sqrt)\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+|[a-z]))"), r"\\sqrt{\1\2\3}"),
    (re.compile(r"\{([^{}]*)\\over\b([^{}]*)\}"), r"\\frac{\1}{\2}"),
    (re.compile(r",?\s*(?:(?<![a-zA-Z\\])and(?![a-zA-Z])|\\text\s*\{\s*,?\s*and\s*\})\s*"), ", "),
    (re.compile(r"\\text\s*\{\s*,?\s*or\s*\}"), " or "),
    (re.compile(r"\A\s*\{([^{}]*)\}\s*\Z"), r"\1"),
]


def tidy(answer: str) -> str:
    """An answer without LaTeX's layout, stars and a full stop behind it, in ASCII where there is a spelling in it."""
    inner = boxes(answer)
    text = re.sub(r"\s+", " ", inner[0].text if len(inner) == 1 and inner[0].start == 0 else answer).translate(UNICODE)
    for pattern, spelling in TIDY:
        text = pattern.sub(spelling, text)
    return text.strip(" *").rstrip(" .*")


PI_OR_DIGIT = r"(?:(?<=[\d})%])|(?<=\\pi)|(?<=\\pi\s)|(?<=\\circ\s))"
# 1,234 but not (1,234)
THOUSANDS = re.compile(r"(?<=\d)(?:\{,\}|,|\s)(?=\d{3}(?!\d))(?=[\d{},.\s]*\s*(?:[^\d\s,)\]}]|$))")
# Spellings that mean the same, applied one after the other.
PLAIN = [
    # 10 \text{ apples}
    (re.compile(PI_OR_DIGIT + r"\s*\\(?:text|mathrm|mbox)\s*\{\s*[A-Za-z. ]+\}(?:\^\{?[23]\}?)?[\s.$]*$"), ""),
    (LATEX_TEXT, r"\1"),
    (re.compile(r"(?<=\d),\\!\s*(?=\d{3})|\\!"), ""),
    (re.compile(r"(?<!\\)\\[,;: ]|~|\\q?quad\b"), " "),
    (re.compile(r"\\?%|^\s*=|\^\s*\\circ"), ""),
    (re.compile(r",?\s*(?<![a-zA-Z\\])or(?![a-zA-Z])\s*"), ","),
    (re.compile(r"\bno\s(?:real\s)?solutions?\b|\\varnothing\b", re.IGNORECASE), r"\\emptyset"),
    (re.compile(r"\\mathbb\s*\{?\s*R\s*\}?|\ball real numbers\b", re.IGNORECASE), r"(-\\infty,\\infty)"),
    *BRACED,
    (re.compile(r"\\sqrt\s*([^\s{\\\[])"), r"\\sqrt{\1}"),
    (re.compile(r"(?<![\w.}])(-?)(\d+)\s+(\d+)\s*/\s*(\d+)"), r"\1\2\\frac{\3}{\4}"),  # 3 1/2
    (re.compile(r"(?<![\w.}/)])(-?\d+)\s*/\s*(\d+)(?![\w./(^])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\{-(\d+)\}"), r"-\\frac{\1}"),
    (THOUSANDS, ""),
    (re.compile(r"\\leq?(?![a-zA-Z])"), "<="),
    (re.compile(r"\\geq?(?![a-zA-Z])"), ">="),
    (re.compile(r"\\(?:cdot|times)(?![a-zA-Z])"), "*"),
    (re.compile(r"\\(?:infty|infinity)\b|\binfinity\b"), r"\\infty"),
    (re.compile(r"([_^])\s*\{\s*\(?(\w)\)?\s*\}"), r"\1\2"),
    (re.compile(r"\((\w+)\)\s*_"), r"\1_"),
    (re.compile(r"(\\(?:sin|cos|tan|cot|sec|csc|ln|log)(?:[_^]\w)*)\s*[({]\s*(\\?\w+)\s*[)}](?![\w(^])"), r"\1 \2"),
    (re.compile(r"(?<![\w)}])\(([^()]+)\)\s*/\s*(?:\(([^()]+)\)|(\d+)(?![\w.(^]))"), r"\\frac{\1}{\2\3}"),  # (x + 1)/2
    (re.compile(r"^\s*\((?:\\?[a-zA-Z]+\s*,\s*)+\\?[a-zA-Z]+\)\s*=\s*(?=\()"), ""),  # (x, y) = (2, 3)
    (re.compile(r"^\s*\(?[a-zA-Z](?:_\{?\w\}?)?(?:\([a-z]\))?\s*(?:=|\\in\b)\s*(?=[^=])"), ""),  # x = 5, x \in [0, 1]
    (re.compile(r"(^|[,(\[])\s*\+"), r"\1"),
]
UNITS = re.compile(
    PI_OR_DIGIT
    + r"\s*\\?\s*(?:square|sq\.?|cubic)?\s*(?:degrees?|radians?|units?|dollars?|cents?|percent|inch(?:es)?|in\.?|"
    r"feet|foot|ft|miles?|yards?|meters?|metres?|centimeters?|kilometers?|(?:cm|mm|km|m)(?:\^\{?[23]\}?)?|hours?|hrs?|minutes?|min|"
    r"seconds?|sec|days?|weeks?|months?|years?|people|students|ways|points|kg|grams?|pounds?|lbs?|mph|"
    r"p\.?m\.?|a\.?m\.?)(?:\^\{?[23]\}?)?(?:\s*(?:per|/)\s*[a-z]+)?\s*\.?$"
)


def plain(answer: str, join: bool = True) -> str:
    """An answer in its plainest spelling: without LaTeX's layout, units, x =, spaces and, with join, commas."""
    text = tidy(answer)
    for pattern, spelling in PLAIN:
        text = pattern.sub(spelling, text) if join or pattern is not THOUSANDS else text
    text = UNITS.sub("", text.strip())
    text = re.sub(r"(?<!\d)\s+|(?<=[_^]\d)\s+|\s+(?!\d)", "", text).rstrip(".,;:")  # 3 4 is not 34
    text = re.sub(r"(?<!\d)\.(?=\d)", "0.", text)
    if between := re.fullmatch(r"([^<>=]+)<(=?)[a-zA-Z]<(=?)([^<>=]+)", text):  # 0 < x <= 5
        low, closed, closed_above, high = between.groups()
        text = f"{'[' if closed else '('}{low},{high}{']' if closed_above else ')'}"
    choice = re.fullmatch(r"\(([A-Za-z])\)", text)
    return choice[1] if choice else text


RATIONAL = re.compile(r"([+-]?)(\d+(?:\.\d+)?)?(?:\\frac\{(\d+)\}\{(\d+)\})?")


def rational(text: str) -> Fraction | None:
    """The value of a plain number: 12, 0.5, \\frac{1}{2}, 3\\frac{1}{2}; None for anything else."""
    match = RATIONAL.fullmatch(text[:100])
    if not match or not (match[2] or match[3]) or len(text) > 100 or (match[4] and not int(match[4])):
        return None
    whole, part = Fraction(match[2] or 0), Fraction(int(match[3]), int(match[4])) if match[3] else 0
    if match[2] and match[3] and whole.denominator != 1:
        return None
    return (-1 if match[1] == "-" else 1) * (whole + part)


def parts_of(text: str, separator: str = ",") -> list[str]:
    """The parts between those separators that stand in no brackets."""
    parts, depth, start = [], 0, 0
    for match in re.finditer(rf"[(\[{{]|[)\]}}]|{re.escape(separator)}", text):
        depth += (match[0] in "([{") - (match[0] in ")]}")
        if match[0] == separator and depth == 0:
            parts.append(text[start : match.start()])
            start = match.end()
    return [*parts, text[start:]]


def elements(text: str) -> tuple[str, list[str]]:
    """(brackets, parts) of a plain answer: "(1,2)" -> ("()", ["1", "2"]); a set or bare list has none, and no order. A
    matrix has its shape for brackets, and so has a union its sign."""
    brackets = ""
    if matrix := re.fullmatch(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}", text):
        return "".join(re.findall(r"&|\\\\", matrix[1])) or "&", re.split(r"&|\\\\", matrix[1])
    if len(union := parts_of(text, "\\cup")) > 1:
        return "\\cup", union
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    elif text[:1] in "([" and text[-1:] in ")]" and text and closes_last(text):
        brackets, text = text[0] + text[-1], text[1:-1]
    parts = parts_of(text)
    if not brackets:  # 1 \pm x is 1 + x and 1 - x
        signs = [("+", "-") if part.count("\\pm") == 1 else ("",) for part in parts]
        parts = [re.sub(r"\\pm", s, part).removeprefix("+") for part, both in zip(parts, signs) for s in both]
    return brackets, parts


def closes_last(text: str) -> bool:
    """Whether a text's first bracket is closed by its last character."""
    depth = 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if depth == 0:
            return i == len(text) - 1
    return False


QUOTIENT = re.compile(r"\\frac\{((?:[^{}+-]|\{[^{}]*\})*)\}\{([1-9]\d{0,19})\}")
FACTOR = re.compile(  # a number and its power, a root, a variable, a divisor
    r"\*?(?:(?:(?<=\*)|(?<![\w}]))(\d{1,20}(?:\.\d{1,20})?)(?:\^\{?(\d\d?)\}?)?(?![\d^_!])|/([1-9]\d{0,19})(?![\d^_!])|"
    r"((?:\\sqrt\{[^{}]*\}|\\(?:pi|theta|alpha|beta|phi|omega)(?![a-z])|[a-zA-Z](?:_\w)?)(?:\^(?:\{[^{}]*\}|\w))?)(?![_!']))"
)


def product(text: str) -> tuple[Fraction, list[str]] | None:
    """(coefficient, other factors) of a product: -5\\pi/3, \\frac{1}{2}x^2y; None for anything else."""
    value, text = Fraction(-1 if text[0] == "-" else 1), QUOTIENT.sub(r"*\1/\2", text.removeprefix("-"))
    if not text or FACTOR.sub("", text):
        return None
    for number, power, by, _ in (found := FACTOR.findall(text)):
        value *= Fraction(number or 1) ** int(power or 1) / int(by or 1)
    return value, sorted(factor for *_, factor in found if factor)


def canonical(text: str, depth: int = 4):
    """What plain answers that are the same have in common: a number's value; the parts within brackets or a matrix, in
    order, or of a list, set or union, sorted; a sum's terms; else the text."""
    value = rational(text)
    if value is not None or depth == 0:
        return text if value is None else value
    around, parts = elements(text)
    if len(parts) > 1 or around not in ("", "()"):
        keys = [canonical(re.sub(r"^[a-zA-Z]=", "", part), depth - 1) for part in parts]
        return around, keys if around not in ("", "\\cup") else sorted(keys, key=str)
    if around:
        return canonical(parts[0], depth - 1)
    found = [product(part) for part in parts_of(text.replace("-", "+-"), "+") if part]  # a - b is a + -b
    if None in found or not re.search(r"[\d\\+*/^-]", text):
        return text
    return found[0][0] if [factors for _, factors in found] == [[]] else str(sorted(found, key=str))


def same_plain(a: str, b: str) -> bool:
    """Whether two plain answers are the same, but for the order of sets and sums, and the case of words."""
    return canonical(a) == canonical(b) or (a.isalpha() and a.casefold() == b.casefold())


@functools.cache
def math_verify():
    """The module math_verify, or None where it is not installed."""
    try:
        import math_verify as module
    except ImportError:
        return None
    return module


# What could keep sympy busy: towers of powers, factorials, long numbers, sums to a high power, deep nesting; and what
# math-verify would ignore: a base, 42_5, a dash, dots, digits apart.
WILD = re.compile(
    r"!|\d{16}|\d\s*_|\^\s*\{?\s*-?\d{3}|\^\s*\{?[^{}\s]*\}?\s*\^|\^\s*\{[^{}]*\^|\\[a-z]{0,3}(?:binom|prod|sum|int|lim|mod)|"
    r"[)\]}]\s*\^\s*\{?[2-9]\d|(?:[({][^(){}]*){20}|'|dots|(?<![_^\d])\d+\.?\s+\d|%\s*\\?%"
)
SIGN = re.compile(r"<|>|\\[lg]eq?\b|(?<![<>])=|:|\||\\(?:neq?|mid|to|approx)\b|\\[A-Z]?[a-z]*arrow")
LETTER = re.compile(r"(?<![a-zA-Z\\])[a-zA-Z]+")  # the variables of a product, but not a command's name


def same_by_math_verify(gold: str, answer: str) -> bool:
    """Whether math-verify finds two expressions equal; False where it is not installed, for what it may hang on, and
    where the answer has signs of relation or variables of its own: of words math-verify reads what it likes."""
    module, both = math_verify(), gold + " , " + answer
    if module is None or len(both) > 300 or WILD.search(both) or len(re.findall(r"\^\s*\{?-?\d\d", both)) > 3:
        return False
    letters, signs = ([set(pattern.findall(text)) for text in (gold, answer)] for pattern in (LETTER, SIGN))
    if not set("".join(letters[1])) <= {*"".join(letters[0]), "e", "i"}:
        return False
    if not signs[1] <= signs[0] or ("=" in signs[0]) > ("=" in signs[1]) or answer.count("|") % 2:
        return False
    # its time limit is an alarm signal, which only the main thread can set
    limit = 3 if threading.current_thread() is threading.main_thread() else None
    try:
        parsed = [module.parse(f"${text}$", parsing_timeout=limit) for text in (gold, answer)]
        return bool(all(parsed) and module.verify(*parsed, timeout_seconds=limit))
    except Exception:  # sympy's errors have no common class
        return False


BOUNDED = re.compile(r"\b(?:at\s(?:least|most)|(?:more|less)\sthan|between|could|cannot)\b", re.IGNORECASE)
# The only number among words; these would make another number of it.
COUNTED = re.compile(
    r"(?!.*\b(?:minus|negative|half|hundred|thousand|million|billion|dozen|squared|cubed|factorial|over|times|pi|a?sin|"
    r"cos|tan|log|ln|root)\b)(?:[A-Za-z][A-Za-z'.,]*[ *:]+)*([^A-Za-z\\]*\d[^A-Za-z\\]*(?:\\frac\{\d+\}\{\d+\})?)"
    r"(?:[ *~/-]+[a-z]{2,}[.,]*)*"
)
CHOICE = re.compile(  # one of several: "(C) 42", "C. 42", "Option C"
    r"(?:option|choice|graph)?\s*\(?((?<=\()[A-H](?=\))|[A-H](?=[.:]\s|$))"
    r"(?:[).:]\s*(?![,/&])(?!.*(?:\([A-H]\)|\b[A-H][.:]\s)).*)?",
    re.IGNORECASE,
)
# "Simplify 6/8": its answer is not 6/8
CONVERT = re.compile(
    r"\b(?:express|convert|write|simplify|reduce|factor|expand|evaluate|compute|calculate|rationalize)|"
    r"\b(?:find|what is)(?:\s+the\s+value\s+of)?\W{1,4}(?=\d|[a-z]*\{)",
    re.IGNORECASE,
)


def value_of(answer: str) -> str | None:
    """Of "f(2) = 4/8 = 1/2" the last side, of "22/7 \\approx 3.14" the first, of "1/2 or 0.5" either; None where
    numbers among the sides differ. Of "x = 1, y = 2" each part's."""
    for parts in (re.split(r",?\s+or\s+", answer), parts_of(answer)):
        if len(parts) > 1:
            values = [value_of(part) for part in parts]
            if None in values:
                return None
            numbers = {rational(plain(value)) for value in values}
            one = " or " in answer and len(numbers) == 1 and None not in numbers
            return values[0] if one else ",".join(values)
    first, *near = re.split(r"\\approx\b", answer)
    sides = re.split(r"(?<![<>])=", first)
    exact, rounded = ([v for side in group if (v := rational(plain(side))) is not None] for group in (sides, near))
    differ = len(set(exact)) > 1 or any(abs(value - near) * 50 > abs(value) for value in exact[:1] for near in rounded)
    return None if differ else sides[-1]


def same_answer(answer: str, gold: str, question: str) -> bool:
    """Whether an answer to a MATH problem is right.

    The plain comparison: equal after `plain`, equal as exact numbers, element by element, or term by term. Where that
    fails, math-verify (if installed) looks for a symbolic equality: x^2 + x and x (x + 1). A part of the question is no
    answer, although it may equal it: "Factor x^2 - 1" is not answered by x^2 - 1. Nor is "not 5" or "at least 5".
    """
    b = plain(gold)
    if any(unsure.search(answer) and not unsure.search(gold) for unsure in (NEGATED, BOUNDED)):
        return False
    answer, gold = tidy(answer), tidy(gold)
    if rational(b) is not None and (alone := COUNTED.fullmatch(LATEX_TEXT.sub(r" \1 ", answer).strip())):
        answer = alone[1]
    if not SIGN.search(b):
        named, answer = answer, value_of(answer)
        if answer is None:
            return False
        if b[:1] == "(" and re.fullmatch(r"\s*([a-z])\s*=[^,=]+(,\s*(?!\1)[a-z]\s*=[^,=]+)+", named):
            answer = f"({answer})"  # x = 1, y = 2
    a = plain(answer)
    if a == b or (re.fullmatch(r"\d+_\{?\d+\}?", b) and a == b.partition("_")[0]):  # the question names the base
        return True
    if re.fullmatch(r"[A-H]", b) and (choice := CHOICE.fullmatch(LATEX_TEXT.sub(r"\1", answer))):
        return choice[1] == b
    asked = re.search(r"\W", a) and re.search(rf"(?<![\d.]){re.escape(a)}(?![\d.]*\d)", plain(question[:10_000]))
    exact = same_plain(a, b) or same_plain(plain(answer, False), plain(gold, False))  # 100,200 may be two numbers
    if asked:
        return exact and not CONVERT.search(question)
    # 5 is not 5, 5; math-verify reads both as a set
    (around_a, of_a), (around_b, of_b) = elements(a), elements(b)
    alike = len(of_a) == len(of_b) and (around_a == around_b or len(of_a) == 1)
    return exact or (alike and same_by_math_verify(gold, answer))


WORDS_BETWEEN = r"[A-Za-z\s.,:;'*]*"
MATH = r"(?:(?<!\\)\$+([^$]+)(?<!\\)\$+|\\\(((?:(?!\\\)).)+)\\\)|\\\[((?:(?!\\\]).)+)\\\])"
FORMULA = re.compile(  # words around one formula, or "The value of $x$ is $5$"
    rf"(?s)\A{WORDS_BETWEEN}(?:{MATH}[A-Za-z\s,]*\b(?:is|are|equals)\b[\s:]*(?:equal to\s*)?)?{MATH}{WORDS_BETWEEN}\Z"
)
ADDED = re.compile(  # "5, since x > 0", "12 (3 times 4)"
    r"(?s),?\s+(?:because|since|as)\b.*|"
    r"\s+(?:\\text\{\s*)?\((?!\s*(?:or|and|not)\b)[^()\\]*(?<![a-zA-Z])[a-z]{3,}[^()\\]*\)\}?[\s.*$]*\Z"
)


def math500_answers(completion: str, problem: Problem) -> list[str]:
    """The different answers that a completion announces, in order."""
    different: dict[str, str] = {}  # plain spelling -> spelling
    for text in announcements(completion, problem):
        text = ADDED.sub("", text)
        text = next(filter(None, formula.groups()[3:])) if (formula := FORMULA.match(text)) else text
        if not any(same_plain(plain(text), other) for other in different):
            different[plain(text)] = text
        if len(different) > 10:  # no problem has so many solutions
            break
    return list(different.values())


def math500_correct(completion: str, problem: Problem) -> float:
    """1 if the answer, all of it where several are announced, equals the published one or all that the published
    solution announces: "3" and "4" are right where the solutions are 3 and 4, and wrong where the answer is 3."""
    answers = math500_answers(completion, problem)
    golds = {problem["answer"], ",".join(math500_answers(problem["solution"], problem))} - {""}
    return float(bool(answers) and any(same_answer(",".join(answers), gold, problem["question"]) for gold in golds))


def math500_reward(completion: str, problem: Problem) -> Reward:
    r"""correctness 2.0; format: 0.5 for an answer that can be told apart, 0.5 for working that ends in one \boxed{}."""
    told = len(math500_answers(completion, problem)) == 1
    found = boxes(completion)
    in_form = told and len(found) == 1 and worked(completion[: found[0].start])
    return {"correctness": 2.0 * math500_correct(completion, problem), "format": 0.5 * told + 0.5 * in_form}


# ---------------------------------------------------------------------------------------------
# MBPP: small functions and their tests
# ---------------------------------------------------------------------------------------------

FORMULAS = {
    "{f}(x): {a} times x, plus {b}": ("x * {a} + {b}", lambda x, a, b: x * a + b),
    "{f}(x): {b} less than {a} times x": ("x * {a} - {b}", lambda x, a, b: x * a - b),
    "{f}(x): x plus {a}, all times {b}": ("(x + {a}) * {b}", lambda x, a, b: (x + a) * b),
    "{f}(x): {a} minus x, all times {b}": ("({a} - x) * {b}", lambda x, a, b: (a - x) * b),
    "{f}(x): the larger of x + {a} and {b}": ("max(x + {a}, {b})", lambda x, a, b: max(x + a, b)),
    "{f}(x): the rest of x + {a} divided by {b}": ("(x + {a}) % {b}", lambda x, a, b: (x + a) % b),
}
FUNCTIONS = ("f", "g", "h", "change", "result", "value", "compute", "apply", "answer", "number", "solve", "update")


def draw_mbpp(rng: random.Random, split: str) -> Problem | None:
    """One function to write and three tests of it; None if its split is another."""
    words, (body, formula) = rng.choice(list(FORMULAS.items()))
    name, a, b = rng.choice(FUNCTIONS), rng.randint(1, LARGEST), rng.randint(1, LARGEST)
    question = words.format(f=name, a=a, b=b)
    tests = [f"assert {name}({x}) == {formula(x, a, b)}" for x in rng.sample(range(LARGEST), 3)]
    code = f"def {name}(x):\n return {body.format(a=a, b=b)}"
    if ("unseen" if reserved(a, "f", b) else part_of(question)) != split:
        return None
    return {"question": question, "answer": code, "tests": tests, "imports": "", "setup": ""}


def check_mbpp(row: dict, where: str) -> Problem:
    """text or prompt, code, test_list, test_imports, test_setup_code; challenge tests are left out, as in MBPP's own
    evaluation. DataError also for a test that `split_test` cannot split."""
    example = 'MBPP has "text" (or "prompt"), "code" and "test_list"'
    question = pick_text(row, ("text", *QUESTION), where, example)
    code = pick(row, ("code", "canonical_solution", "reference", "solution", "answer"))
    tests = pick(row, ("test_list", "tests", "test", "gold"))
    if isinstance(tests, str):  # a list as JSON, or one test after the other
        tests = json_rows(tests) or re.split(r"\n(?=assert\b)", tests.strip())
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise DataError(f'{where}: field "test_list" is missing or no list of texts; {example}')
    text_of = lambda value: "\n".join(value) if isinstance(value, list) else value or ""
    imports, setup = (text_of(row.get(name)) for name in ("test_imports", "test_setup_code"))
    problem = {"question": question, "answer": code if isinstance(code, str) else ""}
    problem |= {"tests": tests, "imports": imports, "setup": setup}
    try:
        split_tests(problem)
    except (SyntaxError, ValueError) as error:
        raise DataError(f"{where}: a test is not a Python assertion of the program's results ({error})") from None
    return problem


def mbpp_messages(problem: Problem) -> list[dict[str, str]]:
    """The chat that asks for a program; one test shows the function's name and arguments."""
    return chat("mbpp", f"{problem['question']}\n{problem['tests'][0]}")


def mbpp_target(problem: Problem) -> str:
    """The program that SFT trains on."""
    return f"```python\n{problem['answer']}\n```"


LONGEST_PROGRAM = 100_000  # characters
FENCED = re.compile(r"(```|~~~)[ \t]*[\w+#.-]*[ \t]*\r?\n(.*?)(?:\1|\Z)", re.DOTALL)
DEFINES = re.compile(r"^[ \t]*(?:(?:async[ ]+)?def|class)\s+(\w+)|^(\w+)\s*=", re.MULTILINE)
CODE_LINE = re.compile(
    r"\s|$|[@#)\]}]|(?:(?:async\s+)?def|class|import|from\s+[\w.]+\s+import|if|elif|for|while|with)\s|"
    r"(?:else|try|finally|except\b[^:]*):|\w[\w.]*(?:\[[^\]]*\])*\s*[-+*/%&|^:]?=|\w[\w.]*\("
)


def extract_code(completion: str, tests: tuple[str, ...] | list[str] = ()) -> str | None:
    """The program of a completion: the last fenced block that defines what the tests call, else the last that defines
    something; without fences all of its text, or what stands between [BEGIN] and [DONE] or in <answer>, or its lines
    of code. None if that is no Python, or defines nothing."""
    called = set(re.findall(r"\b([A-Za-z_]\w*)\s*\(", "\n".join(tests)))
    text = SPECIAL.sub("", completion).replace("\r\n", "\n")
    bare = text.partition("[DONE]")[0].rpartition("[BEGIN]")[2].partition("```")[0]
    bare = TAGS.split(bare)[1] if TAGS.search(bare) else bare
    bare = re.sub(r"\A\s*'(.*)'\s*\Z", r"\1", bare, flags=re.DOTALL)  # as in MBPP's own few-shot prompt
    fenced = [match[2].partition("[DONE]")[0] for match in FENCED.finditer(text)]
    source = bare if bare.strip() or not fenced else fenced[-1]  # a fence may be left open
    lines = itertools.groupby(source.split("\n"), key=lambda line: CODE_LINE.match(line) is not None)
    for blocks in (fenced, [bare], ["\n".join(part) for code, part in lines if code]):
        blocks = (block if compiles(block) else textwrap.dedent(block) for block in blocks if DEFINES.search(block))
        programs = [block for block in blocks if compiles(block)]
        wanted = [block for block in programs if called & set(itertools.chain(*DEFINES.findall(block)))]
        if programs:
            return (wanted or programs)[-1].strip("\n").rstrip()
    return None


def compiles(program: str) -> bool:
    """Whether a text is Python, and no longer than a program of MBPP could ever be."""
    if len(program) > LONGEST_PROGRAM:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a program is no concern of ours
            ast.parse(program)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


class SplitTest(NamedTuple):
    """A test, split between the program and its judge.

    steps: what runs beside the program, in order: ("exec", statement) or ("eval", expression). conditions: what must
    hold of the expressions' values, which go by the names _0, _1, ...; what is expected stands only here.
    """

    steps: tuple[tuple[str, str], ...]
    conditions: tuple[str, ...]


class Outsiders(ast.NodeTransformer):
    """Replaces the largest sub-expressions that only the program can evaluate by names _0, _1, ..."""

    def __init__(self, own: set[str], known: set[str]):
        self.own, self.known, self.found = own, known, []

    def placeholder(self, node: ast.AST, form: str = "{}") -> ast.AST:
        self.found.append(form.format(ast.unparse(node)))
        return ast.copy_location(ast.Name(f"_{len(self.found) - 1}", ast.Load()), node)

    def visit(self, node: ast.AST) -> ast.AST:
        """The node, or the placeholder of what the program's own names come to in it."""
        inner = node
        while isinstance(inner, (ast.Call, ast.Attribute, ast.Subscript)):
            inner = inner.func if isinstance(inner, ast.Call) else inner.value
        if isinstance(inner, ast.Name) and (inner.id in self.own or inner.id not in self.known):
            return self.placeholder(node)
        if isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            # What binds names of its own is not taken apart. Where it calls the program, all of it is evaluated beside
            # the program, and what stands in it can be seen from there; no test of MBPP's own samples is like that.
            if not self.own & {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}:
                return node
            return self.placeholder(node, "list({})" if isinstance(node, ast.GeneratorExp) else "{}")
        return self.generic_visit(node)


def names_bound(code: str) -> tuple[set[str], set[str], str]:
    """(names that a module defines, names that it imports, its import statements)."""
    body = ast.parse(code).body
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {(alias.asname or alias.name).partition(".")[0] for node in imports for alias in node.names}
    defined = {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))}
    defined |= {n.id for node in body for n in ast.walk(node) if isinstance(n, ast.Name) and type(n.ctx) is ast.Store}
    return defined, imported, "\n".join(map(ast.unparse, imports))


def split_tests(problem: Problem) -> tuple[str, list[SplitTest]]:
    """(imports for the judge, the problem's tests split). SyntaxError or ValueError for what cannot be split.

    `assert set(f(3)) == {1, 2}` becomes the expression f(3), which the program's process evaluates, and the condition
    set(_0) == {1, 2}, which that process never sees.
    """
    try:
        own, imported, imports = names_bound(problem["answer"].replace("\r\n", "\n"))
    except (SyntaxError, ValueError):
        own, imported, imports = set(), set(), ""  # a reference that is no Python 3 says nothing
    _, more, _ = names_bound(problem["imports"])
    known = set(dir(builtins)) | imported | more
    tests = []
    for test in problem["tests"]:
        steps, conditions, outsiders = [], [], Outsiders(own, known)
        for node in ast.parse(test.strip()).body:
            if isinstance(node, ast.Assert):
                before = len(outsiders.found)
                conditions.append(ast.unparse(outsiders.visit(node.test)))
                steps += [("eval", source) for source in outsiders.found[before:]]
            elif any(isinstance(inner, ast.Assert) for inner in ast.walk(node)):
                raise ValueError("an assertion within another statement")
            else:
                steps.append(("exec", ast.unparse(node)))
        if not conditions or not outsiders.found:
            raise ValueError(f"nothing in it depends on the program: {test.strip()[:80]}")
        tests.append(SplitTest(tuple(steps), tuple(conditions)))
    return "\n".join(filter(None, (problem["imports"], imports))), tests


def pass_rate(program: str, problem: Problem) -> float:
    """The share of a problem's tests that a program passes, run in the sandbox and judged outside of it."""
    imports, tests = split_tests(problem)
    steps = tuple(test.steps for test in tests)
    results = run_program(problem["imports"], program, problem["setup"], steps, SECONDS)
    return sum(holds(imports, test.conditions, got) for test, got in zip(tests, results)) / len(tests)


def holds(imports: str, conditions: tuple[str, ...], values: str | None) -> bool:
    """Whether conditions hold of the packed values, JSON. Equality with a literal is decided here; anything else is
    evaluated in a second sandbox, in which no program runs."""
    if not values:
        return False
    try:
        found = [unpack(value) for value in json.loads(values)]
    except (ValueError, TypeError, RecursionError):  # forged: no packed values
        return False
    if len(conditions) == 1 and (match := re.fullmatch(r"_0 == (.*)", conditions[0], re.DOTALL)) and found:
        try:
            return bool(found[0] == ast.literal_eval(match[1]))
        except (ValueError, RecursionError):
            pass  # no literal
    steps = [("bind", values), *(("eval", f"bool({condition})") for condition in conditions)]
    verdicts = run_program(imports, "", "", (tuple(steps),), SECONDS)[0]
    return bool(verdicts) and json.loads(verdicts) == [True] * len(conditions)


def mbpp_score(completion: str, problem: Problem) -> float:
    """1 if the completion's program passes all tests, else 0: pass@1 is its mean."""
    program = extract_code(completion, problem["tests"])
    return float(program is not None and pass_rate(program, problem) == 1)


def mbpp_reward(completion: str, problem: Problem) -> Reward:
    """tests: 2.0 times the share that passes; format: 0.5 for a program that compiles, 0.5 for one fenced block."""
    program = extract_code(completion, problem["tests"])
    if program is None:
        return {"tests": 0.0, "format": 0.0}
    fenced = len(FENCED.findall(completion)) == 1
    return {"tests": 2.0 * pass_rate(program, problem), "format": 0.5 + 0.5 * fenced}


# ---------------------------------------------------------------------------------------------
# The sandbox: programs that a model wrote
#
# The program runs in a process of its own; what it returns comes back as plain data, and is judged elsewhere. It can
# forge what it returns, which is no more than returning it. Where the system allows, the process has its own user,
# its own processes, network and file system: an empty directory, and the interpreter's files to read.
# ---------------------------------------------------------------------------------------------

SECONDS, GRACE = 5, 5  # of wall-clock and of CPU time per program; more, for starting on a busy machine
MEMORY, FILE_SIZE, DISK = 2**30, 2**20, 2**24  # bytes: address space, one file (and the results), all files
FILES = 64  # open ones
ANSWER_SIZE = 100_000  # characters of one test's packed values
INSIDE = "builtins ctypes functools json math os signal sys types".split()  # the imports of what runs in the process
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 1 << 17, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE = 1 << 14, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38

CODE_REFUSED = "--task {} runs programs that a model wrote: add --allow_code_execution if you want that"
code_execution_allowed = False


def allow_code_execution() -> None:
    """From now on this process may run programs that a model wrote (--allow_code_execution)."""
    global code_execution_allowed
    code_execution_allowed = True


@functools.lru_cache(maxsize=4096)  # a group of rollouts often holds the same program twice
def run_program(imports: str, program: str, setup: str, tests: tuple, seconds: float) -> list[str | None]:
    """What the tests' expressions come to beside a program: packed values as JSON per test, None where it failed.

    tests: steps per test, as in SplitTest. Raises DataError unless code execution was allowed.
    """
    job = {"imports": imports, "program": program, "setup": setup, "tests": tests, "seconds": seconds}
    return run_sandbox(job, seconds)[1]


def run_sandbox(job: dict, seconds: float) -> tuple[list[str] | None, list[str | None]]:
    """(the protections that were active, packed values or None per test) of one job of `sandboxed`."""
    if not code_execution_allowed:
        raise DataError(CODE_REFUSED.format("mbpp"))
    # as isolated as -I, but for the environment: this one is ours, and -I would ignore its hash seed
    command = [sys.executable, "-s", "-c", inside()]
    env = {"PYTHONHASHSEED": "0", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as box,
        tempfile.TemporaryFile() as results,  # a file, so that its size limit caps what comes back
    ):
        pipes = dict(stdin=subprocess.PIPE, stdout=results, stderr=subprocess.DEVNULL)
        process = subprocess.Popen(command, cwd=box, env=env, start_new_session=True, **pipes)
        try:
            process.communicate(json.dumps(job).encode(), timeout=seconds + GRACE)
        except subprocess.TimeoutExpired:
            pass
        finally:
            end_session(process)
        results.seek(0)
        lines = results.read(FILE_SIZE).decode(errors="replace").split("\n")
    return read_results(lines, len(job["tests"]))


def inside() -> str:
    """The program that is the sandbox's process: the functions below, and nothing else of this file or its imports."""
    names = re.findall(
        r"\b(?:CLONE|MS|PR_SET)_[A-Z_]+|\b(?:MEMORY|FILE_SIZE|DISK|FILES)\b", (source := inside_source())
    )
    constants = [f"{name} = {globals()[name]!r}" for name in dict.fromkeys(names)]
    return "\n".join(
        ["from __future__ import annotations", *(f"import {m}" for m in INSIDE), *constants, source, "sandboxed()"]
    )


@functools.cache
def inside_source() -> str:
    """The source of the functions that run in the sandbox's process, and of nothing else."""
    functions = [sandboxed, run_steps, pack, unpack, confine, become, change_root, keep_importing, keep_time]
    return "\n".join(map(inspect.getsource, [*functions, limit_resources]))


def end_session(process: subprocess.Popen) -> None:
    """Kill the sandbox's session, and wait for its first process."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # gone, or none of ours but its leader
            process.kill()
        process.wait()


def read_results(lines: list[str], tests: int) -> tuple[list[str] | None, list[str | None]]:
    """The lines that `sandboxed` wrote: its protections (None: it never started), then (test, values); nothing else."""
    active, values = None, [None] * tests
    for line in lines:
        head, _, tail = line.partition(" ")
        if head == "active" and active is None:
            active = [name for name in tail.split(",") if name]
        elif head.isdecimal() and len(head) < 6 and int(head) < tests and len(tail) <= ANSWER_SIZE:
            values[int(head)] = tail if values[int(head)] is None else values[int(head)]
    return active, values


def protections() -> str:
    """One line: how programs will be run on this system, found by running an empty one. DataError if it fails."""
    active, _ = run_sandbox({"imports": "", "program": "", "setup": "", "tests": [], "seconds": SECONDS}, SECONDS)
    if active is None:
        raise DataError(
            "programs cannot be run here: the sandbox needs Linux or macOS and, where it is root, the right to become "
            "another user; run as a user who is not root"
        )
    without = [name for name in ("files", "network", "processes", "users") if name not in active]
    apart = f"; its own {', '.join(active)}" * bool(active) + f"; NOT its own here: {', '.join(without)}" * bool(
        without
    )
    return f"a process per program, {SECONDS} s, {MEMORY >> 20} MiB, no further process{apart}"


# Below: what runs inside the sandbox's process.


def sandboxed() -> None:
    """Read a job from standard input, give up all rights, run its program and tests, write what they come to."""
    job = json.loads(sys.stdin.buffer.read())
    results, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.close(null)
    active = confine(job["seconds"])
    write = functools.partial(os.write, results)
    write(f"active {','.join(active)}\n".encode())
    module = sys.modules["program"] = types.ModuleType("program")
    scope = module.__dict__
    try:
        for part in ("imports", "program", "setup"):
            exec(compile(job[part], part, "exec"), scope)
        for number, steps in enumerate(job["tests"]):
            write(f"{number} {run_steps(steps, scope)}\n".encode())
    except BaseException:  # also SystemExit: the program is to define something, not to leave
        pass
    os._exit(0)


def run_steps(steps: list, scope: dict) -> str:
    """The packed values of one test's expressions, JSON; "" where it fails."""
    values = []
    try:
        for kind, source in steps:
            if kind == "eval":
                values.append(pack(eval(compile(source, "test", "eval"), scope)))
            elif kind == "exec":
                exec(compile(source, "test", "exec"), scope)
            else:
                scope |= {f"_{i}": unpack(value) for i, value in enumerate(json.loads(source))}
        return json.dumps(values)
    except BaseException:
        return ""


def pack(value) -> Any:
    """A value as JSON: containers as [name, ...], and what can only be gone through as an iterator of a list. What is
    no plain data becomes ["object"], equal to nothing."""
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    if value is None or isinstance(value, (bool, str)):
        return str.__str__(value) if isinstance(value, str) else value
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", bytes(value).hex()]
    if isinstance(value, dict):
        return ["dict", *([pack(k), pack(v)] for k, v in value.items())]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, *map(pack, value)]
    views = ("range", "deque", "dict_keys", "dict_values", "dict_items")
    if hasattr(type(value), "__next__") or type(value).__name__ in views:
        return ["iter", *(pack(part) for _, part in zip(range(100_000), value))]
    return ["object"]


def unpack(value):
    """The value that `pack` packed. Raises ValueError, TypeError or RecursionError for what it never packs."""
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("an object")
        return value
    kind, *parts = value
    if kind in ("list", "tuple", "set", "frozenset"):
        return getattr(builtins, kind)(map(unpack, parts))
    if kind == "dict":
        return {unpack(k): unpack(v) for k, v in parts}
    if kind == "iter":
        return iter(list(map(unpack, parts)))
    if kind == "complex":
        return complex(*parts)
    return bytes.fromhex(*parts) if kind == "bytes" else object()


def confine(seconds: float) -> list[str]:
    """Take everything from this process but the interpreter and an empty directory; the names of what is separated.

    Namespaces need root or unprivileged user namespaces; root then changes to a user that nobody else is. Without
    namespaces the limits remain, among them that no further process can be started: where one can be, this ends.
    """
    libc, active = ctypes.CDLL(None, use_errno=True), []
    outside, group, user = os.geteuid(), os.getegid(), 1_500_000_000 + os.getpid()  # a user for this process alone
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | (CLONE_NEWUSER if outside else 0)
    if hasattr(libc, "unshare") and libc.unshare(spaces) == 0:
        if outside:
            maps = {"setgroups": "deny", "uid_map": f"{user} {outside} 1", "gid_map": f"{user} {group} 1"}
            for name, text in maps.items():
                with open(f"/proc/self/{name}", "w") as file:
                    file.write(text)
        active += ["network", "processes"] + ["files"] * change_root(libc, os.getcwd())
        keep_time(seconds)
    if outside == 0:
        if "files" not in active:
            keep_importing()
        active += ["users"] * become(user)
    if "users" not in active and active:
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        active += ["users"] * (libc.capset(header, none) == 0)
    limit_resources(seconds)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    try:
        child = os.fork()
    except OSError:
        return sorted(active)
    if child:
        os.waitpid(child, 0)
    os._exit(1)  # a root that stays root starts others whatever its limits


def become(user: int) -> bool:
    """Change from root to a user, with the current directory; False where the system has none such."""
    for one in (user, 60_000 + user % 5_000):  # the second, where a container knows 65,536 of them
        try:
            os.setgroups([])
            os.chown(".", one, one)
            os.setresgid(one, one, one)
            os.setresuid(one, one, one)
            return True
        except OSError:
            pass
    return False


def change_root(libc: ctypes.CDLL, box: str) -> bool:
    """Make an empty file system in memory the root: the interpreter's files, read-only, /tmp, and an empty
    directory to work in."""

    def mount(source: str, target: str, kind: bytes | None, flags: int, options: bytes | None = None) -> None:
        if libc.mount(os.fsencode(source), os.fsencode(target), kind, ctypes.c_ulong(flags), options):
            raise OSError(ctypes.get_errno(), f"mount {target}")

    needed = {os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.__file__))}
    needed |= {path for path in ("/usr", "/lib", "/lib64") if os.path.exists(path)}
    try:
        mount("none", "/", None, MS_REC | MS_PRIVATE)
        mount("tmpfs", box, b"tmpfs", MS_NOSUID | MS_NODEV, b"mode=755,size=%d" % DISK)
        for path in sorted(needed):
            if os.path.islink(path):
                os.symlink(os.readlink(path), box + path)
            elif not os.path.exists(box + path):  # else it lies in one that is there already
                os.makedirs(box + path)
                kept = os.statvfs(path).f_flag & MS_NOEXEC
                mount(path, box + path, None, MS_BIND)
                mount(path, box + path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)
        os.makedirs(box + "/tmp", exist_ok=True)  # the interpreter may lie in there
        os.chmod(box + "/tmp", 0o1777)
        os.mkdir(box + "/empty")
        os.chroot(box)
        os.chdir("/empty")
    except OSError:
        return False
    return True


def keep_importing() -> None:
    """Reach the interpreter's modules through open directories: the way to them, as in root's home or in a directory
    of mkdtemp, may be closed to the user that this process becomes."""
    folders = [path for path in sys.path if os.path.isdir(path)] if os.path.isdir("/proc/self/fd") else []
    opened = {path: f"/proc/self/fd/{os.open(path, os.O_RDONLY)}" for path in folders}
    sys.path[:] = [opened.get(path, path) for path in sys.path]
    for module in list(sys.modules.values()):
        for i, path in enumerate(folder := getattr(module, "__path__", [])):
            for start in opened:
                if path.startswith(start + "/"):
                    folder[i] = opened[start] + path[len(start) :]


def keep_time(seconds: float) -> None:
    """Go on in a child, the first process of its own namespace: when it ends, all others in there do. The parent
    stays outside to end it in time."""
    child = os.fork()
    if child == 0:
        os.setsid()
        return
    signal.signal(signal.SIGALRM, lambda number, frame: os.kill(child, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    os.waitpid(child, 0)
    os._exit(0)


def limit_resources(seconds: float) -> None:
    """CPU time, memory, file size, open files, no core, and no process or thread besides this one."""
    import resource

    limits = {"CPU": math.ceil(seconds), "AS": MEMORY, "FSIZE": FILE_SIZE, "NOFILE": FILES, "CORE": 0, "NPROC": 1}
    for name, most in limits.items():
        try:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most))
        except (AttributeError, ValueError, OSError):  # not every system has all of them
            pass


# ---------------------------------------------------------------------------------------------
# Countdown: make the target of all the numbers. Expressions are parsed here, never run
# ---------------------------------------------------------------------------------------------


def draw_countdown(rng: random.Random, split: str) -> Problem | None:
    """Three numbers in any order, a target, and one way to make it; None if its split is another."""
    a, b, c = (rng.randint(1, LARGEST) for _ in range(3))
    op1, op2 = rng.choice("+-*"), rng.choice("+-")
    target = OPERATIONS[op2](OPERATIONS[op1](a, b), c)
    numbers = rng.sample([a, b, c], 3)
    key = " ".join(map(str, sorted(numbers)))  # the same numbers in another order are the same problem
    part = "unseen" if crc(key) % 8 == 0 else part_of(f"{key} {target}")
    if part != split or not 1 <= target <= 2 * LARGEST:
        return None
    return countdown_problem(numbers, target) | {"answer": f"{a} {op1} {b} {op2} {c}"}


def countdown_problem(numbers: list[int], target: int) -> Problem:
    """The problem in words and in numbers, without a solution."""
    question = f"Numbers: {', '.join(map(str, numbers))}. Target: {target}."
    return {"question": question, "answer": "", "numbers": list(numbers), "target": target}


def check_countdown(row: dict, where: str) -> Problem:
    """nums (numbers, input "3,8,5") and target (output); or ground_truth, [[3, 8, 5], 6] or with both by name; or both
    in the question's words, "Numbers: 3, 8, 5. Target: 6.". DataError for all else."""
    both = pick(row, ("ground_truth", "gts", "solution", "answer"))
    row = row | both if isinstance(both, dict) else row
    pair = both if isinstance(both, list) and len(both) == 2 and isinstance(both[0], list) else (None, None)
    numbers, target = pick(row, ("nums", "numbers", "input")) or pair[0], row.get("target", row.get("output", pair[1]))
    words = str(pick(row, QUESTION) or "")
    listed = re.search(r"numbers?:?\s*\[?(\d[\d,\s]*)", words, re.IGNORECASE) or re.search(r"\[(\d[\d,\s]*)\]", words)
    if numbers is None and listed:
        goal = r"(?:target(?: of|:)?|equals?|make|evaluates? to(?: exactly)?)\s*(-?\d+)"
        numbers, said = listed[1], re.search(goal, words, re.IGNORECASE)
        target = said[1] if said and target is None else target
    try:
        numbers = re.findall(r"\d+", numbers) if isinstance(numbers, str) else numbers
        numbers, target = [int(n) for n in numbers], int(target)
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if not 1 <= len(numbers) <= 20:
        raise DataError(f'{where}: expected "nums": [3, 8, 5] (or "input": "3,8,5") and "target": 6 (or "output")')
    return countdown_problem(numbers, target)


def ways_to_make(numbers: tuple[tuple[Fraction, str], ...]) -> Iterator[tuple[Fraction, str]]:
    """Every (value, expression) that uses all of some (value, expression) pairs once, by joining two at a time."""
    if len(numbers) == 1:
        yield numbers[0]
    for i, j in itertools.permutations(range(len(numbers)), 2):
        (x, left), (y, right) = numbers[i], numbers[j]
        rest = tuple(pair for k, pair in enumerate(numbers) if k not in (i, j))
        for op in "+-*/":
            if not (op in "+*" and i > j) and not (op == "/" and y == 0):
                value = x / y if op == "/" else OPERATIONS[op](x, y)
                yield from ways_to_make((*rest, (value, f"({left} {op} {right})")))


def countdown_target(problem: Problem) -> str:
    """A solution that SFT trains on: the generator's, else the first that a search over all expressions finds."""
    answer = problem["answer"]
    if not answer:
        numbers = tuple((Fraction(n), str(n)) for n in problem["numbers"])
        answer = next((text for value, text in ways_to_make(numbers) if value == problem["target"]), None)
        if answer is None:
            raise DataError(f"countdown: {problem['question']} No expression makes it")
    return f"#### {answer}"


SPELLINGS = (
    (LATEX_TEXT, r"\1"),
    (re.compile(r"\\left|\\right|\\[,;:! ]|[*]{2}|[$`]|\\\(|\\\)|\\\[|\\\]"), ""),
    (re.compile(r"(?<=[\d)])\s*[xX]\s*(?=[\d(])"), "*"),
    *BRACED,
    (FRACTION, r"((\1)/(\2))"),
    (re.compile(r"\\times|\\cdot|[\u00d7\u00b7\u22c5\u2217\u2022]"), "*"),
    (re.compile(r"={2,}|\u2192|\\to\b"), "="),
    (re.compile("[\"'\u2713\u2714\u2705]"), ""),
    (re.compile(r"\\div|\u00f7|\u2215"), "/"),
    (re.compile(r"[\u2212\u2013]"), "-"),
    (re.compile(r"[\[{]"), "("),
    (re.compile(r"[\]}]"), ")"),
)
PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2, "negative": 3}


def spelled(expression: str) -> str:
    """An expression with + - * / and parentheses for all that means the same."""
    for pattern, spelling in SPELLINGS:
        expression = pattern.sub(spelling, expression)
    return expression


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """(exact value, the numbers used) of whole numbers, + - * / and parentheses; None for anything else.

    The shunting-yard algorithm, in one pass and without recursion.
    """
    tokens = re.findall(r"\d+|\S", spelled(expression))
    values, operators, used, after_value = [], [], [], False
    for token in [*tokens, None]:
        if token is not None and token.isascii() and token.isdigit() and not after_value and len(token) <= 20:
            used.append(int(token))
            values.append(Fraction(used[-1]))
            after_value = True
        elif token == "(" and not after_value:
            operators.append(token)
        elif token in ("+", "-") and not after_value:
            operators += ["negative"] * (token == "-")
        elif (token in PRECEDENCE or token in (")", None)) and after_value:
            while operators and operators[-1] != "(" and PRECEDENCE[operators[-1]] >= PRECEDENCE.get(token, 0):
                if not apply(operators.pop(), values):
                    return None
            if token == ")":
                if not operators:
                    return None
                operators.pop()
            elif token is not None:
                operators.append(token)
                after_value = False
        else:
            return None
    return (values[0], used) if not operators and len(values) == 1 else None


def apply(op: str, values: list[Fraction]) -> bool:
    """Replace the operands on top of a stack by the result; False where there is none."""
    y = values.pop()
    if op == "negative":
        values.append(-y)
        return True
    if op == "/" and y == 0:
        return False
    x = values.pop()
    values.append(x / y if op == "/" else OPERATIONS[op](x, y))
    return True


def expression_of(text: str, numbers: list[int]) -> str | None:
    """The expression of "E", "E = 23", "23 = E", "The equation is E = 23" or "E = 3 + 20 = 23"; None where its sides
    differ."""
    text = re.sub(r"\A`*(?!minus|negative)[A-Za-z]{3,}:?", "", re.sub(r"\s+", "", text))
    sides = spelled(text.rstrip(".")).split("=")
    found = [evaluate(side) for side in sides]
    if len(sides) > 1 and (None in found or len({value for value, _ in found}) > 1):
        return None
    uses_all = (side for side, made in zip(sides, found) if made and sorted(made[1]) == sorted(numbers))
    return next(uses_all, sides[0])


def countdown_answer(completion: str, problem: Problem) -> str | None:
    """The announced expression, without a true "= target" beside it; None without one, or with several."""
    answers = {expression_of(text, problem["numbers"]) for text in announcements(completion, problem)}
    return answers.pop() if len(answers) == 1 else None


def countdown_terms(completion: str, problem: Problem) -> tuple[float, float]:
    """(1 if the expression makes the target, 1 if it uses every number exactly once); both 0 without the latter."""
    found = evaluate(countdown_answer(completion, problem) or "")
    if found is None or sorted(found[1]) != sorted(problem["numbers"]):
        return 0.0, 0.0
    return float(found[0] == problem["target"]), 1.0


def countdown_reward(completion: str, problem: Problem) -> Reward:
    """d1's: 1 for the target made of all the numbers, 0.1 for another value made of all the numbers."""
    right, all_used = countdown_terms(completion, problem)
    return {"correctness": 0.9 * right, "format": 0.1 * all_used}


# ---------------------------------------------------------------------------------------------
# Sudoku, 4 x 4: 288 solved grids, so that uniqueness and marginals are counted and not searched
# ---------------------------------------------------------------------------------------------

SIDE, BOX, EMPTY = 4, 2, "0"
CLUES = (5, 8)  # fewest and most clues of a generated puzzle; 4 is the least that a unique puzzle can have


def peers(cell: int) -> set[int]:
    """The cells that share a row, a column or a box with `cell`, 0 ... 15, itself not included."""
    row, column = divmod(cell, SIDE)
    box = lambda r, c: (r // BOX, c // BOX)
    places = ((r, c) for r in range(SIDE) for c in range(SIDE))
    return {r * SIDE + c for r, c in places if r == row or c == column or box(r, c) == box(row, column)} - {cell}


@functools.cache
def solved_grids() -> tuple[str, ...]:
    """All 288 solved 4 x 4 grids, 16 digits each, row by row."""
    before = [[p for p in peers(cell) if p < cell] for cell in range(SIDE * SIDE)]
    grids = [""]
    for cell in range(SIDE * SIDE):
        grids = [g + d for g in grids for d in "1234" if all(g[p] != d for p in before[cell])]
    return tuple(grids)


@functools.cache
def grid_bits() -> tuple[int, ...]:
    """Each solved grid as a set of (cell, digit) pairs, one bit each: a puzzle is a subset of its solutions."""
    return tuple(clue_bits(grid) for grid in solved_grids())


def clue_bits(puzzle: str) -> int:
    """The clues of a puzzle as a set of (cell, digit) pairs, one bit each."""
    return sum(1 << (10 * cell + int(digit)) for cell, digit in enumerate(puzzle) if digit != EMPTY)


def solutions(puzzle: str) -> list[str]:
    """Every solved grid that agrees with a puzzle's clues."""
    clues = clue_bits(puzzle)
    return [grid for grid, bits in zip(solved_grids(), grid_bits()) if bits & clues == clues]


def draw_sudoku(rng: random.Random, split: str) -> Problem | None:
    """One puzzle with its only solution; None if it has others, or its split is another.

    A puzzle belongs to one split by its own digits; "unseen" puzzles have solutions (an eighth of the 288)
    that no other split shows.
    """
    solution = rng.choice(solved_grids())
    clues = set(rng.sample(range(SIDE * SIDE), rng.randint(*CLUES)))
    puzzle = "".join(digit if cell in clues else EMPTY for cell, digit in enumerate(solution))
    part = "unseen" if crc(solution) % 8 == 0 else part_of(puzzle)
    return {"question": puzzle, "answer": solution} if part == split and len(solutions(puzzle)) == 1 else None


def check_sudoku(row: dict, where: str) -> Problem:
    """A puzzle with its solution; DataError says what is wrong at `where`. Several solutions are allowed."""
    row, example = {name.lower(): value for name, value in row.items()}, "a sudoku file has the header Puzzle,Solution"
    puzzle, solution = (
        "".join(pick_text(row, names, where, example).split())
        for names in (("puzzle", *QUESTION), ("solution", *ANSWER))
    )
    if not puzzle.isdigit() and (within := re.search(r"(?<!\d)[0-4]{16}(?!\d)", puzzle)):
        puzzle = within[0]  # a prompt with the puzzle in it
    # a spreadsheet drops the zeros that a puzzle begins with
    puzzle = puzzle.zfill(SIDE * SIDE) if puzzle.isdigit() else puzzle
    if not re.fullmatch(r"[0-4]{16}", puzzle):
        raise DataError(f"{where}: puzzle {puzzle!r} is not 16 digits 0 to 4, row by row, 0 for empty")
    if not re.fullmatch(r"[1-4]{16}", solution):
        raise DataError(f"{where}: solution {solution!r} is not 16 digits 1 to 4, row by row")
    if EMPTY not in puzzle:
        raise DataError(f"{where}: puzzle {puzzle} has no empty cell (0)")
    if not solutions(puzzle):
        raise DataError(f"{where}: puzzle {puzzle} has no solution")
    if solution not in solutions(puzzle):
        raise DataError(f"{where}: solution {solution} does not solve puzzle {puzzle}")
    return {"question": puzzle, "answer": solution}


def grid_text(digits: str) -> str:
    """Four lines of four digits with spaces between: one token per cell in most vocabularies."""
    return "\n".join(" ".join(digits[i : i + SIDE]) for i in range(0, len(digits), SIDE))


DIGITS = re.compile(r"[0-9\s|,.+\-\[\]*_&\\\u2500-\u257f]+")  # and what draws a table of them


# The name of a row of four cells: "Row 1: ", "| R1 |", "1. "; and numbers that are none: of a list, a column, a puzzle.
ROW_NAME = re.compile(
    r"^[ \t|>*-]{0,9}(?:r(?:ow)?[ \t]{0,3}[1-4]|[1-4][.):])[ \t:|*]{1,9}(?=(?:[ \t|,*&_]{0,5}[0-4]){4}[ \t|*,.]{0,9}$)",
    re.IGNORECASE | re.MULTILINE,
)
NO_CELL = re.compile(
    r"^[ \t>*-]{0,9}\d{1,2}[.)][ \t]+(?=[*_]*[a-z])|\bc(?:ol(?:umn)?)? ?\d\b|(?<=[a-z]) \d{1,2}(?=[.:,]?[ \t]{0,9}$)",
    re.IGNORECASE | re.MULTILINE,
)


def sudoku_grid(completion: str, problem: Problem) -> str | None:
    """The one set of 16 digits that stands alone, with words around it or not, in <answer> where there is one; an
    echo of the puzzle is none. None for several, and for anything but a grid with the puzzle's clues in place."""
    text, puzzle = SPECIAL.sub("", completion), problem["question"]
    text = NO_CELL.sub(";", ROW_NAME.sub("", text.replace("\\hline", "")))
    behind = re.split(r"</(?:reasoning|think)>", text)[-1]
    for parts in ([span.text for span in answer_tags(text)] or [behind], [text]):
        runs = [re.sub(r"\D", "", run) for part in parts for run in DIGITS.findall(part)]
        whole = (run for run in runs if len(run) % len(puzzle) == 0)  # one grid, or several without words between
        found = {run[i : i + len(puzzle)] for run in whole for i in range(0, len(run), len(puzzle))}
        grids = [grid for grid in found if grid != puzzle]
        if grids or "<answer>" in text:
            break
    grids = [grid for grid in grids if EMPTY not in grid] or grids  # what is still open is working
    given = len(grids) == 1 and all(c in (EMPTY, g) for c, g in zip(puzzle, grids[0]))
    return grids[0] if given else None


def sudoku_score(completion: str, problem: Problem) -> float:
    """The share of the empty cells that are right."""
    grid = sudoku_grid(completion, problem)
    if grid is None:
        return 0.0
    empty = [cell for cell, clue in enumerate(problem["question"]) if clue == EMPTY]
    return sum(grid[cell] == problem["answer"][cell] for cell in empty) / len(empty)


def sudoku_ceiling(problem: Problem) -> float:
    """The expected share of right cells where each empty one gets its most frequent digit among the puzzle's
    solutions: Bayes given the clues; 1 for a puzzle with one solution."""
    grids = solutions(problem["question"])
    empty = [cell for cell, clue in enumerate(problem["question"]) if clue == EMPTY]
    most = [max(sum(grid[cell] == digit for grid in grids) for digit in "1234") for cell in empty]
    return sum(most) / len(grids) / len(empty)


# ---------------------------------------------------------------------------------------------
# Text to image, in miniature: GenEval's categories on grids of codes
# ---------------------------------------------------------------------------------------------

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 98, 217), "yellow": (250, 200, 40)}
OPENINGS = ("a photo of", "a picture of", "a drawing of", "an image of", "a sketch of", "a view of")
NUMBERS = {"two": 2, "three": 3, "four": 4}
# What the first object's place has to be relative to the second's: (rows, columns) to go from it to the second.
RELATIONS = {"left of": (0, 1), "right of": (0, -1), "above": (1, 0), "below": (-1, 0)}
WIDTH, PARTS = 8, 4  # codes along an image's side; parts of an object, 2 x 2, row by row
CODEBOOK = 1 + len(SHAPES) * len(COLOURS) * PARTS  # code 0 is the background
TILE = 8  # pixels along a code's side


class Thing(NamedTuple):
    """An object: its shape, its colour, and the row and column of its upper left part."""

    shape: str
    colour: str
    row: int
    column: int


class Scene(NamedTuple):
    """What a prompt asks for. wanted: (shape, colour or None for any, how many) each; relation: between the two."""

    category: str
    wanted: tuple[tuple[str, str | None, int], ...]
    relation: str | None = None


def scenes() -> list[tuple[str, Scene]]:
    """All scenes, in words and as what they ask for, category by category, as GenEval names them."""
    pairs = [(a, b) for a in SHAPES for b in SHAPES if a != b]
    tints = [(s, t) for s in COLOURS for t in COLOURS]
    some = lambda shape, colour=None, n=1: (shape, colour, n)
    found = [(f"a {a}", Scene("single_object", (some(a),))) for a in SHAPES]
    found += [(f"a {a} and a {b}", Scene("two_object", (some(a), some(b)))) for a, b in pairs]
    found += [(f"{w} {a}s", Scene("counting", (some(a, None, n),))) for a in SHAPES for w, n in NUMBERS.items()]
    found += [(f"a {c} {a}", Scene("colors", (some(a, c),))) for a in SHAPES for c in COLOURS]
    found += [(f"a {a} {r} a {b}", Scene("position", (some(a), some(b)), r)) for a, b in pairs for r in RELATIONS]
    found += [
        (f"a {s} {a} and a {t} {b}", Scene("color_attr", (some(a, s), some(b, t)))) for a, b in pairs for s, t in tints
    ]
    return found


@functools.cache
def scene_table() -> dict[str, Scene]:
    """Every prompt of the miniature, opening and scene, and what it asks for."""
    return {f"{opening} {words}": scene for words, scene in scenes() for opening in OPENINGS}


def scene_of(prompt: str) -> Scene:
    """What a prompt asks for; DataError for a prompt that the miniature does not know."""
    scene = scene_table().get(" ".join(prompt.split()))
    if scene is None:
        raise DataError(
            f'prompt {prompt!r}: not one that the embedded t2i task knows, such as "a photo of a red circle and a '
            f'blue star"; shapes {", ".join(SHAPES)}; colours {", ".join(COLOURS)}'
        )
    return scene


def code_of(shape: str, colour: str, part: int) -> int:
    """The code of one part, 0 ... 3 row by row, of an object."""
    return 1 + (SHAPES.index(shape) * len(COLOURS) + list(COLOURS).index(colour)) * PARTS + part


def paint(things: list[Thing]) -> list[int]:
    """The 64 codes of an image that shows these objects."""
    codes = [0] * (WIDTH * WIDTH)
    for thing in things:
        for part in range(PARTS):
            place = (thing.row + part // 2) * WIDTH + thing.column + part % 2
            codes[place] = code_of(thing.shape, thing.colour, part)
    return codes


def image_codes(text: str) -> list[int] | None:
    """The codes of an image, spelled with spaces between; None for anything but 64 of the codebook's."""
    words = text[:1000].split()
    codes = [int(w) for w in words if re.fullmatch(r"\d{1,3}", w, re.ASCII)]
    return codes if len(codes) == len(words) == WIDTH * WIDTH and max(codes) < CODEBOOK else None


def find_things(codes: list[int]) -> tuple[list[Thing], int]:
    """(the objects with all four parts in place, the number of cells that belong to none of them)."""
    found = []
    for place, code in enumerate(codes):
        row, column = divmod(place, WIDTH)
        if code % PARTS == 1 and row < WIDTH - 1 and column < WIDTH - 1:  # the first part of an object
            around = [codes[place + step] for step in (0, 1, WIDTH, WIDTH + 1)]
            if around == list(range(code, code + PARTS)):
                kind = code // PARTS
                found.append(Thing(SHAPES[kind // len(COLOURS)], list(COLOURS)[kind % len(COLOURS)], row, column))
    return found, sum(code != 0 for code in codes) - PARTS * len(found)


def related(a: Thing, b: Thing, relation: str) -> bool:
    """Whether a is left of b, ...: the two do not share a column (a row) on the way from one to the other."""
    rows, columns = RELATIONS[relation]
    return rows * (b.row - a.row) + columns * (b.column - a.column) >= 2


def geneval(things: list[Thing], scene: Scene) -> bool:
    """GenEval's strict verdict: everything that was asked for is there, all at once. A count is exact; other objects
    may be there besides, as in GenEval."""
    matching = [
        [t for t in things if t.shape == shape and colour in (None, t.colour)] for shape, colour, _ in scene.wanted
    ]
    if scene.category == "counting":
        return len(matching[0]) == scene.wanted[0][2]
    if scene.relation:
        return any(related(a, b, scene.relation) for a in matching[0] for b in matching[1])
    return all(matching)


def t2i_reward(completion: str, problem: Problem) -> Reward:
    """geneval: 1 if the image shows what the prompt asks for; fidelity: 0.25 if it shows objects and none is broken.
    Nothing for an image or a prompt that is not the miniature's."""
    codes, scene = image_codes(completion), scene_table().get(problem["question"])
    if codes is None or scene is None:
        return {"geneval": 0.0, "fidelity": 0.0}
    things, broken = find_things(codes)
    return {"geneval": float(geneval(things, scene)), "fidelity": 0.25 * (bool(things) and not broken)}


def draw_scene(scene: Scene, rng: random.Random) -> list[Thing]:
    """A random image of a scene: objects on even rows and columns, of any colour where none is asked for."""
    while True:
        things = []
        for shape, colour, n in scene.wanted:
            for _ in range(n):
                row, column = 2 * rng.randrange(WIDTH // 2), 2 * rng.randrange(WIDTH // 2)
                things.append(Thing(shape, colour or rng.choice(list(COLOURS)), row, column))
        apart = len({(thing.row, thing.column) for thing in things}) == len(things)
        if apart and (scene.relation is None or related(*things, scene.relation)):
            return things


@functools.cache
def prompts_of(split: str) -> dict[str, list[str]]:
    """A split's prompts by category. Every fifth scene of a category is unseen in any wording; of the others each has
    one wording that only the test split has, one that only validation has, and four to train on."""
    found: dict[str, list[str]] = {}
    for number, (words, scene) in enumerate(scenes()):
        for i, opening in enumerate(OPENINGS):
            mine = {0: "test", 1: "validation"}.get((number + i) % len(OPENINGS), "train")
            if scene.category != "single_object" and number % 5 == 4:
                mine = "unseen"
            if mine == split:
                found.setdefault(scene.category, []).append(f"{opening} {words}")
    return found


def generate_t2i(split: str, n: int, seed: int) -> list[Problem]:
    """n prompts of a split, every category as often, each with an image that shows it; prompts repeat, images differ.
    The unseen split has no single objects: there are only four."""
    rng, prompts = random.Random(f"t2i {split} {seed}"), prompts_of(split)
    problems = []
    for i in range(n):
        prompt = rng.choice(prompts[list(prompts)[i % len(prompts)]])
        scene = scene_of(prompt)
        image = " ".join(map(str, paint(draw_scene(scene, rng))))
        problems.append({"question": prompt, "answer": image, "tag": scene.category})
    return problems


def check_t2i(row: dict, where: str) -> Problem:
    """A prompt, with what GenEval's metadata says of it; DataError says what is wrong in `where`."""
    prompt = pick(row, ("prompt", "question"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise DataError(f'{where}: field "prompt" is missing or not text')
    for field, kind in (("tag", str), ("include", list), ("exclude", list)):
        if not isinstance(row.get(field, kind()), kind):
            raise DataError(f'{where}: "{field}" is not {kind.__name__}; see GenEval\'s metadata')
    scene = {field: row[field] for field in ("include", "exclude") if field in row}
    return {"question": prompt.strip(), "answer": json.dumps(scene) if scene else "", "tag": row.get("tag", "")}


def load_prompts(path: str | None) -> list[Problem]:
    """Prompts from a text file, one per line, or from GenEval's metadata (.jsonl), as problems. Raises DataError.

    question is the prompt; answer what GenEval's detector has to find, {"include": [...], "exclude": [...]} as JSON,
    and tag the category (single_object, two_object, counting, colors, position, color_attr): both "" in a text file.
    """
    if path is None:
        raise DataError("t2i: give --data FILE, prompts one per line or GenEval's metadata .jsonl, or --data generated")
    if path.endswith(".jsonl"):
        problems = [check_t2i(row, where) for where, row in read_rows(path)]
    else:
        lines = read_text(path).split("\n")
        if any(line.startswith("{") for line in lines):
            raise DataError(f"{path}: holds JSON; GenEval's metadata goes by the name of .jsonl")
        problems = [check_t2i({"prompt": line}, path) for line in lines if line.strip()]
    if not problems:
        raise DataError(f"{path}: no prompts; expected one per line, or GenEval's metadata in a file .jsonl")
    return problems


@functools.cache
def tiles() -> np.ndarray:
    """The codebook as pictures, (65, 8, 8, 3) uint8."""
    book = np.full((CODEBOOK, TILE, TILE, 3), 245, np.uint8)
    y, x = (np.mgrid[: 2 * TILE, : 2 * TILE] - TILE + 0.5) / (TILE - 1)  # an object's pixels, about -1 ... 1
    inside = {
        "circle": x**2 + y**2 <= 0.9,
        "square": np.maximum(abs(x), abs(y)) <= 0.85,
        "triangle": (y <= 0.85) & (abs(x) <= (y + 1) / 2),
        "star": np.sqrt(abs(x)) + np.sqrt(abs(y)) <= 1.1,
    }
    for shape in SHAPES:
        for colour, rgb in COLOURS.items():
            picture = np.where(inside[shape][..., None], np.uint8(rgb), np.uint8(245))
            for part in range(PARTS):
                r, c = part // 2 * TILE, part % 2 * TILE
                book[code_of(shape, colour, part)] = picture[r : r + TILE, c : c + TILE]
    return book


def render(codes: list[int]) -> np.ndarray:
    """The decoder: 64 codes -> pixels (64, 64, 3) uint8. DataError for a code outside the codebook."""
    if len(codes) != WIDTH * WIDTH or not all(0 <= code < CODEBOOK for code in codes):
        raise DataError(f"an image of this task is {WIDTH * WIDTH} codes from 0 to {CODEBOOK - 1}")
    grid = tiles()[np.array(codes).reshape(WIDTH, WIDTH)]  # (8, 8, 8, 8, 3)
    return grid.transpose(0, 2, 1, 3, 4).reshape(WIDTH * TILE, WIDTH * TILE, 3)


# ---------------------------------------------------------------------------------------------
# Zebra: houses and their attributes
# ---------------------------------------------------------------------------------------------

HOUSES, ATTRIBUTES = 3, {"Color": ("red", "green", "blue"), "Name": ("Tom", "Ann", "Sam")}
ENTRIES = [entry for entries in ATTRIBUTES.values() for entry in entries]


@functools.cache
def arrangements() -> tuple[dict[str, int], ...]:
    """Every way to put the entries into the houses: entry -> house, 1 to HOUSES; 36 of them."""
    orders = [list(itertools.permutations(range(1, HOUSES + 1))) for _ in ATTRIBUTES]
    return tuple(
        {entry: house for entries, order in zip(ATTRIBUTES.values(), way) for entry, house in zip(entries, order)}
        for way in itertools.product(*orders)
    )


@functools.cache
def clues() -> dict[str, int]:
    """Every clue, of kinds that a tiny model can learn -> the set of arrangements that it allows, one bit each."""
    made: dict[str, Callable[[dict[str, int]], bool]] = {}
    for a in ENTRIES:
        for house in range(1, HOUSES + 1):
            made[f"{a} is in house {house}."] = lambda at, a=a, house=house: at[a] == house
    for a, b in itertools.permutations(ENTRIES, 2):
        made[f"{a} is directly left of {b}."] = lambda at, a=a, b=b: at[a] == at[b] - 1
        if ENTRIES.index(a) < ENTRIES.index(b):
            made[f"{a} lives with {b}."] = lambda at, a=a, b=b: at[a] == at[b]
    bits = {text: sum(1 << i for i, at in enumerate(arrangements()) if clue(at)) for text, clue in made.items()}
    return {text: allowed for text, allowed in bits.items() if allowed}


def draw_zebra(rng: random.Random, split: str) -> Problem | None:
    """A puzzle with one solution and no clue to spare; None if its split is another. The solution decides "unseen"."""
    chosen = rng.randrange(len(arrangements()))
    if (crc(f"arrangement {chosen}") % 8 == 0) != (split == "unseen"):
        return None
    true = [text for text, allowed in clues().items() if allowed >> chosen & 1]
    picked, left = [], -1
    for text in rng.sample(true, len(true)):
        if left & clues()[text] != left:  # it says something new
            picked.append(text)
            left &= clues()[text]
    for text in list(picked):
        rest = [other for other in picked if other != text]
        if functools.reduce(operator.and_, map(clues().get, rest), -1) == 1 << chosen:
            picked = rest
    at = arrangements()[chosen]
    rows = [[str(h), *(e for e in ENTRIES if at[e] == h)] for h in range(1, HOUSES + 1)]
    listed = " ".join(f"{name}: {', '.join(entries)}." for name, entries in ATTRIBUTES.items())
    question = f"Houses: {', '.join(row[0] for row in rows)}. {listed} {' '.join(picked)}"
    return zebra_problem(question, ["House", *ATTRIBUTES], rows) if split in ("unseen", part_of(question)) else None


def number_in(house: str) -> str:
    """1 for "House 1"."""
    return (re.search(r"\d+", house) or [house.strip()])[0]


def zebra_problem(question: str, header: list[str], rows: list[list[str]]) -> Problem:
    """A puzzle with its solution as a table, and as the lines that a model is to write."""
    rows = [[number_in(row[0]), *row[1:]] for row in rows]
    answer = "\n".join(f"{row[0]}: {', '.join(row[1:])}" for row in rows)
    return {"question": question, "answer": answer, "header": header, "rows": rows}


def check_zebra(row: dict, where: str) -> Problem:
    """puzzle and solution, as ZebraLogic has them: {"header": [...], "rows": [[...]]}, or {"House 1": {...}, ...}."""
    example = '"solution" is {"header": ["House", "Name", ...], "rows": [["1", "Eric", ...], ...]}'
    question = pick_text(row, ("puzzle", *QUESTION), where, f'ZebraLogic has "puzzle" and "solution"; {example}')
    table = table_of(pick(row, ("solution", *ANSWER)))
    if table is None:
        raise DataError(f'{where}: field "solution" holds no table; {example}')
    header, rows = table
    if any(not entry.strip("_ ") for entries in rows for entry in entries):
        raise DataError(
            f"{where}: the solution is blank (___), as in ZebraLogic's public copy; rewards need it filled in"
        )
    if len({len(entries) for entries in rows} | {len(header)}) != 1 or len(header) < 2:
        raise DataError(f"{where}: a row of the solution has not the {len(header)} entries of its header")
    return zebra_problem(question, header, rows)


def table_of(value) -> tuple[list[str], list[list[str]]] | None:
    """(header, rows) of a solution in any of its spellings, also as JSON text; None for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    for name in ("solution", "final_answer", "answer", "houses"):
        if isinstance(value, dict) and isinstance(value.get(name), (dict, list)):
            value = value[name]
    if isinstance(value, dict) and isinstance(value.get("rows"), list) and isinstance(value.get("header"), list):
        if all(isinstance(row, list) for row in value["rows"]) and value["rows"]:
            return list(map(str, value["header"])), [[str(entry) for entry in row] for row in value["rows"]]
        return None
    if isinstance(value, dict) and value and all(isinstance(entries, dict) for entries in value.values()):
        header = list(dict.fromkeys(name for entries in value.values() for name in entries))
        houses = [(re.search(r"\d+", str(house)), entries) for house, entries in value.items()]
        if all(number for number, _ in houses) and header:
            rows = [[number[0], *(str(entries.get(name, "")) for name in header)] for number, entries in houses]
            return ["House", *header], rows
    return None


HOUSE_LINE = re.compile(
    r"[ \t|>*#-]{0,10}(house)?[ \t#]{0,3}(\d{1,2})\**[ \t]{0,3}(?(1)(?:[:|,;.)-]|$)|[:|,;.)-])(.*)", re.IGNORECASE
)


def zebra_answer(completion: str, problem: Problem) -> dict[str, list[str]] | None:
    """House -> its entries in the header's order, in lower case, "" where one is missing; None without a table, or
    where a house has two different rows. Read are JSON as in ZebraLogic, and what `house_rows` reads."""
    text = SPECIAL.sub("", completion).replace(problem["question"], "").replace(INSTRUCTIONS["zebra"], "")
    for tag in ("</reasoning>", "</think>"):
        text = text.rpartition(tag)[2] or text
    text = text.rpartition("<answer>")[2].partition("</answer>")[0]
    header = list(map(key_of, problem["header"]))
    table = table_of(read_object(text))
    rows = house_rows(text, header) if table is None else [place(entries, table[0], header) for entries in table[1]]
    found: dict[str, list[str]] = {}
    rows = [[house, *(re.sub(r"[\s*_]+", " ", entry).strip().casefold() for entry in row)] for house, *row in rows]
    for house, *entries in sorted(rows, key=lambda row: "?" in row):  # what is open does not count beside the rest
        if found.setdefault(number_in(house), entries) != entries and "?" not in entries:
            return None
    return found or None


def key_of(name: str) -> str:
    """What "Book Genre", "book_genre" and "BookGenre" have in common."""
    return re.sub(r"[\s*_]+", "", name).casefold()


def place(entries: list[str], names: list[str], header: list[str]) -> list[str]:
    """Entries under names of their own, in the header's order; "" where one is missing."""
    placed = dict(zip(map(key_of, names), entries))
    return [placed.get(name, "") for name in header]


def house_rows(text: str, header: list[str]) -> list[list[str]]:
    """The rows of a table in lines: "1: red, Tom", "| 1 | red | Tom |", "House 1: Name: Tom, Color: red", or "House 1:"
    and "- Name: Tom" below it. Entries stand under their own names, else in the order of the table's own header or of
    the problem's."""
    rows, order = [], header[1:]
    for line in text.split("\n"):
        match = HOUSE_LINE.match(line) if len(line) <= LONGEST else None
        cells = re.split(r"[,;|]", (match[3] if match else line[:LONGEST]).strip(" \t|.*-"))
        pairs = [cell.partition(":")[::2] for cell in cells if cell.strip()]
        names = [key_of(name) for name, _ in pairs]
        entries = [entry for _, entry in pairs]
        if match:
            rows.append([match[2], *[""] * len(order)])
        if sorted(names) == sorted(header) and not any(entries):
            order = names[1:]
        elif match and len(pairs) == len(order) and not (set(names) <= set(order) and all(entries)):
            rows[-1][1:] = place([entry or name.strip() for name, entry in pairs], order, header[1:])
        elif rows and pairs and set(names) <= set(order) and all(entries):
            for name, entry in zip(names, entries):
                at = header.index(name)
                rows[-1][at] = entry if rows[-1][at] in ("", entry) else "-"  # two of them are none
    return [row for row in rows if any(row[1:])]


def zebra_score(completion: str, problem: Problem) -> float:
    """The share of the table's entries that are right."""
    found = zebra_answer(completion, problem) or {}
    rows = problem["rows"]
    right = sum(a.strip().casefold() == b for house, *entries in rows for a, b in zip(entries, found.get(house, [])))
    return right / sum(len(row) - 1 for row in rows)


# ---------------------------------------------------------------------------------------------
# The table of tasks, and their splits
# ---------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One task, as callables on text."""

    generate: Callable[[str, int, int], list[Problem]]  # (split, n, seed) -> n different problems
    check: Callable[[dict, str], Problem]  # (row of a published file, where it stands) -> problem
    load: Callable[[str | None, str], list[Problem]]  # (file, or None for the published data; split)
    messages: Callable[[Problem], list[dict[str, str]]]  # what the model is asked, for a chat template
    target: Callable[[Problem], str]  # what SFT teaches it to write
    reward: Callable[[str, Problem], Reward]  # (completion, problem) -> named terms; the reward is their sum
    score: Callable[[str, Problem], float]  # (completion, problem) -> how much of it is solved, 0 to 1
    answer: Callable[[str, Problem], Any]  # (completion, problem) -> the answer that is scored; None or empty: none
    # To be filled in: the target, but for other characters where it is open. None: all of it is the model's own.
    blanks: Callable[[Problem], str] | None = None
    ceiling: Callable[[Problem], float] | None = None  # the best expected score of one who knows all but the answer
    # Codes of an image's codebook where the completion is an image, 0 for text; and an image's pixels from its codes.
    codebook: int = 0
    render: Callable[[list[int]], np.ndarray] | None = None
    category: Callable[[Problem], str] | None = None  # what accuracy is reported by, besides overall
    test_draw: int = 1  # the seed of generated test and unseen problems; a new one once figures on them guided a choice
    runs_code: bool = False  # its reward runs what the model wrote: only with --allow_code_execution


def task(name: str, draw: Callable, check: Callable, hub: dict, example: str, **row) -> Task:
    """A row of TASKS from how one problem is drawn, and how one row of published data is read."""
    generator, loader = functools.partial(generate, name, draw), functools.partial(load_rows, check, hub, example)
    row = {"messages": lambda problem: chat(name, problem["question"])} | row
    return Task(generate=generator, check=check, load=loader, **row)


TASKS = {
    "gsm8k": task(
        "gsm8k",
        draw_gsm8k,
        check_gsm8k,
        {split: ("openai/gsm8k", "main", split) for split in ("train", "test")},
        'lines {"question": "...", "answer": "... #### 42"}',
        target=gsm8k_target,
        reward=gsm8k_reward,
        score=gsm8k_correct,
        answer=gsm8k_answer,
    ),
    "math500": task(
        "math500",
        draw_math500,
        check_math500,
        {
            "train": ("DigitalLearningGmbH/MATH-lighteval", None, "train"),
            "test": ("HuggingFaceH4/MATH-500", None, "test"),
        },
        'lines {"problem": "...", "solution": "... \\\\boxed{42}"}',
        target=operator.itemgetter("solution"),
        reward=math500_reward,
        score=math500_correct,
        answer=math500_answers,
    ),
    "mbpp": task(
        "mbpp",
        draw_mbpp,
        check_mbpp,
        {split: ("google-research-datasets/mbpp", "full", split) for split in ("train", "test")},
        'lines {"text": "...", "code": "...", "test_list": ["assert ..."]}',
        messages=mbpp_messages,
        target=mbpp_target,
        reward=mbpp_reward,
        score=mbpp_score,
        answer=lambda completion, problem: extract_code(completion, problem["tests"]),
        runs_code=True,
    ),
    "countdown": task(
        "countdown",
        draw_countdown,
        check_countdown,
        # one split: its last 1,024 problems are held out
        {
            "train": ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train[:-1024]"),
            "test": ("Jiayi-Pan/Countdown-Tasks-3to4", None, "train[-1024:]"),
        },
        'lines {"nums": [3, 8, 5], "target": 6} or {"input": "3,8,5", "output": "6"}',
        target=countdown_target,
        reward=countdown_reward,
        score=lambda completion, problem: countdown_terms(completion, problem)[0],
        answer=countdown_answer,
    ),
    "sudoku": task(
        "sudoku",
        draw_sudoku,
        check_sudoku,
        {},
        "a CSV file with the header Puzzle,Solution",
        messages=lambda problem: chat("sudoku", "Sudoku:"),  # the clues stand in the completion itself
        target=lambda problem: grid_text(problem["answer"]),
        reward=lambda completion, problem: {"cells": sudoku_score(completion, problem)},
        score=sudoku_score,
        answer=sudoku_grid,
        blanks=lambda problem: grid_text(problem["question"]),
        ceiling=sudoku_ceiling,
        test_draw=2,
    ),
    "t2i": Task(
        generate=generate_t2i,
        check=check_t2i,
        load=lambda path, split: load_prompts(path),
        messages=lambda problem: [{"role": "user", "content": problem["question"]}],
        target=operator.itemgetter("answer"),
        reward=t2i_reward,
        score=lambda completion, problem: t2i_reward(completion, problem)["geneval"],
        answer=lambda completion, problem: image_codes(completion),
        codebook=CODEBOOK,
        render=render,
        category=operator.itemgetter("tag"),
    ),
    "zebra": task(
        "zebra",
        draw_zebra,
        check_zebra,
        {},
        'lines {"puzzle": "...", "solution": {"header": [...], "rows": [[...]]}}',
        target=operator.itemgetter("answer"),
        reward=lambda completion, problem: {"entries": zebra_score(completion, problem)},
        score=zebra_score,
        answer=zebra_answer,
    ),
}


def generated_splits(task: Task, n: int, seed: int) -> dict[str, list[Problem]]:
    """Generated problems: train from the run's seed, 256 for validation, n for test and for unseen.

    Held-out problems are the same for every run. validation is for choices; test and unseen are for figures only.
    """
    held_out = {"validation": task.generate("validation", 256, 0)}
    held_out |= {split: task.generate(split, n, task.test_draw) for split in ("test", "unseen")}
    return {"train": task.generate("train", 20_000, seed)} | held_out


def published_splits(task: Task, data: str | None, eval_data: str | None, n: int) -> dict[str, list[Problem]]:
    """Published problems, from files or by `datasets` (data None). Held-out problems never train.

    test is eval_data, else the published test split, else every tenth problem of data; its first n (0: all).
    validation is the last tenth of what remains, 256 at most. There is no unseen split.
    """
    train = task.load(data, "train")
    if eval_data or data is None:
        test = task.load(eval_data, "test")
    else:
        test = train[9::10]
    held_out = {p["question"] for p in test}
    train = list({p["question"]: p for p in train if p["question"] not in held_out}.values())  # each problem once
    held = min(256, len(train) // 10)
    if not test or not held:
        raise DataError(f"{data}: {len(train)} problems are too few to hold some out; give 20 or more, or --eval_data")
    return {"train": train[:-held], "validation": train[-held:], "test": test[: n or None], "unseen": []}


# ---------------------------------------------------------------------------------------------
# Verdicts -> figures
# ---------------------------------------------------------------------------------------------


def accuracy(scores: list[float]) -> dict[str, float]:
    """{"accuracy", "stderr", "n"} of one score per problem; of verdicts 0 and 1 the stderr is the binomial one."""
    n, p = len(scores), sum(scores) / len(scores)
    variance = max(sum(score * score for score in scores) / n - p * p, 0.0)
    return {"accuracy": round(p, 6), "stderr": round(math.sqrt(variance / n), 6), "n": n}


def pass_at(scores: list[list[float]], k: int) -> float:
    """pass@k: the mean over problems of the best of k samples' expected score, from n >= k samples each, unbiased.

    The i-th lowest of n scores is the best of C(i - 1, k - 1) of the C(n, k) subsets of size k. With c of n
    verdicts 1 and the others 0 it is the usual 1 - C(n - c, k) / C(n, k).
    """
    best = lambda row: sum(math.comb(i, k - 1) * score for i, score in enumerate(sorted(row))) / math.comb(len(row), k)
    return sum(map(best, scores)) / len(scores)


def paired_p(before: list[float], after: list[float]) -> float:
    """Two-sided exact sign test on the same problems (McNemar's, for verdicts): how likely so uneven a split of the
    changed scores into better and worse is by chance."""
    won = sum(a > b for b, a in zip(before, after, strict=True))
    lost = sum(b > a for b, a in zip(before, after, strict=True))
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


# ---------------------------------------------------------------------------------------------
# Images: codes -> pixels -> numbers
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MagvitConfig:
    """The MAGVIT-v2 decoder's sizes, under the published code's names; the defaults are showlab/magvitv2's."""

    ch: int = 128  # channels at the finest level
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # channels of each level in units of ch, finest level first
    num_res_blocks: tuple[int, ...] = (4, 4, 3, 4, 3)  # of each level, finest level first
    z_channels: int = 13  # bits of a code: a codebook of 2 ** 13


group_norm = functools.partial(nn.GroupNorm, 32, eps=1e-6)


def named(**modules: nn.Module) -> nn.Sequential:
    """Modules in a row, each under its published name."""
    return nn.Sequential(OrderedDict(modules))


class ResnetBlock(nn.Module):
    """x + f(x) with f = conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution carries x to another width."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(width), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """x + attention among all places of x, one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = group_norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT for conv in (self.q, self.k, self.v))  # (B, places, C)
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))


class MagvitDecoder(nn.Module):
    """The decoder of the image tokenizer that Show-o published and MMaDA uses (MAGVIT-v2, arXiv 2310.05737).

    Its parameters have the published names, so the published weights load as they are: `load_magvit`.
    """

    def __init__(self, config: MagvitConfig = MagvitConfig()):
        super().__init__()
        self.config = config
        widths = [config.ch * multiple for multiple in config.ch_mult]
        width, bits = widths[-1], config.z_channels
        self.post_quant_conv = nn.Conv2d(bits, bits, 1)
        self.conv_in = nn.Conv2d(bits, width, 3, padding=1)
        self.mid = named(block_1=ResnetBlock(width, width), attn_1=AttnBlock(width), block_2=ResnetBlock(width, width))
        levels = []
        for level in reversed(range(len(widths))):  # coarsest first; published in the other order
            out = widths[level]
            blocks = [ResnetBlock(out if i else width, out) for i in range(config.num_res_blocks[level])]
            parts = {"block": nn.Sequential(*blocks)}
            if level:
                parts["upsample"] = named(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(out, out, 3, padding=1))
            levels.append(named(**parts))
            width = out
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out, self.conv_out = group_norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, h * h) long codes, row by row -> (B, 3, H, H) float, about -1 to 1; H is 16 h as published."""
        bits, side = self.config.z_channels, math.isqrt(codes.shape[1])
        # Lookup-free quantisation: a code's bits, the most significant first, are its vector of -1 and 1.
        z = codes[:, None, :] >> torch.arange(bits - 1, -1, -1, device=codes.device)[:, None] & 1
        z = (2 * z - 1).to(self.conv_in.weight.dtype).reshape(-1, bits, side, side)
        h = self.mid(self.conv_in(self.post_quant_conv(z)))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    @torch.no_grad()
    def pixels(self, codes: Tensor, batch: int = 8) -> Tensor:
        """(B, h * h) long codes, row by row -> (B, H, H, 3) uint8 on the decoder's device, `batch` images at a time.

        Raises DataError for a code outside the codebook and for codes that are no square.
        """
        size, side = 2**self.config.z_channels, math.isqrt(codes.shape[1])
        if side * side != codes.shape[1]:
            raise DataError(f"an image of {codes.shape[1]} codes is not square; MMaDA's has 32 * 32 = 1024")
        outside = ((codes < 0) | (codes >= size)).nonzero()
        if len(outside):
            image, place = outside[0].tolist()
            code = codes[image, place].item()
            raise DataError(f"image {image}, place {place}: code {code} is outside the codebook, 0 to {size - 1}")
        parts = codes.to(self.conv_in.weight.device).split(batch)
        images = torch.cat([self(part) for part in parts])
        return (127.5 * (images.float().clamp(-1, 1) + 1)).round().to(torch.uint8).permute(0, 2, 3, 1)


def load_magvit(where: str, device: str | torch.device = "cpu") -> MagvitDecoder:
    """The MAGVIT-v2 decoder from a weights file, a folder that holds one, or a hub id such as showlab/magvitv2.

    config.json beside the weights gives the sizes; where it names none, as the published one, they are the
    published sizes. The encoder's weights are skipped. Raises DataError.
    """
    file = magvit_file(where)
    beside = file.with_name("config.json")
    try:
        raw = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        sizes = {f.name: raw[f.name] for f in fields(MagvitConfig) if f.name in raw}
        config = MagvitConfig(**{name: tuple(size) if isinstance(size, list) else size for name, size in sizes.items()})
        with torch.device("meta"):
            decoder = MagvitDecoder(config)
    except Exception as error:  # what a nonsensical config.json raises has no common class
        raise DataError(f"{beside}: not the sizes of a MAGVIT-v2 decoder ({first_line(error)})") from None
    try:
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        weights = {name: weight.float() for name, weight in weights.items() if name.startswith("decoder.")}
    except Exception as error:  # likewise: a file may hold anything
        raise DataError(f"{file}: cannot be read as weights by name ({first_line(error)})") from None
    expected = {f"decoder.{name}": weight.shape for name, weight in decoder.state_dict().items()}
    found = {name: weight.shape for name, weight in weights.items()}
    wrong = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if wrong:
        shape = lambda shapes: list(shapes[wrong[0]]) if wrong[0] in shapes else "nothing"
        raise DataError(
            f"{file}: {len(wrong)} weights do not fit a MAGVIT-v2 decoder of {config}; the first is {wrong[0]}: "
            f"expected {shape(expected)}, found {shape(found)}"
        )
    decoder.load_state_dict({name.removeprefix("decoder."): w for name, w in weights.items()}, assign=True)
    return decoder.requires_grad_(False).eval().to(device)


def magvit_file(where: str) -> Path:
    """The weights file at `where`, as in `load_magvit`: safetensors before .bin and .pth. Raises DataError."""
    folder = Path(where)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(where, allow_patterns=["config.json", "*.safetensors", "*.bin", "*.pth"]))
        except Exception as error:  # the hub's errors have no common class
            reason = f"not a file, not a folder, and not to be had from the hub ({first_line(error)})"
            raise DataError(f"MAGVIT-v2 weights {where}: {reason}") from None
    for pattern in ("*.safetensors", "*.bin", "*.pth"):
        if files := sorted(folder.glob(pattern)):
            return files[0]
    raise DataError(f"{where}: no weights in it; expected a file .safetensors, .bin or .pth")


def first_line(error: Exception) -> str:
    """What an exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def png(image: Tensor) -> bytes:
    """A PNG file of an image (H, W, 3) uint8: 8-bit RGB, no row filters."""
    height, width, _ = image.shape
    rows = F.pad(image.cpu().reshape(height, 3 * width), (1, 0)).numpy().tobytes()  # filter 0 before each row
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*parts) for parts in chunks)


CLIP = "openai/clip-vit-large-patch14"  # the one that the official code takes


def load_clip(where: str = CLIP, device: str | torch.device = "cpu") -> tuple:
    """(CLIPModel, CLIPProcessor) of transformers, from a folder or a hub id. Raises DataError."""
    if importlib.util.find_spec("PIL") is None:
        raise DataError("CLIP's image processor needs Pillow: pip install pillow")
    from transformers import CLIPModel, CLIPProcessor  # slow to import, and the other rewards do without

    try:
        processor = CLIPProcessor.from_pretrained(where, trust_remote_code=False)
        return CLIPModel.from_pretrained(where).to(device).eval(), processor
    except Exception as error:  # what a broken checkpoint raises has no common class
        raise DataError(f"CLIP {where}: cannot be loaded ({first_line(error)})") from None


@torch.no_grad()
def clip_score(images: Tensor, prompts: list[str], model, processor, batch: int = 32) -> list[float]:
    """100 max(0, cosine) of each image with its prompt, after Hessel et al. (arXiv 2104.08718, eq. 1), who have 2.5
    for 100. The official code has the bare cosine: weigh by 0.01 for its scale.

    images (B, H, W, 3) uint8; longer prompts than CLIP's text model takes (77 tokens) are cut.
    """
    length = model.config.text_config.max_position_embeddings
    scores = []
    for start in range(0, len(prompts), batch):
        part = slice(start, start + batch)
        pictures = list(images[part].cpu().numpy())
        settings = {"return_tensors": "pt", "padding": True, "truncation": True, "max_length": length}
        inputs = processor(text=prompts[part], images=pictures, input_data_format="channels_last", **settings)
        out = model(**inputs.to(model.device))
        cosine = (out.image_embeds * out.text_embeds).sum(-1)  # (b,), both of length 1
        scores += (100 * cosine.clamp(min=0)).tolist()
    return scores


class ScorerError(DataError):
    """A remote scorer that cannot be used: its URL, whether it is down, slow or answers nonsense, and the attempts."""


class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: a POST that follows one arrives as a GET, or on a host that nobody named."""

    def redirect_request(self, *args):
        return None


LARGEST_ANSWER = 1 << 20  # bytes


@dataclass
class RemoteScorer:
    """A reward model that the user serves (HPSv3, UnifiedReward, ImageReward ...), as a callable on images.

    Request: POST of JSON {"name": ..., "prompts": [...], "images": [base64 of a PNG, ...]}. Answer: JSON
    {"scores": [...]}, one finite number per image. A scorer that is down, slow or answers 5xx is asked again.
    """

    url: str
    name: str
    timeout: float = 120.0  # seconds for one answer
    retries: int = 3  # further attempts of one request
    pause: float = 1.0  # seconds before the first further attempt; doubled before each next one
    batch: int = 32  # images per request

    def __call__(self, images: Tensor, prompts: list[str]) -> list[float]:
        """images (B, H, W, 3) uint8, B prompts -> B scores. Raises ScorerError."""
        scores = []
        for start in range(0, len(prompts), self.batch):
            part = slice(start, start + self.batch)
            pngs = [base64.b64encode(png(image)).decode() for image in images[part]]
            body = {"name": self.name, "prompts": prompts[part], "images": pngs}
            scores += self.scores(self.post(json.dumps(body).encode()), len(pngs))
        return scores

    def post(self, body: bytes) -> bytes:
        """The answer to one request, after up to `retries` further attempts."""
        for attempt in range(1, self.retries + 2):
            if attempt > 1:
                time.sleep(self.pause * 2 ** (attempt - 2))
            try:
                return self.answer(body)
            except urllib.error.HTTPError as error:
                error.close()
                reason = f"HTTP {error.code}"
                if error.code < 500 and error.code != 429:  # asking again would not change it
                    to = f" to {error.headers['Location']!r}" if 300 <= error.code < 400 else ""
                    raise ScorerError(f"{self.url}: {reason}{to}, on attempt {attempt}; expected 200") from None
            except (OSError, http.client.HTTPException, UnicodeError) as error:
                cause = getattr(error, "reason", error)  # urllib wraps what happens before the answer begins
                slow = isinstance(cause, TimeoutError)
                reason = f"slow: no answer in {self.timeout:g} s" if slow else f"down: {first_line(cause)}"
        raise ScorerError(f"{self.url}: {reason}; {attempt} attempts; is the scorer running there?")

    def answer(self, body: bytes) -> bytes:
        """The answer to one attempt; TimeoutError past the timeout, even where it trickles in."""
        deadline = time.monotonic() + self.timeout
        # A scorer is a process of the user's own, so no proxy stands between.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), NoRedirect)
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        content = b""
        with opener.open(request, timeout=self.timeout) as response:
            while part := response.read1(1 << 16):
                content += part
                if len(content) > LARGEST_ANSWER:
                    raise ScorerError(f"{self.url}: nonsense: an answer above {LARGEST_ANSWER} bytes")
                if time.monotonic() > deadline:
                    raise TimeoutError
        return content

    def scores(self, content: bytes, count: int) -> list[float]:
        """`count` finite numbers from an answer; ScorerError where it holds anything else."""
        wanted = f'expected {{"scores": [{count} finite numbers]}}'
        try:
            scores = json.loads(content)["scores"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ScorerError(f"{self.url}: nonsense: {content[:60]!r}; {wanted}") from None
        if not isinstance(scores, list) or len(scores) != count:
            found = f"{len(scores)} scores for {count} images" if isinstance(scores, list) else "scores is no list"
            raise ScorerError(f"{self.url}: nonsense: {found}; {wanted}")
        for score in scores:
            # NaN fails every comparison, and an integer of any length can be compared
            if isinstance(score, bool) or not isinstance(score, int | float) or not abs(score) < 1e30:
                raise ScorerError(f"{self.url}: nonsense: a score is {str(score)[:60]!r}; {wanted}")
        return [float(score) for score in scores]


class Scorer(NamedTuple):
    """One term of a reward on pixels."""

    name: str
    weight: float
    where: str  # a CLIP folder or hub id, or the URL of a remote scorer


SCORERS = "expected WHERE=WEIGHT,... with WHERE clip, clip:PATH_OR_HUB_ID or http://HOST:PORT/NAME"


def parse_scorers(text: str) -> list[Scorer]:
    """The rewards that a flag names: "clip=1,http://127.0.0.1:8000/hpsv3=0.5". Raises DataError.

    A remote scorer's name is the last part of its URL. A weight of 0 reports a score and does not count it. The
    official mixture of its three scales: clip=0.01, and 0.2 for each of HPSv3 and UnifiedReward.
    """
    scorers: dict[str, Scorer] = {}
    for term in text.split(","):
        where, _, number = term.strip().rpartition("=")
        try:
            weight = float(number)
            url = urllib.parse.urlsplit(where)
            host = url.scheme in ("http", "https") and url.hostname and url.port != 0 and "@" not in url.netloc
        except ValueError as error:  # no weight, or no port
            raise DataError(f"reward {term.strip()!r}: {error}; {SCORERS}") from None
        if not math.isfinite(weight):
            raise DataError(f"reward {term.strip()!r}: a weight is a finite number")
        name = url.path.rpartition("/")[2]
        if where == "clip" or where.startswith("clip:"):
            scorer = Scorer("clip", weight, where.removeprefix("clip").removeprefix(":") or CLIP)
        elif host and re.fullmatch(r"[!-~]+", where) and re.fullmatch(r"[\w.-]+", name):
            scorer = Scorer(name, weight, where)
        else:
            raise DataError(f"reward {term.strip()!r}: {SCORERS}")
        if scorer.name in scorers:
            raise DataError(f"reward {term.strip()!r}: {scorer.name!r} is named twice")
        scorers[scorer.name] = scorer
    return list(scorers.values())


class PixelReward:
    """Codes and prompts -> the terms of a reward on pixels; one decoder and one CLIP serve a whole rollout.

    decode: (B, L) long codes -> (B, H, W, 3) uint8, such as `load_magvit(...).pixels`. text: see `parse_scorers`.
    remote: settings of `RemoteScorer`, such as timeout and retries.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], text: str, device: str | torch.device = "cpu", **remote):
        self.decode = decode
        self.weights, self.scorers = {}, {}
        for name, weight, where in parse_scorers(text):
            self.weights[name] = weight
            if where.startswith(("http://", "https://")):
                self.scorers[name] = RemoteScorer(where, name, **remote)
            else:
                model, processor = load_clip(where, device)
                self.scorers[name] = functools.partial(clip_score, model=model, processor=processor)

    def __call__(self, codes: Tensor, prompts: list[str]) -> dict[str, list[float]]:
        """Each term's B scores, not yet weighed, by name. Raises DataError, which ScorerError is."""
        images = self.decode(codes)
        return {name: scorer(images, prompts) for name, scorer in self.scorers.items()}

    def total(self, scores: dict[str, list[float]]) -> list[float]:
        """The B rewards: the weighted sum of the terms."""
        rows = zip(*scores.values(), strict=True)
        return [sum(self.weights[name] * score for name, score in zip(scores, row)) for row in rows]


# ---------------------------------------------------------------------------------------------
# Files of completions -> figures; the command line
# ---------------------------------------------------------------------------------------------

SAID_RIGHT, SAID_WRONG = ("true", "correct", "right", "yes", "passed"), ("false", "incorrect", "wrong", "no", "failed")


class Scored(NamedTuple):
    """One completion of a file: where it stands, what it earns, and the file's own verdict (None: it has none)."""

    where: str
    reward: float
    score: float
    answer: Any
    gold: str
    verdict: bool | None


def is_chat(value) -> bool:
    """Whether a value is a list of messages, as chats are stored."""
    return (
        isinstance(value, list) and bool(value) and all(isinstance(m, dict) and {"role", "from"} & {*m} for m in value)
    )


def said_in(value):
    """The text of a completion: of a chat what the assistant says, of a message its content; other objects as JSON."""
    if is_chat(value):
        own = [m for m in value if m.get("role", m.get("from")) in ("assistant", "gpt")]
        return "\n".join(str(m.get("content", m.get("value", ""))) for m in own)
    if isinstance(value, dict):
        return value["content"] if isinstance(value.get("content"), str) else json.dumps(value)
    return value


def verdicts_of(row: dict, count: int) -> list[bool | None]:
    """The file's own verdict on each of a row's completions: one for all of them or a list; None where it has none."""
    value = pick(row, VERDICT)
    values = value if isinstance(value, list) else [value] * count
    words = [value.strip().lower() if isinstance(value, str) else value for value in values]
    verdicts = [True if w in (1, *SAID_RIGHT) else False if w in (0, *SAID_WRONG) else None for w in words]
    return verdicts if len(verdicts) == count else [None] * count


def completions_of(name: str, row: dict, where: str) -> list[str]:
    """The completions of one row, under any of their names. Of countdown, one with "input" and "output" is a row of
    data; "code" is the text of a solution where no program is asked for. A bare value that was parsed is the answer."""
    names = [*COMPLETION, *["code"] * (name != "mbpp"), *PARSED]
    if name == "countdown" and "input" in row and pick(row, GOLD) is None:
        names.remove("output")
    field = next((field for field in names if row.get(field) is not None), None)
    value = row.get(field)
    while isinstance(value, list) and len(value) == 1 and isinstance(value[0], list):
        value = value[0]
    values = value if isinstance(value, list) and not is_chat(value) else [value]
    texts = [said_in("" if text is None and len(values) > 1 else text) for text in values]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise DataError(f'{where}: no completion; expected a text in "completion" (or {", ".join(names[1:])})')
    bare = re.compile(r"(?![^\n]*(?<![\\a-zA-Z])[a-z]{3})[^\n]{1,60}")
    return [f"<answer>{t}</answer>" if field in PARSED and bare.fullmatch(t) and not announced(t) else t for t in texts]


def problem_of(name: str, row: dict, where: str) -> Problem:
    """The problem that a row's completions answer. Its question may be missing, and a number be all of its answer."""
    row = dict(row)
    for field in ("prompt", "question"):
        if isinstance(row.get(field), list):  # a chat
            row[field] = "\n".join(str(m.get("content", "")) for m in row[field] if isinstance(m, dict))
    if pick(row, QUESTION) is None:
        row["question"] = "(not given)"
    for field in {*GOLD, *ANSWER}:
        if isinstance(value := row.get(field), list) and len(value) == 1 and isinstance(value[0], (str, int, float)):
            row[field] = value[0]
    gold = pick(row, (*GOLD, *ANSWER))
    if name == "gsm8k" and isinstance(gold, (str, int, float)):
        row["answer"] = gold if "####" in str(gold) or announced(str(gold)) else f"#### {gold}"
    elif name == "math500" and (gold := pick(row, (*GOLD, *ANSWER[:-1]))) is not None:
        row["answer"] = gold
    problem = TASKS[name].check(row, where)
    return problem | ({"prompt": row["prompt"]} if isinstance(row.get("prompt"), str) else {})


def score_file(name: str, path: str) -> list[Scored]:
    """Every completion of a file, scored. DataError names the file and the line of what cannot be read."""
    rows = []
    for where, row in read_rows(path):
        row = {field.lower(): value for field, value in row.items()} | row
        for part in ("doc", "reward_model"):  # lm-evaluation-harness; verl
            row = row[part] | row if isinstance(row.get(part), dict) else row
        problem, texts = problem_of(name, row, where), completions_of(name, row, where)
        for text, verdict in zip(texts, verdicts_of(row, len(texts))):
            prompt = problem.get("prompt", "")
            text = without_echo(text.removeprefix(prompt), prompt)  # a whole prompt, however short, is an echo
            reward, score = sum(TASKS[name].reward(text, problem).values()), TASKS[name].score(text, problem)
            rows.append(Scored(where, reward, score, TASKS[name].answer(text, problem), problem["answer"], verdict))
    if not rows:
        raise DataError(f'{path}: no completions; expected lines {{"prompt": ..., "completion": ..., "answer": ...}}')
    return rows


def report(name: str, rows: list[Scored], as_json: bool) -> None:
    """Print accuracy, mean reward, the share without an answer, and where the file's own verdicts differ."""
    n = len(rows)
    mean = {"accuracy": sum(row.score for row in rows) / n, "mean_reward": sum(row.reward for row in rows) / n}
    mean["no_answer"] = sum(not row.answer and row.answer != 0 for row in rows) / n
    if as_json:
        print(json.dumps({"task": name, "n": n} | {key: round(value, 6) for key, value in mean.items()}))
        return
    print(f"{name}, {n} completions")
    for key, value in mean.items():
        print(f"{key.replace('_', ' '):<12} {value:.4f}")
    judged = [row for row in rows if row.verdict is not None]
    differ = [row for row in judged if row.verdict != (row.score == 1)]
    if judged:
        print(f"the file's own verdicts: {len(judged)}, of which {len(differ)} differ")
    for row in differ[:5]:
        own, ours = ("right" if verdict else "wrong" for verdict in (row.verdict, row.score == 1))
        print(
            f"  {row.where}: the file says {own}, here {ours}; answer {str(row.answer)[:60]!r}, gold {row.gold[-60:]!r}"
        )


def show(names: list[str]) -> None:
    """Problems of each split, and what completions of the first two tasks earn."""
    for name in names:
        print(f"{name}\n" + "-" * len(name))
        for split in SPLITS:
            problem = TASKS[name].generate(split, 1, 0)[0]
            print(f"{split:<11} {problem['question']}")
            print("".join(f"{'':<11} | {line}\n" for line in TASKS[name].target(problem).splitlines()))
    for name in names:
        problem = TASKS[name].generate("train", 1, 0)[0]
        if not TASKS[name].runs_code or code_execution_allowed:
            show_rewards(name, problem, tries(name, problem))


def tries(name: str, problem: Problem) -> list[str]:
    """A right completion of a problem, and what else somebody might write."""
    target = TASKS[name].target(problem)
    if name == "gsm8k":
        right = gold_answer(problem)
        return [
            target,
            f"#### {right}",
            f"The answer is \\boxed{{{right}.00}}.",
            f"{right}",
            f"#### 99\n#### {right}",
            "",
        ]
    if name == "sudoku":
        ones = grid_text(problem["question"].replace(EMPTY, "1"))
        return [target, ones, grid_text(solved_grids()[0]), target[:-2]]
    return [target, problem["answer"], problem["question"], target + "\n" + target.replace("1", "7"), ""]


def show_rewards(name: str, problem: Problem, completions: list[str]) -> None:
    """A table of completions and the terms of their rewards."""
    rows = [TASKS[name].reward(completion, problem) for completion in completions]
    print(f"What completions earn where the {name} problem is {problem['question']!r}:")
    print(f"{'completion':<60}" + "".join(f"{term:>13}" for term in rows[0]))
    for completion, row in zip(completions, rows):
        print(f"{repr(completion)[:58]:<60}" + "".join(f"{value:>13.2f}" for value in row.values()))
    print()


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise DataError(message + " (see --help)")  # one line, not a page of usage


def main(argv: list[str] | None = None) -> int:
    """Show the tasks, or score a file of completions; 0, or 2 with one line that says what to change."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--task", choices=tuple(TASKS), help="which task; default: show all")
    parser.add_argument(
        "--score", metavar="FILE", help="score completions: JSONL (or JSON) of prompt, completion, answer"
    )
    parser.add_argument("--json", action="store_true", help="with --score: one line of JSON")
    parser.add_argument("--allow_code_execution", action="store_true", help="task mbpp: run the programs, in a sandbox")
    try:
        flags = parser.parse_args(argv)
        if (flags.score or flags.json) and not (flags.task and flags.score):
            raise DataError("--score needs --task, and --json needs --score")
        if flags.allow_code_execution:
            allow_code_execution()
        if flags.score is None:
            show([flags.task] if flags.task else list(TASKS))
            return 0
        if TASKS[flags.task].runs_code and not code_execution_allowed:
            raise DataError(CODE_REFUSED.format(flags.task))
        if TASKS[flags.task].runs_code and not flags.json:
            print(f"sandbox      {protections()}")
        report(flags.task, score_file(flags.task, flags.score), flags.json)
    except DataError as error:
        print(f"rewards.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
