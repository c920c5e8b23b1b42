"""Offline lists against brute force: ties, unequal captions, fewer keys than asked for; every search the same lists; files that do not fit are refused."""
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from itm_nb.core.errors_files import DataError
from itm_nb.methods import offline_mining
from itm_nb.methods.offline_mining import (
    Anywhere, Draw, Lists, load_lists, mine, mine_model, mine_scores, save_lists, search, without_true)

torch.set_num_threads(1)


def brute(q, k, own_q, own_k, h):
    "By definition, in plain Python: float64, rounded to float32, falling score, rising id"
    S = (q.double() @ k.double().T).float()
    out = []
    for i in range(len(q)):
        row = sorted((-S[i,j].item(), j) for j in range(len(k)) if own_q[i] != own_k[j])[:h]
        out.append([j for _, j in row] + [-1]*(h - len(row)))
    return torch.tensor(out, dtype=torch.int32)


def world(seed, n, m, D, kinds):
    "Captions in `kinds` different wordings only, so that whole crowds tie; unequal numbers of captions per image"
    g = torch.Generator().manual_seed(seed)
    img = torch.nn.functional.normalize(torch.randn(n, D, generator=g), dim=1); pool = torch.nn.functional.normalize(torch.randn(kinds, D, generator=g), dim=1)
    return img, pool[torch.randint(kinds, (m,), generator=g)].clone(), torch.arange(n), torch.randint(n, (m,), generator=g).sort().values


@pytest.mark.parametrize('seed,n,m,D,kinds,h', [(0, 7, 30, 3, 30, 5), (1, 40, 211, 8, 20, 30), (2, 40, 211, 8, 211, 30), (3, 25, 60, 4, 2, 10), (4, 3, 9, 2, 9, 12), (5, 64, 500, 16, 250, 1), (6, 1, 4, 3, 4, 2)])
@pytest.mark.parametrize('how,blocks', [('torch', {}), ('torch', dict(rows=5, cols=7)), ('torch', dict(rows=16, cols=64)), ('half', dict(rows=16, cols=64)), ('faiss', {}), ('int8', {}),
                                        ('int8', dict(rows=5, cols=7)), ('int8', dict(rows=16, cols=64))])
def test_equal_to_brute_force_both_ways(seed, n, m, D, kinds, h, how, blocks):
    img, txt, me, own = world(seed, n, m, D, kinds)
    for q, k, a, b in ((img, txt, me, own), (txt, img, own, me)):
        h_ = min(h, len(k)); got, _ = mine(q, k, a, b, h_, how=how, **blocks)
        assert torch.equal(got.idx, brute(q, k, a, b, h_)) and torch.equal(got.idx < 0, got.score == -torch.inf)
        want = (q.double() @ k.double().T).float().gather(1, got.idx.clamp(min=0).long()).masked_fill(got.idx < 0, -torch.inf)
        assert torch.equal(got.score, want)


@pytest.mark.parametrize('seed', range(4))
def test_any_score_equal_to_brute_force(seed):
    img, txt, me, own = world(seed, 33, 150, 4, 40); S = ((img @ txt.T)*3).round()
    want = brute(torch.eye(33), S.T.contiguous(), me, own, 12)
    for rows, cols in ((64, 1024), (8, 16), (5, 150)): assert torch.equal(mine_scores(lambda r, c: S[r,c].clone(), me, own, 12, rows, cols)[0].idx, want)


def test_no_slack_and_much_slack_agree():
    img, txt, me, own = world(9, 50, 400, 6, 60)
    lists = [mine(img, txt, me, own, 20, slack=s, how='torch') for s in (0., .25, 3.)]
    assert all(torch.equal(a.idx, lists[0][0].idx) and torch.equal(a.score, lists[0][0].score) for a, _ in lists) and lists[0][1] > 0


@pytest.mark.parametrize('how', ['torch', 'half', 'faiss', 'int8'])
def test_zero_and_constant_vectors_are_one_great_tie(how):
    for img, txt in ((torch.zeros(5, 3), torch.randn(40, 3)), (torch.ones(5, 3), torch.ones(40, 3)), (torch.randn(5, 3), torch.zeros(9, 3))):
        me, own = torch.arange(5), torch.arange(len(txt)) % 5
        assert torch.equal(mine(img, txt, me, own, 4, how=how)[0].idx, brute(img, txt, me, own, 4))


@pytest.mark.parametrize('scale', [1e-9, 1., 3e5])
def test_half_precision_is_right_where_it_errs(scale):
    "Scores that lie closer together than half precision can tell, and vectors it could not hold: rows are done again, lists are the same"
    g = torch.Generator().manual_seed(1); D = 24; base = torch.randn(D, generator=g); img, txt = (scale*(base + torch.randn(n, D, generator=g)*s) for n, s in ((40, 1e-2), (900, 1e-3)))
    me, own = torch.arange(40), torch.arange(900) % 40; (got, again), (want, _) = (mine(img, txt, me, own, 15, how=how) for how in ('half', 'torch'))
    assert torch.equal(got.idx, want.idx) and torch.equal(got.score, want.score) and again == 40
    img, txt = (torch.nn.functional.normalize(torch.randn(n, 4, generator=g), dim=1)*scale for n in (40, 900))
    (got, again), (want, _) = (mine(img, txt, me, own, 15, slack=3., how=how) for how in ('half', 'torch')); assert torch.equal(got.idx, want.idx) and again < 10


@pytest.mark.parametrize('h', [1, 60])
@pytest.mark.parametrize('D', [8, 96, 300])
def test_whole_numbers_give_the_lists_of_floating_point(h, D):
    "Copies that tie, lengths that differ a thousandfold, one crowd whose scores whole numbers cannot tell apart"
    g = torch.Generator().manual_seed(D)
    far = 10.**torch.randint(-2, 2, (3000, 1), generator=g)
    base = torch.nn.functional.normalize(torch.randn(3000, D, generator=g), dim=1)
    crowd = base[:1] + 1e-4*torch.randn(3000, D, generator=g)
    own, me = torch.arange(3000)//30, torch.arange(100)
    for txt in (base, base[torch.randint(3000, (3000,), generator=g)], base*far, crowd):
        img = torch.nn.functional.normalize(txt[::30] + .3*torch.randn(100, D, generator=g)/D**.5, dim=1)
        (got, _), (want, _) = (mine(img, txt, me, own, h, how=how, rows=64, cols=500) for how in ('int8', 'torch'))
        assert torch.equal(got.idx, want.idx) and torch.equal(got.score, want.score)


@pytest.mark.parametrize('spread', [0., 1e-3, 1e-2])
def test_whole_numbers_of_vectors_whose_places_are_equal(spread):
    "What rounding takes adds up there instead of cancelling"
    g = torch.Generator().manual_seed(1)
    img, txt = (torch.rand(n, 1, generator=g) + spread*torch.randn(n, 512, generator=g) for n in (60, 2000))
    me, own = torch.arange(60), torch.arange(2000) % 60
    (got, _), (want, _) = (mine(img, txt, me, own, 20, how=how) for how in ('int8', 'torch'))
    assert torch.equal(got.idx, want.idx) and torch.equal(got.score, want.score)


def test_a_pool_too_large_is_searched_in_floating_point(monkeypatch):
    monkeypatch.setattr(offline_mining, '_MOST', 500)
    img, txt, me, own = world(5, 64, 500, 16, 250)
    got, again = mine(img, txt, me, own, 30, how='int8', rows=16, cols=64)
    assert torch.equal(got.idx, brute(img, txt, me, own, 30)) and again == 64


def test_memory_is_bounded():
    "Beyond the lists: one block, whatever the number of keys; measured in a process of its own"
    code = """if 1:
        import resource, torch; torch.set_num_threads(1)
        from itm_nb.methods.offline_mining import mine
        g = torch.Generator().manual_seed(0); q, k = torch.randn(1500, 32, generator=g), torch.randn(60000, 32, generator=g); a, b = torch.arange(1500), torch.arange(60000)//40
        mine(q[:64], k[:9000], a[:64], b[:9000], 50); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        mine(q, k, a, b, 50); print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)/1024)"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert float(out) < 120, 'the whole matrix would be 343 MiB'


def test_a_released_draw():
    "One draw n: T3 = i2t[image][n], I3 = t2i[caption][n // 5], T4 = a caption of I3, I4 = the image of T3"
    rng = np.random.default_rng(0); N, h = 40, 30; own = torch.arange(5*N) // 5
    i2t = torch.tensor(np.stack([rng.permutation(np.flatnonzero(own.numpy() != i))[:h] for i in range(N)]), dtype=torch.int32)
    t2i = torch.tensor(np.stack([rng.permutation(np.delete(np.arange(N), j//5))[:h//5] for j in range(5*N)]), dtype=torch.int32)
    lists = dict(i2t=Lists(i2t, i2t.float()), t2i=Lists(t2i, t2i.float())); cap = torch.arange(5*N)
    def rank(table, rows, x): return (table[rows] == x[:,None]).float().argmax(1)
    ranks = []
    for epoch in range(20):
        d = Draw(lists, own, h, h//5)(cap, 3, epoch)
        n = rank(i2t, own, d['T3']); assert torch.equal(rank(t2i, cap, d['I3']), n // 5)
        assert torch.equal(d['I4'], own[d['T3']]) and torch.equal(own[d['T4']], d['I3']); ranks.append(n)
    counts = torch.bincount(torch.cat(ranks), minlength=h); assert len(counts) == h and (counts - 20*200/h).abs().max() < 60       # uniform: 133 +- 11
    loose = Draw(lists, own, h, h//5, tied=False)(cap, 3, 0)
    assert not torch.equal(rank(t2i, cap, loose['I3']), rank(i2t, own, loose['T3']) // 5)


def test_a_query_without_negatives_draws_none():
    img, txt, me, own = torch.eye(2), torch.eye(2)[[0, 0]], torch.arange(2), torch.tensor([0, 0])
    lists = dict(i2t=mine(img, txt, me, own, 2)[0], t2i=mine(txt, img, own, me, 1)[0])
    d = Draw(lists, own, 2, 1)(torch.arange(2))
    assert d['T3'].tolist() == [-1, -1] and d['I4'].tolist() == [-1, -1] and d['I3'].tolist() == [1, 1] and d['T4'].tolist() == [-1, -1]


def saved(tmp_path, about=None):
    img, txt, me, own = world(0, 8, 30, 3, 30)
    lists = dict(i2t=mine(img, txt, me, own, 5)[0], t2i=mine(txt, img, own, me, 3)[0])
    save_lists(tmp_path, lists, about or dict(model='m', data='d', split='train')); return lists


def test_file_round_trip_and_refusals(tmp_path):
    lists = saved(tmp_path); got = load_lists(tmp_path, dict(model='m', data='d', split='train'))
    for side in lists:
        for a, b in zip(lists[side], got[side]): assert isinstance(b, np.memmap) and np.array_equal(a.numpy(), b)
    for k in ('model', 'data', 'split', 'other'):
        with pytest.raises(DataError, match=f'lists of {k}'): load_lists(tmp_path, {k: 'something else'})
    assert not list(tmp_path.glob('.*'))


@pytest.mark.parametrize('harm', ['json', 'gone', 'cut', 'bit', 'format', 'list', 'way out'])
def test_a_harmed_folder_is_refused(tmp_path, harm):
    saved(tmp_path); at, x = tmp_path/'lists.json', tmp_path/'i2t_idx.npy'; d = json.loads(at.read_text()); raw = bytearray(x.read_bytes())
    if harm == 'json': at.unlink()
    if harm == 'gone': x.unlink()
    if harm == 'cut': x.write_bytes(raw[:-8])
    if harm == 'bit': raw[-1] ^= 1; x.write_bytes(raw)
    if harm == 'format': d['format'] = 'itm_nb lists 2'; at.write_text(json.dumps(d))
    if harm == 'list': at.write_text('[1]')
    if harm == 'way out': d['files']['../x.npy'] = d['files'].pop('i2t_idx.npy'); at.write_text(json.dumps(d))
    with pytest.raises(DataError): load_lists(tmp_path, dict(model='m'))


def test_killed_half_way_leaves_nothing_that_is_accepted(tmp_path, monkeypatch):
    saved(tmp_path); real, count = np.save, []
    def save(*a, **kw):
        count.append(1)
        if len(count) == 3: raise KeyboardInterrupt
        return real(*a, **kw)
    monkeypatch.setattr(np, 'save', save)
    with pytest.raises(KeyboardInterrupt): saved(tmp_path, dict(model='new', data='d', split='train'))
    for model in ('m', 'new'):
        with pytest.raises(DataError, match='no lists.json'): load_lists(tmp_path, dict(model=model))
    count.extend([1]*9); saved(tmp_path); load_lists(tmp_path, dict(model='m'))


@pytest.mark.parametrize('seed', range(4))
def test_anywhere_is_uniform_over_other_images(seed):
    "Unequal captions per image, in any order: every caption of another image about equally often, no own one ever"
    _, _, _, own = world(seed, 5, 12, 3, 12); own = own[torch.randperm(12, generator=torch.Generator().manual_seed(seed))]; cap = torch.arange(12)
    d = [Anywhere(own, 5)(cap, seed, e) for e in range(800)]; T3, I3, T4 = (torch.stack([x[k] for x in d]) for k in ('T3', 'I3', 'T4'))
    assert (own[T3] != own).all() and (I3 != own).all() and torch.equal(torch.stack([x['I4'] for x in d]), own[T3])
    silent = torch.tensor([i not in own.tolist() for i in range(5)]); assert torch.equal(T4 < 0, silent[I3]) and (own[T4.clamp(min=0)] == I3)[T4 >= 0].all()
    for j in range(12):
        n = torch.bincount(T3[:,j], minlength=12)[own != own[j]].double(); assert ((n - n.mean()).abs() < 5*n.mean().sqrt()).all()
        m = torch.bincount(I3[:,j], minlength=5); m = m[torch.arange(5) != own[j]].double(); assert ((m - 200).abs() < 5*200**.5).all()


@pytest.mark.parametrize('seed', range(4))
def test_true_pairs_taken_out(seed):
    img, txt, me, own = world(seed, 20, 90, 4, 90); S = img @ txt.T; true = torch.rand(20, 90, generator=torch.Generator().manual_seed(seed)) < .3
    lists = mine_model(None, img, txt, own, (40, 15)); got = without_true(lists, lambda i, t: true[torch.as_tensor(i).long(), torch.as_tensor(t).long()].numpy(), (10, 8))
    for side, A, bad, q, k, h in (('i2t', S, true, me, own, 10), ('t2i', S.T, true.T, own, me, 8)):
        for r in range(len(A)):
            kept = [int(c) for c in lists[side].idx[r] if c >= 0 and not bad[r,int(c)]][:h]; row = [int(c) for c in got[side].idx[r]]
            assert row == kept + [-1]*(h - len(kept)) and torch.equal(got[side].score[r] == -torch.inf, got[side].idx[r] < 0)


def test_vectors_of_length_one_by_whole_numbers():
    "torch multiplies such matrices of whole numbers wrongly"
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, 1, generator=g) for n in (20, 50))
    got, want = (mine(q, k, torch.arange(20), torch.arange(50) % 20, 5, how=how)[0] for how in ('int8', 'torch'))
    assert torch.equal(got.idx, want.idx) and torch.equal(got.score, want.score)
