"""Stages: what is done, what is stale, what is missing; their manifests; and the lock on a folder of results."""

import contextlib
import dataclasses
import enum
import fcntl
import functools
import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common import ALONE, ROOT, InputError, Ranks, processes_per_gpu, read_json, world, write_text


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder by name; cached by size and mtime."""
    if path.is_dir():
        parts = [(p.relative_to(path).as_posix(), digest(p)) for p in sorted(path.rglob("*")) if p.is_file()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    stat = path.stat()
    return digest_of_file(path, stat.st_size, stat.st_mtime_ns)


@functools.cache
def digest_of_file(path: Path, size: int, mtime: int) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def settings_of(settings, **more) -> dict:
    """Of a dataclass of flags what a Stage compares, with `more`; the values of fields that are new; and what is recorded only."""
    fields = dataclasses.fields(settings)
    speed = {f.name: getattr(settings, f.name) for f in fields if f.metadata.get("speed")}
    config = {f.name: getattr(settings, f.name) for f in fields if f.name not in speed}
    return {
        "config": config | more,
        "defaults": {f.name: f.default for f in fields if f.name in config},
        "speed": speed,
    }


class State(enum.Enum):
    """What there is of a stage."""

    MISSING = "missing"  # nothing
    BEGUN = "begun"  # unfinished, for the same work: `make` continues it
    SHORT = "short"  # finished with less than `minimum`, or begun to be more: `make` continues it
    STALE = "stale"  # of other settings, inputs or code, or changed since: it is moved aside
    DONE = "done"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One resumable step: `make(folder, ranks, ...)` writes files into `folder` and returns what it cost (tokens, counts).

    The folder is done when its manifest.json, written last, holds the same `config`, the same digests of `inputs` (a file,
    a folder, or a function that computes the digest) and of the `code` that can be reached (reach.py). It may contain more
    than `minimum`. A setting that an older manifest lacks had the value in `defaults`. `speed` is recorded, not compared.

    Under several processes rank 0 makes it while the others wait, unless it is `on_all_ranks`: then `make` runs on all of
    them and rank 0's cost counts. `group_size` is how many make it together (or the next divisor of their number) while
    others make its neighbours (0: all). `twins` are folders of other tasks: where one holds the result of the same config,
    inputs and code, it is copied. `work` says what the stage does, for plan.py.
    """

    folder: Path
    config: dict
    inputs: dict[str, Path | Callable[[], str]]
    make: Callable[..., dict]
    code: dict[str, str] = dataclasses.field(default_factory=dict)
    defaults: dict = dataclasses.field(default_factory=dict)
    speed: dict = dataclasses.field(default_factory=dict)
    minimum: dict[str, int] = dataclasses.field(default_factory=dict)
    on_all_ranks: bool = False
    group_size: int = 0
    twins: tuple[Path, ...] = ()
    work: object = None

    def wanted(self) -> dict:
        return {
            "config": json.loads(json.dumps(self.config)),
            "inputs": {name: what() if callable(what) else digest(what) for name, what in self.inputs.items()},
            "code": self.code,
        }

    def state(self) -> tuple[State, list[str]]:
        """What there is, and why it is not done."""
        have = read_manifest(self.folder)
        there = {p.name for p in self.folder.iterdir() if is_output(p)} if self.folder.exists() else set()
        try:
            want = self.wanted()
        except FileNotFoundError as e:
            return (State.STALE if have else State.MISSING), [f"input {e.filename} is missing"]
        begun_for_this = read_json(self.folder / "started.json") == want
        if have is None and begun_for_this:
            return State.BEGUN, []
        if have is None:
            begun = "started.json" in there
            how = "begun with other settings" if begun else f"{min(there, default='')}, of unknown origin"
            return (State.STALE, [how]) if there - {"started.json"} else (State.MISSING, [])
        if not have:
            return State.STALE, ["manifest.json is not readable"]
        changed = self.changed_outputs(have)
        if why := differences(self.filled(have), want) + ([] if begun_for_this else changed):
            return State.STALE, why
        got = have.get("minimum", {})
        few = [f"{k}: {got.get(k, 0)} -> {n}" for k, n in self.minimum.items() if got.get(k, 0) < n] or changed
        return (State.SHORT, few) if few else (State.DONE, [])

    def filled(self, have: dict) -> dict:
        """A manifest with the settings that there were not when it was written."""
        since = {k: v for k, v in self.defaults.items() if k in self.config}
        return have | {"config": since | have.get("config", {})}

    def changed_outputs(self, have: dict) -> list[str]:
        """Files of a finished stage that are no longer what it wrote."""
        lines = []
        for name, recorded in have.get("outputs", {}).items():
            if not (self.folder / name).exists():
                lines.append(f"output {name} is missing")
            elif digest(self.folder / name) != recorded:
                lines.append(f"output {name} was changed after it was written")
        return lines

    def run(self, ranks: Ranks = ALONE, *more) -> bool:
        """Make the stage unless it is done; True if it was made. A stale folder is moved aside, never overwritten.

        started.json says what an unfinished folder was begun for, so that only the same work continues it. `more` is
        handed on to `make`.
        """
        begun = ranks.broadcast(self.begin() if ranks.rank == 0 else None)
        if begun is None:
            return False
        start = time.time()
        cost = self.make(self.folder, ranks, *more) if self.on_all_ranks or ranks.rank == 0 else {}
        ranks.barrier()  # the manifest is of what all of them wrote
        if ranks.rank == 0:
            self.finish(*begun, {"seconds": round(time.time() - start, 3), **cost})
        ranks.barrier()
        return True

    def begin(self) -> tuple[dict, dict] | None:
        """None when the stage is done; else what is wanted, and the manifest that it continues. Readies the folder."""
        state, why = self.state()
        if state is State.DONE:
            have = read_manifest(self.folder)
            if have != (filled := self.filled(have)):  # should a default change later, this is still known
                write_manifest(self.folder, filled)
            (self.folder / "started.json").unlink(missing_ok=True)  # of a run killed at its very end
        if state is State.DONE or state is State.MISSING and self.copied():
            return None
        if state is State.STALE:
            names = (self.folder.parent / f"stale/{self.folder.name}.{n}" for n in itertools.count(1))
            aside = next(path for path in names if not path.exists())
            print(f"stale: {self.folder} ({'; '.join(why)}); the old files are now in {aside}", flush=True)
            aside.parent.mkdir(exist_ok=True)  # a level deeper than what the results' README.md names
            os.replace(self.folder, aside)
        want = self.wanted()
        write_text(self.folder / "started.json", json.dumps(want))
        return want, read_manifest(self.folder) or {}

    def copied(self) -> bool:
        """Whether a twin was finished; its files are then this stage's too, the manifest last."""
        for twin in self.twins:
            if dataclasses.replace(self, folder=twin).state()[0] is State.DONE:
                leave_out = shutil.ignore_patterns("manifest.json", "*.tmp")
                shutil.copytree(twin, self.folder, ignore=leave_out, dirs_exist_ok=True)
                write_manifest(self.folder, read_manifest(twin) | {"copied_from": str(twin)})
                return True
        return False

    def finish(self, want: dict, before: dict, spent: dict) -> None:
        """Write the manifest: what was wanted, what there is, what it cost."""
        outputs = {
            p.relative_to(self.folder).as_posix(): digest(p)
            for p in sorted(self.folder.rglob("*"))
            if p.is_file() and is_output(p) and p.name not in ("manifest.json", "started.json", "steps.jsonl")
        }
        if "new_tokens" in before:  # debates go on, so that what they cost before counts; other work is done again
            spent |= {k: v + before.get(k, 0) for k, v in spent.items() if isinstance(v, int | float)}
        more = {k: max(n, self.minimum.get(k, 0)) for k, n in (before.get("minimum", {}) | self.minimum).items()}
        made = want | {"speed": self.speed, "minimum": more, "outputs": outputs, **spent, **provenance()}
        write_manifest(self.folder, made)
        (self.folder / "started.json").unlink()

    def accept(self) -> bool:
        """Take what is there as made by the code as it now is, where nothing but the code differs; True if it did."""
        have = self.filled(read_manifest(self.folder) or {})
        if "outputs" not in have or self.changed_outputs(have):
            return False
        try:
            want = self.wanted()
        except FileNotFoundError:
            return False
        if differences(have | {"code": self.code}, want):
            return False
        changed = differences(have, want)
        accepted = [*have.get("accepted", []), {"commit": git_commit(), "changed": changed}]
        write_manifest(self.folder, have | {"code": self.code, "accepted": accepted})
        return bool(changed)


def differences(have: dict, want: dict) -> list[str]:
    """What two manifests were made of, where they differ."""

    def changed(part: str) -> list[tuple[str, str, str]]:
        old, new = have.get(part, {}), want[part]
        names = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
        return [(k, str(old.get(k))[:60], str(new.get(k))[:60]) for k in names]

    lines = [f"{part}.{k}: {old} -> {new}" for part in ("config", "inputs") for k, old, new in changed(part)]
    code = [k for k, _, _ in changed("code")]
    more = f" and {len(code) - 3} more" if len(code) > 3 else ""
    return lines + ([f"code: {', '.join(code[:3])}{more}"] if code else [])


def write_manifest(folder: Path, manifest: dict) -> None:
    write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def is_output(path: Path) -> bool:
    """Whether a file of a stage's folder is more than a lock or a half-written file."""
    return path.name != ".lock" and path.suffix != ".tmp"


def read_manifest(folder: Path) -> dict | None:
    """A stage's manifest: None where there is none, empty where it is not what a stage writes."""
    have = read_json(folder / "manifest.json")
    parts = [(have or {}).get(part, {}) for part in ("config", "inputs", "code", "outputs", "minimum")]
    plain = isinstance((have or {}).get("seconds", 0), int | float)
    whole = plain and all(isinstance(p, dict) for p in parts) and all(type(n) is int for n in parts[4].values())
    return have if whole else {}


@functools.cache
def provenance() -> dict:
    """Commit, package versions and device, for a manifest."""
    import torch

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    device = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()} x{os.cpu_count()}"
    )
    if (n := processes_per_gpu()) > 1:
        device += f", shared by {n} processes"  # so its seconds are not those of a GPU alone
    names = ("torch", "transformers", "datasets", "triton", "numpy")
    return {"commit": git_commit(), "versions": {n: installed(n) for n in names}, "device": device}


def git_commit() -> str:
    out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this run. Raises InputError where another run holds it; locks of dead processes are released.

    A lock of the kernel: on a network file system it holds among nodes only where that carries locks.
    """
    if world().rank > 0:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            raise InputError(
                f"--out {folder}: {f.read() or 'another run'} is writing there; wait for its end or name another --out"
            ) from None
        f.truncate(0)
        f.write(f"process {os.getpid()} on {platform.node()}")
        f.flush()
        yield


def is_locked(folder: Path) -> bool:
    """Whether a run holds `folder` now."""
    if not (folder / ".lock").exists():
        return False
    with open(folder / ".lock") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
