"""How a run computes: precision, compiled towers, deterministic algorithms, checkpoints by the clock, memory."""
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from itm_nb.core.commands import SetupError
from itm_nb.runs.run_record import cost
from itm_nb.training import loop
from itm_nb.training.build import memory_needed, warn_of_memory
from itm_nb.training.checkpoint import load_checkpoint, save_checkpoint
from itm_nb.training.config import config, Config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import _only_deterministic, _products, fit, prepare, Saving, train_step

TINY = Config(preset='tiny', text='mean', text_pool='mean', dim=16, d_word=8, image_hidden=16, epochs=1,
              batch=64, method='vsepp')


@pytest.fixture(scope='module')
def world():
    return corpus(TINY)


def stands():
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


@pytest.mark.parametrize('precision,inside', [('fp32', ('highest', False)), ('tf32', ('high', True)),
                                              ('bf16', ('highest', False))])
def test_products_inside_and_as_before_outside(precision, inside):
    before = stands()
    with pytest.raises(KeyError), _products(precision):
        assert stands() == inside
        raise KeyError
    assert stands() == before


def test_towers_and_the_way_back_are_coarse_and_scores_are_not(world, monkeypatch):
    t, seen = prepare(replace(TINY, precision='tf32'), world), []
    monkeypatch.setattr(type(t.core), 'matrix', lambda s, a, b: (seen.append(('scores', stands()[0])), a @ b.T)[1])
    t.core.image_tower.register_forward_hook(lambda *_: seen.append(('tower', stands()[0])))
    t.core.image_tower.register_full_backward_hook(lambda *_: seen.append(('back', stands()[0])))
    train_step(t, torch.arange(64), 0)
    assert {k: v for k, v in seen} == dict(tower='high', scores='highest', back='high')


def test_tf32_and_fp32_are_settings_and_nothing_else():
    with pytest.raises(SetupError, match='precision'):
        config(dict(precision='fp16'))
    assert Config().precision == 'fp32' and Config().compile == 'off' and not Config().deterministic


def test_deterministic_algorithms_inside_only(world, tmp_path, monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    seen = []
    real = loop.train_step
    monkeypatch.setattr(loop, 'train_step', lambda *a: seen.append(
        torch.are_deterministic_algorithms_enabled()) or real(*a))
    cfg = replace(TINY, deterministic=True)
    fit(cfg, tmp_path/'a', world, progress=False)
    assert seen and all(seen) and not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    fit(TINY, tmp_path/'b', world, progress=False)               # on a CPU they are the same algorithms
    assert (tmp_path/'a'/'log.jsonl').read_bytes() == (tmp_path/'b'/'log.jsonl').read_bytes()
    with _only_deterministic(True), _only_deterministic(False):
        assert torch.are_deterministic_algorithms_enabled()       # somebody else's wish is kept


@pytest.mark.parametrize('every,seconds,wanted', [(0, 0, 'all'), (0, 1e9, 'ends'), (3, 1e9, 'thirds')])
def test_when_a_checkpoint_is_written(every, seconds, wanted, world, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(loop, '_keep', lambda t, run: saved.append(t.step))
    monkeypatch.setattr(loop, '_finished', lambda t, run: t)
    t = fit(TINY, tmp_path, world, progress=False, saving=Saving(every=every, seconds=seconds))
    n = t.steps
    assert saved == dict(all=[*range(1, n+1)], ends=[n],
                         thirds=sorted({*range(3, n+1, 3), n}))[wanted]


def test_a_checkpoint_from_before_these_settings_is_gone_on_with(world, tmp_path):
    def stop(step):
        if step == 4:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        fit(TINY, tmp_path, world, progress=False, saving=Saving(every=2), on_step=stop)
    tensors, state = load_checkpoint(tmp_path/'last')
    for name in ('compile', 'deterministic'):
        assert state['config'].pop(name) == getattr(Config(), name)
    save_checkpoint(tmp_path/'last', tensors, state)
    steps = []
    fit(TINY, tmp_path, world, progress=False, on_step=steps.append)
    assert steps[0] == 3


def test_compiled_towers_are_towers_like_others(world, tmp_path, monkeypatch):
    "With a compiler that only counts: what is compiled, and that names and numbers stay"
    compiled = []
    real = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile',
                        lambda m, **kw: compiled.append(type(m).__name__) or real(m, backend='eager', **kw))
    runs = [fit(replace(TINY, compile=how), tmp_path/how, world, progress=False) for how in ('off', 'towers')]
    assert compiled == ['RegionTower', 'MeanTower']
    logs = [[json.loads(x).get('loss') for x in (tmp_path/how/'log.jsonl').read_text().splitlines()]
            for how in ('off', 'towers')]
    assert [x for x in logs[1] if x] == pytest.approx([x for x in logs[0] if x], rel=1e-5)
    assert runs[0].core.state_dict().keys() == runs[1].core.state_dict().keys()


# ---- memory

def test_what_a_step_needs_is_counted(world):
    t = prepare(TINY, world)
    need = memory_needed(TINY, t.core, t.train)
    learned = 4*sum(p.numel() for p in t.core.parameters() if p.requires_grad)
    assert (need['gradients'], need['moments'], need['scores']) == (learned, 2*learned, 16*64**2)
    regions, width = t.train.feats.shape[1:]
    real = int(t.train.mask[t.train.img_of[:8]].sum())*8          # of 8 pairs, times 8: on a CPU padding costs nothing
    # at least the features and the hidden layer of every real region are kept; not ten times as much
    assert 1 <= need['states']/(4*real*(width + TINY.image_hidden)) < 10
    assert memory_needed(replace(TINY, batch=128), t.core, t.train)['states'] == 2*need['states']
    assert memory_needed(replace(TINY, chunk=8), t.core, t.train)['states'] == need['states']//8


def test_the_estimate_changes_nothing(world, tmp_path):
    cfg = replace(TINY, dropout=.1)
    a, b = (prepare(cfg, world) for _ in 'ab')
    memory_needed(cfg, b.core, b.train)
    costs = [train_step(t, torch.arange(64), 0) for t in (a, b)]
    assert {k: float(v) for k, v in costs[0].items()} == {k: float(v) for k, v in costs[1].items()}
    assert all(torch.equal(p, q) for p, q in zip(a.core.parameters(), b.core.parameters()))


@pytest.mark.parametrize('states,free,wanted', [(2**34, 2**33, 'set chunk to (3[0-9]|4[0-9]|5[0-9]|6[0-4]) '),
                                                (2**20, 2**29, 'set batch below 128')])
def test_too_little_memory_is_said_with_the_setting(states, free, wanted):
    need = dict(gradients=2**29, moments=2**30, states=states, scores=2**20)
    with pytest.warns(UserWarning, match=wanted):
        warn_of_memory(replace(TINY, batch=128), need, free)


def test_enough_memory_is_not_talked_about(recwarn):
    warn_of_memory(TINY, dict(gradients=1, moments=2, states=3, scores=4), 10)
    assert not recwarn.list


def test_a_small_device_is_told_before_the_first_step(world, monkeypatch):
    t = prepare(TINY, world)
    assert t.core is t.model                                      # worked out once, before the device changes
    t.accelerator = SimpleNamespace(device=torch.device('meta'))
    monkeypatch.setattr(torch, 'get_device_module', lambda d: SimpleNamespace(
        mem_get_info=lambda: (1000, 2000), max_memory_allocated=lambda: 5 << 20))
    with pytest.warns(UserWarning, match='are free: set'):
        loop._look_at_memory(t)
    assert loop._on_the_device(t) == dict(device_mib=5)


def test_the_most_memory_of_the_device_is_in_the_record(world, tmp_path, monkeypatch):
    fit(TINY, tmp_path/'cpu', world, progress=False)
    assert 'device_mib' not in cost(tmp_path/'cpu')
    monkeypatch.setattr(loop, '_on_the_device', lambda t: dict(device_mib=7))
    fit(TINY, tmp_path/'far', world, progress=False)
    found = cost(tmp_path/'far')
    assert found['device_mib'] == 7 and found['pairs_per_s'] > 0
