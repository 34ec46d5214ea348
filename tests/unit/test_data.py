"""The data contract: what is read, what is refused, and what stays the same."""

import gzip
import json
import math
import tempfile
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.config import DataConfig, load_profile
from utils.data import pairs as data_module
from utils.data.pairs import (
    SPLITS,
    DataError,
    Group,
    Pair,
    Response,
    drop_long,
    load_data,
    pairs_frame,
    responses_frame,
)
from utils.experiments.pipeline import prepared_data
from utils.models.weights import encode_prompt


@pytest.fixture(scope="module")
def embedded():
    return load_data(DataConfig())


def turns(prompt="Hi?", answer="Yes."):
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def pair_row(prompt="Hi?", **changes):
    row = {
        "prompt": prompt,
        "chosen": turns(prompt, "Yes."),
        "rejected": turns(prompt, "No."),
        "chosen_rating": 8.0,
        "rejected_rating": 2.0,
    }
    return {**row, **changes}


def list_row(prompt="Hi?", ratings=(8, 2, 5), **changes):
    responses = [{"response": f"Answer {i}.", "overall": r} for i, r in enumerate(ratings)]
    return {"prompt": prompt, "responses": responses, **changes}


def with_response(**changes):
    row = list_row()
    row["responses"][1].update(changes)
    return row


def without(row, column):
    return {name: value for name, value in row.items() if name != column}


def write(path, rows):
    if path.suffix == ".parquet":
        pd.DataFrame(rows).to_parquet(path)
        return path
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def load(path, **fields):
    return load_data(DataConfig(source="file", path=str(path), **fields))


def load_rows(folder, rows, **fields):
    return load(write(Path(folder) / "rows.jsonl", rows), **fields)


# The embedded set


def test_embedded_sizes(embedded):
    assert [len(embedded.prompts(split)) for split in SPLITS] == [460, 60, 168]
    assert sum(len(group.responses) for group in embedded.groups) == 5477
    assert embedded.dropped == {}


@pytest.mark.parametrize(
    ("split", "total", "between"),
    [("train", 3990, 2615), ("validation", 523, 347), ("test", 1453, 949)],
)
def test_embedded_pairs(embedded, split, total, between):
    pairs = embedded.pairs(split)
    assert len(pairs) == total
    assert sum(pair.between_samples for pair in pairs) == between
    assert all(pair.chosen.rating > pair.rejected.rating for pair in pairs)
    assert all(pair.prompt_id == pair.group.prompt_id for pair in pairs)


def test_no_prompt_text_in_two_splits(embedded):
    texts = [{p.messages[-1]["content"] for p in embedded.prompts(split)} for split in SPLITS]
    assert sum(map(len, texts)) == len(set.union(*texts))


def test_embedded_frames(embedded):
    frame = responses_frame(embedded)
    assert len(frame) == 5477
    means = frame[frame.temperature == 0.7].groupby("batch").rating.mean()
    assert means.round(2).to_dict() == {1: 2.39, 2: 1.77}
    pairs = pairs_frame(embedded.pairs("validation"))
    assert len(pairs) == 523
    assert (pairs.chosen_rating > pairs.rejected_rating).all()
    assert pairs.chosen[0][-1]["role"] == "assistant"
    assert pairs.chosen[0][:-1] == pairs.rejected[0][:-1]
    assert pairs.chosen[0][-2]["content"] == pairs.prompt[0]


@pytest.mark.parametrize("cut", [True, False])
def test_broken_embedded_file(tmp_path, monkeypatch, cut):
    copy = tmp_path / "helpful_mini.jsonl"
    if cut:
        copy.write_bytes(data_module.EMBEDDED_PATH.read_bytes()[:-100])
    monkeypatch.setattr(data_module, "EMBEDDED_PATH", copy)
    with pytest.raises(DataError, match=r"git checkout -- .*helpful_mini.jsonl"):
        load_data(DataConfig())


def test_limit_keeps_all_categories(embedded):
    small = load_data(DataConfig(train_prompts=12, validation_prompts=5, test_prompts=26))
    assert [len(small.prompts(split)) for split in SPLITS] == [12, 5, 26]
    assert len({p.category for p in small.prompts("train")}) == 12
    assert len({p.category for p in small.prompts("validation")}) == 5
    per_category = pd.Series([p.category for p in small.prompts("test")]).value_counts()
    assert set(per_category) == {2, 3}
    ids = [g.prompt_id for g in embedded.groups]
    places = [ids.index(g.prompt_id) for g in small.groups]
    assert places == sorted(places)
    larger = load_data(DataConfig(train_prompts=20))
    assert {p.id for p in small.prompts("train")} < {p.id for p in larger.prompts("train")}


def test_limit_of_zero_and_below_zero():
    assert load_data(DataConfig(test_prompts=0)).prompts("test") == []
    with pytest.raises(DataError, match="test_prompts"):
        load_data(DataConfig(test_prompts=-1))


# Files


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".jsonl.gz"])
def test_pair_round_trip(embedded, tmp_path, ending):
    frame = pairs_frame(embedded.pairs("test")[:50] + embedded.pairs("train")[:50])
    again = load(write(tmp_path / f"pairs{ending}", frame.to_dict("records")))
    frames = [pairs_frame(again.pairs(split)) for split in ("test", "train")]
    found = pd.concat(frames, ignore_index=True)
    pd.testing.assert_frame_equal(found, frame)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".jsonl.gz"])
def test_listwise_round_trip(embedded, tmp_path, ending):
    lines = data_module.EMBEDDED_PATH.read_text(encoding="utf-8").splitlines()
    again = load(write(tmp_path / f"list{ending}", [json.loads(line) for line in lines]))
    assert again == embedded


def test_listwise_names_and_batches(tmp_path):
    row = list_row(responses=[
        {"response": "a", "rating": 1, "model": "m", "batch": 1},
        {"response": "b", "rating": 2, "model": "reference", "batch": 2, "finished": False},
        {"response": "c", "rating": 3, "source": "s", "batch": 2, "temperature": 0.5},
    ])  # fmt: skip
    groups = load_rows(tmp_path, [row], split_seed=1).groups
    assert [[r.text for r in g.responses] for g in groups] == [["a"], ["b", "c"]]
    assert groups[0].prompt_id == groups[1].prompt_id
    assert groups[0].responses[0] == Response("a", 1.0, True, "m", None)
    assert groups[1].responses == (
        Response("b", 2.0, False, "reference"),
        Response("c", 3.0, True, "s", 0.5),
    )


def test_system_and_several_turns(tmp_path):
    head = [{"role": "system", "content": "Be brief."}, *turns("One?", "1."), turns("Two?")[0]]
    texts = {
        name: [*head, {"role": "assistant", "content": text}]
        for name, text in (("chosen", "2."), ("rejected", "3."))
    }
    group = load_rows(tmp_path, [pair_row("Two?", **texts)]).groups[0]
    assert list(group.prompt) == head
    assert [r.text for r in group.responses] == ["2.", "3."]


# Turns in the text of a prompt

MARKED = "One?\n<extra_id_1>Assistant\nIt is\n\n1.\n<extra_id_1>User\nTwo?\n"


def contents(group):
    return [(message["role"], message["content"]) for message in group.prompt]


@pytest.mark.parametrize("prompt", [MARKED, "Two?", f"{MARKED}\n"])
def test_marked_turns_of_a_pair(tmp_path, prompt):
    changes = {name: turns(MARKED, text) for name, text in (("chosen", "2"), ("rejected", "3"))}
    group = load_rows(tmp_path, [pair_row(prompt, **changes)]).groups[0]
    assert contents(group) == [("user", "One?"), ("assistant", "It is\n\n1."), ("user", "Two?")]
    assert [r.text for r in group.responses] == ["2", "3"]


def test_marked_turns_of_a_list(tmp_path):
    group = load_rows(tmp_path, [list_row(MARKED)]).groups[0]
    assert [role for role, _ in contents(group)] == ["user", "assistant", "user"]


def test_marked_turns_come_back_as_they_were(tmp_path):
    data = load_rows(tmp_path, [pair_row(MARKED, split="test")])
    again = load_rows(tmp_path, pairs_frame(data.pairs("test")).to_dict("records"))
    assert again.groups[0].prompt == data.groups[0].prompt


@pytest.mark.parametrize(
    "text", ["The <extra_id_1> sleeps.", " spaces stay \n", "<extra_id_0>User"]
)
def test_text_without_markers_is_not_touched(tmp_path, text):
    assert contents(load_rows(tmp_path, [list_row(text)]).groups[0]) == [("user", text)]


@pytest.mark.parametrize(
    "text",
    [
        "One?\n<extra_id_1>Assistant\n1.",
        "One?\n<extra_id_1>User\nTwo?",
        "One?\n<extra_id_1>Assistant\n1.\n<extra_id_1>Assistant\n2.\n<extra_id_1>User\nThree?",
        "One?\n<extra_id_1>Assistant\n\n<extra_id_1>User\nTwo?",
        "<extra_id_1>Assistant\n1.\n<extra_id_1>User\nTwo?",
        "One?\n<extra_id_1>Assistant\n1.\n<extra_id_1>User\n \n",
        "One?\n<extra_id_1>System\n1.\n<extra_id_1>User\nTwo?",
    ],
)
@pytest.mark.parametrize("row", [list_row, pair_row])
def test_malformed_markers(tmp_path, text, row):
    with pytest.raises(DataError, match=r"row 2, column .*marked <extra_id_1>Assistant and"):
        load_rows(tmp_path, [row("Good?"), row(text)])


# Ratings


def test_ratings_are_mapped_to_the_scale_of_the_classes(tmp_path):
    scale = {"rating_low": 0.0, "rating_high": 4.0}
    row = list_row(ratings=(0, 4, 2, 2.6))
    found = load_rows(tmp_path, [row], **scale).groups[0].responses
    assert [r.rating for r in found] == pytest.approx([1, 10, 5.5, 6.85])
    pair = pair_row(chosen_rating=4, rejected_rating=0, split="train")
    (pair,) = load_rows(tmp_path, [pair], **scale).pairs("train")
    assert (pair.chosen.rating, pair.rejected.rating) == (10, 1)
    odd = list_row(ratings=(2.9, 4.7, 4.8, 8.4))
    kept = [r.rating for r in load_rows(tmp_path, [odd]).groups[0].responses]
    assert kept == [2.9, 4.7, 4.8, 8.4], "to the last bit where the scale is the same"


def test_errors_show_ratings_as_they_were_read(tmp_path):
    scale = {"rating_low": 0.0, "rating_high": 4.0}
    with pytest.raises(DataError, match=r"from 0 to 4 .*got 5"):
        load_rows(tmp_path, [pair_row(chosen_rating=5)], **scale)
    with pytest.raises(DataError, match=r"at least rejected_rating 2.0, got 1.0"):
        load_rows(tmp_path, [pair_row(chosen_rating=1)], **scale)


# Identical texts


def test_identical_pair_is_dropped(tmp_path):
    same = pair_row("Same?", rejected=turns("Same?", "Yes."))
    tie = pair_row("Same too?", rejected=turns("Same too?", "Yes."), rejected_rating=8.0)
    found = load_rows(tmp_path, [pair_row(), same, tie])
    assert found.dropped == {"identical texts": 2}
    assert [g.prompt[-1]["content"] for g in found.groups] == ["Hi?"]


def test_identical_listwise_text_keeps_the_first_rating(tmp_path):
    row = list_row()
    row["responses"] += [{**row["responses"][0], "overall": 3}, dict(row["responses"][0])]
    found = load_rows(tmp_path, [row])
    assert found.dropped == {"identical texts": 1}
    assert [r.rating for r in found.groups[0].responses] == [8, 2, 5, 8]


BAD_ROWS = [
    ("prompt", "not empty", without(pair_row(), "prompt")),
    ("prompt", "not empty", without(list_row(), "prompt")),
    ("prompt", "last user turn", pair_row(prompt="Hi?") | {"prompt": "Other?"}),
    ("chosen", "it is missing", without(pair_row(), "chosen")),
    ("rejected", "it is missing", without(pair_row(), "rejected")),
    ("chosen", "list of {role, content}", pair_row(chosen="Yes.")),
    ("chosen", "roles", pair_row(chosen=turns()[::-1])),
    ("chosen", "roles", pair_row(chosen=turns()[:1])),
    ("chosen", "roles", pair_row(chosen=turns()[1:])),
    ("chosen", "roles", pair_row(chosen=[])),
    ("chosen", "roles", pair_row(chosen=[turns()[0], *turns()])),
    ("rejected", "prompt turns", pair_row(rejected=turns("Other?", "No."))),
    ("chosen[1].content", "not empty", pair_row(chosen=turns("Hi?", " \n"))),
    ("chosen_rating", "a number", without(pair_row(), "chosen_rating")),
    ("chosen_rating", "from 1 to 10", pair_row(chosen_rating=11)),
    ("rejected_rating", "from 1 to 10", pair_row(rejected_rating=0.5)),
    ("rejected_rating", "a number", pair_row(rejected_rating="2")),
    ("rejected_rating", "a number", pair_row(rejected_rating=math.nan)),
    ("chosen_rating", "a number", pair_row(chosen_rating=True)),
    ("chosen_rating", "at least rejected_rating", pair_row(chosen_rating=1.5)),
    ("category", "not empty", pair_row(category=3)),
    ("responses", "non-empty list", list_row(responses=[])),
    ("responses[0]", "object", list_row(responses=["Yes."])),
    ("responses[1].response", "not empty", with_response(response=" ")),
    ("responses[1].response", "it is missing", with_response(response=None)),
    ("responses[1].overall", "it is missing", with_response(overall=None)),
    ("responses[1].overall", "a number", with_response(overall="good")),
    ("responses[1].overall", "from 1 to 10", with_response(overall=-math.inf)),
    ("responses[1].rating", "from 1 to 10", with_response(overall=None, rating=10**400)),
    ("responses[1].finished", "true or false", with_response(finished="yes")),
    ("responses[1].batch", "integer", with_response(batch="a")),
    ("responses[1].temperature", "number", with_response(temperature="hot")),
    ("responses[1].source", "text", with_response(source=["a"])),
]


@pytest.mark.parametrize(("column", "expected", "row"), BAD_ROWS)
def test_bad_row(tmp_path, column, expected, row):
    good = list_row("Good?") if "responses" in row else pair_row("Good?")
    with pytest.raises(DataError) as caught:
        load_rows(tmp_path, [good, row])
    message = str(caught.value)
    assert f"rows.jsonl, row 2, column {column!r}" in message
    assert expected in message


@pytest.mark.parametrize(("first", "second"), [("train", "test"), ("train", None), ("dev", "dev")])
def test_bad_split(tmp_path, first, second):
    rows = [pair_row("Good?", split="train"), pair_row(split=first), pair_row(split=second)]
    with pytest.raises(DataError, match=r"row [23], column 'split'"):
        load_rows(tmp_path, rows)


def test_one_id_for_two_prompts(tmp_path):
    with pytest.raises(DataError, match="row 2, column 'id'"):
        load_rows(tmp_path, [list_row("One?", id=0), list_row("Two?", id=0)])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"prompt", "unknown file ending, expected .parquet"),
        ("a.jsonl", None, "no such file"),
        ("a.jsonl", b"", "no rows"),
        ("a.jsonl", b"\n\n", "no rows"),
        ("a.jsonl", b'\n{"prompt": "Hi', "line 2"),
        ("a.jsonl", b"[1]", "line 1: expected a JSON object"),
        ("a.jsonl", b"\xff", "unreadable"),
        ("a.jsonl.gz", b"no gzip", "unreadable"),
        ("a.jsonl.gz", gzip.compress(b"{}" * 99)[:-12], "unreadable"),
        ("a.parquet", b"PAR1", "unreadable"),
    ],
)
def test_bad_file(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        load(tmp_path / name)


def test_parquet_errors_name_the_row(tmp_path):
    rows = [pair_row("One?"), pair_row("Two?", chosen_rating=math.nan)]
    with pytest.raises(DataError, match="row 2, column 'chosen_rating'"):
        load(write(tmp_path / "a.parquet", rows))
    with pytest.raises(DataError, match="no rows"):
        load(write(tmp_path / "b.parquet", pd.DataFrame(rows)[:0]))


# Splits and fingerprints


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=8),
    seed=st.integers(0, 5),
    order=st.randoms(use_true_random=False),
)
def test_a_prompt_always_lands_in_one_split(prompts, seed, order):
    shuffled = order.sample(prompts, len(prompts))
    with tempfile.TemporaryDirectory() as folder:
        found = [
            load_rows(folder, [list_row(p) for p in listed], split_seed=seed)
            for listed in (prompts + prompts[:2], shuffled)
        ]
    splits = [{(g.prompt[-1]["content"], g.split) for g in d.groups} for d in found]
    assert splits[0] == splits[1]
    assert len(splits[0]) == len(set(prompts))


def test_split_shares_and_seed(tmp_path):
    rows = [list_row(f"Question {i}?") for i in range(2000)]
    first, second = (load_rows(tmp_path, rows, split_seed=seed) for seed in (0, 1))
    shares = [len(first.prompts(split)) / 2000 for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert [g.split for g in first.groups] != [g.split for g in second.groups]


def test_fingerprint(embedded, tmp_path):
    assert load_data(DataConfig()).fingerprint == embedded.fingerprint
    rows = [list_row("One?"), list_row("Two?")]
    base = load_rows(tmp_path, rows).fingerprint
    assert len(base) == 16
    assert load_rows(tmp_path, rows).fingerprint == base
    for changed in (
        [list_row("One?"), list_row("Two?", ratings=(8, 2, 5.5))],
        [list_row("One?"), list_row("Two!")],
        [list_row("One?", id="p"), list_row("Two?")],
        [row | {"split": "test"} for row in rows],
        rows[:1],
    ):
        assert load_rows(tmp_path, changed).fingerprint != base
    smaller = load_data(DataConfig(train_prompts=10))
    assert smaller.fingerprint != embedded.fingerprint


# Length


def encode_words(messages, response):
    text = " ".join(m["content"] for m in messages) + " " + (response.text if response else "")
    return [len(word) for word in text.split()]


def sized_row(prompt, *lengths):
    texts = [{"response": "w " * n, "overall": n % 10 + 1} for n in lengths]
    return {"prompt": prompt, "split": "train", "responses": texts}


def test_drop_long(tmp_path):
    shapes = [("a b", 1, 2, 3), ("a b c d", 1, 2), ("c d", 3, 4, 5), ("e f", 1, 6, 7)]
    data = load_rows(tmp_path, [sized_row(*shape) for shape in shapes])
    found = drop_long(data, encode_words, max_prompt_length=3, max_length=6)
    assert found.dropped == {
        "prompt over 3 tokens": 1,
        "response over 6 tokens": 3,
        "group of fewer than two responses": 1,
    }
    assert sorted(found.dropped_shares()) == [
        "group of fewer than two responses: 1 of 3, 33.3%",
        "prompt over 3 tokens: 1 of 4, 25.0%",
        "response over 6 tokens: 3 of 9, 33.3%",
    ]
    assert [p.messages[-1]["content"] for p in found.prompts("train")] == ["a b", "c d"]
    assert [len(g.responses) for g in found.groups] == [3, 2]
    assert found.fingerprint != data.fingerprint
    same = drop_long(data, encode_words, max_prompt_length=99, max_length=99)
    assert same == data
    assert same.dropped_shares() == []


def test_a_text_is_encoded_once(tmp_path):
    data, calls = load_rows(tmp_path, [sized_row("a b", 1, 2, 3), sized_row("c d", 1, 2)]), []

    def encode(messages, response):
        calls.append((messages[0]["content"], response and response.text))
        return encode_words(messages, response)

    drop_long(data, encode, 99, 99)
    assert len(calls) == len(set(calls)) == 7


def test_what_reads_the_same_is_dropped(tmp_path):
    """Texts differ and token ids do not, as with characters that a tokenizer does not know."""

    def row(prompt, *responses):
        entries = [{"response": text, "overall": rating} for text, rating in responses]
        return {"prompt": prompt, "split": "train", "responses": entries}

    rows = [
        row("group", ("xx", 1), ("yy", 5), ("zz", 1), ("z", 3)),  # yy goes, zz has xx's rating
        row("pair", ("xx", 1), ("yy", 5)),  # both go
        row("late", ("xx", 1), ("yy", 5), ("w " * 9, 9)),  # a pair, once the third is too long
        row("fine", ("x", 1), ("yy", 5)),
    ]
    found = drop_long(load_rows(tmp_path, rows), encode_words, 9, 9)
    kept = {g.prompt[0]["content"]: [r.text for r in g.responses] for g in found.groups}
    assert kept == {"group": ["xx", "zz", "z"], "fine": ["x", "yy"]}
    assert found.dropped == {"identical after tokenisation": 5, "response over 9 tokens": 1}
    assert "identical after tokenisation: 5 of 10, 50.0%" in found.dropped_shares()


def test_shares_of_identical_texts(tmp_path):
    same = pair_row("Same?", rejected=turns("Same?", "Yes."))
    shares = load_rows(tmp_path, [pair_row(), same, pair_row("Third?")]).dropped_shares()
    assert shares == ["identical texts: 1 of 3, 33.3%"]


def prepare(**changes):
    fields = {f"data.{name}": value for name, value in changes.items()}
    return prepared_data(load_profile("smoke", fields))


@pytest.fixture
def _no_profile(monkeypatch):
    monkeypatch.delenv("REPORT_PROFILE", raising=False)


@pytest.mark.usefixtures("_no_profile")
def test_limits_smaller_than_the_template(tokenizer):
    one_word = [{"role": "user", "content": "Hi"}]
    template = len(encode_prompt(tokenizer, one_word))
    with pytest.raises(DataError, match=f"max_prompt_length = {template} .*makes {template} tok"):
        prepare(max_prompt_length=template)
    with pytest.raises(DataError, match=r"no prompts are left in train and validation and test"):
        prepare(max_prompt_length=template + 1)
    with pytest.raises(DataError, match=r"response over 45 tokens: \d+ of \d+, \d"):
        prepare(max_length=45)


@pytest.mark.usefixtures("_no_profile")
def test_a_split_that_is_not_there(tmp_path):
    rows = [list_row(f"{i}?", split="train" if i else "validation") for i in range(3)]
    path = str(write(tmp_path / "rows.jsonl", rows))
    with pytest.raises(DataError, match=r"no prompts are left in test \(dropped: none\)"):
        prepare(source="file", path=path)
    assert len(prepare(source="file", path=path, test_prompts=0).groups) == 3


def test_pairs_between_samples():
    group = Group("p", "test", None, tuple(turns()[:1]), ())
    sampled = Response("one two three", 5.0, source="m"), Response("one", 2.0, source="m")
    reference, unknown = Response("one", 9.0, source="reference"), Response("two", 9.5)
    pairs = [Pair(group, *sampled), Pair(group, reference, sampled[0])]
    pairs.append(Pair(group, unknown, sampled[0]))
    assert [pair.between_samples for pair in pairs] == [True, False, False]


def test_unknown_split(embedded):
    with pytest.raises(DataError, match="train, validation, test"):
        embedded.pairs("dev")
