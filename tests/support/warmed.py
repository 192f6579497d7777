"""A process that has imported everything, and forks a child for every command: real processes that start at once.

`python -P warmed.py MODEL` compresses the model once, so that whatever is imported late is there, and reads a JSON
object a line on stdin. One with `words` (the command line), `output` (where stdout and stderr go), `cwd` and `calls`
(functions of the module `sabotage` with their arguments, called in the child before the command) starts a child, and is
answered with `{"pid": ...}`; one with `wait`, a pid, is answered with its `{"status": ...}`, as `subprocess` counts,
when it is gone. A child is a process of its own, which a real signal kills. The process that forks has one thread.
"""

import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LONGEST = 500.0
"""Seconds after which a child is killed that doesn't end."""


def run(task: dict[str, Any]) -> None:
    """Carry out one command line in the child; never comes back."""
    code = 70
    try:
        output = os.open(task["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.close(output)
        os.chdir(task["cwd"])
        import sabotage

        from quantkit.cli import main

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        for name, arguments in task["calls"]:
            getattr(sabotage, name)(**arguments)
        sys.argv = ["quantkit", *task["words"]]
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def ended(pid: int) -> int:
    """The status of a child that is gone."""
    until = time.monotonic() + LONGEST
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)


def answer(**values: Any) -> None:
    """Write a line to stdout."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


def serve(model: str) -> None:
    """Fork a child for every command on stdin until there are no more."""
    import sabotage  # noqa: F401
    import torch

    import quantkit.cli  # noqa: F401
    from quantkit.checkpoint import quiet_transformers
    from quantkit.pipeline import quantize

    torch.set_num_threads(1)
    quiet_transformers()
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("what is imported late " * 50, encoding="utf-8")
        steps = ["smoothquant", "w8a8"]
        quantize(model, Path(folder, "out"), steps=steps, dataset=str(text), samples=2, seq_len=16, progress=False)
    answer(ready=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            answer(status=ended(task["wait"]))
            continue
        pid = os.fork()
        if pid == 0:
            run(task)
        answer(pid=pid)


if __name__ == "__main__":
    serve(sys.argv[1])
