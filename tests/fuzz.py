"""Looks for input that ends in a traceback: in the readers of files and in the command lines.

    python tests/fuzz.py --minutes 20

Not run by pytest. Every target may return, raise InputError (one line, exit code 2), or an error of the machine that run_script
puts in one line; anything else is printed with the input that did it, and the exit code is 1. No model is loaded.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from conftest import run
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import common
import config
import debate
import train
import w2s
from common import InputError
from data.prepare import TASKS, load_rows, make_samples, task_of_file

leaf = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
value = st.recursive(
    leaf, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4), x, max_size=3), max_leaves=6
)
known = st.sampled_from(["id", "text", "label", "probs", "sides", "turns", "n_tokens", "question", "answer"])
row = st.dictionaries(known, value | st.just([0.5, 0.5]) | st.sampled_from(["a", "b", 0, 1]), max_size=6)
lines = st.lists(row.map(json.dumps) | value.map(json.dumps) | st.text(max_size=20), max_size=4)
content = st.binary(max_size=40) | lines.map(lambda x: "\n".join(x).encode("utf-8", "surrogatepass"))
manifest = st.dictionaries(
    st.sampled_from(["config", "inputs", "outputs", "minimum", "seconds", "commit"]),
    value | st.dictionaries(st.text(max_size=6) | st.just("../x"), leaf, max_size=3),
).map(lambda m: json.dumps(m).encode())

parts = value | st.text(max_size=4) | st.lists(st.text(max_size=4), max_size=2)
wording = st.dictionaries(st.sampled_from(["shown", "debated", "claim", "sides"]), parts, max_size=2)
own_row = st.fixed_dictionaries({"text": st.text(max_size=8), "label": st.sampled_from([0, 1])}) | row
own = st.tuples(wording, st.lists(own_row, min_size=8, max_size=12)).map(
    lambda x: "\n".join(map(json.dumps, [{"wording": x[0]}, *x[1]])).encode()
)


def flags_of(cls) -> st.SearchStrategy:
    """Flags of a dataclass with values that are often odd."""
    names = ["--" + f.name.replace("_", "-") for f in dataclasses.fields(cls)]
    odd = "|0|-1|1|2|nan|inf|1e400|no|a/b|:1|@|random-small|random-small:9|sciq|ours|/dev/null".split("|")
    word = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=5)
    return st.lists(st.sampled_from(names) | st.sampled_from([*odd, "x" * 300]) | word, max_size=6)


class Enough(BaseException):
    """The input was accepted: what would be computed now is no matter of reading it."""


def stop(*_, **__):
    raise Enough


def command(script: str, *argv) -> None:
    """The script up to where it would compute. Its faults are raised, its one-line errors are not."""
    with (
        mock.patch.object(train, "Classifier", stop),
        mock.patch.object(debate, "ENGINES", dict.fromkeys(debate.ENGINES, stop)),
        mock.patch.object(w2s, "make_all", stop),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.suppress(Enough),
    ):
        run(script, *argv)


def targets(folder: Path) -> dict:
    """Name -> (strategy, what to do with a drawn value). Files are written to `folder`."""
    file, good, debates = folder / "rows.jsonl", folder / "good.jsonl", folder / "seed0.jsonl"
    common.write_jsonl(good, [{"id": f"s{i}", "text": "why", "label": i % 2} for i in range(4)])
    training = ["--model", "random-small", "--out", folder / "trained"]
    debating = ["--strong", "random-small", "--out", folder / "debated"]
    pipeline = ["--preset", "smoke", "--methods", "single", "--tasks", "sciq", "--seeds", "0", "--out", folder / "run"]

    def samples(raw: bytes) -> None:
        for name in ("rows.jsonl", "rows.jsonl.gz"):
            (folder / name).write_bytes(raw)
            command("debate", *debating, "--samples", folder / name)
            command("train", *training, "--train", folder / name, "--test", good)
            command("train", *training, "--train", good, "--test", folder / name)

    def choices(raw: bytes) -> None:
        file.write_bytes(raw)
        command("debate", *debating, "--samples", good, "--protocol", "market_making", "--choices", file)

    def transcripts(raw: bytes) -> None:
        debates.write_bytes(raw)
        debate.make_transcripts(stop, "sciq", "debate", common.read_jsonl(good), {0: debates}, 3, stop)

    def manifests(raw: bytes) -> None:
        for name in ("data", "transcripts/debate", "predictions/weak-naive-f0-s0", "predictions/strong-single-s0"):
            (folder / "run/sciq" / name).mkdir(parents=True, exist_ok=True)
            (folder / "run/sciq" / name / "manifest.json").write_bytes(raw)
        command("w2s", "status", *pipeline)
        command("w2s", "report", *pipeline)

    def own_task(raw: bytes) -> None:
        file.write_bytes(raw)
        name, task = task_of_file(file)
        with mock.patch.dict(TASKS, {name: task}):
            for split in ("train", "test"):
                make_samples(name, load_rows(name, split, None), 0)

    def source(task: str) -> st.SearchStrategy:
        rows = st.fixed_dictionaries({f: leaf | st.text(max_size=3) for f in TASKS[task].fields})
        return st.tuples(st.just(task), st.lists(rows, max_size=3), st.just(0))

    commands = st.sampled_from(["run", "status", "report", "x"])
    return {
        "samples": (content, samples),
        "choices": (content, choices),
        "transcripts": (content, transcripts),
        "manifests": (content | manifest, manifests),
        "task files": (content | own, own_task),
        "sources": (st.sampled_from(config.PAPER_TASKS).flatmap(source), lambda drawn: make_samples(*drawn)),
        "w2s": (st.tuples(commands, flags_of(w2s.Config)), lambda x: command("w2s", x[0], *pipeline, *x[1])),
        "debate": (flags_of(debate.Args), lambda x: command("debate", "--samples", good, *debating, *x)),
        "train": (flags_of(train.Args), lambda x: command("train", "--train", good, "--test", good, *training, *x)),
    }


def explore(strategy: st.SearchStrategy, act: Callable, key: int) -> None:
    """A hundred inputs. Raises what `act` should have caught."""

    @seed(key)
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def once(drawn) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(InputError, OSError, Enough):
            act(drawn)

    once()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="how long to look")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    args = parser.parse_args()
    end, rounds, faults, chance = time.time() + 60 * args.minutes, 0, 0, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        todo = targets(Path(folder))
        while time.time() < end:
            rounds += 1
            for name, (strategy, act) in list(todo.items()):
                try:
                    explore(strategy, act, chance.getrandbits(60))
                except Exception as e:
                    faults += 1
                    notes = getattr(e, "__notes__", [])
                    print(f"FOUND in {name}: {type(e).__name__}: {e}", *notes, sep="\n", flush=True)
                    todo.pop(name)  # one fault a target and session
    print(f"{args.minutes:g} minutes, seed {args.seed}: {rounds} rounds of 100 inputs a target; faults {faults}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
