"""A run killed at any step goes on to the bytes of an uninterrupted one; broken checkpoints and other people's folders are refused."""
import hashlib
import json
import os
import shutil
import signal
import warnings
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_nb.core.errors_files import DataError
from itm_nb.core.random import order
from itm_nb.methods.method import METHODS
from itm_nb.training.build import build
from itm_nb.training.checkpoint import Busy, load_checkpoint, locked, save_checkpoint, Stopped
from itm_nb.training.config import config, Config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import evaluate, fit, prepare, Saving, train_step

TINY = Config(preset='tiny', text='mean', text_pool='mean', dim=16, d_word=8, image_hidden=16, epochs=2, batch=64, method='vsepp', warmup=1, dropout=.1)


@pytest.fixture(scope='module')
def world(): return corpus(TINY)


@pytest.fixture(scope='module')
def whole(world, tmp_path_factory):
    "An uninterrupted run and the bytes it left"
    run = tmp_path_factory.mktemp('whole')
    t = fit(TINY, run, world, progress=False, saving=Saving(every=5)); evaluate(run, world)
    return t.steps, digest(run)


def digest(run):
    "SHA-256 of everything a run leaves but the clock, the lock and the checkpoint before the last"
    files = [p for p in sorted(Path(run).rglob('*')) if p.is_file() and p.name not in ('timing.jsonl', 'lock') and p.parent.name != 'previous']
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def killed(run, world, cfg, step, how=signal.SIGKILL, every=5):
    "Train in a process of its own that dies at a step; returns how it ended"
    pid = os.fork()
    if pid == 0:
        try: fit(cfg, run, world, progress=False, saving=Saving(every=every), on_step=lambda s: os.kill(os.getpid(), how) if s == step else None)
        except Stopped: os._exit(75)
        except BaseException: os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def check_kill(run, world, whole, step):
    status = killed(run, world, TINY, step)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    assert not (run/'ranks_val.npz').exists()
    fit(TINY, run, world, progress=False, saving=Saving(every=5)); evaluate(run, world)
    assert digest(run) == whole[1]


@pytest.mark.parametrize('i', range(5))
def test_sigkill_and_resume(i, tmp_path, world, whole):
    check_kill(tmp_path, world, whole, int(np.random.default_rng(i).integers(1, whole[0])))


@pytest.mark.slow
@pytest.mark.parametrize('i', range(50))
def test_sigkill_and_resume_often(i, tmp_path, world, whole):
    check_kill(tmp_path, world, whole, int(np.random.default_rng(100+i).integers(1, whole[0])))


def test_killed_again_and_again(tmp_path, world, whole):
    for step in range(3, whole[0], 7): killed(tmp_path, world, TINY, step)
    fit(TINY, tmp_path, world, progress=False, saving=Saving(every=5)); evaluate(tmp_path, world)
    assert digest(tmp_path) == whole[1]


def test_sigterm_saves_and_stops(tmp_path, world, whole):
    assert os.waitstatus_to_exitcode(killed(tmp_path, world, TINY, 7, signal.SIGTERM, every=1000)) == 75
    assert load_checkpoint(tmp_path/'last')[1]['step'] == 7
    fit(TINY, tmp_path, world, progress=False, saving=Saving(every=5)); evaluate(tmp_path, world)
    assert digest(tmp_path) == whole[1]


@pytest.mark.parametrize('point', ['new', 'moved'])
def test_killed_while_writing_a_checkpoint(point, tmp_path, world, whole):
    "Half of a new checkpoint, or the moment between two renames: the one before is used"
    killed(tmp_path, world, TINY, 12)
    shutil.rmtree(tmp_path/'new.tmp', ignore_errors=True)                   # it may have been killed in just that
    if point == 'new':
        (tmp_path/'new.tmp').mkdir()
        (tmp_path/'new.tmp'/'tensors.safetensors').write_bytes(b'half')
    elif (tmp_path/'last').is_dir():
        os.replace(tmp_path/'last', tmp_path/'new.tmp')
    fit(TINY, tmp_path, world, progress=False, saving=Saving(every=5)); evaluate(tmp_path, world)
    assert digest(tmp_path) == whole[1]


@pytest.mark.parametrize('seed', range(32))
def test_damaged_checkpoint_is_noticed(seed, tmp_path):
    "A flipped bit or a cut file, anywhere: the previous checkpoint is used, and it is said"
    g = np.random.default_rng(seed)
    for step in (1, 2): save_checkpoint(tmp_path/'last', dict(w=torch.full((50,), float(step))), dict(step=step))
    f = tmp_path/'last'/('tensors.safetensors' if seed % 2 else 'state.json'); raw = bytearray(f.read_bytes())
    if seed % 8 > 4: raw = raw[:int(g.integers(0, len(raw)))]
    else: raw[int(g.integers(len(raw)))] ^= 1
    f.write_bytes(raw)
    with pytest.warns(UserWarning, match='damaged'): tensors, state = load_checkpoint(tmp_path/'last')
    assert state['step'] == 1 and (tensors['w'] == 1).all()


def test_other_settings_or_data_are_refused(tmp_path, world):
    fit(TINY, tmp_path, world, progress=False)
    before = digest(tmp_path)
    with pytest.raises(DataError, match='other settings'): fit(config(asdict(TINY) | dict(lr=.5)), tmp_path, world, progress=False)
    other = corpus(config(asdict(TINY) | dict(world=7)))
    with pytest.raises(DataError, match='other data'): fit(TINY, tmp_path, other, progress=False)
    assert digest(tmp_path) == before


def test_one_process_per_run_folder(tmp_path, world):
    with locked(tmp_path), pytest.raises(Busy): fit(TINY, tmp_path, world, progress=False)


def test_training_never_opens_the_test_split(tmp_path, world):
    opened = []
    spy = type(world)(world.label, lambda part: opened.append(part) or world.split(part), world.world)
    fit(TINY, tmp_path, spy, progress=False)
    assert set(opened) == {'train', 'val'}


def test_a_world_is_drawn_once(tmp_path, monkeypatch):
    "The second run reads what the first has drawn, and trains the same model"
    cfg = config(asdict(TINY) | dict(epochs=1, warmup=0))
    first = fit(cfg, tmp_path/'a', corpus(cfg, cache=tmp_path/'worlds'), progress=False).history
    monkeypatch.setattr('itm_nb.scenes.dataset.make', lambda *a, **k: pytest.fail('drawn again'))
    assert fit(cfg, tmp_path/'b', corpus(cfg, cache=tmp_path/'worlds'), progress=False).history == first
    assert [f.suffix for f in (tmp_path/'worlds').iterdir()] == ['.npz']


def test_arms_share_their_streams(world):
    "Same seed, other method: same initial weights, same order; another seed: neither"
    a, b = (build(config(asdict(TINY) | dict(method=m)), 64, 50).state_dict() for m in ('vsepp', 'infonce'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    c = build(config(asdict(TINY) | dict(seed=1)), 64, 50).state_dict()
    assert any(not torch.equal(a[k], c[k]) for k in a)
    assert torch.equal(order(100, 0, 3), order(100, 0, 3)) and not torch.equal(order(100, 0, 3), order(100, 0, 4))


@pytest.mark.parametrize('method', METHODS)
def test_every_method_lowers_its_own_loss(method, world):
    t = prepare(config(asdict(TINY) | dict(method=method, warmup=0, epochs=30, dropout=0., lr=.01)), world)
    caps = order(len(t.train.lengths), 0, 0)[:64]
    costs = [float(sum(train_step(t, caps, 0).values())) for _ in range(50)]
    assert np.isfinite(costs).all() and costs[-1] < .9*costs[0]


def test_no_host_sync_in_a_step(world):
    "A step on a device that refuses to hand out values: nothing may call .item(), .tolist() or bool() on a result"
    t = prepare(TINY, world); asked = []
    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if 'local_scalar_dense' in str(func) or 'nonzero' in str(func): asked.append(str(func))
            return func(*args, **(kwargs or {}))
    caps = order(len(t.train.lengths), 0, 0)[:64]
    train_step(t, caps, 1)                                              # the optimiser makes its state
    with Watch(): train_step(t, caps, 1)
    assert not asked


def test_log_holds_nothing_of_the_clock(tmp_path, world):
    fit(TINY, tmp_path, world, progress=False)
    lines = [json.loads(l) for l in (tmp_path/'log.jsonl').read_text().splitlines()]
    assert {k for l in lines for k in l} <= {'step', 'epoch', 'loss', 'norm', 'clipped', 'val'}
    assert [l['step'] for l in lines] == sorted(l['step'] for l in lines)


@pytest.mark.parametrize('bad,wanted', [(dict(lr='fast'), 'lr'), (dict(epochs=0), 'epochs'), (dict(data='coco'), 'data'), (dict(epoch=3), "did you mean 'epochs'"),
                                        (dict(decay='linear'), 'decay'), (dict(batch=2.5), 'batch'), (dict(precision='fp16'), 'precision')])
def test_bad_settings(bad, wanted):
    with pytest.raises(ValueError, match=wanted): config(asdict(TINY) | bad)


@pytest.mark.parametrize('bad,wanted', [(dict(method='vse+'), 'no method;'), (dict(method='vsep'), 'no method called'),
                                        (dict(text='lstm'), "text is 'lstm'; there are"), (dict(image_pool='avg'), "image_pool is 'avg'; there are")])
def test_bad_names_fail_before_training(bad, wanted, tmp_path, world):
    with pytest.raises(ValueError, match=wanted): fit(config(asdict(TINY) | bad), tmp_path, world, progress=False)
    assert not (tmp_path/'last').exists()
