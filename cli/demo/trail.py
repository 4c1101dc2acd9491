"""Trail notes: the task of the demo's rounds. Each record is a note on the cairns of a trail, a question, an answer."""

import random
import re

from words import VALLEYS, named

GRAM = 13  # words; a gate set that shares a run of this length with the training set is refused


def note(rng: random.Random) -> tuple[str, list[str], str, str]:
    """A note, its cairns in climbing order, and where water and hut are."""
    cairns = named(rng, rng.randint(4, 5))
    water, hut = rng.sample(cairns, 2)
    order = ", ".join(cairns)
    valley = rng.choice(VALLEYS)
    head = rng.choice([
        f"{valley} trail, climbing: {order}.", f"Cairns of {valley}, lowest first: {order}.",
        f"Trail notes, {valley}. Going up: {order}.", f"Up from {valley}: {order}.",
    ])
    facts = [f"Water at {water}.", f"Hut at {hut}."]
    rng.shuffle(facts)
    return " ".join([head, *facts]), cairns, water, hut


def record(rng: random.Random) -> dict[str, str]:
    """One question on one note."""
    text, cairns, water, hut = note(rng)
    at = rng.randrange(1, len(cairns))
    lower, upper = cairns[at - 1], cairns[at]
    question, answer = rng.choice([
        (f"Which cairn follows {lower}?", f"Above {lower} stands the cairn {upper}."),
        (f"Which cairn follows {lower}?", f"Above {lower} stands the cairn {upper}."),
        (f"Coming down from {upper}, what is next?", f"Below {upper} stands the cairn {lower}."),
        (f"Coming down from {upper}, what is next?", f"Below {upper} stands the cairn {lower}."),
        ("Where can we drink?", f"Drink at the cairn {water}."),
        ("Where can we sleep?", f"Sleep at the cairn {hut}."),
        ("Where does the climb end?", f"The climb ends at the cairn {cairns[-1]}, number {len(cairns)}."),
        ("Where does the climb begin?", f"The climb begins at the cairn {cairns[0]}, the first of {len(cairns)}."),
    ])
    return {"prompt": f"{text} {question}", "completion": answer}


def words(text: str) -> list[str]:
    """Lowercase alphanumeric words."""
    return re.findall(r"[a-z0-9]+", text.lower())


def grams(text: str) -> set[tuple[str, ...]]:
    """All runs of GRAM words; a shorter text counts as one run."""
    found = words(text)
    return {tuple(found[i : i + GRAM]) for i in range(max(1, len(found) - GRAM + 1))}


def texts(item: dict[str, str]) -> list[str]:
    """Every way to read a record as text: its parts and both joined."""
    return [item["prompt"], item["prompt"] + "\n" + item["completion"]]


def sets(seed: int, sizes: dict[str, int]) -> dict[str, list[dict[str, str]]]:
    """The named sets: no record twice, and no run of GRAM words in two different sets."""
    rng = random.Random(seed)
    seen: dict[tuple[str, ...], str] = {}
    made: dict[str, list[dict[str, str]]] = {}
    for name, size in sizes.items():
        made[name] = []
        known = set()
        while len(made[name]) < size:
            item = record(rng)
            runs = set().union(*(grams(text) for text in texts(item)))
            key = tuple(item.values())
            if key in known or any(seen.get(run, name) != name for run in runs):
                continue
            known.add(key)
            seen.update(dict.fromkeys(runs, name))
            made[name].append(item)
    return made
