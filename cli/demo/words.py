"""The invented language of the demo: word lists and small helpers that both text makers share."""

import random

SEED = 20

PEOPLE = "Mara Tobin Oda Ned Hilda Bram Signe Wick Lotte Ivo Runa Piers Edda Colm Sunna Jory".split()
TRADES = {
    "miller": "mill", "smith": "forge", "baker": "oven", "weaver": "loom", "fisher": "pier",
    "shepherd": "fold", "cooper": "yard", "potter": "kiln", "keeper": "gate", "brewer": "cellar",
}
PLACES = "well mill forge gate pier barn chapel orchard bridge meadow market ford".split()
THINGS = "rope lamp kettle basket ladder blanket hammer bucket candle spade broom jar".split()
FOODS = "plum mint salt honey barley onion radish butter bean cheese pear cabbage".split()
ANIMALS = "goat hen mule dog goose cat ram heron".split()
ADJECTIVES = (
    "grey cold bent old tall last red quiet broken late narrow green silver lost high dry "
    "black little north hollow white sleepy wild blind"
).split()
NOUNS = (
    "ewe spoon pine lamp tooth hen sister stone boot raven bell thorn kettle ladder crown finger "
    "hare needle table fox saddle candle fiddle heron widow drum button turnip mitten piper"
).split()
WEATHER = "rain fog sun snow wind frost hail thunder".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "March April May June July August September October".split()
SIDES = ["north", "south", "east", "west"]
BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}
NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve".split()
VALLEYS = "Orrin Veld Sarn Tamber Mossa Keld Harrow Ulla Brack Fenna Loom Ister".split()


def title(words: str) -> str:
    """Each word with a capital: a proper name."""
    return " ".join(word.capitalize() for word in words.split())


def plural(noun: str) -> str:
    """The plural of a thing or a food; the lists hold regular nouns only."""
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


def named(rng: random.Random, count: int) -> list[str]:
    """`count` different proper names such as "Grey Ewe"; no adjective or noun comes twice."""
    return [
        title(f"{first} {second}")
        for first, second in zip(rng.sample(ADJECTIVES, count), rng.sample(NOUNS, count))
    ]


def listed(items: list[str]) -> str:
    """A list in running text: "a, b and c"."""
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
