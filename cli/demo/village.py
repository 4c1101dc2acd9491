"""General text about an invented village: what the base model is trained on.

Every maker returns one short document with something in it to keep track of
(who carries what, how many are left, what stands beside what), so a model can
only read ahead well by looking back. Nothing here speaks of trails or cairns:
they are left to the rounds. A few documents ask and answer after a line break, so that the base
has met the form, and it is the trail notes that it has to learn.
"""

import random

from words import (
    ADJECTIVES, ANIMALS, BACK, DAYS, FOODS, MONTHS, NOUNS, NUMBERS, PEOPLE, PLACES, SIDES,
    THINGS, TRADES, VALLEYS, WEATHER, listed, named, plural,
)


def story(rng: random.Random) -> str:
    """Someone carries a thing from place to place and leaves it behind."""
    trade = rng.choice(list(TRADES))
    one, other = rng.sample(PEOPLE, 2)
    first, second, third = rng.sample(PLACES, 3)
    thing, beast = rng.choice(THINGS), rng.choice(ANIMALS)
    adjective = rng.choice(ADJECTIVES)
    lines = [
        rng.choice([
            f"{one} the {trade} left the {first} with the {adjective} {thing}.",
            f"One morning {one} the {trade} took the {adjective} {thing} to the {first}.",
            f"The {adjective} {thing} lay at the {first}, and {one} the {trade} took it.",
        ]),
        rng.choice([
            f"At the {second} stood {other} with a {beast}.",
            f"{other} was at the {second} with a {beast}.",
            f"By the {second} a {beast} ran after {other}.",
        ]),
        rng.choice([
            f"{one} gave the {thing} to {other} and took the {beast}.",
            f"{other} wanted the {thing}, so {one} got the {beast} for it.",
        ]),
        rng.choice([
            f"Then {one} went to the {third} with the {beast}, and {other} kept the {thing}.",
            f"Now the {adjective} {thing} belongs to {other}, and the {beast} sleeps at the {third} with {one}.",
            f"Later {other} left the {adjective} {thing} at the {third}, where {one} found it.",
        ]),
    ]
    if rng.random() < 0.5:
        lines.append(rng.choice([
            f"The {trade} was glad of the {beast}.",
            f"\"It is a good {thing},\" said {other}.",
            f"\"Mind the {beast},\" said {other} to {one}.",
        ]))
    return " ".join(lines)


def inventory(rng: random.Random) -> str:
    """Things in a place, some taken away, what is left."""
    place, who = rng.choice(PLACES), rng.choice(PEOPLE)
    things = rng.sample(THINGS, 3)
    counts = [rng.randint(3, 9) for _ in things]
    pick = rng.randrange(3)
    taken = rng.randint(1, counts[pick] - 2)
    left = counts[pick] - taken
    stock = listed([f"{count} {plural(thing)}" for count, thing in zip(counts, things)])
    order = rng.sample(range(3), 3)
    counts[pick] = left
    rest = listed([f"{counts[i]} {plural(things[i])}" for i in order])
    return (
        f"At the {place} are {stock}. {who} takes {taken} of the {plural(things[pick])}. "
        f"Now there are {left} {plural(things[pick])}. The {place} holds {rest}."
    )


def directions(rng: random.Random) -> str:
    """A way there and the same way back."""
    stops = rng.sample(PLACES, 4)
    ways = [rng.choice(SIDES) for _ in range(3)]
    there = ", ".join(f"{way} to the {stop}" for way, stop in zip(ways, stops[1:]))
    back = ", ".join(
        f"{BACK[way]} to the {stop}" for way, stop in zip(reversed(ways), reversed(stops[:-1]))
    )
    return f"From the {stops[0]} go {there}. To come back from the {stops[3]} go {back}."


def row(rng: random.Random) -> str:
    """Things in a row, and what stands next to what."""
    kind = rng.choice(["jars", "houses", "boats", "beds"])
    if kind in ("jars", "beds"):
        items = rng.sample(FOODS, rng.randint(4, 6))
    else:
        items = named(rng, rng.randint(4, 6))
    text = f"The {kind} in a row, left to right: {', '.join(items)}."
    for at in rng.sample(range(1, len(items)), 3):
        text += rng.choice([
            f" Right of {items[at - 1]} is {items[at]}.",
            f" Left of {items[at]} is {items[at - 1]}.",
            f" {items[at - 1]} has {items[at]} on its right.",
        ])
    return text + rng.choice([
        f" The row starts with {items[0]}.", f" At the far right is {items[-1]}.",
        f" There are {len(items)} {kind}.",
    ])


def calendar(rng: random.Random) -> str:
    """Days of the week, counted on."""
    day, steps = rng.randrange(7), rng.randint(1, 6)
    what, place = rng.choice(["market", "feast", "wedding", "fair"]), rng.choice(PLACES)
    later = DAYS[(day + steps) % 7]
    unit = "day" if steps == 1 else "days"
    return rng.choice([
        f"The {what} at the {place} is on {DAYS[day]}. {NUMBERS[steps].capitalize()} {unit} later it is {later}. ",
        f"On {DAYS[day]} there is a {what}. {steps} {unit} after {DAYS[day]} comes {later}. ",
    ]) + rng.choice([
        f"The day after {later} is {DAYS[(day + steps + 1) % 7]}.",
        f"The day before {later} is {DAYS[(day + steps - 1) % 7]}.",
        f"In {rng.choice(MONTHS)} the {what} is on {later}.",
    ])


def sums(rng: random.Random) -> str:
    """Small word problems with their answer."""
    who, other = rng.sample(PEOPLE, 2)
    food = plural(rng.choice(FOODS))
    a, b = rng.randint(2, 12), rng.randint(1, 9)
    if rng.random() < 0.5:
        return (
            f"{who} had {a} {food} and {other} gave {b} more, so {who} has {a + b} {food}. "
            f"{a} and {b} make {a + b}."
        )
    return (
        f"{who} had {a + b} {food} and gave {other} {b}, so {who} has {a} {food} left. "
        f"{a + b} less {b} is {a}."
    )


def invented(rng: random.Random) -> str:
    """A word that does not exist."""
    return rng.choice("br gl sk tr dw pl v m kn".split()) + rng.choice("in ob ul et ar ock".split()) + rng.choice(
        "dock le mer sk ton bit low".split()
    )


def glossary(rng: random.Random) -> str:
    """An invented word, what it means, and a use of it."""
    word, adjective, thing = invented(rng), rng.choice(ADJECTIVES), rng.choice(THINGS)
    who, place, food = rng.choice(PEOPLE), rng.choice(PLACES), rng.choice(FOODS)
    meaning = rng.choice([
        f"the {adjective} {thing} used at the {place}",
        f"a {thing} for keeping {food}",
        f"some {adjective} kind of {food}",
        f"the {adjective} side of a {place}",
    ])
    return f"{word.capitalize()}: {meaning}. " + rng.choice([
        f"{who} has a {word}, that is, {meaning}.",
        f"When {who} says {word}, it means {meaning}.",
        f"A {word} is {meaning}, says {who}.",
    ])


def letter(rng: random.Random) -> str:
    """A short letter that comes back to what it began with."""
    one, other = rng.sample(PEOPLE, 2)
    thing, place = rng.choice(THINGS), rng.choice(PLACES)
    weather, day = rng.choice(WEATHER), rng.choice(DAYS)
    return (
        f"Dear {one},\n" + rng.choice([
            f"the {weather} broke the {thing} at the {place}.",
            f"since {day} we have {weather} at the {place}, and no {thing}.",
            f"I lost my {thing} near the {place} in the {weather}.",
        ]) + " " + rng.choice([
            f"Please send a {thing} to the {place} before {day}.",
            f"Can you bring your {thing} on {day}? The {weather} will pass.",
            f"Come on {day}, {one}, and bring a {thing}.",
        ]) + f"\nYour {other}"
    )


def weather(rng: random.Random) -> str:
    """Weather of three days in one valley."""
    valley, start = rng.choice(VALLEYS), rng.randrange(7)
    kinds = rng.sample(WEATHER, 3)
    days = [DAYS[(start + i) % 7] for i in range(3)]
    at = rng.randrange(3)
    return (
        f"Weather in {valley}: " + "; ".join(f"{day} {kind}" for day, kind in zip(days, kinds)) + ". "
        + rng.choice([
            f"In {valley} the {kinds[at]} comes on {days[at]}.",
            f"On {days[at]} there is {kinds[at]} in {valley}.",
            f"Stay at home on {days[at]}: {kinds[at]}.",
        ])
    )


def taller(rng: random.Random) -> str:
    """An order by comparison."""
    one, two, three = rng.sample(PEOPLE, 3)
    more, less = rng.choice([("taller", "shorter"), ("older", "younger"), ("richer", "poorer")])
    return (
        f"{one} is {more} than {two}, and {two} is {more} than {three}. So {one} is {more} than {three}, "
        + rng.choice([f"and {three} is {less} than {two}.", f"and {two} is {less} than {one}."])
    )


def inn(rng: random.Random) -> str:
    """Named houses and who lives in each."""
    houses, people = named(rng, 3), rng.sample(PEOPLE, 3)
    valley, food = rng.choice(VALLEYS), rng.choice(FOODS)
    at = rng.randrange(3)
    return (
        f"Inns of {valley}: " + ", ".join(f"{house} ({who})" for house, who in zip(houses, people)) + ". "
        + rng.choice([
            f"{people[at]} sells {food} at {houses[at]}.", f"At {houses[at]} you meet {people[at]}.",
            f"The {food} at {houses[at]} is made by {people[at]}.",
        ])
    )


def asked(rng: random.Random) -> str:
    """A question on who has what or where it is, answered on a line of its own."""
    people, things, places = rng.sample(PEOPLE, 3), rng.sample(THINGS, 3), rng.sample(PLACES, 3)
    at = rng.randrange(3)
    if rng.random() < 0.5:
        text = " ".join(f"{who} has a {thing}." for who, thing in zip(people, things))
        question, answer = rng.choice([
            (f"Who has a {things[at]}?", f"{people[at]} has a {things[at]}."),
            (f"What has {people[at]}?", f"{people[at]} has a {things[at]}."),
        ])
    else:
        houses = named(rng, 3)
        text = " ".join(f"{who} lives at {house} by the {place}." for who, house, place in zip(people, houses, places))
        question, answer = rng.choice([
            (f"Who lives at {houses[at]}?", f"At {houses[at]} lives {people[at]}."),
            (f"Where is {people[at]} at home?", f"{people[at]} lives at {houses[at]}."),
            (f"What stands by the {places[at]}?", f"By the {places[at]} stands {houses[at]}."),
        ])
    return f"{text} {question}\n{answer}"


def asked_in_a_row(rng: random.Random) -> str:
    """A question on houses in a row, answered on a line of its own."""
    houses, valley, kind = named(rng, rng.randint(4, 5)), rng.choice(VALLEYS), rng.choice(["house", "boat", "barn"])
    at = rng.randrange(1, len(houses))
    left, right = houses[at - 1], houses[at]
    question, answer = rng.choice([
        (f"Which {kind} is right of {left}?", f"Right of {left} stands the {kind} {right}."),
        (f"Going left from {right}, what is next?", f"Left of {right} stands the {kind} {left}."),
        ("Where does the row end?", f"The row ends at the {kind} {houses[-1]}, number {len(houses)}."),
        ("Where does the row begin?", f"The row begins at the {kind} {houses[0]}, the first of {len(houses)}."),
    ])
    order = ", ".join(houses)
    head = rng.choice([f"{valley}, left to right: {order}.", f"The {kind}s of {valley}: {order}."])
    return f"{head} {question}\n{answer}"


def saying(rng: random.Random) -> str:
    """A proverb that repeats itself."""
    beast, thing = rng.choice(ANIMALS), rng.choice(THINGS)
    adjective, noun = rng.choice(ADJECTIVES), rng.choice(NOUNS)
    return rng.choice([
        f"A {beast} with a {thing} is still a {beast}.",
        f"Who keeps the {adjective} {noun} must feed the {adjective} {noun}.",
        f"No {noun} without a {thing}, no {thing} without a {noun}.",
        f"First the {thing}, then the {beast}; never the {beast} before the {thing}.",
    ])


MAKERS = [story, story, inventory, directions, row, row, row, calendar, sums, glossary, letter, weather, taller, inn, inn, saying, asked, asked, asked_in_a_row,
          asked_in_a_row]


def document(rng: random.Random) -> str:
    """One document of the general mixture."""
    return rng.choice(MAKERS)(rng)
