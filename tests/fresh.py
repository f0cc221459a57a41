"""Code in an interpreter that has imported torch and nothing of ours.

One process imports torch, which takes seconds; each piece of code then runs in a fork of it.
"""

import json
import os
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[1]


def fresh(code: str, *arguments, cwd=ROOT, env=None) -> SimpleNamespace:
    """Runs `code` as `python -c code arguments` would, in `cwd` with `env` added.

    Args:
        env: names with their values; None takes one out.

    Returns:
        Its `returncode`, `stdout` and `stderr`.
    """
    given = {"code": textwrap.dedent(code), "arguments": [os.fspath(a) for a in arguments]}
    env = {name: value for name, value in (os.environ | (env or {})).items() if value is not None}
    given |= {"cwd": os.fspath(cwd), "env": env}
    server = _server()
    server.stdin.write(json.dumps(given) + "\n")
    server.stdin.flush()
    return SimpleNamespace(**json.loads(server.stdout.readline()))


def printed(code: str, *arguments, **options) -> str:
    """What the code wrote to its standard output; an error of it is one here."""
    done = fresh(code, *arguments, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


@cache
def _server() -> subprocess.Popen:
    """Ends with us, when its standard input does."""
    return subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def _serve() -> None:
    import tempfile

    import torch  # noqa: F401

    sys.path[0] = ""  # as -c has it, instead of this folder
    for line in sys.stdin:
        given = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = os.fork()
            if not child:
                _run(given, out, err)
            _, status = os.waitpid(child, 0)
            done = {"returncode": os.waitstatus_to_exitcode(status)}
            for name, file in (("stdout", out), ("stderr", err)):
                file.seek(0)
                done[name] = file.read()
        print(json.dumps(done), flush=True)


def _run(given, out, err):
    """In the child: never returns."""
    import traceback

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.chdir(given["cwd"])
    os.environ.clear()
    os.environ.update(given["env"])
    sys.argv = ["-c", *given["arguments"]]
    status = 0
    try:
        exec(compile(given["code"], "-c", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
