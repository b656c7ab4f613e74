"""Writes the three small instruction sets beside this file: same script, same bytes, anywhere.

    python make.py            write arithmetic.jsonl, polite.jsonl and extraction.jsonl
    python make.py --check    exit with 1 if the files differ from what this script makes

Each set has one narrow style, so that a small model shows after a few dozen steps that it learned.
"""

import argparse
import json
import operator
import random
import sys
from collections.abc import Callable
from pathlib import Path

ROWS = 260
HERE = Path(__file__).resolve().parent

PEOPLE = (
    "Ada Bola Chen Dilan Elif Farah Goran Hana Ivo Jorge Kavya Lena Mateo Nadia Omar Petra Quinn "
    "Rosa Sami Tara Uma Victor Wanda Yusuf Zora Anouk Bram Cleo"
).split()
CITIES = (
    "Lisbon Oslo Accra Kyoto Lima Cork Turin Quebec Hanoi Tunis Bergen Porto Leeds Graz".split()
)
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = (
    "January February March April May June July August September October November December".split()
)
GOODS = "pencils marbles stickers buttons candles postcards apples bulbs tiles badges".split()
ITEMS = (
    "desk lamp,tea kettle,wool blanket,garden hose,bread knife,wall clock,rain jacket,"
    "reading chair,bird feeder,picnic basket,coffee grinder,travel mug"
).split(",")
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.floordiv}

# Wordings; ranges of the numbers; steps (name of the result, what it is, left, sign, right).
PROBLEMS = (
    (
        (
            "{who} buys {a} boxes of {thing} with {b} in each box and gives {c} to a friend. "
            "How many {thing} are left?",
            "There are {b} {thing} in a box. {who} has {a} boxes and loses {c} {thing}. "
            "How many {thing} does {who} still have?",
        ),
        {"a": (3, 12), "b": (6, 24), "c": (2, 17)},
        (("d", "{thing} in the boxes", "a", "*", "b"), ("e", "{thing} left", "d", "-", "c")),
    ),
    (
        (
            "{who} earns {a} dollars an hour for {b} hours, then pays {c} dollars for lunch. "
            "How many dollars remain?",
            "A job pays {a} dollars an hour. After {b} hours {who} pays {c} dollars for a ticket. "
            "How much money does {who} have from the job?",
        ),
        {"a": (9, 28), "b": (3, 9), "c": (5, 24)},
        (("d", "dollars earned", "a", "*", "b"), ("e", "dollars kept", "d", "-", "c")),
    ),
    (
        (
            "{who} picks {a} {thing} in the morning and {b} in the afternoon, and shares them "
            "equally among {c} baskets. How many {thing} go into each basket?",
            "On {day} {who} collects {a} {thing}, then {b} more. They are split evenly into {c} "
            "bags. How many {thing} are in one bag?",
        ),
        {"a": (11, 70), "b": (11, 70), "c": (3, 9)},
        (("d", "{thing} in all", "a", "+", "b"), ("e", "{thing} in each", "d", "/", "c")),
    ),
    (
        (
            "A train to {city} has {a} coaches with {b} seats each. {c} seats are taken. "
            "How many seats are free?",
            "A hall in {city} has {a} rows of {b} chairs, and {c} guests are seated. "
            "How many chairs are empty?",
        ),
        {"a": (5, 14), "b": (12, 32), "c": (20, 59)},
        (("d", "seats in all", "a", "*", "b"), ("e", "seats free", "d", "-", "c")),
    ),
    (
        (
            "{who} reads {a} pages on {day} and {b} pages on each of the next {c} days. "
            "How many pages is that?",
            "On {day} {who} writes {a} lines, and then {b} lines a day for {c} days. "
            "How many lines are there in the end?",
        ),
        {"a": (8, 60), "b": (7, 35), "c": (2, 8)},
        (("d", "the later days", "b", "*", "c"), ("e", "all together", "a", "+", "d")),
    ),
    (
        (
            "{who} sells {a} {thing} at {b} dollars each and {c} baskets at {d} dollars each. "
            "How many dollars does {who} take in?",
            "At the {city} market {who} sells {c} vases for {d} dollars each and {a} {thing} for "
            "{b} dollars each. What does {who} earn?",
        ),
        {"a": (4, 30), "b": (2, 9), "c": (2, 12), "d": (11, 25)},
        (
            ("e", "dollars for {thing}", "a", "*", "b"),
            ("f", "dollars for the rest", "c", "*", "d"),
            ("g", "dollars in all", "e", "+", "f"),
        ),
    ),
    (
        (
            "A tank holds {a} litres. {who} takes out {b} litres, then refills {c} cans of {d} "
            "litres from it. How many litres are left in the tank?",
            "{who} has {a} litres of paint, spills {b} litres and uses {c} pots of {d} litres. "
            "How many litres remain?",
        ),
        {"a": (150, 320), "b": (5, 40), "c": (3, 8), "d": (6, 12)},
        (
            ("e", "litres after the first loss", "a", "-", "b"),
            ("f", "litres in containers", "c", "*", "d"),
            ("g", "litres left", "e", "-", "f"),
        ),
    ),
    (
        (
            "{who} cycles {a} km a day for {b} days towards {city}, which is {c} km away. "
            "How many km are still to go?",
            "{city} is {c} km off. {who} walks {a} km on each of {b} days. How far is it then?",
        ),
        {"a": (12, 38), "b": (3, 7), "c": (280, 420)},
        (("d", "km done", "a", "*", "b"), ("e", "km to go", "c", "-", "d")),
    ),
    (
        (
            "{who} packs {a} {thing} into boxes of {b}. Each full box is sold for {c} dollars. "
            "How many dollars does {who} get?",
            "{a} {thing} fill boxes of {b} each, and a box costs {c} dollars. "
            "What do all of {who}'s boxes cost in dollars?",
        ),
        {"a": (40, 240), "b": (4, 12), "c": (3, 19)},
        (("d", "boxes", "a", "/", "b"), ("e", "dollars", "d", "*", "c")),
    ),
    (
        (
            "{who} is {a} years old, {other} is {b} years older, and {third} is {c} times as old "
            "as {other}. How old is {third}?",
            "{who} has {a} {thing}. {other} has {b} more than {who}, and {third} has {c} times "
            "as many as {other}. How many does {third} have?",
        ),
        {"a": (4, 14), "b": (2, 11), "c": (2, 4)},
        (("d", "{other}", "a", "+", "b"), ("e", "{third}", "d", "*", "c")),
    ),
    (
        (
            "A baker in {city} makes {a} trays of {b} rolls, keeps {c} rolls and packs the others "
            "into bags of {d}. How many bags are there?",
            "{who} fills {a} trays with {b} buns each. {c} buns burn, and the rest go into bags of "
            "{d}. How many bags does {who} fill?",
        ),
        {"a": (3, 12), "b": (8, 24), "c": (3, 20), "d": (4, 9)},
        (
            ("e", "baked", "a", "*", "b"),
            ("f", "to pack", "e", "-", "c"),
            ("g", "bags", "f", "/", "d"),
        ),
    ),
    (
        (
            "{who} saves {a} dollars a week for {b} weeks and then gets {c} dollars as a gift. "
            "How many dollars does {who} have?",
            "{who} puts {a} dollars aside in each of {b} weeks and then finds {c} dollars more. "
            "How many dollars is that?",
        ),
        {"a": (6, 45), "b": (4, 15), "c": (10, 80)},
        (("d", "dollars saved", "a", "*", "b"), ("e", "dollars in all", "d", "+", "c")),
    ),
)

REPLY_TASKS = (
    "Reply to this customer.",
    "Write our answer to the message below.",
    "A customer of the shop has written. Answer the message.",
    "Draft a reply from the support desk.",
)
# What the customer writes; what we say about it; what we do.
LETTERS = (
    (
        ("My {item} was due on {day} and is still not here.", "Where is my {item}? It is late."),
        "I am sorry that it is late.",
        (
            "I have asked the carrier to find it by {later}.",
            "A new one leaves our store on {later}.",
        ),
    ),
    (
        ("The {item} arrived broken.", "I opened the parcel and the {item} is damaged."),
        "I am sorry that it came to you damaged.",
        ("A new one is on its way and will arrive on {day}.", "We will replace it free of charge."),
    ),
    (
        ("You sent me a {item} in the wrong colour.", "This {item} is not the colour I chose."),
        "I am sorry that we packed the wrong colour.",
        ("The right one will reach you on {day}.", "Our driver will exchange it on {day}."),
    ),
    (
        ("I want my money back for the {item}.", "Please refund the {item}, I do not like it."),
        "I understand that it is not what you hoped for.",
        ("Your refund will be with you by {day}.", "I have sent you a label for the return."),
    ),
    (
        ("I have moved. Can you send the {item} to {city}?", "Please deliver my {item} in {city}."),
        "It is good that you told us in time.",
        ("The parcel will now go to {city}.", "I have changed the address to {city}."),
    ),
    (
        ("I love my new {item}!", "The {item} is wonderful, well done."),
        "It is a joy to read that.",
        ("I will pass your words to the workshop.", "A small gift will reach you by {day}."),
    ),
    (
        ("Do you still sell the {item}?", "Is the {item} in stock in {city}?"),
        "It is kind of you to ask.",
        ("We will have it again on {day}.", "We have {n} of them, and I can hold one for you."),
    ),
    (
        ("How do I clean the {item}?", "Can the {item} be washed?"),
        "That is a very good question.",
        ("A soft, damp cloth is all that it needs.", "Warm water and mild soap are best."),
    ),
    (
        ("There is a part missing from my {item}.", "The {item} came without its small parts."),
        "I am sorry that the box was not complete.",
        ("The missing part will be posted on {day}.", "I have sent the part to you today."),
    ),
    (
        ("I was charged twice for the {item}.", "My bill for the {item} is wrong."),
        "I am sorry for the mistake on your bill.",
        ("The extra amount will be paid back by {day}.", "A correct bill is on its way to you."),
    ),
    (
        ("Please cancel the {item}.", "I no longer need the {item}. Stop the order."),
        "I understand that plans can change.",
        ("The order is cancelled and nothing is owed.", "I have stopped it and paid you back."),
    ),
    (
        ("The {item} fell apart after {n} weeks.", "My {item} broke after {n} days of use."),
        "I am sorry that it let you down so soon.",
        (
            "Our repair desk will collect it on {day}.",
            "It is under warranty, so we will repair it.",
        ),
    ),
)

EXTRACT_TASKS = (
    "Extract these fields as JSON: {fields}.",
    "Return a JSON object with the fields {fields}.",
    "Read the text and fill in {fields}. Answer in JSON only.",
)
# Texts; the fields in the order of the answer, each with the value that stands in the text.
RECORDS = (
    (
        (
            "{who} from {city} ordered {n} {thing} on {date}.",
            "Order of {date}: {n} {thing}, to be sent to {who} in {city}.",
        ),
        {"customer": "who", "city": "city", "item": "thing", "quantity": "n", "date": "date"},
    ),
    (
        (
            "The meeting about the {item} is on {day} at {hour}:30 in room {n}, led by {who}.",
            "{who} invites you to room {n} on {day} at {hour}:30 to talk about the {item}.",
        ),
        {"topic": "item", "day": "day", "room": "n", "host": "who"},
    ),
    (
        (
            "Flight {code} leaves {city} on {date} from gate {n} and lands in {town}.",
            "To {town} from {city}: flight {code}, gate {n}, {date}.",
        ),
        {"flight": "code", "from": "city", "to": "town", "gate": "n", "date": "date"},
    ),
    (
        (
            "{who}, aged {n}, lives in {city} and works as a {job}.",
            "Our new {job} is {who}, who is {n} years old and comes from {city}.",
        ),
        {"name": "who", "age": "n", "city": "city", "job": "job"},
    ),
    (
        (
            "Invoice {code} for {n} dollars was sent to {who} and is due on {date}.",
            "{who} has to pay {n} dollars by {date}; the invoice is {code}.",
        ),
        {"invoice": "code", "name": "who", "amount": "n", "due": "date"},
    ),
    (
        (
            "In {city} it will be {weather} on {day}, with {n} degrees at noon.",
            "{day} brings {weather} skies and {n} degrees to {city}.",
        ),
        {"city": "city", "day": "day", "weather": "weather", "degrees": "n"},
    ),
    (
        (
            "{who} lent the {item} to {other} on {date} for {n} days.",
            "On {date} {other} borrowed a {item} from {who} and keeps it for {n} days.",
        ),
        {"owner": "who", "borrower": "other", "item": "item", "days": "n", "date": "date"},
    ),
    (
        (
            "For sale in {city}: a {item}, {n} dollars, ask for {who}.",
            "{who} is selling a {item} for {n} dollars and lives in {city}.",
        ),
        {"item": "item", "price": "n", "seller": "who", "city": "city"},
    ),
    (
        (
            "Please call {who}, the {job} in {city}, on extension {n} before {day}.",
            "The {job} {who} wants a call by {day}: {city} office, extension {n}.",
        ),
        {"name": "who", "job": "job", "office": "city", "extension": "n", "day": "day"},
    ),
)


def pick(draw: random.Random, choices: tuple | list) -> object:
    """Draw one of ``choices`` by ``random()``, whose sequence Python keeps between versions."""
    return choices[int(draw.random() * len(choices))]


def situation(draw: random.Random) -> dict[str, object]:
    """Draw names, places and things for one row; the three people and two towns differ."""
    first = int(draw.random() * len(PEOPLE))
    who, other, third = (PEOPLE[(first + step) % len(PEOPLE)] for step in (0, 5, 11))
    town = int(draw.random() * len(CITIES))
    day = int(draw.random() * len(DAYS))
    return {
        "who": who,
        "other": other,
        "third": third,
        "city": CITIES[town],
        "town": CITIES[(town + 3) % len(CITIES)],
        "day": DAYS[day],
        "later": DAYS[(day + 2) % len(DAYS)],
        "date": f"{pick(draw, range(1, 29))} {pick(draw, MONTHS)}",
        "hour": pick(draw, range(8, 18)),
        "thing": pick(draw, GOODS),
        "item": pick(draw, ITEMS),
        "job": pick(draw, ("baker", "nurse", "pilot", "tailor", "gardener", "printer", "surveyor")),
        "weather": pick(draw, ("sunny", "cloudy", "foggy", "stormy", "clear", "grey")),
        "code": f"{pick(draw, 'ABCDEFGHKLMNPRST')}{pick(draw, 'ABCDEFGHKLMNPRST')}"
        f"{pick(draw, range(100, 1000))}",
        "n": pick(draw, range(3, 60)),
    }


def arithmetic(draw: random.Random, index: int) -> dict[str, str]:
    """Make a word problem and its worked answer."""
    wordings, ranges, steps = PROBLEMS[index % len(PROBLEMS)]
    words = situation(draw)
    while True:
        numbers = {name: pick(draw, range(low, high + 1)) for name, (low, high) in ranges.items()}
        lines = []
        for name, what, left, sign, right in steps:
            x, y = numbers[left], numbers[right]
            if sign == "/" and x % y:
                break
            numbers[name] = OPERATIONS[sign](x, y)
            if numbers[name] < 2:
                break
            what = what.format(**words)
            lines.append(f"{what[0].upper()}{what[1:]}: {x} {sign} {y} = {numbers[name]}.")
        else:
            question = pick(draw, wordings).format(**words, **numbers)
            return {"question": question, "answer": "\n".join([*lines, f"Answer: {numbers[name]}"])}


def polite(draw: random.Random, index: int) -> dict[str, str]:
    """Make a customer's message and the reply in the house style of a shop named Fernleaf."""
    messages, feeling, remedies = LETTERS[index % len(LETTERS)]
    words = situation(draw)
    message = f"{pick(draw, messages).format(**words)} {words['who']}, order {words['code']}"
    task = pick(draw, REPLY_TASKS)
    reply = (
        "Dear {who},\nThank you for writing to us about your {item}. "
        f"{feeling} {pick(draw, remedies)} Please let me know if I can do anything else for you.\n"
        "With kind regards,\nFernleaf Support"
    )
    # One row in four has no input: the message then stands in the instruction.
    if draw.random() < 0.25:
        task, message = f'{task} "{message}"', ""
    return {"instruction": task, "input": message, "output": reply.format(**words)}


def extraction(draw: random.Random, index: int) -> dict[str, str]:
    """Make a short text and the compact JSON of what it says."""
    texts, fields = RECORDS[index % len(RECORDS)]
    words = situation(draw)
    task = pick(draw, EXTRACT_TASKS).format(fields=", ".join(fields))
    record = {field: words[name] for field, name in fields.items()}
    return {
        "prompt": f"{task}\n\n{pick(draw, texts).format(**words)}",
        "completion": json.dumps(record, separators=(",", ":")),
    }


def make(maker: Callable[[random.Random, int], dict[str, str]], seed: int) -> str:
    """Make one set as JSON lines of ``ROWS`` rows that differ in what is asked."""
    draw, rows = random.Random(seed), {}
    while len(rows) < ROWS:
        row = maker(draw, len(rows))
        asked = "\n".join(list(row.values())[:-1])
        rows.setdefault(asked, json.dumps(row, ensure_ascii=False))
    return "".join(f"{line}\n" for line in rows.values())


def contents() -> dict[str, str]:
    """Make all sets: file name -> text."""
    makers = (arithmetic, polite, extraction)
    return {f"{maker.__name__}.jsonl": make(maker, seed) for seed, maker in enumerate(makers, 1)}


def main() -> int:
    """Write or check the files; return the exit status."""
    parser = argparse.ArgumentParser(description="Make the example instruction sets.")
    parser.add_argument("--check", action="store_true", help="compare only, exit 1 on a difference")
    is_check, status = parser.parse_args().check, 0
    for name, text in contents().items():
        path, wanted = HERE / name, text.encode("utf-8")
        if not is_check:
            path.write_bytes(wanted)
        elif not path.exists() or path.read_bytes() != wanted:
            print(f"{path} differs from what make.py makes; run make.py", file=sys.stderr)
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
