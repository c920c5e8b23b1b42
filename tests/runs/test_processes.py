"""One run in several processes: the numbers of one process, by the command, after a stop, and as part of a sweep."""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from itm_nb.core import commands, project
from itm_nb.runs import parameters, run_folder
from itm_nb.runs.multi_process import launcher, several

ROOT = Path(__file__).parents[2]
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
SMALL = dict(preset='tiny', dim=16, d_word=8, image_hidden=16, epochs=2, batch=32, dropout=0., progress=False)


def command(out, *more, **given):
    set_ = [x for k, v in (SMALL | given | dict(out=str(out))).items() for x in ('-p', k, str(v))]
    return [sys.executable, '-c', 'from itm_nb.cli import itm_run; itm_run()', 'train', *set_, '--quiet', *more]


def go(*a, **kw): return subprocess.run(command(*a, **kw), cwd=ROOT, env=ENV, capture_output=True, text=True, timeout=900)


def test_what_cannot_be_shared_is_refused(tmp_path, capsys):
    "An odd batch, accelerators that are not there: before anything is started"
    values = parameters.resolve(parameters.parameters(project.template('train')), dict(batch=33))
    with pytest.raises(commands.SetupError, match='batch 33 cannot be shared by 2'): several(2)(project.template('train'), values, tmp_path)
    with pytest.raises(commands.SetupError, match='accelerators here; -p device cpu'): launcher(999, 'auto')
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_two_processes_come_to_the_numbers_of_one(tmp_path):
    "Through the command: weights, loss and validation to 1e-6, the same ranks of the test split, a record and an executed notebook"
    from safetensors.torch import load_file
    a, b = tmp_path/'a'/'one', tmp_path/'b'/'two'
    for out, more in ((a, ()), (b, ('--accelerate', '2'))):
        r = go(out, *more); assert r.returncode == 0, r.stdout + r.stderr[-3000:] + ((out/'processes.log').read_text()[-3000:] if more else '')
    assert (b/'DONE').is_file() and (b/'run.ipynb').is_file() and 'Gloo' not in (a/'worker.log').read_text() if (a/'worker.log').is_file() else True
    x, y = (load_file(p/'last'/'tensors.safetensors') for p in (a, b)); assert x.keys() == y.keys()
    for k in x:
        if k.startswith('model.'): np.testing.assert_allclose(x[k], y[k], atol=1e-6, err_msg=k)
    logs = [[json.loads(l) for l in (p/'log.jsonl').read_text().splitlines()] for p in (a, b)]
    for m, n in zip(*logs):
        if 'loss' in m: assert abs(m['loss'] - n['loss']) < 1e-5*abs(m['loss'])
        if 'val' in m: assert abs(m['val']['rsum'] - n['val']['rsum']) < 1e-6
    recs = [json.loads(next((p.parent/'records').glob('*.json')).read_text()) for p in (a, b)]
    assert recs[0]['id'] == recs[1]['id'] and recs[0]['ranks'] == recs[1]['ranks']
    assert '2 processes' not in (b/'processes.log').read_text() and 'Traceback' not in (b/'processes.log').read_text()


@pytest.mark.slow
def test_a_stop_reaches_all_processes_and_the_run_goes_on(tmp_path):
    "SIGTERM to the command: 75, a checkpoint, no notebook yet; the same command ends it, with one process or two"
    out = tmp_path/'r'/'x'; p = subprocess.Popen(command(out, '--accelerate', '2', epochs=400), cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    while not (out/'last').is_dir(): assert p.poll() is None, p.stderr.read()[-3000:]; time.sleep(.1)
    p.send_signal(signal.SIGTERM); assert p.wait(timeout=180) == run_folder.RESUMABLE and not (out/'DONE').exists()
    from itm_nb.training.checkpoint import load_checkpoint
    before = load_checkpoint(out/'last')[1]['step']; assert 0 < before
    p = subprocess.Popen(command(out, '--accelerate', '2', epochs=400), cwd=ROOT, env=ENV)
    limit = time.monotonic() + 180
    while load_checkpoint(out/'last')[1]['step'] <= before: assert time.monotonic() < limit and p.poll() is None; time.sleep(.2)
    p.send_signal(signal.SIGTERM); assert p.wait(timeout=180) == run_folder.RESUMABLE
