"""TAGS-DC in runs: killed at any step it goes on to the same bytes, and one device and two come to the same."""
import os
import signal
from functools import cache

import pytest
import torch

from itm_nb.core.random import order
from itm_nb.training.config import config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import _pack, fit, prepare, Saving, train_step
from devices import in_worlds, started

torch.set_num_threads(1)
WARM = dict(preset='tiny', dim=16, d_word=16, layers=1, heads=2, image_hidden=16, dropout=0., epochs=2, batch=32, lr=2e-3, warmup=1, warmup_method='infonce|mlm_warmup(weight=2.0)')
DC = 'vsepp|tags(copies=2, draws=2, hard=2, tau=1.0, discrimination=0.5, correction=0.05{})'
ARMS = dict(two=dict(similarity='two_modes', method=DC.format('')), unshared=dict(similarity='two_modes', method=DC.format(", sharing='unshared'")),
            cross=dict(similarity='cross', method=DC.format(''), warmup_method='infonce(temperature=1.0)|mlm_warmup(weight=2.0)'))


def cfg_of(arm): return config(WARM | ARMS[arm])


@cache
def data(): return corpus(cfg_of('two'))


def run(arm, steps=2):
    "Steps of the warm-up and of TAGS-DC in double precision: what is left, and every cost"
    torch.set_default_dtype(torch.double)
    try:
        t = prepare(cfg_of(arm), data()); t.model.double(); take, out = t.train.take, {}
        t.train.take = lambda *a, **kw: {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in take(*a, **kw).items()}
        for epoch in (0, 1):
            for o in t.stateful():
                if hasattr(o, 'start_epoch'): o.start_epoch(epoch)
            for i in range(steps):
                caps = order(len(t.train.lengths), 0, epoch)[i*32:(i+1)*32]
                out |= {f'cost.{epoch}.{i}.{k}': v for k, v in train_step(t, caps, epoch).items()}; t.step += 1
        return out | {k: v.clone() for k, v in _pack(t)[0].items()}
    finally: torch.set_default_dtype(torch.float)


def worker(folder):
    "What each process does"
    from safetensors.torch import save_file
    from itm_nb.core.distributed import devices
    prepare(cfg_of('two'), data()); rank, world = devices()
    save_file({f'{arm}.{k}': v.contiguous() for arm in ARMS for k, v in run(arm).items()}, f'{folder}/out_{world}_{rank}.safetensors')


def test_devices_do_not_change_a_run(tmp_path):
    "One and two: every cost, weights, moments, and a writer that learns apart, on both ranks; only counts are each device's own"
    from safetensors.torch import load_file
    started(__file__, tmp_path, 1, 2)
    one, *two = (load_file(tmp_path/f'out_{w}_{r}.safetensors') for w, r in ((1, 0), (2, 0), (2, 1)))
    own = lambda k: '.said.' in k or k.endswith(('.n', '.batch')); names = [k for k in one if not own(k)]
    assert {'two', 'unshared', 'cross'} == {k.split('.')[0] for k in names} and any('correction' in k for k in names)
    assert any(k.startswith('unshared.owner') and 'exp_avg' in k and one[k].any() for k in names)
    for got in two:
        far = {k: float((got[k].double()-one[k].double()).abs().max()) for k in names if one[k].numel()}
        assert max(far.values()) < 1e-6, sorted(far.items(), key=lambda x: -x[1])[:5]


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "The run of an arm that nobody killed, made once: every killed one is held against it"
    @cache
    def run_of(arm):
        at = tmp_path_factory.mktemp(arm)/'whole'
        fit(cfg_of(arm), at, data(), progress=False, saving=Saving(every=3))
        return at
    return run_of


@pytest.mark.parametrize('step', [5, 17])
@pytest.mark.parametrize('arm', ['two', 'unshared'])
def test_killed_and_resumed(arm, step, whole, tmp_path):
    "SIGKILL in the lesson and among the sentences; the writer that learns apart, the tally and its notes come back too"
    cfg, ways = cfg_of(arm), [whole(arm), tmp_path/'killed']
    pid = os.fork()
    if pid == 0:
        try: fit(cfg, ways[1], data(), progress=False, saving=Saving(every=3), on_step=lambda s: os.kill(os.getpid(), signal.SIGKILL) if s == step else None)
        finally: os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    fit(cfg, ways[1], data(), progress=False, saving=Saving(every=3))
    for name in ('log.jsonl', 'best/model.safetensors', 'last/tensors.safetensors'): assert (ways[0]/name).read_bytes() == (ways[1]/name).read_bytes(), name


if __name__ == '__main__': in_worlds(worker, data)
