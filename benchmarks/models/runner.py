"""Each model in a process of its own, forked once the libraries are imported, with limits on its time and memory."""

import json
import os
import resource
import select
import signal
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SECONDS, GIBIBYTES = 60, 6


def run(
    names: Iterable[str], work: Callable[[str], list[Row]], path: Path, seconds: int = SECONDS, say: bool = True
) -> list[Row]:
    """Append what ``work`` returns for every name to ``path``, one JSON object per line."""
    rows: list[Row] = []
    names = list(names)
    for i, name in enumerate(names):
        start = time.perf_counter()
        made = in_child(name, work, seconds)
        took = time.perf_counter() - start
        for row in made:
            row["seconds"] = round(took, 2)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in made)
        rows += made
        if say:
            ends = "; ".join(f"{row.get('plan', 'build')}: {row['outcome']}" for row in made)
            print(f"{i + 1}/{len(names)} {name} {took:.1f} s  {ends}", flush=True)
    return rows


def in_child(name: str, work: Callable[[str], list[Row]], seconds: int) -> list[Row]:
    """What ``work(name)`` returns in a fork; a row saying so where it takes too long or dies."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _child(name, work, write)
    os.close(write)
    content, deadline = b"", time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        ready, _, _ = select.select([read], [], [], left)
        if ready and not (piece := os.read(read, 1 << 16)):
            break
        content += piece if ready else b""
    else:
        os.kill(child, signal.SIGKILL)
    os.close(read)
    _, status = os.waitpid(child, 0)
    rows = [json.loads(line) for line in content.decode().splitlines() if line.endswith("}")]
    if os.WIFSIGNALED(status):
        how = f"{seconds} s were not enough" if left <= 0 else f"died of signal {os.WTERMSIG(status)}"
        rows.append({"model": name, "plan": "rest", "outcome": "no answer", "reason": how})
    return rows


def _child(name: str, work: Callable[[str], list[Row]], write: int) -> None:
    """The rest of a forked process's life."""
    try:
        limit = _virtual_memory() + (GIBIBYTES << 30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        warnings.simplefilter("ignore")
        for row in work(name):
            os.write(write, (json.dumps(row) + "\n").encode())
    except BaseException as error:
        row = {
            "model": name,
            "plan": "rest",
            "outcome": "no answer",
            "reason": f"{type(error).__name__}: {error}"[:300],
        }
        os.write(write, (json.dumps(row) + "\n").encode())
    finally:
        os._exit(0)


def _virtual_memory() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def read_rows(path: Path) -> list[Row]:
    """Rows that were written before; a line that a kill cut off is left out."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]
