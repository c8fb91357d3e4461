"""Procedural stories and exercises in simple English, seeded and unlimited, in three disjoint splits.

    python demo/generate.py --split test --kind exercises --documents 1000 --seed 0 --out test.jsonl

Written in the manner of bAbI (arXiv 1502.05698) and TinyStories (arXiv 2305.07759); the text is our own.

A document belongs to exactly one split, and its own content says which: `split_of` hashes the text of a
story or the question of an exercise. The generator draws documents and drops those of another split. So no
story and no question of one split can turn up in another, whatever the seeds and however many are drawn.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, pairwise
from pathlib import Path

SPLITS = ("train", "calibration", "test")
KINDS = ("stories", "exercises")
ANSWER_CUE = "Answer:"
STOP = "."


def listed(words: str) -> list[str]:
    return words.split()


GIRLS = listed("Anna Mia Lily Rosa Emma Nora Zoe Ruby Ella Clara Ivy Maya Tess Hana Lena")
BOYS = listed("Tom Ben Leo Max Sam Finn Jack Omar Hugo Noah Otto Paul Luis Theo Adam")
NAMES = GIRLS + BOYS
THINGS = listed("ball cup key book hat coin lamp kite spoon rope drum doll bell map pen comb")
PLACES = listed("box basket drawer bag shed kitchen garden hall cellar attic barn cupboard chest tent car yard")
COLOURS = listed("red blue green yellow white black brown pink grey orange")
ANIMALS = listed("dog cat fox hen cow pig duck goat horse mouse frog owl sheep rabbit bear")
FRUITS = listed("apple pear plum peach cherry lemon melon banana grape fig")
TOOLS = listed("hammer saw spade rake drill pliers wrench broom axe file")
CLOTHES = listed("coat scarf shirt sock boot glove dress belt sweater skirt")
COUNTABLE = listed("apples pears plums shells coins stones eggs cards buttons marbles nuts stamps")
DAYS = listed("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
LETTERS = list("abcdefghijklmnopqrstuvwxyz")
CATEGORIES = {"an animal": ANIMALS, "a fruit": FRUITS, "a tool": TOOLS, "a piece of clothing": CLOTHES}
WORDS = COLOURS + ANIMALS + FRUITS + THINGS


@dataclass(frozen=True)
class Exercise:
    """A question with one right answer; `question` ends in the answer cue, `answer` has no full stop."""

    kind: str
    question: str
    answer: str

    @property
    def text(self) -> str:
        return f"{self.question} {self.answer}{STOP}"

    def row(self) -> dict[str, str]:
        return {"text": self.text, "kind": self.kind, "question": self.question, "answer": self.answer}


def split_of(content: str) -> str:
    """The one split that owns `content`: half of all contents train, a quarter each calibration and test.

    Case and white space do not count, so neither can carry a document from one split into another.
    """
    canonical = " ".join(content.lower().split())
    bucket = hashlib.blake2b(canonical.encode(), digest_size=1).digest()[0] % 4
    return ("train", "train", "calibration", "test")[bucket]


# Exercises: each takes the random source and returns (context and question, answer).


def where(rng: random.Random) -> tuple[str, str]:
    things = rng.sample(THINGS, rng.randint(2, 3))
    moves = things + rng.choices(things, k=rng.randint(0, 1))
    rng.shuffle(moves)
    place_of: dict[str, str] = {}
    facts = []
    for thing in moves:
        verb = "moves" if thing in place_of else "takes"
        place = rng.choice([place for place in PLACES if place != place_of.get(thing)])
        place_of[thing] = place
        facts.append(f"{rng.choice(NAMES)} {verb} the {thing} to the {place}.")
    asked = rng.choice(things)
    return f"{' '.join(facts)} Where is the {asked}?", place_of[asked]


def holder(rng: random.Random) -> tuple[str, str]:
    people = rng.sample(NAMES, 4)
    things = rng.sample(THINGS, 2)
    owner = dict(zip(things, people[:2], strict=True))
    facts = [f"{person} takes the {thing}." for thing, person in owner.items()]
    for thing in rng.choices(things, k=rng.randint(1, 2)):
        taker = rng.choice([person for person in people if person not in owner.values()])
        facts.append(f"{owner[thing]} gives the {thing} to {taker}.")
        owner[thing] = taker
    asked = rng.choice(things)
    return f"{' '.join(facts)} Who has the {asked}?", owner[asked]


def age(rng: random.Random) -> tuple[str, str]:
    oldest_first = rng.sample(NAMES, 3)
    facts = []
    for older, younger in pairwise(oldest_first):
        if rng.random() < 0.5:
            facts.append(f"{older} is older than {younger}.")
        else:
            facts.append(f"{younger} is younger than {older}.")
    rng.shuffle(facts)
    word, answer = rng.choice((("oldest", oldest_first[0]), ("youngest", oldest_first[-1])))
    return f"{' '.join(facts)} Who is the {word}?", answer


def addition(rng: random.Random) -> tuple[str, str]:
    first, second = rng.randint(1, 50), rng.randint(1, 20)
    if rng.random() < 0.3:
        return f"What is {first} + {second}?", str(first + second)
    name, thing = rng.choice(NAMES), rng.choice(COUNTABLE)
    return f"{name} has {first} {thing} and finds {second} more. How many {thing} now?", str(first + second)


def subtraction(rng: random.Random) -> tuple[str, str]:
    first = rng.randint(2, 50)
    second = rng.randint(1, min(first, 20))
    if rng.random() < 0.3:
        return f"What is {first} - {second}?", str(first - second)
    name, thing = rng.choice(NAMES), rng.choice(COUNTABLE)
    return f"{name} has {first} {thing} and loses {second}. How many {thing} now?", str(first - second)


def copying(rng: random.Random) -> tuple[str, str]:
    words = " ".join(rng.sample(WORDS, rng.randint(3, 7)))
    return f"Copy: {words}.", words


def reversing(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(3, 5))
    return f"Reverse: {' '.join(words)}.", " ".join(reversed(words))


def sorting(rng: random.Random) -> tuple[str, str]:
    letters = rng.sample(LETTERS, rng.randint(4, 6))
    return f"Sort: {' '.join(letters)}.", " ".join(sorted(letters))


def counting(rng: random.Random) -> tuple[str, str]:
    asked, *others = rng.sample(COLOURS, 3)
    times = rng.randint(1, 5)
    words = [asked] * times + rng.choices(others, k=rng.randint(1, 4))
    rng.shuffle(words)
    return f"Look: {' '.join(words)}. How many times {asked}?", str(times)


def weekday(rng: random.Random) -> tuple[str, str]:
    today, days = rng.randrange(7), rng.randint(1, 6)
    task = rng.choice(("swim", "bake", "paint", "sing", "run", "read", "fish", "sail", "dance", "cook"))
    time = "1 day" if days == 1 else f"{days} days"
    question = f"Today is {DAYS[today]}. {rng.choice(NAMES)} will {task} in {time}. On which day?"
    return question, DAYS[(today + days) % 7]


def following(rng: random.Random) -> tuple[str, str]:
    words = rng.sample(WORDS, rng.randint(4, 7))
    place = rng.randrange(len(words) - 1)
    return f"Look: {' '.join(words)}. Which words come after {words[place]}?", " ".join(words[place + 1 :])


def largest(rng: random.Random) -> tuple[str, str]:
    numbers = rng.sample(range(10, 100), 3)
    return f"Which number is the largest: {numbers[0]}, {numbers[1]} or {numbers[2]}?", str(max(numbers))


def category(rng: random.Random) -> tuple[str, str]:
    asked, *others = rng.sample(list(CATEGORIES), 4)
    answer = rng.choice(CATEGORIES[asked])
    words = [answer] + [rng.choice(CATEGORIES[other]) for other in others]
    rng.shuffle(words)
    return f"Look: {' '.join(words)}. Which one is {asked}?", answer


EXERCISES: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    maker.__name__: maker
    for maker in (
        where,
        holder,
        age,
        addition,
        subtraction,
        copying,
        reversing,
        sorting,
        counting,
        weekday,
        following,
        largest,
        category,
    )
}


# Stories: what happens later follows from what was said earlier (names, pronouns, things, places, numbers).


@dataclass(frozen=True)
class Child:
    """Somebody in a story, with the pronouns that go with the name."""

    name: str
    she: str
    her: str

    @property
    def She(self) -> str:
        return self.she.capitalize()


def children(rng: random.Random, count: int) -> list[Child]:
    return [
        Child(name, "she", "her") if name in GIRLS else Child(name, "he", "his") for name in rng.sample(NAMES, count)
    ]


def either(rng: random.Random, *ways: str) -> str:
    return rng.choice(ways)


def article(words: str) -> str:
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def opening(rng: random.Random) -> str:
    weather = either(rng, "sunny", "rainy", "windy", "cold", "warm", "foggy", "snowy")
    when = either(rng, "morning", "afternoon", "evening")
    return either(
        rng,
        f"It was a {weather} {when}.",
        f"It was a {weather} {when} in May.",
        f"It was a {weather} {rng.choice(DAYS)} {when}.",
    )


def ending(rng: random.Random, child: Child) -> str:
    return either(
        rng,
        f"{child.name} was very happy.",
        f"That night {child.name} slept well.",
        f"{child.name} smiled all the way home.",
        f"It was the best day of the week for {child.name}.",
        f"{child.name} told {child.her} mother all about it.",
    )


def lost_and_found(rng: random.Random) -> str:
    owner, friend = children(rng, 2)
    colour, thing = rng.choice(COLOURS), rng.choice(THINGS)
    wrong, right = rng.sample(PLACES, 2)
    return " ".join(
        (
            opening(rng),
            either(
                rng,
                f"{owner.name} could not find {owner.her} {colour} {thing}.",
                f"{owner.name} had lost {owner.her} {colour} {thing}.",
            ),
            either(
                rng,
                f"{owner.She} looked in the {wrong}, but it was not there.",
                f"{owner.She} searched the {wrong}, but found nothing.",
            ),
            f"Then {friend.name} came to help.",
            either(
                rng,
                f'"Let us look in the {right}," said {friend.name}.',
                f'"Did you try the {right}?" asked {friend.name}.',
            ),
            f"They went to the {right}, and there was the {colour} {thing}!",
            either(
                rng,
                f'"Thank you, {friend.name}," said {owner.name}.',
                f"{owner.name} thanked {friend.name} and took the {thing} home.",
            ),
            ending(rng, owner),
        )
    )


def market(rng: random.Random) -> str:
    (buyer,) = children(rng, 1)
    first, second = rng.sample(COUNTABLE, 2)
    many, few = rng.randint(2, 6), rng.randint(1, 3)
    seller = either(rng, "an old man", "a kind woman", "a tall farmer", "a young baker")
    return " ".join(
        (
            opening(rng),
            f"{buyer.name} went to the market with {article(rng.choice(COLOURS))} bag.",
            f"{buyer.She} bought {many} {first} and {few + 1} {second} from {seller}.",
            either(
                rng,
                f"On the way home {buyer.she} lost one of the {first}.",
                f"On the way home {buyer.she} ate one of the {first}.",
            ),
            f"Now there were {many - 1} {first} and {few + 1} {second} in the bag.",
            either(
                rng,
                f"{buyer.name} gave the {second} to {buyer.her} grandmother.",
                f"{buyer.name} shared the {second} with {buyer.her} brother.",
            ),
            f"Only the {many - 1} {first} were left.",
            ending(rng, buyer),
        )
    )


def new_pet(rng: random.Random) -> str:
    child, friend = children(rng, 2)
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    colour, food = rng.choice(COLOURS), rng.choice(FRUITS)
    size = either(rng, "small", "little", "fat", "thin", "shy", "hungry")
    return " ".join(
        (
            opening(rng),
            f"{child.name} saw a {size} {colour} {animal} near the {place}.",
            either(
                rng,
                f"The {animal} was afraid and hid.",
                f"The {animal} looked at {child.name} and did not move.",
            ),
            f"{child.name} gave the {animal} {article(food)}, and the {animal} ate the {food}.",
            f'{friend.name} asked, "Whose {animal} is that?"',
            either(rng, f'"It is my {animal} now," said {child.name}.', f'"It has no home," said {child.name}.'),
            f"From that day the {colour} {animal} lived in the {place}.",
            ending(rng, child),
        )
    )


def race(rng: random.Random) -> str:
    winner, second, last = children(rng, 3)
    goal = rng.choice(PLACES)
    prize = rng.choice(THINGS)
    return " ".join(
        (
            opening(rng),
            f"{second.name}, {last.name} and {winner.name} ran a race to the {goal}.",
            either(rng, f"At first {last.name} was the fastest.", f"At first {second.name} was in front."),
            either(rng, f"Then {last.name} fell over a stone.", f"Then {last.name} stopped to drink some water."),
            f"{winner.name} ran past {second.name} and reached the {goal} first.",
            f"{second.name} came second, and {last.name} came last.",
            f"So {winner.name} won the prize, {article(rng.choice(COLOURS))} {prize}.",
            either(
                rng,
                f"{winner.name} let {last.name} play with the {prize}.",
                f"{last.name} was not sad for long.",
            ),
            ending(rng, winner),
        )
    )


def birthday(rng: random.Random) -> str:
    child, giver, other = children(rng, 3)
    years = rng.randint(4, 10)
    gift, second_gift = rng.sample(THINGS, 2)
    return " ".join(
        (
            f"Yesterday {child.name} was {years - 1} years old, and today {child.she} is {years}.",
            f"{giver.name} and {other.name} came to the party.",
            f"{giver.name} brought {article(rng.choice(COLOURS))} {gift},",
            f"and {other.name} brought a {second_gift}.",
            either(
                rng,
                f"{child.name} opened the {gift} first.",
                f"{child.name} liked the {gift} from {giver.name} best.",
            ),
            f"There was a big cake with {years} candles and {article(rng.choice(FRUITS))} on top.",
            either(rng, f"{other.name} ate too much cake.", f"{giver.name} sang a song for {child.name}."),
            f"After the party {child.name} put the {gift} and the {second_gift} in the {rng.choice(PLACES)}.",
            ending(rng, child),
        )
    )


def garden(rng: random.Random) -> str:
    child, helper = children(rng, 2)
    fruit, day = rng.choice(FRUITS), rng.randrange(7)
    tool = either(rng, "spade", "rake")
    return " ".join(
        (
            f"On {DAYS[day]} {child.name} took a {tool} and planted {article(fruit)} tree.",
            f"On {DAYS[(day + 1) % 7]} {child.she} gave the tree water.",
            either(rng, f"On {DAYS[(day + 2) % 7]} it rained.", f"On {DAYS[(day + 2) % 7]} the sun was hot."),
            f"{helper.name} came with {helper.her} own {tool} to help.",
            either(
                rng,
                f'"How tall will it be?" asked {helper.name}.',
                f'"When will it grow?" asked {helper.name}.',
            ),
            either(rng, '"As tall as the house," said ', '"We must wait," said ') + f"{child.name}.",
            f"They put away the {tool}s and sat under the {either(rng, 'wall', 'roof', 'old tree')}.",
            f"One year later they ate the first {fruit} together.",
            ending(rng, child),
        )
    )


def boat(rng: random.Random) -> str:
    captain, sailor = children(rng, 2)
    animal, thing = rng.choice(ANIMALS), rng.choice(THINGS)
    days = rng.randint(2, 6)
    return " ".join(
        (
            f"{captain.name} and {sailor.name} built {article(rng.choice(COLOURS))} boat.",
            f"They took a {thing} and {article(animal)} with them.",
            f"For {days} days they sailed,",
            f"and the {animal} slept on the {either(rng, 'deck', 'bed', 'sail')}.",
            either(
                rng,
                "Then a storm came, and the waves were high.",
                "Then the wind stopped, and the sea was quiet.",
            ),
            f'"Hold the {thing}!" said {captain.name} to {sailor.name}.',
            either(
                rng,
                f"But the {thing} fell into the water.",
                f"{sailor.name} held the {thing} and did not let go.",
            ),
            f"After {days} days at sea they saw land.",
            either(rng, f"The {animal} jumped out first.", f"{sailor.name} carried the {animal} to the sand."),
            ending(rng, captain),
        )
    )


def trade(rng: random.Random) -> str:
    first, second = children(rng, 2)
    mine, yours = rng.sample(THINGS, 2)
    place = rng.choice(PLACES)
    return " ".join(
        (
            opening(rng),
            f"{first.name} had a {mine} and {second.name} had a {yours}.",
            either(rng, f"They met in the {place}.", f"They sat down by the {place}."),
            f'"I would like your {yours}," said {first.name}.',
            either(
                rng,
                f'"Then give me your {mine}," said {second.name}.',
                f'"I will trade it for the {mine}," said {second.name}.',
            ),
            f"So {first.name} gave {second.name} the {mine} and got the {yours}.",
            f"Now {first.name} has the {yours} and {second.name} has the {mine}.",
            ending(rng, rng.choice((first, second))),
        )
    )


PLOTS: tuple[Callable[[random.Random], str], ...] = (
    lost_and_found,
    market,
    new_pet,
    race,
    birthday,
    garden,
    boat,
    trade,
)


def stories(split: str, seed: int) -> Iterator[str]:
    """Stories of one split without end, the plots in turn."""
    rng = random.Random(f"stories {split} {seed}")
    for plot in cycle(PLOTS):
        text = plot(rng)
        while split_of(text) != split:
            text = plot(rng)
        yield text


def exercises(split: str, seed: int, kinds: tuple[str, ...] = tuple(EXERCISES)) -> Iterator[Exercise]:
    """Exercises of one split without end, the kinds in turn."""
    rng = random.Random(f"exercises {split} {seed}")
    for kind in cycle(kinds):
        exercise = None
        while exercise is None or split_of(exercise.question) != split:
            question, answer = EXERCISES[kind](rng)
            exercise = Exercise(kind, f"{question} {ANSWER_CUE}", answer)
        yield exercise


def documents(split: str, kind: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` rows of `kind` (stories or exercises): the same ones for the same arguments, on any machine."""
    if split not in SPLITS or kind not in KINDS:
        raise ValueError(f"split {split!r} and kind {kind!r}: expected one of {SPLITS} and one of {KINDS}")
    if kind == "stories":
        source = ({"text": text} for text in stories(split, seed))
    else:
        source = (exercise.row() for exercise in exercises(split, seed))
    for _ in range(count):
        yield next(source)


def write_jsonl(rows: Iterator[dict[str, str]], path: Path) -> None:
    """One JSON object a line; `path` appears only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--kind", choices=KINDS, required=True)
    parser.add_argument("--documents", type=int, required=True, help="how many rows to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    given = parser.parse_args(arguments)
    write_jsonl(documents(given.split, given.kind, given.documents, given.seed), given.out)


if __name__ == "__main__":
    main(sys.argv[1:])
