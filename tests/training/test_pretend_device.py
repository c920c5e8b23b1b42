"""The cases on a pretend device run in a process of their own: a registered device gives autograd threads, and tests that fork cannot follow."""
import os
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name('pretend_device_cases.py')
ROOT = Path(__file__).parents[2]


def test_every_case_on_the_pretend_device(capsys):
    call = [sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '-o', 'addopts=', str(CASES)]
    env = {k: v for k, v in os.environ.items() if not k.startswith('PYTEST_')}
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, timeout=1200, env=env)
    with capsys.disabled(): print('\n' + done.stdout.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
