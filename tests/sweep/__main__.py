"""python -m tests.sweep: every class of Transformers that generates tokens, tiny, with a `PagedCache`."""

import argparse
import json
import os
import select
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from tests.sweep.checks import MODES
from tests.sweep.results import RESULTS, Results

SECONDS = {"oracle": 150, "uncompiled": 200, "turns": 400, "prefill": 150, "gathered": 150, "compiled": 420}
PER_PROCESS = 30  # models, before a new one is started


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sweep", description=__doc__)
    parser.add_argument("--modes", default=",".join(MODES), help="of %(default)s")
    parser.add_argument("--only", default="", help="names of classes, comma-separated")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where results are kept (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="leave out what has a result")
    parser.add_argument("--processes", type=int, default=1, help="at a time (default: %(default)s)")
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker)
    else:
        sweep(arguments)


def work(pipe: int) -> None:
    """Answer each line `name kind mode,…` on stdin with one line of JSON for each mode."""
    warnings.filterwarnings("ignore")
    import torch
    import transformers

    from tests.sweep.answer import answers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    with os.fdopen(pipe, "w") as out:
        for line in sys.stdin:
            name, kind, modes = line.split()
            for answer in answers(name, kind, modes.split(",")):
                print(json.dumps(answer), file=out, flush=True)


class Worker:
    """A process that runs models one after another, and can be given up."""

    def __init__(self) -> None:
        self.read, write = os.pipe()
        command = [sys.executable, "-m", "tests.sweep", "--worker", str(write)]
        environment = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"} | os.environ
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, pass_fds=[write], env=environment, text=True, stderr=sys.stderr
        )
        os.close(write)
        self.lines = os.fdopen(self.read)
        self.num_models = 0

    def ask(self, line: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self.num_models += 1
        self.since = time.monotonic()

    def answer(self) -> dict[str, Any] | None:
        """The next line; None if the process is gone."""
        self.since = time.monotonic()
        line = self.lines.readline()
        return json.loads(line) if line.endswith("\n") else None

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.lines.close()


def sweep(arguments: argparse.Namespace) -> None:
    from tests.sweep.subjects import classes

    modes = arguments.modes.split(",")
    results = Results(arguments.results)
    known = classes()
    results.keep(known)
    names = arguments.only.split(",") if arguments.only else list(known)
    jobs = []
    for name in names:
        todo = results.missing(name, modes) if arguments.resume else modes
        if todo:
            jobs.append((name, known[name][0], todo))
    print(f"{len(jobs)} of {len(known)} classes to run", flush=True)
    started = time.monotonic()
    busy: dict[int, tuple[Worker, list[Any]]] = {}
    idle: list[Worker] = []
    num_jobs, done = len(jobs), 0
    while jobs or busy:
        while jobs and len(busy) < arguments.processes:
            name, kind, todo = jobs.pop(0)
            worker = idle.pop() if idle else Worker()
            worker.ask(f"{name} {kind} {','.join(todo)}")
            busy[worker.read] = (worker, [name, kind, ["oracle", *todo]])
        ready, _, _ = select.select(list(busy), [], [], 1.0)
        for read in list(busy):
            worker, (name, kind, todo) = busy[read]
            late = time.monotonic() - worker.since > SECONDS[todo[0]]
            answer = worker.answer() if read in ready else None
            if answer is not None:
                results.add(name, known[name], todo.pop(0), answer)
                ended = not todo or "not built" in answer
            elif read in ready or late:
                results.add_failure(name, known[name], todo, "took too long" if late else "the process died")
                worker.stop()
                del busy[read]
                if todo[0] != "oracle" and todo[1:]:
                    jobs.insert(0, (name, kind, todo[1:]))
                    num_jobs += 1
                done += 1
                continue
            else:
                continue
            if ended:
                done += 1
                del busy[read]
                if worker.num_models < PER_PROCESS:
                    idle.append(worker)
                else:
                    worker.stop()
                print(f"{time.monotonic() - started:5.0f} s {done:3}/{num_jobs} {results.line(name)}", flush=True)
    for worker in idle:
        worker.stop()
    results.save()


if __name__ == "__main__":
    main()
