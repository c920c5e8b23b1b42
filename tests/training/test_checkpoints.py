"""Checkpoints are written beside the steps: the same bytes, whatever happens in between."""
import errno
import os
import signal
import threading
import time
from concurrent.futures import wait as waited
from dataclasses import replace

import pytest
import torch
from safetensors import SafetensorError
from test_train import digest, TINY

from itm_nb.core.errors_files import DataError
from itm_nb.training import loop
from itm_nb.training.checkpoint import load_checkpoint, locked, Stopped
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import fit, Saving

SMALL = replace(TINY, batch=100)


@pytest.fixture(scope='module')
def world():
    return corpus(SMALL)


@pytest.fixture(scope='module')
def one_after_the_other(world, tmp_path_factory):
    "The bytes of a run whose steps wait for every checkpoint"
    run = tmp_path_factory.mktemp('in_turn')
    with pytest.MonkeyPatch.context() as m:
        m.setattr(loop.Aside, 'begin', lambda self, work, *args: work(*args))
        fit(SMALL, run, world, progress=False, saving=Saving(every=2))
    return digest(run)


def slow(monkeypatch, until, at=None):
    "`save_checkpoint`, begun only when something is so; at a step, or at all. Returns steps that were written"
    real, written = loop.save_checkpoint, []

    def save(folder, tensors, state):
        end = time.monotonic() + 120
        while at in (None, state['step']) and not until():
            assert time.monotonic() < end, 'waited too long'
            time.sleep(.002)
        real(folder, tensors, state)
        written.append(state['step'])
    monkeypatch.setattr(loop, 'save_checkpoint', save)
    return written


def test_steps_go_on_while_a_checkpoint_is_written(one_after_the_other, world, tmp_path, monkeypatch):
    "That of step 2 is written only after step 3 is done: steps that waited for it would wait for ever"
    done = [0]
    written = slow(monkeypatch, lambda: done[0] >= 3, at=2)
    before = []

    def told(step):
        done[0] = step
        before.append((step, list(written)))
    fit(SMALL, tmp_path, world, progress=False, saving=Saving(every=2), on_step=told)
    assert dict(before)[3] == []
    assert written == sorted(set(written)) and written[0] == 2
    assert digest(tmp_path) == one_after_the_other


def test_a_checkpoint_holds_the_step_it_was_asked_for(world, tmp_path, monkeypatch):
    "Weights, moments, meter and history of step 2, although step 3 was done before they were written"
    done, kept = [0], {}
    real = loop._pack

    def packed(t):
        tensors, state = real(t)
        kept[state['step']] = {k: v.clone() for k, v in tensors.items()}, list(state['history'])
        return tensors, state
    monkeypatch.setattr(loop, '_pack', packed)
    slow(monkeypatch, lambda: done[0] >= 3, at=2)

    def told(step):
        done[0] = step
        if step == 4:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fit(SMALL, tmp_path, world, progress=False, saving=Saving(every=2), on_step=told)
    tensors, state = load_checkpoint(tmp_path/'last')
    assert state['step'] == 2 and state['history'] == kept[2][1]
    assert tensors.keys() == kept[2][0].keys()
    assert all(torch.equal(v, kept[2][0][k]) for k, v in tensors.items())


def test_there_is_one_writer_and_it_ends_with_the_training(world, tmp_path, monkeypatch):
    at_work = []
    real = loop.save_checkpoint

    def save(*what):
        at_work.append(threading.current_thread().name)
        assert sum(t.name.startswith('checkpoint') for t in threading.enumerate()) == 1
        real(*what)
    monkeypatch.setattr(loop, 'save_checkpoint', save)
    fit(SMALL, tmp_path, world, progress=False, saving=Saving(every=1))
    assert len(at_work) > 4 and set(at_work) == {'checkpoint_0'}
    assert not [t for t in threading.enumerate() if t.name.startswith('checkpoint')]


@pytest.mark.parametrize('how', [KeyboardInterrupt, signal.SIGTERM])
def test_an_error_or_a_stop_waits_for_what_is_being_written(how, one_after_the_other, world, tmp_path,
                                                            monkeypatch):
    "The folder is locked until all is written, and whole when it is free"
    done, free = [0], []
    late = []

    def ready():
        late.append(1)
        try:
            with locked(tmp_path):
                free.append(True)
        except Exception:
            pass
        return done[0] >= 3 and len(late) > 20
    slow(monkeypatch, ready, at=2)

    def told(step):
        done[0] = step
        if step == 3 and how is KeyboardInterrupt:
            raise KeyboardInterrupt
        if step == 3:
            os.kill(os.getpid(), how)
    with pytest.raises(KeyboardInterrupt if how is KeyboardInterrupt else Stopped):
        fit(SMALL, tmp_path, world, progress=False, saving=Saving(every=2), on_step=told)
    assert len(late) > 20 and not free
    with locked(tmp_path):
        assert load_checkpoint(tmp_path/'last')[1]['step'] == (2 if how is KeyboardInterrupt else 3)
    fit(SMALL, tmp_path, world, progress=False, saving=Saving(every=2))
    assert digest(tmp_path) == one_after_the_other


FULL = [OSError(errno.ENOSPC, 'No space left on device', 'new.tmp'),
        SafetensorError('I/O error: No space left on device (os error 28)')]


@pytest.mark.parametrize('error', FULL, ids=['system', 'safetensors'])
@pytest.mark.parametrize('at', [2, 4, 'last'])
def test_a_full_disk_ends_the_run_and_it_can_be_gone_on_with(error, at, one_after_the_other, world, tmp_path,
                                                             monkeypatch):
    steps = []
    real = loop.save_checkpoint
    last = SMALL.epochs*(len(world.split('train').captions)//SMALL.batch)
    at = last if at == 'last' else at

    def full(folder, tensors, state):
        if state['step'] == at:
            raise error
        real(folder, tensors, state)
    with monkeypatch.context() as m:
        m.setattr(loop, 'save_checkpoint', full)
        with pytest.raises(DataError, match=f'after step {at} cannot be written .*No space left on device'):
            fit(SMALL, tmp_path, world, progress=False, saving=Saving(every=2), on_step=steps.append)
    assert at <= steps[-1] <= at+2 and not (tmp_path/'ranks_val.npz').exists()
    found = load_checkpoint(tmp_path/'last')
    assert found is None if at == 2 else found[1]['step'] == max(s for s in range(2, at, 2))
    fit(SMALL, tmp_path, world, progress=False, saving=Saving(every=2))
    assert digest(tmp_path) == one_after_the_other


def test_a_failed_write_is_told_before_the_next_checkpoint(world, tmp_path, monkeypatch):
    "At the next step, not at the next checkpoint, which may be an hour away"
    failed = threading.Event()

    def full(*what):
        failed.set()
        raise FULL[0]
    monkeypatch.setattr(loop, 'save_checkpoint', full)
    real = loop.train_step
    monkeypatch.setattr(loop, 'train_step', lambda t, *a: (t.aside.work and failed.wait(60) and
                                                           waited([t.aside.work]), real(t, *a))[1])
    steps = []
    with pytest.raises(DataError, match='after step 2 cannot be written'):
        cfg = replace(SMALL, batch=40)
        fit(cfg, tmp_path, world, progress=False, saving=Saving(every=2), on_step=steps.append)
    assert steps == [1, 2, 3]


def test_a_write_that_fails_does_not_hide_what_ended_the_run(world, tmp_path, monkeypatch):
    def full(*what):
        time.sleep(.2)
        raise FULL[0]
    monkeypatch.setattr(loop, 'save_checkpoint', full)

    def fall(t, *a):
        loop._keep(t, tmp_path)
        raise ZeroDivisionError('mine')
    monkeypatch.setattr(loop, '_go_on', fall)
    with pytest.warns(UserWarning, match='last checkpoint was not written .*No space'):
        with pytest.raises(ZeroDivisionError, match='mine'):
            fit(SMALL, tmp_path, world, progress=False)


@pytest.mark.parametrize('at', [2, 4])
def test_killed_while_steps_go_on_beside_a_write(at, one_after_the_other, world, tmp_path, monkeypatch):
    "SIGKILL with a checkpoint half written and the log already further"
    pid = os.fork()
    if pid == 0:
        done = [0]
        slow(pytest.MonkeyPatch(), lambda: done[0] > at and os.kill(os.getpid(), signal.SIGKILL), at=at)
        try:
            tell = lambda s: done.__setitem__(0, s)
            fit(SMALL, tmp_path, world, progress=False, saving=Saving(every=2), on_step=tell)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    found = load_checkpoint(tmp_path/'last')
    assert found is None if at == 2 else found[1]['step'] < at
    fit(SMALL, tmp_path, world, progress=False, saving=Saving(every=2))
    assert digest(tmp_path) == one_after_the_other
