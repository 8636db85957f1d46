"""Stages: what is done, what is stale, what is missing; their manifests; and the lock on a folder of results."""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from common import ROOT, InputError, barrier, broadcast, print0, rank, read_json, write_text

_digests: dict[tuple, str] = {}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder by name; cached by size and mtime."""
    path = Path(path)
    if path.is_dir():
        parts = [(p.relative_to(path).as_posix(), digest(p)) for p in sorted(path.rglob("*")) if p.is_file()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    stat = path.stat()
    key = (str(path), stat.st_size, stat.st_mtime_ns)
    if key not in _digests:
        with open(path, "rb") as f:
            _digests[key] = hashlib.file_digest(f, "sha256").hexdigest()
    return _digests[key]


@dataclasses.dataclass(frozen=True)
class Stage:
    """One resumable step: `make(folder)` writes files into `folder` and returns what it cost (tokens, counts).

    The folder is done when its manifest.json, written last, holds the same config and the same digests of inputs (a
    file, a folder, or a function that computes the digest). It may contain more than `minimum`; when it has less, and
    nothing else differs, `make` continues what is there. Under several processes rank 0 makes it while the others
    wait, unless it is `on_all_ranks`: then `make` runs on all of them and rank 0's cost counts. `group_size` is how many are to
    make it together while others make its neighbours (0: all). `twins` are folders of other tasks: where one holds the
    result of the same config and inputs, it is copied, not computed again.
    """

    folder: Path
    config: dict
    inputs: dict[str, Path | Callable[[], str]]
    make: Callable[[Path], dict]
    minimum: dict[str, int] = dataclasses.field(default_factory=dict)
    on_all_ranks: bool = False
    group_size: int = 0
    twins: tuple[Path, ...] = ()
    work: object = None  # what it does, for plan.py

    def wanted(self) -> dict:
        return {
            "config": json.loads(json.dumps(self.config)),
            "inputs": {name: what() if callable(what) else digest(what) for name, what in self.inputs.items()},
        }

    def difference(self) -> list[str] | None:
        """None when there is no manifest; else what differs between the manifest and what is asked for ([]: done)."""
        have = read_manifest(self.folder)
        if not have:
            return have if have is None else ["manifest.json is not readable"]
        try:
            want = self.wanted()
        except FileNotFoundError as e:
            return [f"input {e.filename} is missing"]
        lines = []
        for part in ("config", "inputs"):
            old, new = have.get(part, {}), want[part]
            lines += [
                f"{part}.{k}: {str(old.get(k))[:60]} -> {str(new.get(k))[:60]}"
                for k in sorted(old.keys() | new.keys())
                if old.get(k) != new.get(k)
            ]
        for name, recorded in have.get("outputs", {}).items():
            file = self.folder / name
            if not file.exists():
                lines.append(f"output {name} is missing")
            elif digest(file) != recorded:
                lines.append(f"output {name} was changed after it was written")
        return lines + self.too_few(have)

    def too_few(self, have: dict) -> list[str]:
        got = have.get("minimum", {})
        return [f"{k}: {got.get(k, 0)} -> {n}" for k, n in self.minimum.items() if got.get(k, 0) < n]

    def run(self) -> bool:
        """Make the stage unless it is done; True if it was made. A stale folder is moved aside, never overwritten.

        started.json says what an unfinished folder was begun for, so that only the same work continues it.
        """
        begun = broadcast(self.begin() if rank() == 0 else None)
        if begun is None:
            return False
        start = time.time()
        cost = self.make(self.folder) if self.on_all_ranks or rank() == 0 else {}
        if rank() == 0:
            self.finish(*begun, {"seconds": round(time.time() - start, 3), **cost})
        barrier()
        return True

    def begin(self) -> tuple[dict, dict] | None:
        """None when the stage is done; else what is wanted, and the manifest that it continues. Readies the folder."""
        difference = self.difference()
        if difference == [] or difference is None and self.copied():
            return None
        want, before = self.wanted(), read_manifest(self.folder) or {}
        if why := self.conflict():
            before, aside = {}, free_name(self.folder)
            print0(f"stale: {self.folder} ({why}); the old files are now in {aside.name}")
            os.replace(self.folder, aside)
        write_text(self.folder / "started.json", json.dumps(want))
        return want, before

    def copied(self) -> bool:
        """Whether a twin was finished; its files are then this stage's too, the manifest last."""
        for twin in self.twins:
            if dataclasses.replace(self, folder=twin).difference() == [] and not self.conflict():
                leave_out = shutil.ignore_patterns("manifest.json", "*.tmp")
                shutil.copytree(twin, self.folder, ignore=leave_out, dirs_exist_ok=True)
                manifest = read_manifest(twin) | {"copied_from": str(twin)}
                write_text(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
                return True
        return False

    def conflict(self) -> str:
        """The reason why the folder cannot be reused, or "": it is empty, or holds this stage finished or unfinished."""
        difference = self.difference()
        files = {p.name for p in self.folder.iterdir() if is_output(p)} if self.folder.exists() else set()
        begun = read_json(self.folder / "started.json") == self.wanted()
        grown = difference and difference == self.too_few(read_manifest(self.folder) or {})
        if difference == [] or begun or grown or not files - {"started.json"}:
            return ""
        unknown = "begun with other settings" if "started.json" in files else f"{min(files)}, of unknown origin"
        return "; ".join(difference or [unknown])

    def finish(self, want: dict, before: dict, spent: dict) -> None:
        """Write the manifest: what was wanted, what there is, what it cost."""
        outputs = {
            p.relative_to(self.folder).as_posix(): digest(p)
            for p in sorted(self.folder.rglob("*"))
            if p.is_file() and is_output(p) and p.name not in ("manifest.json", "started.json", "steps.jsonl")
        }
        if before:  # continued: what it cost before counts too
            spent |= {k: v + before.get(k, 0) for k, v in spent.items() if isinstance(v, int | float)}
        more = {k: max(n, self.minimum.get(k, 0)) for k, n in (before.get("minimum", {}) | self.minimum).items()}
        manifest = want | {"minimum": more, "outputs": outputs, **spent, **provenance()}
        write_text(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        (self.folder / "started.json").unlink()


def is_output(path: Path) -> bool:
    """Whether a file of a stage's folder is more than a lock or a half-written file."""
    return path.name != ".lock" and path.suffix != ".tmp"


def read_manifest(folder: Path) -> dict | None:
    """A stage's manifest: None where there is none, empty where it is not what a stage writes."""
    have = read_json(folder / "manifest.json")
    parts = [(have or {}).get(part, {}) for part in ("config", "inputs", "outputs", "minimum")]
    plain = isinstance((have or {}).get("seconds", 0), int | float)
    whole = plain and all(isinstance(p, dict) for p in parts) and all(type(n) is int for n in parts[3].values())
    return have if whole else {}


def free_name(folder: Path) -> Path:
    n = 1
    while (aside := folder.with_name(f"{folder.name}.stale{n}")).exists():
        n += 1
    return aside


def provenance() -> dict:
    """Commit, package versions and device, for a manifest."""
    import torch

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()} x{os.cpu_count()}"
    names = ("torch", "transformers", "datasets", "triton", "numpy")
    return {"commit": git_commit(), "versions": {n: installed(n) for n in names}, "device": gpu}


def git_commit() -> str:
    out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return out.stdout.strip() or "unknown"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock `folder` for this run. Raises InputError where another run holds it; locks of dead processes are released.

    A lock of the kernel: on a network file system it holds among nodes only where that carries locks.
    """
    if rank() > 0:
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
