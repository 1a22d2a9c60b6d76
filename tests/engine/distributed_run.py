"""Runs of the toy system for launchers, and a launcher that is quick.

    torchrun ... -m engine.distributed_run run OUT '{"steps": 12}'
    python -m engine.distributed_run fork '[{"out": OUT, "processes": 2, "sharded": false, "steps": 12}, ...]'

``fork`` starts the processes of each job as forks of itself, with the environment that torchrun gives them: what takes long
on two cores, importing torch, is done once. It prints one JSON object a job: the exit codes, and what was raised.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

from engine import toys
from unmask.engine.display import SilentDisplay
from unmask.engine.distributed import leave
from unmask.engine.run import Interrupted
from unmask.engine.stages import train
from unmask.errors import UserError


def run(out: Path, options: dict) -> None:
    kind = getattr(toys, options.pop("kind", "Toy"))
    resume, stop = options.pop("resume", False), options.pop("stop", None)
    monitors = [toys.Width()]
    if stop:
        monitors.append(toys.StopAfter(stop))
    if options.pop("spoil", False):
        monitors.append(toys.Spoil(out))
    made = toys.stage(kind, monitors=monitors, **options)
    train([made], out, describe={"system": "toy"}, resume=resume, display=SilentDisplay())


def forked(job: dict) -> dict:
    processes, sharded, out = job.pop("processes", 1), job.pop("sharded", False), Path(job.pop("out"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            if processes > 1:
                group = {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": port,
                    "WORLD_SIZE": processes,
                    "LOCAL_WORLD_SIZE": processes,
                }
                group |= {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_FSDP": str(sharded).lower()}
                os.environ.update({n: str(v) for n, v in group.items()})
            code, told = 0, ""
            try:
                run(out, job)
            except Interrupted as left:
                code, told = left.exit_code, str(left)
            except UserError as error:
                code, told = 2, str(error)
            except BaseException as error:
                import traceback

                code, told = 1, "".join(traceback.format_exception(error))
            os.write(writer, told.encode()[-4000:])
            os._exit(code)
        os.close(writer)
        children.append((child, reader))
    told = []
    codes = []
    for child, reader in children:
        with os.fdopen(reader) as pipe:
            told.append(pipe.read())
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return {"codes": codes, "told": told}


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]), json.loads(sys.argv[3]))
        leave(0)
    else:
        for job in json.loads(sys.argv[2]):
            print(json.dumps(forked(job)), flush=True)
