"""Many jobs, a few at a time, with one line of progress for all of them. Imports no torch.

Small networks use a second core badly, so two jobs of one thread each end sooner than one job of two threads. Each job
is a process of its own (``python -m unmask.claims.arm``): Ctrl-C reaches all of them, each saves itself and leaves.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import IO, Any

from unmask.claims.jobs import Job
from unmask.engine.run import cores
from unmask.errors import UserError

Talk = Callable[[str], None]
POLL = 0.5  # seconds between two looks at the running jobs


@dataclass
class Running:
    """A job in its own process; what it says goes to ``log.txt`` in its folder."""

    job: Job
    process: subprocess.Popen[bytes]
    log: IO[bytes]


def run_jobs(jobs: Sequence[Job], at_once: int, talk: Talk) -> None:
    """Do every job that is not done. Raises ``UserError`` with the first job's complaint; finished ones stay finished."""
    left = [job for job in jobs if job.values() is None]
    if len(left) < len(jobs):
        talk(f"{len(jobs) - len(left)} of {len(jobs)} arms and seeds are done already")
    if not left:
        return
    for job in left:
        job.write()
    if at_once == 1:
        in_turn(left, talk)
    else:
        side_by_side(left, at_once, talk)


def in_turn(jobs: Sequence[Job], talk: Talk) -> None:
    """One after another in this process, which shows each training's own progress."""
    from unmask.claims.arm import perform

    clock = Clock(jobs)
    for number, job in enumerate(jobs):
        talk(f"{number + 1}/{len(jobs)} {job.title}")
        values = perform(job, talk)
        talk(f"{number + 1}/{len(jobs)} {job.title}: {told(values)}{clock.left(jobs)}")


def side_by_side(jobs: Sequence[Job], at_once: int, talk: Talk) -> None:
    """``at_once`` processes, the machine's cores shared out among them."""
    threads = max(cores() // at_once, 1)
    waiting, running, done = list(jobs), list[Running](), 0
    clock, bar = Clock(jobs), Bar(jobs)
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(started(waiting.pop(0), threads))
            time.sleep(POLL)
            for one in [r for r in running if r.process.poll() is not None]:
                running.remove(one)
                one.log.close()
                if one.process.returncode:
                    raise UserError(complaint(one))
                done += 1
                bar.say(f"{done}/{len(jobs)} {one.job.title}: {told(one.job.values() or {})}{clock.left(jobs)}", talk)
            bar.show([r.job for r in running], clock)
    finally:
        bar.close()
        for one in running:  # a stop, or another job's complaint: each saves itself and leaves
            if one.process.poll() is None:
                one.process.terminate()
        for one in running:
            one.process.wait()
            one.log.close()


def started(job: Job, threads: int) -> Running:
    limits = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    log = (job.folder / "log.txt").open("ab")
    command = [sys.executable, "-m", "unmask.claims.arm", str(job.folder)]
    process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **limits})
    return Running(job, process, log)


def complaint(one: Running) -> str:
    """The last line a failed job wrote, as one line."""
    path = one.job.folder / "log.txt"
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()] or [
        "it left without a word"
    ]
    last = lines[-1].removeprefix("unmask: ")
    return f"{one.job.title} stopped: {last} (its whole log: {path})"


def told(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items()) or "done"


class Clock:
    """Time left, from the training steps done since the start."""

    def __init__(self, jobs: Sequence[Job]):
        self.began, self.total = time.monotonic(), sum(j.steps for j in jobs)
        self.at_start = sum(j.steps_done() for j in jobs)

    def left(self, jobs: Sequence[Job]) -> str:
        """``; about 4 min left``, or nothing while it cannot be said."""
        done = sum(j.steps_done() for j in jobs)
        if done <= self.at_start or done >= self.total:
            return ""
        seconds = (time.monotonic() - self.began) * (self.total - done) / (done - self.at_start)
        return f"; about {max(round(seconds / 60), 1)} min left"


class Bar:
    """A live bar on a terminal; elsewhere nothing, and ``say`` writes plain lines."""

    def __init__(self, jobs: Sequence[Job]):
        self.jobs = jobs
        self.progress: Any = None
        self.task: Any = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TimeElapsedColumn(),
            )
            self.progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self.task = self.progress.add_task("", total=max(sum(j.steps for j in jobs), 1))
            self.progress.start()

    def show(self, running: Sequence[Job], clock: Clock) -> None:
        if self.progress is not None:
            names = ", ".join(f"{j.arm} (seed {j.seed})" for j in running)
            done = sum(j.steps_done() for j in self.jobs)
            self.progress.update(self.task, completed=done, description=f"{names}{clock.left(self.jobs)}")

    def say(self, line: str, talk: Talk) -> None:
        if self.progress is not None:
            self.progress.console.print(line, highlight=False, markup=False)
        else:
            talk(line)

    def close(self) -> None:
        if self.progress is not None:
            self.progress.stop()
