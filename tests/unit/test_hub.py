"""Data and models from the hub: the real libraries against a stand-in, each scenario once.

The endpoint is fixed when the libraries are imported, so the scenarios run in two processes of
their own: one that reaches the stand-in, and one that is offline with the cache of the first.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub
from tests.hub_data import jsonl, pairs, parquet, ratings

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND, THIRD = (
    ("esfrankel17/HelpSteer2_binarized", "average_rating_split"),
    ("esfrankel17/original_HelpSteer2_binarized", "average_rating"),
    ("juyoungml/original_HelpSteer2_binarized", "average_rating"),
)


# The scenarios, in processes of their own


class Scenarios:
    """Run calls one after another; keep what each returned, printed or raised, and how long."""

    def __init__(self, home, hub):
        self.home, self.hub, self.outcomes = home, hub, {}

    def fresh(self):
        self.hub.clear()
        for name in ("hub", "datasets"):
            shutil.rmtree(self.home / name, ignore_errors=True)

    def add(self, place, rows, **how):
        repository, split = place
        content = rows if isinstance(rows, bytes) else parquet(rows)
        files = {f"data/{split}-00000-of-00001.parquet": content}
        return self.hub.add_dataset(repository, files, **how)

    def data(self, scenario, **fields):
        from utils.config import DataConfig
        from utils.data.pairs import load_data

        def call():
            scale = {"rating_low": 0.0, "rating_high": 4.0}
            data = load_data(DataConfig(source="hub", **{**scale, **fields}))
            groups = [
                [g.prompt, [(r.text, r.rating) for r in g.responses]] for g in data.groups[:3]
            ]
            pairs = sum(len(data.pairs(split)) for split in ("train", "validation", "test"))
            count = len(data.groups)
            shares = data.dropped_shares()
            return {"groups": groups, "count": count, "pairs": pairs, "shares": shares}

        self.run(scenario, call)

    def model(self, scenario, repository, revision=None):
        from utils.data.hub import model_snapshot

        def call():
            folder = model_snapshot(repository, revision)
            files = [path for path in folder.rglob("*") if path.is_file()]
            return {"files": sorted(path.relative_to(folder).as_posix() for path in files)}

        self.run(scenario, call)

    def run(self, scenario, call):
        printed, start = io.StringIO(), time.monotonic()
        with contextlib.redirect_stdout(printed):
            try:
                outcome = call()
            except Exception as error:
                outcome = {"error": f"{type(error).__name__}: {error}"}
        outcome |= {"printed": printed.getvalue(), "seconds": time.monotonic() - start}
        self.outcomes[scenario] = outcome


def online(home, folder):
    hub = FakeHub()
    os.environ.update(hub.environment(home))
    with hub:
        s = Scenarios(home, hub)
        full = parquet(pairs(8678))
        data_scenarios(s, full)
        model_scenarios(s, folder)
        # What is in the cache from here on is what the offline process finds.
        s.fresh()
        s.add(SECOND, full)
        s.data("fills the cache")
        old = s.add(("own/pairs", "train"), pairs(4))
        s.data("fills the cache, pinned", name="own/pairs:train", revision=old)
        new = s.add(("own/pairs", "train"), pairs(5))
        hub.add_model("own/tiny", folder)
        s.model("fills the cache, model", "own/tiny")
    s.data("no network, first name not cached")
    s.model("no network, model", "own/other")
    s.outcomes["commits"] = {"old": old, "new": new}
    return s.outcomes


def data_scenarios(s, full):
    s.fresh()
    s.outcomes["commit of first"] = s.add(FIRST, full)
    s.data("first")
    s.fresh()
    s.add(FIRST, pairs(100))
    s.add(THIRD, full)
    s.data("wrong count")
    s.fresh()
    s.add((FIRST[0], "train"), pairs(5))
    s.hub.add_dataset("nvidia/HelpSteer2", {
        "train.jsonl.gz": jsonl(ratings(12)), "validation.jsonl.gz": jsonl(ratings(3)),
    })  # fmt: skip
    s.data("rebuilt")
    s.fresh()
    s.add(FIRST, full, gated=True)
    s.data("none")
    s.fresh()
    s.hub.add_dataset("nvidia/HelpSteer2", {"train.jsonl.gz": jsonl(ratings(2)[1:3])})
    s.data("ratings of two prompts")
    s.fresh()
    other = ("own/pairs", "train")
    commit = s.add(other, pairs(4), tag="v1")
    s.add(other, pairs(5))
    named = {"name": "own/pairs:train"}
    s.data("pinned by commit", **named, revision=commit)
    s.data("pinned by tag", **named, revision="v1")


def model_scenarios(s, folder):
    s.fresh()
    copy = s.home / "model"
    shutil.copytree(folder, copy)
    (copy / "onnx").mkdir()
    (copy / "onnx" / "config.json").write_text("{}")
    (copy / "pytorch_model.bin").write_bytes(b"pickled")
    s.outcomes["files"] = sorted(path.name for path in Path(folder).iterdir())
    s.hub.add_model("own/tiny", copy)
    s.model("model", "own/tiny")
    s.model("model, unknown revision", "own/tiny", "v9")
    s.model("model, missing", "own/nothing")
    s.hub.add_model("own/gated", copy, gated=True)
    s.model("model, gated", "own/gated")


def offline(home, commits):
    s = Scenarios(home, None)
    s.data("offline")
    s.data("offline, pinned", name="own/pairs:train", revision=commits["old"])
    s.data("offline, another commit", name="own/pairs:train", revision=commits["new"])
    s.model("offline, model", "own/tiny")
    shutil.rmtree(home / "hub")
    s.data("offline, the cache of datasets alone")
    return s.outcomes


def in_process(home, stage, argument, **environment):
    command = [sys.executable, __file__, stage, str(home), json.dumps(argument)]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory, tiny):
    from utils.models.weights import weights_path

    home = tmp_path_factory.mktemp("home")
    first = in_process(home, "online", str(weights_path(tiny)))
    closed = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    return first | in_process(home, "offline", first["commits"], **closed)


# What they must come to


def test_the_first_name_is_taken(outcomes):
    found = outcomes["first"]
    assert found["count"] == 8678
    assert found["pairs"] == 8677, "the tie makes no pair"
    commit = outcomes["commit of first"]
    assert found["printed"] == f"[data] {':'.join(FIRST)} is used: 8,678 rows, commit {commit}\n"


def test_turns_in_the_text_and_the_scale_of_the_classes(outcomes):
    dialogue, tie, _ = outcomes["first"]["groups"]
    roles = ["user", "assistant", "user"]
    assert dialogue == [
        [{"role": r, "content": c} for r, c in zip(roles, ("One?", "1.", "Two?"), strict=True)],
        [["Yes.", 10.0], ["No.", 1.0]],
    ]
    assert tie[1] == [["Yes.", 5.5], ["No.", 5.5]]


def test_another_number_of_rows_is_refused_and_the_next_name_taken(outcomes):
    found = outcomes["wrong count"]
    lines = found["printed"].splitlines()
    assert lines[0].endswith("is not used: it has 100 rows, the known set 8,678")
    assert len(lines) == 3
    assert f"{':'.join(THIRD)} is used: 8,678 rows" in lines[2]


def test_the_last_resort_is_rebuilt_from_ratings(outcomes):
    found = outcomes["rebuilt"]
    assert [line.count("is not used") for line in found["printed"].splitlines()] == [1, 1, 1, 0, 0]
    assert f'Unknown split "{FIRST[1]}"' in found["printed"], "a renamed split has its reason"
    last = found["printed"].splitlines()[-1]
    assert "9 pairs rebuilt from ratings, 3 of equal ratings left out" in last
    assert last.endswith("the known set has 8,678: the counts differ")
    assert found["shares"] == ["pair of equal ratings: 3 of 12, 25.0%"]
    # means 2.6 and 2.0 of 0..4
    prompt, responses = found["groups"][0]
    assert prompt == [{"role": "user", "content": "Question 1?"}]
    assert [text for text, _ in responses] == ["Second.", "First."]
    assert [rating for _, rating in responses] == pytest.approx([6.85, 5.5])


def test_without_any_set_every_reason_is_given(outcomes):
    error = outcomes["none"]["error"]
    assert error.startswith("DataError: ")
    assert error.count("it is not on the hub") == 3
    assert f"{':'.join(FIRST)}: it is gated" in error
    assert "`hf auth login`" in error
    assert "\n" not in error
    assert 'data.source = "embedded"' in error


def test_ratings_of_two_prompts_make_no_pair(outcomes):
    error = outcomes["ratings of two prompts"]["error"]
    assert error.startswith("DataError: nvidia/HelpSteer2:train")
    assert "row 2, column 'prompt': expected that of the row before, got 'Question 1?'" in error


@pytest.mark.parametrize("how", ["commit", "tag"])
def test_a_pinned_revision(outcomes, how):
    assert outcomes[f"pinned by {how}"]["count"] == 4, "5: the newest, 4: the pinned one"


def test_no_network(outcomes):
    name = "no network, first name not cached"
    error = outcomes[name]["error"]
    assert error.startswith("DataError: the hub cannot be reached")
    for remedy in ('data.source = "embedded"', "data.path", "HF_HUB_OFFLINE=1"):
        assert remedy in error
    assert "\n" not in error
    assert outcomes[name]["printed"] == "", "it stops at once"
    assert outcomes[name]["seconds"] < 10


def test_offline_the_cache_is_used(outcomes):
    assert outcomes["fills the cache"]["count"] == 8678
    found = outcomes["offline"]
    assert found["count"] == 8678
    assert f"{':'.join(FIRST)} is not used: it is not in the cache" in found["printed"]
    assert outcomes["offline, pinned"]["count"] == 4
    assert outcomes["offline, the cache of datasets alone"]["count"] == 8678


def test_offline_another_commit_is_not_taken_for_the_pinned_one(outcomes):
    error = outcomes["offline, another commit"]["error"]
    assert error.startswith("DataError: the hub cannot be reached")
    old, new = outcomes["commits"].values()
    assert f"commit {old} for {new}" in error


def test_a_model(outcomes):
    assert outcomes["model"]["files"] == outcomes["files"], "no subfolder, no pickle"
    assert "model.safetensors" in outcomes["files"]
    assert outcomes["offline, model"]["files"] == outcomes["files"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("model, unknown revision", ["no revision 'v9'", "model.revision"]),
        ("model, missing", ["'own/nothing' is neither", "spelling", "hf auth login"]),
        ("model, gated", ["'own/gated' is gated", "hf auth login"]),
        ("no network, model", ["the hub cannot be reached", "not in the cache"]),
    ],
)
def test_a_model_that_cannot_be_had(outcomes, name, parts):
    error = outcomes[name]["error"]
    assert error.startswith("HubError: model.name = ")
    assert "\n" not in error
    assert all(part in error for part in parts), error


if __name__ == "__main__":
    stage, home, argument = sys.argv[1:]
    run = {"online": online, "offline": offline}[stage]
    print(json.dumps(run(Path(home), json.loads(argument))))
