"""Helpers that several scripts share: seeds, ranks, JSON lines, flags."""

import argparse
import contextlib
import dataclasses
import gzip
import hashlib
import json
import math
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent


class InputError(ValueError):
    """Bad input by the user: one line that names the value and the choices; the scripts exit with code 2."""


def stable_hash(*parts: object) -> int:
    """A 63-bit integer from names and numbers: the same on every machine and in every process."""
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


# ---- processes: those that torchrun started, or this one alone ----


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Processes that work together: this one's rank among `size`, and their torch.distributed group (None: all there are).

    `index` of `count` such groups is this one.
    """

    rank: int = 0
    size: int = 1
    group: object = None
    index: int = 0
    count: int = 1

    def gather(self, value) -> list:
        """Every rank's `value` (anything that pickles), by rank, on every rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        values = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value):
        """Rank 0's `value`, on every rank."""
        return self.gather(value if self.rank == 0 else None)[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)

    def print(self, *parts: object) -> None:
        """Print on rank 0 only."""
        if self.rank == 0:
            print(*parts, flush=True)

    def split(self, asked: int) -> "Ranks":
        """This rank's group of consecutive ranks, as many as `group_size` says. Every rank must ask."""
        size = group_size(self.size, asked)
        if size == self.size:
            return self
        import torch.distributed as dist

        starts = range(0, self.size, size)
        groups = [dist.new_group(range(n, n + size), timeout=timedelta(days=1)) for n in starts]
        mine = self.rank // size
        return Ranks(self.rank % size, size, groups[mine], mine, len(groups))


ALONE = Ranks()


def group_size(total: int, asked: int) -> int:
    """How many of `total` work together: as many as asked (0: all), or the next larger divisor, which needs less memory each."""
    return next(n for n in range(min(asked, total) or total, total + 1) if total % n == 0)


def world() -> Ranks:
    """All processes that torchrun started, or this one alone."""
    return Ranks(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def print0(*parts: object) -> None:
    """Print in the first process only."""
    world().print(*parts)


class Progress:
    """A line per 5% of work that takes 20 s or more, with the time left: a bar shows on a terminal alone."""

    def __init__(self, name: str, unit: str, ranks: Ranks):
        self.name, self.unit, self.ranks, self.told = name, unit, ranks, 0

    def at(self, n: int, total: int, seconds: float, *more: str) -> None:
        """`n` of `total` units are done after so many seconds; `more` is what else to say."""
        done = n / total
        if int(20 * done) > self.told and seconds / done >= 20:
            self.told = int(20 * done)
            left = f"{(seconds / done - seconds) / 60:.1f} min left"
            with tqdm.external_write_mode():
                self.ranks.print(f"{self.name}: {self.unit} {n} of {total} ({done:.0%}),", ", ".join([*more, left]))


def processes_per_gpu() -> int:
    """How many processes of this machine share a GPU; 1 without GPUs."""
    import torch

    gpus = torch.cuda.device_count()
    return -(-int(os.environ.get("LOCAL_WORLD_SIZE", 1)) // gpus) if gpus else 1


def refuse_shared_gpus(instead: str) -> None:
    """Raises InputError where processes share a GPU: NCCL does not connect them, so they cannot work on one model."""
    if (n := processes_per_gpu()) > 1:
        raise InputError(f"{n} processes share a GPU, where each works alone: {instead}")


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Initialise torch.distributed under torchrun; destroy it at the end. Ranks take the machine's GPUs in turn.

    NCCL for tensors on GPUs, gloo for the rest. With one process this does nothing.
    """
    if world().size == 1:
        yield
        return
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))  # a rank may wait long for the others' share
    yield  # after an exception the others may be waiting: no clean end, torchrun stops them
    dist.destroy_process_group()


# ---- files ----


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON-lines file, also gzipped. Raises InputError naming the file, and the line that is no JSON object."""
    return [row for _, row in numbered_jsonl(path)]


def numbered_jsonl(path: Path) -> list[tuple[int, dict]]:
    """The same with the number of each row's line, from 1."""
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
            rows.append((number, row))
    return rows


def read_json(path: Path) -> dict | None:
    """A JSON object from a file: None where there is no file, empty where it holds none."""
    try:
        have = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return {}
    return have if isinstance(have, dict) else {}


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
            raise InputError(f"{path}: id {row['id']!r} is a duplicate; ids must be unique")
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
        why = f"{there} is {'not writable' if there.is_dir() else 'not a directory'}" if folder else "no name"
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


def align_by_id(rows: list[dict], ids: list[str], what: str) -> list[dict]:
    """The rows in the order of `ids`. Raises InputError when an id is missing, extra or a duplicate."""
    table = {str(r.get("id")): r for r in rows}
    if len(table) != len(rows) or table.keys() != set(ids):
        odd = sorted(table.keys() ^ set(ids))[:3]
        raise InputError(
            f"{what}: ids do not match ({len(rows)} rows for {len(ids)} samples; first that differ: {odd})"
        )
    return [table[i] for i in ids]


# ---- command lines ----


def parse_dataclass(cls: type, argv: list[str], prog: str, doc: str):
    """A frozen dataclass from flags: one per field, with default and help from `flag(default, help)`, checked."""
    args = cls(**parse_given(cls, argv, prog, doc))
    check_ranges(args)
    return args


def parse_given(cls: type, argv: list[str], prog: str, doc: str) -> dict:
    """Of the same flags those that stand in `argv`, by field."""
    parser = Parser(prog, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for f in dataclasses.fields(cls):
        required, kind = f.default is dataclasses.MISSING, f.metadata["kind"]
        shown = "" if required else f" (default: {f.default})"
        options: dict = {"help": f.metadata["help"] + shown, "default": argparse.SUPPRESS, "required": required}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": kind, "choices": f.metadata["choices"]}
            options["nargs"] = "+" if isinstance(f.default, tuple) else None
        parser.add_argument("--" + f.name.replace("_", "-"), **options)
    return {k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise InputError(f"{message}; `{self.prog} --help` lists the flags")


def picked(cls: type, flags: object, **more):
    """`cls` from those of its fields that `flags` has too, and `more`."""
    return cls(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(cls) if hasattr(flags, f.name)} | more)


def flag(
    default: object = dataclasses.MISSING, help: str = "", kind: type = str, choices=None, speed: bool = False,
    zero: bool = False, most: float = math.inf,
):  # fmt: skip
    """A dataclass field that `parse_dataclass` turns into a flag. `speed`: it changes nothing but speed and memory.

    A number is finite, greater than 0, or 0 with `zero`, and at most `most`.
    """
    metadata = {"help": help, "kind": kind, "choices": choices, "speed": speed, "zero": zero, "most": most}
    return dataclasses.field(default=default, metadata=metadata)


def check_ranges(flags: object) -> None:
    """Raises InputError on the first number that its flag does not allow."""
    for f in dataclasses.fields(flags):
        value, zero, most = getattr(flags, f.name), f.metadata["zero"], f.metadata["most"]
        for n in value if isinstance(value, tuple) else (value,):
            if type(n) in (int, float) and not ((n > 0 or zero and n == 0) and n <= most and math.isfinite(n)):
                least = "at least 0" if zero else "greater than 0"
                end = "finite" if most == math.inf else f"at most {most}"
                raise InputError(f"--{f.name.replace('_', '-')} {n}: must be {least} and {end}")


def run_script(main: Callable[[], None]) -> None:
    """Run under however many processes there are. Exit code 2 with one line on bad input, 1 on any other failure.

    Under several processes this one ends at once, with or without a failure: an interpreter that shuts down in the usual
    way can wait for ever for a communicator whose other ranks are in a collective, and gloo's threads can abort it.
    """
    several, code = world().size > 1, 0
    try:
        with distributed():
            main()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)  # on every rank: it may be one's alone
        code = 2
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # stdout was closed
    except KeyboardInterrupt:
        print("interrupted; what is finished stays", file=sys.stderr)
        code = 1
    except Exception as e:
        code = 1
        of_the_run = isinstance(e, OSError | FloatingPointError | MemoryError)
        if of_the_run or type(e).__name__ in ("OutOfMemoryError", "SafetensorError"):
            notes = getattr(e, "__notes__", [])
            print("error:", "; ".join([(str(e) or type(e).__name__).splitlines()[0], *notes]), file=sys.stderr)
        elif several:
            traceback.print_exc()
        else:
            raise  # a fault of the code
    if several:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)
