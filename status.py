"""What is done, running, stale (and why) or missing, and about how long the rest will take."""

import json
from collections import Counter
from pathlib import Path

from common import print0
from stages import Stage, State, is_locked, read_manifest


def states(stages: list[Stage], out: Path) -> list[dict]:
    """Per stage its state, why it is stale, the seconds it took, and those it will take, estimated from similar stages."""
    rows, spent, running = [], {}, is_locked(out)
    for stage in stages:
        state, why = stage.state()
        known = "missing" if state in (State.BEGUN, State.SHORT) else state.value
        if running and state is not State.DONE and (stage.folder / "started.json").exists():
            known = "running"
        seconds = (read_manifest(stage.folder) or {}).get("seconds")
        name = stage.folder.relative_to(out).as_posix()
        rows.append({"stage": name, "state": known, "why": why if state is State.STALE else [], "seconds": seconds})
        if state is State.DONE and seconds is not None:
            spent.setdefault(kind(name), []).append(seconds)
    for row in rows:
        like = spent.get(kind(row["stage"]))
        row["expected"] = sum(like) / len(like) if like and row["state"] != "done" else None
    return rows


def kind(name: str) -> tuple[str, str]:
    """Stages of one kind take about as long: task/predictions and weak, task/weak_labels/ours and seed0."""
    folder, _, last = name.rpartition("/")
    return folder, last.split("-")[0]


def show(stages: list[Stage], out: Path, as_json: bool) -> None:
    rows = states(stages, out)
    if as_json:
        print0(json.dumps(rows, indent=1))
        return
    task = ""
    for row in rows:
        if (of := row["stage"].split("/")[0]) != task:
            print0(task := of)
        took = f"{row['seconds']:8.1f} s" if row["state"] == "done" else ""
        why = f"  ({'; '.join(row['why'])})" if row["why"] else ""
        print0(f"  {row['state']:8}{row['stage']:60}{took}{why}")
    count = Counter(r["state"] for r in rows)
    left = [r["expected"] for r in rows if r["state"] != "done"]
    known = [x for x in left if x is not None]
    more = f"; about {sum(known) / 60:.0f} min left for {len(known)} of {len(left)}" if known else ""
    print0(", ".join(f"{count[state]} {state}" for state in ("done", "running", "stale", "missing")) + more)
