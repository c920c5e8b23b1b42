"""Runs of one process do not know of each other: each has its own precision."""
import torch

from itm_nb.cli import _bf16_here, _help
from itm_nb.training.config import Config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import _batch, prepare, train_step

TINY = Config(preset='tiny', text='mean', text_pool='mean', dim=16, d_word=8, image_hidden=16, epochs=1,
              batch=32,
              method='vsepp', warmup=0, dropout=0.)


def some(cfg, world, t=None, steps=3):
    "Losses of the first steps, one at a time"
    t = t or prepare(cfg, world)
    for t.step in range(steps):
        yield float(sum(train_step(t, *_batch(t, t.step)).values()))


def test_a_run_in_half_precision_beside_one_in_full():
    world, half = corpus(TINY), Config(**vars(TINY) | dict(precision='bf16'))
    full, low = list(some(TINY, world)), list(some(half, world))
    a, b = prepare(TINY, world), prepare(half, world)
    both = list(zip(some(TINY, world, a), some(half, world, b)))          # step by step in turn
    assert [x for x, _ in both] == full and [y for _, y in both] == low
    assert low != full and torch.allclose(torch.tensor(low), torch.tensor(full), rtol=.05)


def test_half_precision_is_recommended_where_the_processor_has_it(tmp_path, monkeypatch):
    (tmp_path/'with').write_text('flags : fpu avx512f avx512_bf16')
    (tmp_path/'without').write_text('flags : fpu avx512f')
    assert any('precision bf16' in line for line in _bf16_here(tmp_path/'with'))
    assert not _bf16_here(tmp_path/'without') and not _bf16_here(tmp_path/'nowhere')
    monkeypatch.setattr('itm_nb.cli._bf16_here', lambda: ['seen'])
    assert _help('train')[-1] == 'seen' and _help('study')[-1] != 'seen'
