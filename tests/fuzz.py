"""Looks for input that ends in a traceback: in the readers of files and in the command lines.

    python tests/fuzz.py --minutes 20

Not run by pytest. Every target may return, raise InputError (one line, exit code 2), or an error of the machine that run_script
puts in one line; anything else is printed with the input that did it, and the exit code is 1. No model is loaded.
"""

import argparse
import contextlib
import io
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from conftest import ROOT
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

import common
import debate
import train
import w2s
from common import InputError, read_samples
from data.prepare import TASKS, make_samples
from stages import Stage

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


def flags_of(cls) -> st.SearchStrategy:
    """Flags of a dataclass with values that are often odd."""
    names = ["--" + f.name.replace("_", "-") for f in common.dataclasses.fields(cls)]
    odd = [
        "",
        "0",
        "-1",
        "1",
        "2",
        "nan",
        "inf",
        "1e400",
        "no",
        "a/b",
        ":1",
        "@",
        "random-small",
        "random-small:9",
        "sciq",
        "ours",
        "/dev/null",
        "x" * 300,
    ]
    word = (
        st.sampled_from(names)
        | st.sampled_from(odd)
        | st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=5)
    )
    return st.lists(word, max_size=6)


class Enough(BaseException):
    """The input was accepted: what would be computed now is no matter of reading it."""


def stop(*_, **__):
    raise Enough


def command(main, argv: list[str]) -> None:
    with (
        mock.patch.object(sys, "argv", ["fuzz", *argv]),
        mock.patch.object(train, "Classifier", stop),
        mock.patch.object(debate, "make_transcripts", stop),
        mock.patch.object(w2s, "make_all", stop),
        contextlib.suppress(Enough, SystemExit),
    ):
        main()


def targets(folder: Path) -> dict:
    """Name -> (strategy, what to do with a drawn value). Files are written to `folder`."""
    file, rows = folder / "rows.jsonl", folder / "good.jsonl"
    common.write_jsonl(rows, [{"id": f"s{i}", "text": "why", "label": i % 2} for i in range(4)])

    def samples(raw: bytes) -> None:
        file.write_bytes(raw)
        for suffix in ("", ".gz"):
            shutil.copy(file, f"{file}{suffix}") if suffix else None
            with contextlib.suppress(InputError):
                read_samples(Path(f"{file}{suffix}"), "text")

    def labels(raw: bytes) -> None:
        file.write_bytes(raw)
        out = ["--model", "random-small", "--out", str(folder / "new")]
        command(train.main, ["--train", str(file), "--test", str(rows), *out])
        command(train.main, ["--train", str(rows), "--test", str(file), *out])

    def choices(raw: bytes) -> None:
        file.write_bytes(raw)
        given = ["--samples", str(rows), "--out", str(folder / "new"), "--protocol", "market_making"]
        command(debate.main, [*given, "--choices", str(file)])

    size = debate.DebateConfig().batch_size

    def transcripts(raw: bytes) -> None:
        (folder / "seed0.jsonl").write_bytes(raw)
        debate.make_transcripts(stop, "sciq", "debate", common.read_jsonl(rows), {0: folder / "seed0.jsonl"}, 3, size)

    def manifests(raw: bytes) -> None:
        stage = Stage(folder / "stage", {"lr": 1}, {}, lambda out: {})
        stage.folder.mkdir(exist_ok=True)
        (stage.folder / "manifest.json").write_bytes(raw)
        stage.difference()
        experiment = w2s.Experiment(
            w2s.Config.of("sciq", preset="smoke", methods=("single",), seeds=(0,), out=str(folder / "run")),
            "sciq",
        )
        for s in experiment.stages():
            s.folder.mkdir(parents=True, exist_ok=True)
            (s.folder / "manifest.json").write_bytes(raw)
        w2s.status([experiment])
        w2s.write_report([experiment])

    def sources(drawn) -> None:
        make_samples(drawn[0], drawn[1], 0)

    source = st.sampled_from(["sciq", "boolq", "cosmos_qa", "anthropic_hh"]).flatmap(
        lambda t: st.tuples(
            st.just(t),
            st.lists(st.fixed_dictionaries({f: leaf | st.text(max_size=3) for f in TASKS[t].fields}), max_size=3),
        )
    )
    run = ["--preset", "smoke", "--out", str(folder / "run2")]
    return {
        "samples": (content, samples),
        "labels": (content, labels),
        "choices": (content, choices),
        "transcripts": (content, transcripts),
        "manifests": (content | manifest, manifests),
        "sources": (source, sources),
        "w2s.py": (st.tuples(st.sampled_from(["run", "status", "report", "x"]), flags_of(w2s.Config)), lambda a: command(w2s.main, [a[0], *run, *a[1]])),
        "debate.py": (flags_of(debate.Args), lambda a: command(debate.main, ["--samples", str(rows), "--out", str(folder / "new"), *a])),
        "train.py": (flags_of(train.Args), lambda a: command(train.main, ["--train", str(rows), "--test", str(rows), "--model", "random-small", "--out", str(folder / "new"), *a])),
    }  # fmt: skip


def explore(strategy: st.SearchStrategy, act: Callable, key: int, end: float) -> int:
    """A hundred inputs, or as many as there is time for; returns how many. Raises what `act` should have caught."""
    tried = 0

    @seed(key)
    @settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def once(drawn) -> None:
        nonlocal tried
        if time.time() < end:
            tried += 1
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(InputError, OSError, Enough):
                act(drawn)

    once()
    return tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="how long to look")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs")
    args = parser.parse_args()
    end, tried, found, chance = time.time() + 60 * args.minutes, {}, {}, random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        todo = targets(Path(folder))
        while time.time() < end:
            for name, (strategy, act) in list(todo.items()):
                try:
                    tried[name] = tried.get(name, 0) + explore(strategy, act, chance.getrandbits(60), end)
                except Exception as e:
                    found[name] = f"{type(e).__name__}: {e}"
                    print(f"FOUND in {name}: {found[name]}", *getattr(e, "__notes__", []), sep="\n", flush=True)
                    todo.pop(name)  # one fault a target and session
    print(f"{args.minutes:g} minutes, seed {args.seed}: inputs {tried}; faults {len(found)}")
    sys.exit(bool(found))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
