# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Benchmark
# > What the shipped paths cost beside the product of matrices inside them; goal, measured, met.
#
# Seconds are CPU seconds of the one thread that works. The contenders take turns, round after round, in one
# process. A cost is the median over the rounds of the ratio to what ran in the same round; behind it stands the
# interval from the least to the greatest ratio, which holds the true median with the probability said below the
# table. A goal is *met* where the whole interval lies within it, *not met* where the whole interval lies beyond
# it, *open* in between. Results are checked in the same run against slow references, and like is compared with
# like: the same precision, the same results. Read the ratios; seconds belong to the machine. Memory is the peak
# of the process above what it held before.

# %% tags=["parameters"]
threads = 1              # threads of torch
images = 5000            # images of the large gallery
captions = 25000         # sentences of the large gallery, a multiple of the images
dim = 1024               # length of an embedding
rounds = 5               # rounds in which the contenders take turns
batches = '128,512,2048' # batch sizes of the losses
mining = '29000,145000'  # images and sentences to mine from
queries = 56             # one in so many of them asks
depth = '300,60'         # sentences in the list of an image, images in that of a sentence
bf16 = True              # refill in half precision too, where the processor has instructions for it
figures = ''             # folder for the tables; '': figures of the clone

# %%
import ctypes
import gc
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown, display
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from itm_nb.core.project import project
from itm_nb.core.random import generator
from itm_nb.metrics.ranks import ranks, Ranks, summary
from itm_nb.analysis.tables import figure_path

torch.set_num_threads(threads)
home = Path(figures or project()/'figures')
home.mkdir(parents=True, exist_ok=True)


# %% [markdown]
# ## How time and memory are taken

# %%
clock = time.thread_time if threads == 1 else time.process_time

def race(contenders, rounds=rounds):
    "name -> (CPU seconds of each round, its last result); one round before them is not counted"
    seconds, result = {n: np.zeros(rounds) for n in contenders}, {}
    for r in range(-1, rounds):
        for name, f in contenders.items():
            t = clock()
            result[name] = f()
            t = clock() - t
            if r >= 0:
                seconds[name][r] = t
    return {n: (seconds[n], result[n]) for n in contenders}

GOALS = []     # of the table at the end

def goal(work, ours, base, at_most, checked='', of='times'):
    "Hold a ratio, round by round, against a goal; the row for the table at the end"
    x = np.asarray(ours, float)/base
    lo, hi = x.min(), x.max()
    verdict = 'met' if hi <= at_most else 'not met' if lo > at_most else 'open'
    GOALS.append(dict(work=work, unit=of, goal=at_most, measured=float(np.median(x)), low=lo, high=hi,
                      rounds=len(x), verdict=verdict, results=checked))

def status(field):
    return next(int(l.split()[1])/1024
                               for l in open('/proc/self/status') if l.startswith(field + ':'))

def extra_mib(f, times=1):
    """Peak memory of `f()` above what was held before, the least of some; nan where not Linux. Pages that
    the system took back count when they return. Freed memory is given back first"""
    if not Path('/proc/self/clear_refs').exists():
        return float('nan')
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')                     # resets the peak
    before = status('VmRSS')
    f()
    more = status('VmHWM') - before
    return more if times == 1 else min(more, extra_mib(f, times-1))

def row_of(name, seconds, base, **more):
    "A line of a table: median seconds, and the ratio with its interval"
    x = seconds/base
    return dict(what=name, **more, seconds=float(np.median(seconds)), ratio=float(np.median(x)), low=x.min(),
                high=x.max())

def write(part, rows, more='ratio: to the bare product of the same size.', times=rounds):
    "The table of one part: figures/benchmark_<part>.csv and .md"
    table = pd.DataFrame(rows)
    table.to_csv(figure_path(home, f'benchmark_{part}.csv'), index=False, float_format='%.3f')
    text = table.fillna('').map(lambda x: f'{x:.2f}' if isinstance(x, float) else str(x))
    lines = ['| ' + ' | '.join(r) + ' |'
             for r in [list(text.columns), ['---']*text.shape[1], *text.values.tolist()]]
    note = f'CPU seconds, {threads} thread(s), medians of {times} interleaved rounds; {more}'
    figure_path(home, f'benchmark_{part}.md').write_text('\n'.join([*lines, '', note, '']))
    return table


# %% [markdown]
# ## Retrieval evaluation
# Contenders: the *bare* product of all pairs in blocks of 512 x 2048 fp32, thrown away; *count*, that is
# `itm_nb.metrics.ranks`, with the sentences in the order of their images and in any order; *sort*, one product
# and an argsort of every row and column, at a size whose matrix fits. A twentieth of the sentences are copies
# of others, so that there are ties to get wrong.

# %%
def world(N, M, D, seed=0):
    """Unit vectors; a sentence is its image plus noise (R@1 far from 0 and 100); some are copied to a
    neighbour"""
    g = generator(seed, 'benchmark', N, M, D)
    img, img_of = normalize(torch.randn(N, D, generator=g), dim=1), torch.arange(M) // (M//N)
    txt = torch.empty(M, D)
    for a in range(0, M, 1000):
        txt[a:a+1000] = normalize(img[img_of[a:a+1000]] + .28*torch.randn(min(1000, M-a), D, generator=g),
                                  dim=1)
    txt[::20] = txt[(torch.arange(0, M, 20) + M//N) % M]
    return img, txt, img_of

def bare(img, txt, rows=512, cols=2048):
    keep = torch.empty(rows*cols)
    for c in range(0, len(txt), cols):
        for r in range(0, len(img), rows):
            a, b = img[r:r+rows], txt[c:c+cols]
            torch.mm(a, b.T, out=keep[:len(a)*len(b)].view(len(a), len(b)))

def sort(img, txt, img_of):
    "One product, then an argsort per query, as in the authors' evaluators; own answers stand behind ties"
    S = img @ txt.T
    own = torch.arange(len(img))[:,None] == img_of
    S = torch.where(own, S - 2e-6*S.abs().max(), S)
    place = lambda x: x.argsort(1, descending=True).argsort(1)
    # the best-placed own sentence: no own one stands before it
    i2t = torch.where(own, place(S), len(txt)).min(1).values
    return Ranks(i2t.numpy(), place(S.T)[torch.arange(len(txt)), img_of].numpy())

def slow(img, txt, img_of, i, j):
    "Ranks of some images and some sentences by one full row and one full column of scores at a time"
    top = max(float((img[a:a+500] @ txt.T).abs().max()) for a in range(0, len(img), 500))
    R, C = (img[i] @ txt.T).double(), (txt[j] @ img.T).double()
    mine = img_of == i[:,None]
    best = R.masked_fill(~mine, -torch.inf).max(1, keepdim=True).values
    own = C.gather(1, img_of[j][:,None])
    return ((R >= best - 2e-6*top) & ~mine).sum(1).numpy(), (C >= own - 2e-6*top).sum(1).numpy() - 1


# %%
small = world(images//5, captions//5, dim)
def contest(world):
    return {'bare product': lambda: bare(*world[:2]), 'count': lambda: ranks(*world),
                            'sort': lambda: sort(*world)}
small_race = race(contest(small))
mib_small = {n: extra_mib(f) for n,f in contest(small).items()}

large = world(images, captions, dim)
shuffle = torch.randperm(captions, generator=generator(0, 'benchmark', 'shuffle'))
mixed = (large[0], large[1][shuffle], large[2][shuffle])
big = {k: f for k,f in contest(large).items()
       if k != 'sort'} | {'count, sentences in any order': lambda: ranks(*mixed)}
large_race = race(big)
mib_large = {n: extra_mib(f) for n,f in big.items()}


# %% [markdown]
# Equal results, in the same run: at the small size all ranks against the sort, at the large size a sample of
# both directions against full rows and columns, and the two orders against each other. Rounding differs between
# the shapes of products, so a score that lies within a few roundings of the edge of a tie may fall on either
# side: at most one query in a thousand may differ, and by one place.

# %%
def same(a, b):
    "Text for the table; an error if two rankings differ by more than rounding at the edge of a tie"
    d = [np.abs(x.astype(int) - y) for x,y in zip(a, b)]
    off, most = sum((x > 0).sum() for x in d), max(x.max() for x in d)
    assert off <= 1e-3*sum(map(len, d)) and most <= 1, (off, most)
    return (f'equal ({sum(map(len, d)):,} ranks)'
            if off == 0 else f'{off} of {sum(map(len, d)):,} ranks off by 1')

got = {n: r for n,(_,r) in large_race.items()}
pick = generator(0, 'benchmark', 'sample')
i, j = torch.randperm(images, generator=pick)[:500], torch.randperm(captions, generator=pick)[:1000]
c, m = got['count'], got['count, sentences in any order']
a, b = small_race['count'][1], small_race['sort'][1]
checks = {('small', 'count'): same((a.i2t, a.t2i), (b.i2t, b.t2i)), ('small', 'sort'): 'reference',
          ('large', 'count'): same((c.i2t[i], c.t2i[j]), slow(*large, i, j)),
          ('large', 'count, sentences in any order'): same((m.i2t, m.t2i), (c.i2t, c.t2i[shuffle]))}
tied = ranks(*large, ties='optimistic')
tied = int((tied.i2t != c.i2t).sum() + (tied.t2i != c.t2i).sum())
assert tied > images//100                                              # there were ties to get wrong

# %%
rows = []
for size, (N, M), raced, mib in (('small', (images//5, captions//5), small_race, mib_small),
                                 ('large', (images, captions), large_race, mib_large)):
    base = raced['bare product'][0]
    rows += [row_of(name, seconds, base, size=f'{N:,} x {M:,} x {dim:,}', extra_MiB=mib[name],
                    check=checks.get((size, name), '')) for name, (seconds, _) in raced.items()]
base = large_race['bare product'][0]
shape = f'{images:,} x {captions:,} x {dim:,}'
goal(f'ranks of {shape}', large_race['count'][0], base, 1.10, checks['large', 'count'])
goal('the same, sentences in any order', large_race['count, sentences in any order'][0], base, 1.10,
     checks['large', 'count, sentences in any order'])
goal('memory of the ranks', [mib_large['count']], 1, 64, of='MiB')
write('evaluation', rows)

# %% [markdown]
# Ranks that a tie changes, and how good the drawn vectors are:

# %%
pd.Series({'ranks that a tie changes': tied,
           'R@1 i2t, t2i': tuple(round(summary(c)[d]['r1'], 1) for d in ('i2t', 't2i'))})

# %% [markdown]
# ## Several right answers
# `many_positives` with the own pairs and as many drawn ones, at a quarter of the length. The bare product is that
# of all pairs, once.

# %%
from scipy import sparse

from itm_nb.metrics.relevance import many_positives

thin = world(images, captions, dim//4)
rng = np.random.default_rng(0)
right = (np.concatenate([thin[2].numpy(), rng.integers(0, images, captions)]),
         np.concatenate([np.arange(captions), rng.integers(0, captions, captions)]))
right = sparse.csr_matrix((np.ones(2*captions, bool), right), (images, captions))
raced = race({'bare product': lambda: bare(*thin[:2]), 'many_positives': lambda: many_positives(thin[:2], right)},
             min(rounds, 3))
base, found = raced['bare product'][0], raced['many_positives'][1]

def by_walking(i):
    "First rank and average precision of an image, answer by answer, as the definition says"
    S = thin[0][i] @ thin[1].T
    mine = right[i].indices
    wrong = np.delete(S.numpy(), mine)
    cut = np.sort(S[mine].numpy())[::-1] - 2e-6*float(S.abs().max())
    place = np.array([k + 1 + (wrong >= x).sum() for k, x in enumerate(cut)])
    hit = place <= len(mine)
    return place[0] - 1, ((np.arange(len(mine)) + 1)*hit/place).sum()/len(mine)

some = range(0, images, max(1, images//100))
off = sum(found['i2t'].first[i] != by_walking(i)[0] or abs(found['i2t'].ap[i] - by_walking(i)[1]) > 1e-9
          for i in some)
assert off <= .02*len(some), off
check = f'{len(some) - off} of {len(some)} images equal to the definition'
goal(f'many_positives, {images:,} x {captions:,} x {dim//4}', raced['many_positives'][0], base, 1.3, check)
del thin
write('many_positives', [row_of(n, t, base, check=check if n != 'bare product' else '')
                         for n, (t, _) in raced.items()], times=min(rounds, 3))

# %% [markdown]
# ## Losses
# One step of a loss on given vectors, forward and backward. *Full matrix* builds the score matrix with
# gradient, as the released codes do; *ours* searches without gradient and scores what it picked, so it needs
# one product instead of three. The ratio is to ONE product of the batch with itself.

# %%
from itm_nb.models.similarity import Model
from itm_nb.methods.losses import hinge, infonce
from itm_nb.methods.method import losses, infonce as infonce_method, vse0, vsepp
from itm_nb.methods.samplers import Step

class Cosine:
    matrix, pairs, at = Model.matrix, Model.pairs, Model.at

def pairs_of(B):
    g = generator(0, 'losses', B)
    # positives score .2: every anchor has something to lose
    v = normalize(torch.randn(B, dim, generator=g), dim=1)
    t = normalize(v + .15*torch.randn(B, dim, generator=g), dim=1)
    return v.requires_grad_(), t.requires_grad_(), torch.arange(B) // 2

def naive(v, t, ids, name):
    "The textbook form on the full matrix"
    S = v @ t.T
    bad = ids[:,None] == ids
    pos = S.diagonal()
    loss = 0.
    for X in (S, S.T):
        if name == 'hardest':
            loss = loss + hinge(pos, X.masked_fill(bad, -9.).amax(1)).mean()
        elif name == 'sum':
            loss = loss + hinge(pos[:,None], X).masked_fill(bad, 0.).sum(1).mean()
        else:
            loss = loss + infonce(pos, X, ~bad).mean()
    return loss

MAKERS = dict(hardest=vsepp(), sum=vse0(), InfoNCE=infonce_method())

def ours(v, t, ids, name):
    return sum(losses(MAKERS[name],
                                             Step(Cosine(), v, t, ids, torch.arange(len(ids)))).values())

def stepped(f, v, t, ids, name):
    "Loss and gradients of one step"
    loss = f(v, t, ids, name)
    return loss.detach(), *torch.autograd.grad(loss, (v, t))

# %% [markdown]
# AOQ's step has two offline negatives and two unanchored pairs beside each anchor. Its plain form is written
# from the paper's figure; ours is the term that runs, its counts for the log included.

# %%
from itm_nb.methods.aoq import WeightMonitor, aoq_term
from itm_nb.methods.method import Method
from itm_nb.methods.samplers import Candidates, Source, hardest, in_batch

def offline_pool(view):
    "What `Offline.pool` hands over, of vectors that are already encoded"
    s, k = view.step, ('text', 'image') if view.i2t else ('image', 'text')
    score = view.pairs(view.anchor, s.batch[k[0] + '3'])[:,None]
    ok = torch.ones_like(score, dtype=torch.bool)
    three = '3' if view.i2t else '4'
    far = s.model.pairs(s.batch['image' + three], s.batch['text' + three])
    return Candidates(score.detach(), ok, view.positive(), lambda idx: {'': score.gather(1, idx)},
                      dict(unanchored=far, unanchored_valid=ok[:,0], same=~ok[:,0]))

quintuplet = Method(dict(on=Source(in_batch, hardest), off=Source(offline_pool, hardest)),
                    dict(aoq=aoq_term(clamp=True, reduce='mean', watch=WeightMonitor())))

def offline_of(v, t):
    g = generator(0, 'losses', 'offline', len(v))
    near = lambda x: normalize(x.detach() + .12*torch.randn(x.shape, generator=g), dim=1).requires_grad_()
    return {f'{k}{n}': near(t if k == 'text' else v) for k in ('text', 'image') for n in '34'}

def aoq_step(v, t, ids, off):
    loss = sum(losses(quintuplet, Step(Cosine(), v, t, ids, ids, batch=off)).values())
    return loss.detach(), *torch.autograd.grad(loss, (v, t, *off.values()))

def aoq_plain(v, t, ids, off):
    S, loss = v @ t.T, 0.
    own, pos = torch.eye(len(v), dtype=torch.bool), S.diagonal()
    for X, a, near, pair in ((S, v, off['text3'], '3'), (S.T, t, off['image3'], '4')):
        on, far = X.masked_fill(own, -9.).amax(1), (a*near).sum(1)
        away = (off['image' + pair]*off['text' + pair]).sum(1)
        w = (1.5 - (far - on)/.3).clamp(min=0)
        loss = loss + (w*hinge(pos, on) + hinge(pos, far, 0.) + hinge(pos, away, 0.)).mean()
    return loss.detach(), *torch.autograd.grad(loss, (v, t, *off.values()))

# %%
rows = []
limits = {('AOQ', 128): 9., ('AOQ', 512): 2.8, ('AOQ', 2048): 1.65, ('sum', 2048): 3.4, ('InfoNCE', 2048): 3.6}
for B in map(int, batches.split(',')):
    # small steps are repeated: the clock is coarse
    v, t, ids = pairs_of(B)
    off, each = offline_of(v, t), torch.arange(B)
    many = max(1, (512//B)**2)
    def often(f):
        return lambda: [f() for _ in range(many)][-1]
    contest = {('one product', ''): lambda: v.detach() @ t.detach().T}
    for n in MAKERS:
        contest |= {(n, 'full matrix'): lambda n=n: stepped(naive, v, t, ids, n),
                    (n, 'ours'): lambda n=n: stepped(ours, v, t, ids, n)}
    contest |= {('AOQ', 'full matrix'): lambda: aoq_plain(v, t, each, off),
                ('AOQ', 'ours'): lambda: aoq_step(v, t, each, off)}
    raced = race({k: often(f) for k, f in contest.items()})
    one = raced['one product', ''][0]
    for (n, how), (seconds, result) in raced.items():
        check = ''
        if how == 'ours':
            worst = max(float((a-b).abs().max()/b.abs().max().clamp(min=1e-9))
                        for a, b in zip(result, raced[n, 'full matrix'][1]))
            assert float(result[0]) > .01, 'nothing to lose: the check would be empty'
            assert worst < 1e-4, (n, B, worst)
            check = f'loss and gradients equal to {worst:.0e}'
            if (n, B) in limits:
                goal(f'{n}, forward and backward, B {B:,}', seconds, one, limits[n, B], check)
        rows.append(row_of(n, seconds/many, one/many, how=how, batch=B, extra_MiB=extra_mib(contest[n, how]),
                           check=check))
        if (n, how, B) == ('AOQ', 'ours', 2048):
            gradients = 6*B*dim*4/2**20
            goal(f'memory of AOQ beyond its gradients, B {B:,}', [rows[-1]['extra_MiB'] - gradients], 1, 16,
                 of='MiB')
write('losses', rows)

# %% [markdown]
# ## Mining
# Lists of the hardest negatives, both directions, at the size of Flickr30K's training set by default; one in so
# many of its images and sentences asks. *Shipped* is `mine` as a run calls it: on a CPU with instructions for
# whole numbers of 8 bits it searches by these, keeps what a bound cannot rule out and scores that by definition;
# rows where the bound does not decide are done again. What it converts once, the keys, is counted in full here, though
# the whole job needs it once for all queries; the line *without converting* takes it off. The alternative is
# `faiss.knn`, an exact search in fp32 for as many as are listed, which does not know whose own a positive is.
# Every twentieth sentence is a copy of another, so that there are ties. The check is by definition: float64
# dot products of some queries with every key.

# %%
import faiss
from itm_nb.methods.offline_mining import _int8, fastest, mine

faiss.omp_set_num_threads(threads)
N, M = map(int, mining.split(','))
deep = tuple(map(int, depth.split(',')))
img, txt, img_of = world(N, M, dim)
rows = []
sides = (img[::queries].contiguous(), txt, torch.arange(N)[::queries], img_of,
         deep[0]), (txt[::queries].contiguous(), img, img_of[::queries], torch.arange(N), deep[1])

def both(f):
    return lambda: [f(*side) for side in sides]

def search_only(q, k, own_q, own_k, h):
    "An exact search in fp32 and nothing else"
    faiss.knn(q.numpy(), k.numpy(), h, metric=faiss.METRIC_INNER_PRODUCT)

def by_definition(q, k, own_q, own_k, h, some=slice(None, None, 29)):
    "Lists of some queries: scores in float64, rounded to float32, sorted by falling score, then rising id"
    S = torch.cat([q[some].double() @ k[a:a+2048].double().T for a in range(0, len(k), 2048)], 1).float()
    return S.masked_fill(own_q[some,None] == own_k, -torch.inf).sort(dim=1, descending=True,
                                                                     stable=True).indices[:,:h].int()

contest = {'bare product': both(lambda q, k, *_: bare(q, k)), 'faiss, exact': both(search_only),
           f'shipped ({fastest()})': both(lambda *side: mine(*side)),
           'converting the keys': both(lambda q, k, *_: _int8(k))}
shipped = f'shipped ({fastest()})'
raced = race(contest, min(rounds, 3))
found, near = raced[shipped][1], raced['faiss, exact'][0]
assert all(torch.equal(f[0].idx[::29], t) for f, t in zip(found, both(by_definition)()))
other = both(lambda *side: mine(*side, how='torch'))()
assert all(torch.equal(a[0].idx, b[0].idx) and torch.equal(a[0].score, b[0].score) for a, b in zip(found, other))
check = f'lists and scores equal to fp32 search and definition; {sum(f[1] for f in found)} rows again'
size = f'{len(sides[0][0]):,} x {M:,} and {len(sides[1][0]):,} x {N:,}'
rows = [row_of(n, t, near, size=size, check=check if n == shipped else '') for n, (t, _) in raced.items()]
net = raced[shipped][0] - (raced['converting the keys'][0] if fastest() == 'int8' else 0)
rows.append(row_of(f'{shipped}, without converting', net, near, size=size))
goal(f'mining {deep[0]} of {M:,} and {deep[1]} of {N:,}, to faiss', net, near, .5, check)
goal('memory of mining', [extra_mib(contest[shipped])], 1, 300, of='MiB')
del img, txt, sides, contest, raced, found, other
write('mining', rows, 'ratio: to the exact search of faiss.', times=min(rounds, 3))

# %% [markdown]
# ## FNE's step
# Statistics of the batch, candidates barred and joined, posterior, weights, draw, both directions, against the
# similarity products the step cannot do without: the batch with itself and with the memory. *Row loop* is the
# same done anchor by anchor without needless copies; it draws by the same random numbers. With a floor less
# than one candidate in a hundred is admissible; without one all are, which is reported and not gated.

# %%
from itm_nb.methods.fne import floor_of, fne_pick, moments, posterior, Statistics
from itm_nb.methods.memory_bank import Bank
from itm_nb.methods.samplers import DirectedStep

def fne_setting(B, Q=8192, D=768, share=.008):
    "A filled memory, a batch, and statistics whose floor leaves the wanted share"
    g = generator(0, 'benchmark', 'fne', B)
    vectors = lambda n: normalize(torch.randn(n, D, generator=g), dim=1)
    bank, img, txt, new = Bank(Q), vectors(B), vectors(B), (vectors(B), vectors(B))
    bank.ring.put(vectors(Q), vectors(Q), torch.randint(0, 29000, (Q,), generator=g))
    ids = torch.randperm(29000, generator=g)[:B]
    floor = float((vectors(64) @ vectors(Q).T).flatten().kthvalue(int(64*Q*(1-share)))[0])
    believed = torch.tensor([[1000., floor+.2, 999*.004], [2000., .25, 1999*.004]], dtype=torch.double)
    return bank, img, txt, new, ids, believed

room = {(B, n): torch.empty(B, n) for B in (128, 512) for n in (B, 8192)}     # results of the bare products

def fne_products(setting):
    bank, img, txt, new, *_ = setting
    for a, o, old in ((img, new[1], bank.ring.texts), (txt, new[0], bank.ring.images)):
        torch.mm(a, o.T, out=room[len(a), len(o)])
        torch.mm(a, old.T, out=room[len(a), len(old)])
    torch.mm(img, txt.T, out=room[len(img), len(txt)])

def fne_ours(setting, floor='global'):
    "The sampler's whole step -> places drawn, both directions; moments of the batch"
    bank, img, txt, new, ids, believed = setting
    step, s = Step(Cosine(), img, txt, ids, ids), Statistics(window='run')
    step.made[id(bank), 'vectors'] = new
    s.observe(step)
    told, s.moments = s.moments, believed
    pick = fne_pick(s, floor=floor)
    views = [DirectedStep(step, side) for side in ('i2t', 't2i')]
    return [pick(bank.pool(v), v).idx[:,0] for v in views], told

def fne_rows(setting, floor='global', tau=.5, threshold=1e-3):
    "The same, anchor by anchor"
    bank, img, txt, new, ids, believed = setting
    step = Step(Cosine(), img, txt, ids, ids)
    S = img @ txt.T
    accepted = []
    for i in range(len(ids)):
        row, col = S[i].clone(), S[:,i].clone()
        row[i] = col[i] = -torch.inf
        if S[i,i] >= row.max() and S[i,i] >= col.max():
            accepted.append((float(S[i,i]), float(row.max()), float(col.max())))
    x = torch.tensor(accepted).view(-1, 3)
    told, out = torch.stack([moments(y, torch.ones_like(y, dtype=torch.bool)) for y in (x[:,0], x[:,1:])]), []
    for side, (a, o, old) in zip(('i2t', 't2i'),
                                 ((img, new[1], bank.ring.texts), (txt, new[0], bank.ring.images))):
        u, who, places = DirectedStep(step, side).uniform('fne'), torch.cat([ids, bank.ring.ids]), []
        far = torch.cat([a @ o.T, a @ old.T], 1); pos = (a*o).sum(1)
        for i in range(len(ids)):
            s = far[i]
            ok = (who != ids[i]) & (s > floor_of(believed, pos[i:i+1], floor=floor)[0])
            at = ok.nonzero()[:,0]
            P = posterior(s[at], believed)
            w = torch.where(P > threshold, torch.exp(-tau*P), torch.exp(-tau*(s[at]-pos[i])**2))
            cum = w.double().cumsum(0)
            places.append(at[torch.searchsorted(cum, u[i,0]*cum[-1], right=True).clamp(max=len(at)-1)])
        out.append(torch.stack(places))
    return out, told

rows = []
for B, most in ((128, .05), (512, .05)):
    setting = fne_setting(B)
    for floor in ('global', 'none'):
        contest = {'products': lambda: fne_products(setting), 'ours': lambda: fne_ours(setting, floor),
                   'looking on': lambda: torch.no_grad()(fne_ours)(setting, floor)}
        raced = race(contest, 3*rounds)
        one, (seconds, (got, told)) = raced['products'][0], raced['ours']
        want, should = fne_rows(setting, floor)
        same_draws = sum(int((a == b).sum()) for a, b in zip(got, want))
        assert same_draws >= .99*2*B and torch.allclose(told, should, atol=1e-6), (B, floor, same_draws)
        check = f'{same_draws} of {2*B} draws equal'
        rows += [row_of(n, raced[n][0] - one, one, floor=floor, batch=B, check=check if n == 'ours' else '')
                 for n in ('ours', 'looking on')]
        if floor == 'global':
            # a median is held against the goal; of differences of noisy costs no interval lies within it
            middle = [np.median((seconds - one)[i::3]/one[i::3]) for i in range(3)]
            goal(f"FNE's step without its products, B {B}", middle, 1, most, check)
write('fne', rows,
      'ratio: the sampler without the products, to the products; the memory has 8,192 places, vectors 768 '
      'numbers.', 3*rounds)

# %% [markdown]
# ## Cross-attention
# Scores of 128 images of 36 regions with 128 sentences of 6 to 18 words, dimension 1,024. The *bare product* is
# that of all words with all regions; the *honest loop* goes sentence by sentence and builds the attended
# vectors, as the papers write it; *ours* is the Gram form, which never builds them.

# %%
from itm_nb.models.cross_attention import SCORES, l2_normalize
import torch.nn.functional as F

g = generator(0, 'benchmark', 'attention')
B, R = 128, 36
n_words = torch.randint(6, 19, (B,), generator=g)
regions, sentence = l2_normalize(torch.randn(B, R, dim,
                                             generator=g)), l2_normalize(torch.randn(B, 18, dim, generator=g))
r_mask, w_mask = torch.ones(B, R, dtype=torch.bool), torch.arange(18) < n_words[:,None]
sentence = sentence*w_mask[...,None]

def looped(side):
    "SCAN sentence by sentence, attended vectors built"
    scores = []
    for j in range(B):
        w = sentence[j,:n_words[j]]
        x = regions @ w.T                                            # (B, R, L)
        # x: (B, sources, queries)
        q, s, x = (w.expand(B, -1, -1), regions, x) if side == 't2i' else (regions, w.expand(B, -1, -1), x.mT)
        x = F.leaky_relu(x, .1)
        x = x/(x.norm(dim=2, keepdim=True) + 1e-8)
        seen = (x*dict(t2i=9., i2t=4.)[side]).softmax(1).mT @ s
        scores.append((F.cosine_similarity(q, seen,
                                           dim=2)*(lse := dict(t2i=6., i2t=5.)[side])).logsumexp(1)/lse)
    return torch.stack(scores, 1)

def matrix_of(name):
    return SCORES[name]().matrix(regions, r_mask, sentence, w_mask)

def learned(name):
    "Forward and backward"
    a, b = regions.clone().requires_grad_(), sentence.clone().requires_grad_()
    return torch.autograd.grad(SCORES[name]().matrix(a, r_mask, b, w_mask).sum(), (a, b))

words_only = sentence[w_mask]
contest = {('bare product', 'forward'): lambda: regions.flatten(0, 1) @ words_only.T}
for n in ('scan_t2i', 'scan_i2t', 'bfan_equal'):
    contest |= {(n, 'forward'): lambda n=n: torch.no_grad()(matrix_of)(n),
                (n, 'forward and backward'): lambda n=n: learned(n)}
raced = race(contest)
one = raced['bare product', 'forward'][0]
limits = {('scan_t2i', 'forward'): 1.3, ('scan_i2t', 'forward'): 1.3,
          ('scan_t2i', 'forward and backward'): 3.5, ('scan_i2t', 'forward and backward'): 3.5,
          ('bfan_equal', 'forward and backward'): 5.}
rows = []
for (name, how), (seconds, result) in raced.items():
    check = ''
    if name.startswith('scan') and how == 'forward':
        worst = float((result - looped(name[5:])).abs().max())
        assert worst < 1e-5, (name, worst)
        check = f'equal to the loop to {worst:.0e}'
    if (name, how) in limits:
        goal(f'{name}, {how}', seconds, one, limits[name, how], check)
    rows.append(row_of(name, seconds, one, how=how, extra_MiB=extra_mib(contest[name, how]), check=check))
block = len(words_only)*B*R*4/2**20
write('attention', rows, f'a block of scores (all words with all regions) takes {block:.0f} MiB.')

# %% [markdown]
# ## Refilling masked words
# Four masked copies of each of some sentences of 9 to 21 words, by a transformer of BERT's base size with
# random weights. *Sentence by sentence* takes the copies of one sentence as a batch and guesses at every place,
# as the authors' code does; *one copy at a time* and *padded to 60* are the other plain ways; *ours*
# (`itm_nb.generator.refill`) goes by length, works the last layer out at masked places alone and guesses there
# alone. In fp32 products are nearly all of it, so that there is little to gain over the first; `bf16` is for
# processors that have it, and its check is how much of a law of words lies elsewhere.

# %%
from itm_nb.models.cross_encoder import CrossEncoder
from itm_nb.methods.generator import Lexicon, mask_copies, pack, refill

K, V, many = 4, 30522, 6
g = generator(0, 'benchmark', 'refill')
with torch.random.fork_rng():
    torch.manual_seed(0)
    net = CrossEncoder(n_words=V, dim=768, layers=12, heads=12, longest=64, d_in=64, dropout=0.).eval()
length = torch.randint(9, 22, (many,), generator=g)
tokens = torch.randint(5, V, (many, 60), generator=g)*(torch.arange(60) < length[:,None])
lexicon = Lexicon.of([str(i) for i in range(V)], {0, 1, 2, 3, 4}, 4)
copies, hit = mask_copies(tokens, pack([[[k] for k in range(n-2)] for n in length.tolist()]),
                          torch.arange(many), K, lexicon)
seen = net.image(torch.randn(many, 36, 64, generator=g), torch.full((many,), 36)).detach()

def guess(i, c):
    return net.stream.guess(net.tokens(seen[i].expand(len(c), -1, -1), c))

def at_masks(full):
    "Of guesses everywhere, those at masked places: sentence by sentence (K, L, V)"
    return torch.cat([f[hit[i,:,:f.shape[1]]] for i, f in enumerate(full)])

def in_bf16(f):
    with torch.autocast('cpu', torch.bfloat16):
        return f()

class Shapes(TorchDispatchMode):
    "Sizes of every product of matrices that is made inside"
    def __init__(self):
        super().__init__()
        self.of = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ('mm', 'bmm', 'addmm', 'baddbmm'):
            self.of.append(tuple(tuple(x.shape) for x in args[-2:]))
        return func(*args, **(kwargs or {}))

with torch.no_grad(), Shapes() as made:
    refill(net, seen, tokens, copies, hit)
full, low = ([(torch.randn(a, dtype=t), torch.randn(b, dtype=t)) for a, b in made.of]
             for t in (torch.float32, torch.bfloat16))
plain = lambda: at_masks([guess(slice(i, i+1), copies[i,:,:length[i]]) for i in range(many)])
ours = lambda: refill(net, seen, tokens, copies, hit)
contest = {'its own products': lambda: [a @ b for a, b in full][-1], 'sentence by sentence': plain, 'ours': ours}
half = bf16 and any(v for k, v in torch.cpu.get_capabilities().items() if k in ('avx512_bf16', 'amx_bf16'))
if half:
    contest |= {'its own products, bf16': lambda: [a @ b for a, b in low][-1],
                'sentence by sentence, bf16': lambda: in_bf16(plain), 'ours, bf16': lambda: in_bf16(ours)}
with torch.no_grad():
    raced = race(contest, min(rounds, 3))
place, logits = raced['ours'][1]
worst = float((logits[place.argsort()] - raced['sentence by sentence'][1]).abs().max())
assert worst < 1e-3, worst
checks = {'ours': f'equal to {worst:.0e}'}
if half:
    moved = (raced['ours, bf16'][1][1].float().softmax(-1) - logits.softmax(-1)).abs().sum(-1).max()/2
    checks['ours, bf16'] = f'at most {float(moved):.1%} of a distribution lies elsewhere'
rows = []
for n, (seconds, _) in raced.items():
    end = ', bf16' if n.endswith('bf16') else ''
    rows.append(row_of(n, seconds, raced['its own products' + end][0], check=checks.get(n, '')))
    if n.startswith('ours'):
        goal(f"TAGS refill{end or ', fp32'}, to its own products", seconds, raced['its own products' + end][0],
             1.1, checks[n])
write('refill', rows, 'ratio: to the products it makes, replayed with drawn numbers in the same precision.',
      min(rounds, 3))

# %% [markdown]
# ## Cost against size
# Each work from small to large: CPU seconds, or MiB where it says so. A straight line on both axes; its slope is
# what the cost grows with: 1 with the number of images, 2 with its square. Evaluation and mining compare all with
# all, so their slope is 2 and cannot be less; the memory and the opening of features must not grow with them.

# %%
import matplotlib.pyplot as plt
import tempfile

from itm_nb.analysis.figures import preview, save_figure, style
from itm_nb.methods.memory_bank import Bank

def once(f):
    t = clock()
    f()
    return clock() - t

def opened(n, folder):
    "Seconds to open n images of features and take a batch of them, from a file with holes"
    at = Path(folder)/f'{n}.npy'
    x = np.lib.format.open_memmap(at, 'w+', 'float32', (n, 36, 256))
    del x
    def read():
        x = np.load(at, mmap_mode='r')
        return np.array(x[np.arange(0, n, max(1, n//128))])
    t = min(once(read) for _ in range(3))
    at.unlink()
    return t

def bank_mib(n):
    ring = Bank(n)
    ring.ring.put(torch.zeros(n, 64), torch.zeros(n, 64), torch.zeros(n, dtype=torch.long))
    return sum(x.numel()*x.element_size() for x in (ring.ring.images, ring.ring.texts, ring.ring.ids))/2**20

sizes, costs = np.array([1000, 2000, 4000, 8000]), {}
with tempfile.TemporaryDirectory() as folder:
    for n in sizes:
        img, txt, img_of = world(n, 2*n, 64)
        costs.setdefault('evaluation', []).append(once(lambda: ranks(img, txt, img_of)))
        costs.setdefault('mining', []).append(once(lambda: mine(img, txt, torch.arange(n), img_of, 60)))
        costs.setdefault('FNE, memory (MiB)', []).append(bank_mib(8*n))
        costs.setdefault('opening', []).append(opened(14*n, folder))
slopes = {k: np.polyfit(np.log(sizes), np.log(y), 1)[0] for k, y in costs.items()}
with style():
    fig, ax = plt.subplots(figsize=(5, 3.4))
    for k, y in costs.items():
        ax.plot(sizes, y, 'o-', label=f'{k}: slope {slopes[k]:.2f}')
    ax.set(xscale='log', yscale='log', xlabel='images (evaluation, mining: twice as many sentences)',
           ylabel='CPU seconds or MiB')
    ax.legend()
    figure = save_figure(fig, figure_path(home, 'benchmark_size'))
pd.DataFrame(costs | dict(images=sizes)).set_index('images').to_csv(figure_path(home, 'benchmark_size.csv'),
                                                                   float_format='%.4g')
display(preview(figure))
pd.Series(slopes, name='slope').round(2)

# %% [markdown]
# ## Goal, measured, met
# Times are ratios to the product (or what the line names) of the same round. What is not in this table is shown
# elsewhere: data of COCO's size by `tests/training/test_scale.py`, the cost of a run beside its training by
# `tests/runs/test_warm.py`.

# %%
table = pd.DataFrame(GOALS)
table.to_csv(figure_path(home, 'benchmark_goals.csv'), index=False, float_format='%.3f')
fixed = lambda x: f'{x:.2f}' if x < 10 else f'{x:.0f}'
lines = ['| work | goal, at most | measured | interval | verdict | results |', '|---|---|---|---|---|---|']
lines += [f"| {r['work']} | {r['goal']:g} {r['unit']} | {fixed(r['measured'])} | "
          f"{fixed(r['low'])} to {fixed(r['high'])} | {r['verdict']} | {r['results']} |" for r in GOALS]
held = ', '.join(f'{100*(1 - 2.**(1 - n)):.0f} % of {n} rounds' for n in sorted(set(table.rounds) - {1}))
busy = os.getloadavg()[0] if hasattr(os, 'getloadavg') else float('nan')
lines += ['', f'The interval from the least to the greatest ratio holds the true median with a chance of {held}. '
          f'Processes that wanted a core at the end: {busy:.0f}, of {os.cpu_count()} cores.']
figure_path(home, 'benchmark_goals.md').write_text('\n'.join(lines) + '\n')
Markdown('\n'.join(lines))
