"""Runs forked from a warm server: the same bytes as cold ones, each a process of its own."""
import hashlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import yaml
from test_kills import finished
from test_runs import ROOT, command

from itm_nb.core import project
from itm_nb.runs import parameters, warm_server
from itm_nb.runs.run_folder import RESUMABLE
from itm_nb.runs.sweep_driver import drive, launch
from itm_nb.runs.sweep_plan import Entry, entries, read_sweep
from itm_nb.runs.warm_server import Warm
from itm_nb.training.checkpoint import load_checkpoint

TIMES = ('cost',)                     # of a record: what the clock said


def tiny(folder, **base):
    "A sweep of two methods and a control on one world"
    spec = yaml.safe_load((ROOT/'nbs'/'experiments'/'sweeps'/'tiny.yaml').read_text())
    spec |= dict(blocks=[dict(seed=0)], base=spec['base'] | dict(epochs=1) | base, controls={})
    spec['arms']['vsepp']['warmup'] = 0
    f = Path(folder)/'toy.yaml'
    f.write_text(yaml.safe_dump(spec))
    return f


def made(folder):
    "What runs have made, without times: file -> hash or content"
    out = {}
    for p in sorted(folder.glob('*/*')):
        if p.parent.name == 'records':
            out['record', p.name] = {k: v for k, v in json.loads(p.read_text()).items() if k not in TIMES}
        if p.name in ('ranks_test.npz', 'ranks_val.npz', 'picks.bin', 'log.jsonl') or p.parent.name == 'best':
            out[p.parent.name, p.name] = hashlib.sha256(p.read_bytes()).hexdigest()
    for p in sorted(folder.glob('*/best/*')):
        out[p.parts[-3], p.name] = hashlib.sha256(p.read_bytes()).hexdigest()
    return out


def test_cold_and_warm_runs_make_the_same_bytes_in_any_order(tmp_path):
    "Weights, ranks, logs, records: cold, forked, and forked in the opposite order"
    spec, found, warm = read_sweep(tiny(tmp_path)), {}, Warm()
    for how in ('cold', 'warm', 'reversed'):
        todo = entries(spec, 'toy', tmp_path/how, dict(progress=False))
        todo = todo[::-1] if how == 'reversed' else todo
        assert drive(todo, 1, start=launch if how == 'cold' else warm.start) == {}
        assert warm.lost is False and (warm.server is not None) == (how != 'cold')
        assert all((e.out/'run.ipynb').is_file() for e in todo)
        found[how] = made(tmp_path/how/'toy')
    warm.close()
    assert len(found['cold']) > 10 and 'model.safetensors' in {x[1] for x in found['cold']}
    assert found['cold'] == found['warm'] == found['reversed']


def long_run(out):
    known = parameters.parameters(project.template('train'))
    return Entry('train', 'toy', parameters.resolve(known, dict(
        preset='tiny', dim=16, d_word=8, image_hidden=16, epochs=4000, batch=32, progress=False, arm='toy',
        out=str(out))), out)


def until(what, seconds=300):
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, 'waited too long'
        time.sleep(.1)


def family(pid):
    return psutil.Process(pid).children(recursive=True)


def test_a_killed_run_goes_on_and_a_stop_is_a_stop(tmp_path):
    "SIGKILL: -9, its kernel ends too, the server forks it again, from its checkpoint; then SIGTERM: 75"
    e, warm = long_run(tmp_path/'run'), Warm()
    p = warm.start(e)
    until(lambda: p.poll() is not None or (e.out/'last').is_dir())
    kernels = family(p.pid)
    assert p.returncode is None and len(kernels) == 1 and os.getsid(p.pid) == p.pid
    os.kill(p.pid, signal.SIGKILL)
    assert p.wait() == -signal.SIGKILL
    assert psutil.wait_procs(kernels, timeout=60)[1] == []
    before = load_checkpoint(e.out/'last')[1]['step']
    p = warm.start(e)
    until(lambda: p.poll() is not None or load_checkpoint(e.out/'last')[1]['step'] > before)
    p.terminate()
    assert p.wait() == RESUMABLE and not (e.out/'DONE').exists()
    steps = [json.loads(x)['since'] for x in (e.out/'timing.jsonl').read_text().splitlines()]
    assert steps.count(0) == 1, 'it began anew'
    warm.close()


@pytest.mark.parametrize('who', ['server', 'sweep'])
def test_a_sweep_outlives_its_server_and_leaves_no_orphan(who, tmp_path):
    "The server is killed: one line, the sweep goes on. SIGTERM: every run saves, and no process is left"
    f = tiny(tmp_path, epochs=4000)
    argv = (f, '--runs', tmp_path/'runs', '--jobs', '1')
    p = command('itm_sweep', *argv)
    until(lambda: p.poll() is not None or list((tmp_path/'runs').glob('toy/*/last')))
    assert p.poll() is None
    (server,), every = psutil.Process(p.pid).children(), family(p.pid)
    assert len(every) == 3                                        # the server, a run, its kernel
    if who == 'server':
        server.kill()
        time.sleep(1)
        assert every[1].is_running() and p.poll() is None         # what has begun goes on
    p.send_signal(signal.SIGTERM)
    err = p.communicate(timeout=300)[1]
    assert p.returncode == RESUMABLE, err
    assert psutil.wait_procs(every, timeout=60)[1] == [] and not finished(tmp_path/'runs')


TOY = '''
import os, random, signal, sys, time
from itm_nb.runs import warm_server
def main(argv):
    print(argv[0], os.environ.get('LEFT'), os.getcwd() == os.environ['HERE'], random.random(),
          os.environ['OMP_NUM_THREADS'], flush=True)
    os.environ['LEFT'] = 'something'
    os.chdir('/')
    random.seed(1)
    if argv[0] == 'waits':
        time.sleep(5)
    return 0
os.environ['HERE'] = os.getcwd()
if os.path.exists('version'):
    warm_server.source_hash = lambda: open('version').read()
more = ('slow',) if os.path.exists('slow.py') else ()
sys.exit(warm_server.serve(int(sys.argv[1]), main, ('json', 'itm_nb.runs.forked_kernel', *more)))
'''


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A server of toys in a folder of its own; what would be started cold is noted"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PYTHONPATH', f'{ROOT}:{tmp_path}')
    cold = []
    monkeypatch.setattr(warm_server, 'launch',
                        lambda e, more=(): cold.append(e.arm) or subprocess.Popen(['true']))
    warm = Warm(code=TOY)
    yield warm, cold, lambda name, **values: warm.start(Entry(name, name, values, tmp_path/name))
    warm.close()


def test_a_run_leaves_nothing_to_the_next(toy):
    "Environment, folder, random state; one thread"
    warm, cold, start = toy
    assert [start(x).wait() for x in 'ab'] == [0, 0] and not cold
    said = [Path(x, 'worker.log').read_text().split() for x in 'ab']
    assert [x[1:3] + x[4:] for x in said] == [['None', 'True', '1']]*2 and said[0][3] != said[1][3]


def test_more_threads_and_accelerators_start_cold(toy, monkeypatch):
    warm, cold, start = toy
    monkeypatch.setattr(warm_server.shutil, 'which', lambda name: '/usr/bin/nvidia-smi')
    assert start('two', threads=2).wait() == 0 and start('gpu', device='auto').wait() == 0
    assert cold == ['two', 'gpu'] and warm.server is None


def test_a_killed_server_is_said_once(toy, capsys):
    "A run that has begun ends as it would have; later ones start cold"
    warm, cold, start = toy
    p = start('waits')
    until(lambda: p.poll() is None and p.pid)
    warm.server.kill()
    q, r = start('later'), start('last')
    assert (q.wait(), r.wait(), p.wait()) == (0, 0, 0) and cold == ['later', 'last']
    assert capsys.readouterr().err.count('the warm server has ended (exit code -9') == 1


def test_edited_source_ends_the_server(toy, capsys):
    warm, cold, start = toy
    Path('version').write_text('1')
    assert start('before').wait() == 0 and not cold
    Path('version').write_text('2')
    assert start('after').wait() == 0 and cold == ['after']
    assert 'the source has changed' in capsys.readouterr().err


def test_a_server_with_threads_is_not_used(toy, capsys):
    warm, cold, start = toy
    Path('slow.py').write_text('from threading import Thread\nimport time\n'
                               'Thread(target=time.sleep, args=(60,), daemon=True).start()\n')
    assert start('run').wait() == 0 and cold == ['run']
    assert 'more than one thread' in capsys.readouterr().err


def test_a_stop_does_not_wait_for_imports(toy):
    "A run that has not begun is never begun"
    warm, cold, start = toy
    Path('slow.py').write_text('import time\ntime.sleep(60)\n')
    p, began = start('run'), time.monotonic()
    p.terminate()
    assert p.wait() == RESUMABLE and time.monotonic() - began < 30 and not cold


def test_a_cold_sweep_has_no_server(tmp_path):
    "itm_sweep --cold: its children are runs"
    p = command('itm_sweep', tiny(tmp_path, epochs=4000), '--runs', tmp_path/'runs', '--jobs', '1', '--cold')
    until(lambda: p.poll() is not None or list((tmp_path/'runs').glob('toy/*/worker.log')))
    every = family(p.pid)
    assert every and all('itm_run' in ' '.join(x.cmdline()) for x in psutil.Process(p.pid).children())
    p.send_signal(signal.SIGTERM)
    assert p.communicate(timeout=300) and p.returncode == RESUMABLE
    assert psutil.wait_procs(every, timeout=60)[1] == []
