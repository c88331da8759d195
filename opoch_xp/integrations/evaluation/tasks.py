"""Tasks that tell methods apart: synthetic texts with questions at their end, from a seed.

A model is asked by reading: the answers stand in the text, and one counts as right where each of its tokens is the
likeliest after those before it, as greedy generation would write it. All questions of a task are asked in one pass.
After Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?", 2024.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opoch_xp.integrations.evaluation.results import Answered
from opoch_xp.integrations.evaluation.subject import Attend, Subject

Rng = np.random.Generator
Pairs = list[tuple[str, str]]  # what is asked, and the answer

PLACES = (
    "bakery", "bridge", "castle", "cellar", "chapel", "factory", "garden", "harbour", "island", "kitchen", "library",
    "lighthouse", "market", "mill", "museum", "palace", "quarry", "school", "stable", "station", "temple", "theatre",
    "tower", "tunnel", "village", "warehouse",
)  # fmt: skip
COLOURS = ("amber", "black", "blue", "brown", "copper", "crimson", "golden", "green", "grey", "ivory", "orange",
           "purple", "red", "silver", "violet", "white", "yellow")  # fmt: skip
FORMS = (  # of needles, each unlike the others
    ("The password of the old {} is", "password"), ("The train from the {} leaves on track", "train"),
    ("The height of the {} in feet is", "height"), ("The telephone of the {} is", "telephone"),
    ("The year in which the {} was built is", "year"), ("The number of bees in the {} is", "bees"),
    ("The price of the {} in pounds is", "price"), ("The weight of the {} in grams is", "weight"),
)  # fmt: skip
NOISE = ("The grass is green.\n", "The sky is blue.\n", "The sun is yellow.\n", "Here we go.\n", "There and back.\n")
ASKED = 8


@dataclass(frozen=True)
class Task:
    """A task of so many tokens: ids (1, n), and the answers as places of their tokens among them."""

    name: str
    ids: Tensor
    answers: tuple[slice, ...]


def tasks(tokenizer: Any, text: str, tokens: int, seed: int) -> tuple[list[Task], list[str]]:
    """The tasks, of at most so many tokens each: needles of different kinds in the text; one needle among many of its
    kind; numbers that variables hold by way of others; the most frequent of many words. And what is said of tasks that
    so few tokens do not hold."""
    made = [_needles(text), _many_needles, _variables, _frequent_words]
    names = ("needles in text", "needle among its like", "variables", "frequent words")
    found, left = [], []
    for number, (name, make) in enumerate(zip(names, made, strict=True)):
        task = _built(name, tokenizer, make, tokens, np.random.default_rng((seed, number)))
        if task is None:
            left.append(f"The task of {name} needs more than {tokens:,} tokens: it was left out.")
        else:
            found.append(task)
    return found, left


Make = Callable[[Rng, int], tuple[list[str], Pairs]]  # of about so many characters: the text in pieces, the questions


def _built(name: str, tokenizer: Any, make: Make, tokens: int, rng: Rng) -> Task | None:
    """The task with as much text as goes into so many tokens; None where not even its least does."""
    characters, state, least = 4 * tokens, rng.bit_generator.state, 0
    first = [] if getattr(tokenizer, "bos_token_id", None) is None else [tokenizer.bos_token_id]
    while True:
        rng.bit_generator.state = state
        pieces, asked = make(rng, characters)
        ids, answers = _placed(tokenizer, "".join(pieces), asked)
        if len(first) + len(ids) <= tokens:
            places = tuple(slice(len(first) + a, len(first) + b) for a, b in answers)
            return Task(name, torch.tensor(first + ids)[None], places)
        if len(ids) == least:  # it grows no shorter
            return None
        least, characters = len(ids), int(characters * min(0.97, tokens / (len(first) + len(ids))))


def _placed(tokenizer: Any, text: str, asked: Pairs) -> tuple[list[int], list[tuple[int, int]]]:
    """The tokens of the text with its questions and answers, and where among them each answer's begin and end."""
    spans = []
    for question, answer in asked:
        text += question
        spans.append((len(text) + len(answer) - len(answer.lstrip()), len(text) + len(answer)))
        text += answer
    told = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ends = [end for _, end in told.offset_mapping]
    starts = [start for start, _ in told.offset_mapping]
    places = [(bisect_right(ends, start), bisect_left(starts, end)) for start, end in spans]
    return list(told.input_ids), places


def _number(rng: Rng) -> str:
    return str(rng.integers(1000, 10_000))


def _needles(text: str) -> Make:
    def make(rng: Rng, characters: int) -> tuple[list[str], Pairs]:
        places = rng.permutation(PLACES)[:ASKED]
        facts = [(form.format(place), f" {_number(rng)}") for (form, _), place in zip(FORMS, places, strict=True)]
        step = characters // (ASKED + 1)
        pieces = []
        for number in range(ASKED + 1):
            pieces.append(text[number * step : (number + 1) * step])
            if number < ASKED:
                pieces.append("\n" + "".join(facts[number]) + ".\n")
        asked = [(f"\n{facts[i][0]}", facts[i][1]) for i in rng.permutation(ASKED)]
        return [*pieces, "\n"], asked

    return make


def _many_needles(rng: Rng, characters: int) -> tuple[list[str], Pairs]:
    places = [f"{a} {b} {c}" for a in COLOURS for b in COLOURS for c in PLACES if a != b]
    line = len("The number of the violet copper lighthouse is 1234.\n")
    count = max(ASKED, min(len(places), characters // line))
    facts = [(f"The number of the {places[i]} is", f" {_number(rng)}") for i in rng.permutation(len(places))[:count]]
    chosen = [facts[i] for i in rng.permutation(count)[:ASKED]]
    return ["".join(fact) + ".\n" for fact in facts], [(f"\n{question}", answer) for question, answer in chosen]


def _variables(rng: Rng, characters: int) -> tuple[list[str], Pairs]:
    """Chains of three variables among sentences that say nothing, each of which holds the number of the first."""
    letters = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
    names = list(dict.fromkeys("".join(rng.choice(letters, 4)) for _ in range(6 * ASKED)))
    lines, asked = [], []
    for number in range(ASKED):
        first, second, last = names[3 * number : 3 * number + 3]
        value = f" {_number(rng)}"
        lines.append([f"VAR {first} ={value}\n", f"VAR {second} = VAR {first}\n", f"VAR {last} = VAR {second}\n"])
        asked += [(f"\nVAR {first} ={value}, VAR {second} ={value}, VAR {last} =", value)]
    count = max(3 * ASKED, characters // len(NOISE[0]))
    places = np.sort(rng.permutation(count)[: 3 * ASKED])
    order = [line for step in range(3) for line in (chain[step] for chain in lines)]
    put = dict(zip(places.tolist(), order, strict=True))
    return [put.get(i, "") + NOISE[i % len(NOISE)] for i in range(count)], [asked[i] for i in rng.permutation(ASKED)]


def _frequent_words(rng: Rng, characters: int) -> tuple[list[str], Pairs]:
    """Words whose frequency falls with the square of their rank; the three first are asked for."""
    words = [f"{a}{b}" for a in COLOURS for b in PLACES]
    words = [words[i] for i in rng.permutation(len(words))[:200]]
    share = 1 / np.arange(1, len(words) + 1) ** 2
    count = max(50, characters // 14)
    chosen = rng.choice(len(words), count, p=share / share.sum())
    asked = [("\nThe most frequent words, in order:", f" {words[0]}"), (",", f" {words[1]}"), (",", f" {words[2]}")]
    return [f"{words[i]} " for i in chosen], asked


def answer(subject: Subject, task: Task, attend: Attend) -> Answered:
    """How much of a task is right, the model attending by `attend`."""
    ids = task.ids.to(subject.device)
    states = subject.pass_over(ids, attend)[0]
    right, losses = 0, []
    for place in task.answers:
        told = subject.log_probabilities(states[place.start - 1 : place.stop - 1])
        wanted = ids[0, place]
        right += bool((told.argmax(1) == wanted).all())
        losses.append(-told.gather(1, wanted[:, None])[:, 0])
    return Answered(len(task.answers), right / len(task.answers), float(torch.cat(losses).mean()))
