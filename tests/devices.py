"""Tests on several devices, pretended on cores: one process imports, then forks a process for each device.

Importing takes longer than what is tested. A file that is run as a script calls `in_worlds`; its test calls
`started`."""
import importlib
import os
import socket
import subprocess
import sys
import traceback


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def started(file, folder, *worlds, seconds=400):
    "Run a test file as a script that calls `in_worlds`"
    paths = os.pathsep.join(filter(None, (os.path.dirname(__file__), os.environ.get('PYTHONPATH'))))
    done = subprocess.run([sys.executable, file, str(folder), *map(str, worlds)], capture_output=True, text=True,
                          timeout=seconds, env=os.environ | dict(PYTHONPATH=paths))
    assert done.returncode == 0, done.stderr[-3000:]


def forked(work, rank, world, port):
    "The id of a process that is one device"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE=str(world),
                           LOCAL_WORLD_SIZE=str(world), RANK=str(rank), LOCAL_RANK=str(rank),
                           OMP_NUM_THREADS='1', ACCELERATE_USE_CPU='true')
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def in_worlds(work, before=lambda: None):
    """`work(folder)` on as many devices as each further argument says, one world after the other. `before` is
    done once, and all of them have what it makes"""
    importlib.import_module('torch._dynamo')    # a second, once; else the first optimiser of each process does
    before()
    folder, *worlds = sys.argv[1:]
    for world in map(int, worlds):
        port = free_port()
        pids = [forked(lambda: work(folder), r, world, port) for r in range(world)]
        codes = [os.waitpid(p, 0)[1] for p in pids]
        if any(codes):
            sys.exit(f'{world} devices: exit codes {codes}')
