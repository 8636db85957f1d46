"""What two or more of the scripts need: seeds, files, stages with manifests, command lines, model loading."""

import argparse
import contextlib
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent


class InputError(ValueError):
    """Bad input by the user: one line that names the value and the choices; the scripts exit with code 2."""


def print0(*parts: object, **options) -> None:
    """Print on rank 0 only."""
    if rank() == 0:
        print(*parts, flush=True, **options)


def stable_hash(*parts: object) -> int:
    """A 63-bit integer from names and numbers: the same on every machine and in every process."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


# ---- processes: those that torchrun started, or this one alone ----


_group: list = [None]  # the torch.distributed group that works together now; None: all processes


def process_group():
    return _group[-1]


def rank() -> int:
    return process_group().rank() if process_group() else int(os.environ.get("RANK", 0))


def world_size() -> int:
    return process_group().size() if process_group() else int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Join the processes that torchrun started, each with a GPU of its own where there are GPUs; leave them at the end.

    NCCL carries what is on GPUs, gloo the rest. One process alone does nothing here, and the functions below work in it too.
    """
    if world_size() == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # a rank may wait long for the others' share
    yield  # after an exception the others may be waiting: no clean end, torchrun stops them
    dist.destroy_process_group()


@contextlib.contextmanager
def in_groups(size: int) -> Iterator[tuple[int, int]]:
    """Cut the processes into groups of `size` (0: all in one), each for runs of its own; yields its number and their count.

    Within, `rank` and `world_size` are the group's, and so is all that speaks with other processes. At the end all wait
    for all. Raises InputError where `size` does not divide the processes.
    """
    me, world = rank(), world_size()
    size = min(size, world) or world
    if world % size:
        raise InputError(
            f"{world} processes cannot be cut into groups of {size} (--weak-gpus, --strong-gpus): choose a divisor"
        )
    if size < world:
        _group.append(groups_of(size)[me // size])
    yield me // size, world // size
    if size < world:
        _group.pop()
        barrier()


@functools.cache
def groups_of(size: int) -> list:
    """Groups of `size` consecutive ranks; every process must ask."""
    import torch.distributed as dist

    starts = range(0, world_size(), size)
    return [dist.new_group(range(n, n + size), timeout=timedelta(days=1)) for n in starts]


def gather(value) -> list:
    """Every rank's `value` (anything that pickles), by rank, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed as dist

    values = [None] * world_size()
    dist.all_gather_object(values, value, group=process_group())
    return values


def broadcast(value):
    """Rank 0's `value`, on every rank."""
    return gather(value if rank() == 0 else None)[0]


def barrier() -> None:
    """Wait until every rank is here."""
    gather(None)


# ---- files ----


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON-lines file, also gzipped. Raises InputError naming the file, and the line that is no JSON object."""
    rows = []
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if str(path).endswith(".gz") else raw).decode("utf-8-sig")
    except (PermissionError, IsADirectoryError) as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise InputError(f"{path}: damaged gzip ({e})") from None
    except UnicodeDecodeError as e:
        raise InputError(f"{path}: not UTF-8 ({e.reason} at byte {e.start}); convert it") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if "\\u" in line:
                    dump_row(row).encode()  # half a surrogate pair can be escaped, but neither tokenized nor written
            except (ValueError, RecursionError) as e:
                raise InputError(f"{path}:{number}: not JSON ({e})") from None
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: expected a JSON object, got {line[:40]!r}")
            rows.append(row)
    return rows


def read_samples(path: Path, *fields: str) -> list[dict]:
    """Rows that each have an id of their own and `fields`. Raises InputError naming the file, the row and what is wrong."""
    rows, seen = read_jsonl(path), set()
    for number, row in enumerate(rows, 1):
        for field in ("id", *fields):
            value = row.get(field)
            if value in (None, ""):
                raise InputError(f"{path}: a row lacks {field!r} (row {number})")
            if field in ("id", "text") and not isinstance(value, str):
                raise InputError(f"{path}: {field} {str(value)[:40]} of row {number} must be a string, in quotes")
        if row["id"] in seen:
            raise InputError(f"{path}: id {row['id']!r} stands there twice; give every row an id of its own")
        seen.add(row["id"])
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def check_out(folder: str) -> Path:
    """The folder to write. Raises InputError where none can be made, before anything is computed for it."""
    path = Path(folder)
    try:
        there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    except OSError as e:
        raise InputError(f"--out {folder!r}: {e.strerror}") from None
    if not folder or not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = f"{there} is {'not writable' if there.is_dir() else 'no folder'}" if folder else "no name"
        raise InputError(f"--out {folder!r}: {why}; name a folder that can be written")
    return path


def write_text(path: Path, text: str) -> None:
    """Write under a temporary name, then rename: a file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(path.name + ".tmp")
    with open(tmp, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(tmp, path)


def dump_row(row: dict) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    write_text(path, "".join(map(dump_row, rows)))


def by_id(rows: list[dict], ids: list[str], what: str) -> list[dict]:
    """The rows in the order of `ids`. Raises InputError when an id is missing, extra or there twice."""
    table = {str(r.get("id")): r for r in rows}
    if len(table) != len(rows) or table.keys() != set(ids):
        odd = sorted(table.keys() ^ set(ids))[:3]
        raise InputError(
            f"{what}: ids do not match ({len(rows)} rows for {len(ids)} samples; first that differ: {odd})"
        )
    return [table[i] for i in ids]


_digests: dict[tuple, str] = {}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder by name; cached by size and time of change."""
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


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` for this run. Raises InputError where another run holds it; what a dead one held is free.

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


# ---- stages ----


@dataclasses.dataclass(frozen=True)
class Stage:
    """One resumable step: `make(folder)` writes files into `folder` and returns what it cost (tokens, counts).

    The folder is done when its manifest.json, written last, holds the same config and the same digests of inputs (a
    file, a folder, or a function that computes the digest). Of `at_least` it may hold more; when it holds less, and
    nothing else differs, `make` continues what is there. Under several processes rank 0 makes it while the others
    wait, unless it is `shared`: then `make` runs on all of them and rank 0's cost counts. `processes` is how many are to
    make it together while others make its neighbours (0: all).
    """

    folder: Path
    config: dict
    inputs: dict[str, Path | Callable[[], str]]
    make: Callable[[Path], dict]
    at_least: dict[str, int] = dataclasses.field(default_factory=dict)
    shared: bool = False
    processes: int = 0

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
        got = have.get("at_least", {})
        return [f"{k}: {got.get(k, 0)} -> {n}" for k, n in self.at_least.items() if got.get(k, 0) < n]

    def run(self) -> bool:
        """Make the stage unless it is done; True if it was made. A stale folder is moved aside, never overwritten.

        started.json says what an unfinished folder was begun for, so that only the same work continues it.
        """
        begun = broadcast(self.begin() if rank() == 0 else None)
        if begun is None:
            return False
        start = time.time()
        cost = self.make(self.folder) if self.shared or rank() == 0 else {}
        if rank() == 0:
            self.finish(*begun, {"seconds": round(time.time() - start, 3), **cost})
        barrier()
        return True

    def begin(self) -> tuple[dict, dict] | None:
        """None when the stage is done; else what is wanted, and the manifest that it continues. Readies the folder."""
        difference = self.difference()
        if difference == []:
            return None
        want, before = self.wanted(), read_manifest(self.folder) or {}
        if why := self.in_the_way():
            before, aside = {}, free_name(self.folder)
            print0(f"stale: {self.folder} ({why}); the old files are now in {aside.name}")
            os.replace(self.folder, aside)
        write_text(self.folder / "started.json", json.dumps(want))
        return want, before

    def in_the_way(self) -> str:
        """Why the files in the folder are not this stage's, finished or begun; empty where they are, or there are none."""
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
        more = {k: max(n, self.at_least.get(k, 0)) for k, n in (before.get("at_least", {}) | self.at_least).items()}
        manifest = want | {"at_least": more, "outputs": outputs, **spent, **provenance()}
        write_text(self.folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        (self.folder / "started.json").unlink()


def is_output(path: Path) -> bool:
    """Whether a file of a stage's folder is more than a lock or a half-written file."""
    return path.name != ".lock" and path.suffix != ".tmp"


def read_json(path: Path) -> dict | None:
    """A JSON object from a file: None where there is no file, empty where it holds none."""
    try:
        have = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return have if isinstance(have, dict) else {}


def read_manifest(folder: Path) -> dict | None:
    """A stage's manifest: None where there is none, empty where it is not what a stage writes."""
    have = read_json(folder / "manifest.json")
    parts = [(have or {}).get(part, {}) for part in ("config", "inputs", "outputs", "at_least")]
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


# ---- command lines ----


def parse_dataclass(cls: type, argv: list[str], prog: str, doc: str):
    """A frozen dataclass from flags: one flag a field, default and help from `field(default, help)`."""
    parser = Parser(prog=prog, description=doc, formatter_class=Help, allow_abbrev=False)
    for f in dataclasses.fields(cls):
        kind, help_text = f.metadata.get("kind", str), f.metadata["help"]
        flag = "--" + f.name.replace("_", "-")
        required = f.default is dataclasses.MISSING
        options: dict = {"help": help_text} if required else {"default": f.default, "help": help_text}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
            continue
        if isinstance(f.default, tuple):
            options["nargs"] = "+"
        parser.add_argument(flag, type=kind, required=required, choices=f.metadata.get("choices"), **options)
    values = vars(parser.parse_args(argv))
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}; `{self.prog} --help` lists the flags")


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def flag(default: object = dataclasses.MISSING, help: str = "", kind: type = str, choices: tuple | None = None):
    """A dataclass field that `parse_dataclass` turns into a flag."""
    return dataclasses.field(default=default, metadata={"help": help, "kind": kind, "choices": choices})


def run_script(main: Callable[[], None]) -> None:
    """Run under however many processes there are. Exit code 2 with one line on bad input, 1 on any other failure."""
    try:
        with distributed():
            main()
        if world_size() > 1:  # gloo's threads live on and, rarely, abort an interpreter that is shutting down
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
    except InputError as e:
        print0(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has seen enough
    except KeyboardInterrupt:
        print("interrupted; the same command continues from the last finished batch", file=sys.stderr)
        sys.exit(1)
    except Exception as e:
        of_the_run = isinstance(e, OSError | FloatingPointError | MemoryError)
        if not of_the_run and type(e).__name__ not in ("OutOfMemoryError", "SafetensorError"):
            raise  # of the code
        notes = getattr(e, "__notes__", [])
        print("error:", "; ".join([f"{e or type(e).__name__}".splitlines()[0], *notes]), file=sys.stderr)
        sys.exit(1)


# ---- models ----


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """`ID_OR_DIR[@revision][:layers]`: a hub id, a local folder or a built-in model, whole or its first N blocks."""

    name: str
    revision: str | None = None
    layers: int | None = None

    @classmethod
    def parse(cls, spec: str) -> "ModelSpec":
        name, _, layers = spec.rpartition(":") if spec.rpartition(":")[2].isdigit() else (spec, "", "")
        name, _, revision = name.partition("@") if not Path(name).exists() else (name, "", "")
        if not name:
            raise InputError(f"model {spec!r}: no name; give a hub id, a folder or one of the built-in models")
        if layers and int(layers) < 1:
            raise InputError(f"model {spec!r}: the number of layers must be at least 1")
        return cls(name, revision or None, int(layers) if layers else None)

    def source(self) -> dict:
        """Arguments that say to `from_pretrained` where the model is; built-in models are made on first use."""
        from data.models import BUILTIN, builtin_folder
        from data.qwen import FIRST_QWEN, converted_folder

        if self.name in BUILTIN:
            return {"pretrained_model_name_or_path": str(builtin_folder(self.name))}
        if self.name in FIRST_QWEN:
            return {"pretrained_model_name_or_path": str(converted_folder(self.name, self.revision))}
        if Path(self.name).is_dir():
            check_folder(Path(self.name))
        if Path(self.name).is_dir() or self.name.count("/") == 1 and not self.name.startswith((".", "/")):
            return {"pretrained_model_name_or_path": self.name, "revision": self.revision or "main"}
        raise InputError(
            f"model {self.name!r}: no such folder, and neither a hub id (owner/name) nor built in ({', '.join(BUILTIN)})"
        )

    def identity(self) -> dict:
        """What a manifest records of the model: a local folder's digest, or the built-in's or hub's name and revision."""
        from data.models import BUILTIN
        from data.qwen import FIRST_QWEN

        if self.name in BUILTIN:
            return {"weights": f"{self.name}@{BUILTIN[self.name][:16]}", "layers": self.layers}
        path, revision = Path(self.name), self.revision or FIRST_QWEN.get(self.name, "main")
        return {
            "weights": digest(path) if path.is_dir() else f"{path}@{revision}",
            "layers": self.layers,
        }


def check_folder(folder: Path) -> None:
    """Raises InputError where a model's folder leads out of itself or could not be a model's. Nothing of it is loaded."""
    roots = (folder.resolve(), folder.resolve().parent.parent / "blobs")  # where the hub's own cache keeps the files
    for file in folder.rglob("*"):
        if file.is_symlink() and not any(file.resolve().is_relative_to(r) for r in roots):
            raise InputError(f"model {str(folder)!r}: {file.name} is a link out of the folder; copy the file into it")
        if file.suffix == ".json" and file.stat().st_size > 100 * 2**20:
            raise InputError(f"model {str(folder)!r}: {file.name} has {file.stat().st_size} bytes, too many for JSON")
    config = read_json(folder / "config.json")
    if not config:
        what = "no" if config is None else "no readable"
        raise InputError(f"model {str(folder)!r}: {what} config.json there; name a Hugging Face model's folder")
    if config.get("model_type") == "qwen":
        raise InputError(
            f"model {str(folder)!r}: a first-generation Qwen; `python -m data.qwen {folder} OUT` converts it"
        )
    shards = (read_json(folder / "model.safetensors.index.json") or {}).get("weight_map", {})
    names = set(map(str, shards.values())) if isinstance(shards, dict) else {"weight_map"}
    for name in names or {"model.safetensors"}:
        if Path(name).name != name or not (folder / name).is_file():
            only = "; of weights, only safetensors files in the folder itself are loaded, never pickles"
            raise InputError(f"model {str(folder)!r}: no file {name!r} there{only}")


@contextlib.contextmanager
def loading(spec: ModelSpec) -> Iterator[None]:
    """Whatever the libraries raise on a broken model becomes one line that names the model; a full memory stays one."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as e:
        if type(e).__name__ == "OutOfMemoryError":
            raise
        why = (str(e) or type(e).__name__).splitlines()[0]
        if "trust_remote_code" in str(e):
            why = "asks for code of its own, which is never run; choose a model that transformers itself knows"
        raise InputError(f"model {spec.name!r}: {why}") from None


def load_config(spec: ModelSpec, **changes):
    """The model's configuration with `changes`, cut to its first `layers` blocks where asked."""
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()  # its notes on unused and new weights are what cutting and a new head must cause
    logging.disable_progress_bar()
    source = spec.source()
    with loading(spec):
        config = AutoConfig.from_pretrained(**source, **changes, trust_remote_code=False)
    if spec.layers:
        if spec.layers > config.num_hidden_layers:
            raise InputError(f"model {spec.name!r} has {config.num_hidden_layers} layers, {spec.layers} were asked for")
        config.num_hidden_layers = spec.layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[: spec.layers]
    return config


def load_tokenizer(spec: ModelSpec):
    from transformers import AutoTokenizer

    rows = load_config(spec).vocab_size  # says in one line what is wrong with the model's name
    with loading(spec):
        tokenizer = AutoTokenizer.from_pretrained(**spec.source(), trust_remote_code=False)
    if (highest := max(tokenizer.get_vocab().values(), default=0)) >= rows:
        raise InputError(
            f"model {spec.name!r}: its tokenizer has token {highest}, the model's vocabulary ends at {rows - 1}; "
            "give the model its own tokenizer"
        )
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {spec.name!r}: its tokenizer has no end-of-text token")
    tokenizer.model_max_length = int(1e9)  # length limits are ours, counted and recorded
    return tokenizer


def load_model(spec: ModelSpec, auto_class, dtype, attn_implementation: str = "sdpa", parallel=None, **changes):
    """`auto_class.from_pretrained` from safetensors only, never remote code, cut to the asked number of blocks.

    `parallel`: a transformers DistributedConfig that spreads it over the processes.

    Raises InputError where the file lacks a weight (but a new head, `score`), which would be left random.
    """
    config = load_config(spec, **changes)
    with loading(spec):
        model, found = auto_class.from_pretrained(
            **spec.source(), config=config, dtype=dtype, attn_implementation=attn_implementation, use_safetensors=True,
            trust_remote_code=False, output_loading_info=True, distributed_config=parallel,
        )  # fmt: skip
    if lacking := sorted(name for name in found["missing_keys"] if not name.startswith("score.")):
        raise InputError(f"model {spec.name!r}: its files lack {len(lacking)} weights, the first is {lacking[0]}")
    return model


def device():
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str):
    """auto: bfloat16 on a GPU, float32 on a CPU."""
    import torch

    return {
        "auto": torch.bfloat16 if device().type == "cuda" else torch.float32,
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
    }[name]
