"""The cases on a pretend device run in a process of their own: a registered device gives autograd threads,
and tests that fork cannot follow."""
import os
import resource
import socket
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name('pretend_device_cases.py')
ROOT = Path(__file__).parents[2]


def seconds():
    "Of all processors, by processes that have ended"
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_every_case_on_the_pretend_device(capsys):
    call = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-o',
            'addopts=', str(CASES)]
    env, before = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST_')}, seconds()
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=2400, env=env)
    _, table, rows = done.stdout.rpartition('model, method')
    spent = seconds() - before
    with capsys.disabled(): print(f'\n{table}{rows}{spent:.0f} CPU s')
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert all(f'\n{name} ' in done.stdout for name in ('tags', 'fne', 'cross aoq', 'pixels_frozen tags'))
    assert spent < 180, 'CPU seconds that all cases together may take'


def test_two_devices_train_together(tmp_path, capsys):
    "One method of each paper in two processes (gloo), each with a pretend device: as the two on the CPU"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = str(s.getsockname()[1])
    places = os.pathsep.join(map(str, (ROOT, CASES.parents[1], CASES.parent)))
    common = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST_')}
    common |= dict(PYTHONPATH=places, WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    call = [sys.executable, str(CASES.with_name('pretend_device_together.py')), str(tmp_path), 'aoq', 'fne', 'tags']
    both = [subprocess.Popen(call, cwd=ROOT, env=common | dict(RANK=r, LOCAL_RANK=r), stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT, text=True) for r in '01']
    said = [p.communicate(timeout=1200)[0] for p in both]
    with capsys.disabled(): print('\n' + '\n'.join(x for x in said[0].splitlines() if 'on both' in x))
    assert [p.returncode for p in both] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert sum('on both' in x for x in said[0].splitlines()) == 3
