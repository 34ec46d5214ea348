"""Preference data as the hub has it: the columns, types and oddities of HelpSteer2."""

import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet

MARKED = "One?\n<extra_id_1>Assistant\n1.\n<extra_id_1>User\nTwo?"
MESSAGE = pa.list_(pa.struct([("content", pa.string()), ("role", pa.string())]))
SCHEMA = pa.schema([
    ("prompt", pa.string()),
    ("chosen", MESSAGE),
    ("chosen_rating", pa.float64()),
    ("rejected", MESSAGE),
    ("rejected_rating", pa.float64()),
])  # fmt: skip


def pair(prompt, high=3.0, low=2.6):
    turns = {
        name: [{"content": prompt, "role": "user"}, {"content": text, "role": "assistant"}]
        for name, text in (("chosen", "Yes."), ("rejected", "No."))
    }
    return {"prompt": prompt, **turns, "chosen_rating": high, "rejected_rating": low}


def pairs(count):
    """Return the oddities of the real set, turns in the text, a tie, a long prompt, and more."""
    odd = [pair(MARKED, 4.0, 0.0), pair("A tie?", 2.0, 2.0), pair("Long? " * 2000)]
    return [*odd, *(pair(f"Question {i}?") for i in range(count - len(odd)))]


def parquet(rows, schema=SCHEMA):
    buffer = io.BytesIO()
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema=schema), buffer)
    return buffer.getvalue()


def ratings(count):
    """Return rows as nvidia/HelpSteer2 has them: two for each prompt, every fourth pair a tie."""
    names = ("helpfulness", "correctness", "coherence", "complexity", "verbosity")
    rows = []
    for i in range(count):
        second = (2, 2, 2, 2, 2) if i % 4 == 0 else (4, 3, 2, 2, 2)
        for text, values in (("First.", (0, 1, 2, 3, 4)), ("Second.", second)):
            row = {"prompt": f"Question {i}?", "response": text}
            rows.append(row | dict(zip(names, values, strict=True)))
    return rows


def jsonl(rows):
    return gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
