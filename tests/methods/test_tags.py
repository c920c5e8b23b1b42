"""The generator against slow references written row by row, its edges, and the promise that no caption of an image comes out as a negative of it."""
from collections import Counter
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from itm_nb.scenes import dataset
from itm_nb.analysis.attacks import above_all, opened, over_epochs
from itm_nb.models.cross_encoder import CrossEncoder, TwoModes
from itm_nb.core.random import order, uniform
from itm_nb.data.batches import Batches, Vocabulary, words
from itm_nb.data.splits import Split
from itm_nb.methods.generator import (
    buckets, Captions, chunk, draw_words, earlier, elsewhere, fill, judge_of, Lexicon, lexicon,
    mask_copies, members, pack, penalty, refill, refill_law, suspects, Synthetic, synthetic_source, Tally,
    unit_law, TextGenerator)
from itm_nb.methods.method import losses, Method
from itm_nb.methods.samplers import Step, top, DirectedStep
from itm_nb.methods.tags_dc import PRESETS, mlm_warmup, tags, tags_terms, TagsTerms
from itm_nb.analysis.perplexity import Ngrams

torch.set_num_threads(1)


@cache
def data():
    split = dataset.make('tiny').split('train'); vocab = Vocabulary.build(split.captions); lex = lexicon(vocab)
    tokens, _ = vocab.encode(split.captions)
    return split, vocab, lex, tokens, Batches(split, vocab), Captions.of(split, tokens, lex)


def model_of(kind='two', seed=0, dim=16):
    split, vocab, lex, *_ = data(); torch.manual_seed(seed); d = split.feats.shape[-1]
    text = dict(n_words=len(lex.names), dim=dim, layers=1, heads=2, longest=32, d_in=d, dropout=0.)
    return TwoModes(dict(kind='region', d_in=d, dim=dim), text) if kind == 'two' else CrossEncoder(**text)


def step_of(model, cap, seed=0, epoch=0):
    b = data()[4].take(cap); num = b['mask'].sum(1)
    return Step(model, model.image(b['feats'], num), model.text(b['tokens'], b['lengths']), b['img_ids'], b['cap_ids'], seed, epoch, b)


# ---- slow references ------------------------------------------------------------------------------------------------------------------------

def slow_mask(row, groups, cap, copies, lex, seed, epoch):
    "One caption at a time, one copy at a time, one unit at a time: the rule as the dossier of the release words it"
    out, hits = [], []
    for k in range(copies):
        one = torch.tensor([cap*copies + k]); u = lambda what, n: uniform(one, f'mask/{what}', n, seed, epoch)[0].tolist()
        count = Counter(p for g in groups for p in g); law = [sum(.15/count[p] for p in g)/len(g) for g in groups]
        chosen = [g for g, p, x in zip(groups, law, u('unit', len(groups))) if x < p] or [groups[int(u('forced', 1)[0]*len(groups))]]
        hit = {p for g in chosen for p in g}; fate, strange, new = u('fate', len(row)), u('word', len(row)), list(row)
        for p in hit: new[p] = lex.mask if fate[p] < .8 else int(lex.ordinary[int(strange[p]*len(lex.ordinary))]) if fate[p] < .9 else row[p]
        out.append(new); hits.append([p in hit for p in range(len(row))])
    return out, hits


def test_masking_against_the_slow_way():
    split, vocab, lex, tokens, _, known = data(); L = tokens.shape[1]
    copies, hit = mask_copies(tokens[:40], known.units[:40], known.ids[:40], 5, lex, seed=3, epoch=2)
    for i in range(40):
        groups = [[p+1 for p in g] for g in chunk(words(split.captions[i]))]
        want, at = slow_mask(tokens[i].tolist(), groups, int(known.ids[i]), 5, lex, 3, 2)
        assert copies[i].tolist() == want and hit[i].tolist() == at


def test_drawing_against_the_slow_way_and_the_law():
    rng = np.random.default_rng(0); law = refill_law(torch.tensor(rng.normal(size=(7, 9))), 1.5, torch.arange(9) < 2); u = torch.tensor(rng.random((7, 50)))
    got = draw_words(law, u)
    for i in range(7):
        for s in range(50): assert got[i,s] == next(w for w in range(9) if law[i,:w+1].sum() > u[i,s] + 1e-15 or w == 8)
    many = draw_words(law[:1], torch.tensor(rng.random((1, 40_000))))[0].bincount(minlength=9); want = law[0]*40_000
    assert many[:2].sum() == 0 and float(((many-want)**2/want.clamp(min=1e-9))[2:].sum()) < 24.3                  # chi-square, 6 degrees, p = 0.0005


def test_filters_against_the_slow_way():
    rng = np.random.default_rng(1); lex = Lexicon.of([f'w{i}' for i in range(12)], {0, 1, 2, 11}, 11)
    for _ in range(30):
        made = torch.tensor(rng.integers(3, 6, (2, 9, 4))); own = torch.tensor(rng.integers(3, 6, (2, 3, 4))); own[0,2] = 0
        got, minus = suspects(made, own, lex), penalty(made, own[:,0])
        for b in range(2):
            real = [x for x in own[b].tolist() if any(x)]; vocabulary = {w for x in real for w in x}; seen = []
            for n, x in enumerate(made[b].tolist()):
                assert got['caption'][b,n] == (x in real) and got['inside'][b,n] == (set(x) <= vocabulary) and got['repeat'][b,n] == (x in seen)
                assert minus[b,n] == 3*(x == real[0]) + 2*(x in made[b,n+1:].tolist()); seen.append(x)


def test_refill_in_buckets_equals_one_sentence_at_a_time():
    split, vocab, lex, tokens, batches, known = data(); model = model_of().eval(); b = batches.take(torch.arange(24)); tokens = tokens[:24]
    copies, hit = mask_copies(tokens, known.units[:24], known.ids[:24], 3, lex)
    with torch.no_grad():
        regions = model.regions(b['feats'], b['mask']); place, z = refill(model, regions, tokens, copies, hit); assert len(place) == int(hit.sum())
        L = tokens.shape[1]; z = z[place.argsort()]; n = 0
        for i, k in np.ndindex(24, 3):
            row = copies[i,k][tokens[i] != 0]; states = model.tokens(regions[i:i+1], row[None])
            want = model.stream.guess(states[0,hit[i,k][:len(row)]]); torch.testing.assert_close(z[n:n+len(want)], want, atol=2e-5, rtol=1e-4); n += len(want)
    assert n == len(z)


# ---- the pool -------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', ['two', 'cross'])
def test_company_order_and_padding_do_not_matter(kind):
    model = model_of(kind).eval(); cap = order(len(data()[3]), 0, 5)[:12]; g = Synthetic(data()[5], 3, 3, heads=True)
    with torch.no_grad():
        def named(cap):
            c = g.pool(DirectedStep(step_of(model, cap), 'i2t')); return c, c.rescore(torch.arange(9).expand(len(cap), 9))
        c, r = named(cap); flipped, rf = named(cap.flip(0)); assert torch.equal(c.eligible, flipped.eligible.flip(0))
        torch.testing.assert_close(c.score, flipped.score.flip(0), atol=1e-5, rtol=1e-5)
        for i in range(12):
            a, ra = named(cap[i:i+1]); n = ra['tokens'].shape[-1]
            assert torch.equal(ra['tokens'][0], r['tokens'][i,:,:n]) and not r['tokens'][i,:,n:].any() and torch.equal(a.eligible[0], c.eligible[i])
            torch.testing.assert_close(a.score[0], c.score[i], atol=1e-5, rtol=1e-5); torch.testing.assert_close(a.also['mlm'][0], c.also['mlm'][i], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(ra['cor'][0], r['cor'][i,:,:n], atol=1e-5, rtol=1e-5)


def test_seeds_and_epochs():
    model = model_of().eval(); cap = torch.arange(8); g = Synthetic(data()[5], 3, 3)
    def made(**kw):
        with torch.no_grad(): return g.pool(DirectedStep(step_of(model, cap, **kw), 'i2t')).rescore(torch.arange(9).expand(8, 9))['tokens']
    assert torch.equal(made(), made()) and not torch.equal(made(), made(seed=1)) and not torch.equal(made(), made(epoch=1))


@pytest.mark.parametrize('kind', ['two', 'cross'])
def test_whole_method_trains_and_every_head_learns(kind):
    "Both stages through the package's own `losses`; a batch of one; gradients reach the heads that are asked for"
    model = model_of(kind); source = synthetic_source(Synthetic(data()[5], 2, 3, heads=True), 3)
    terms = tags_terms(TagsTerms(discrimination=.5, correction=.5), squash=kind == 'cross')
    method = Method(dict(syn=source), terms)
    for cap in (torch.arange(6), torch.arange(1)):
        model.zero_grad(); parts = losses(method, step_of(model, cap)); assert set(parts) == {f'{k}/i2t' for k in ('synthetic', 'mlm', 'discrimination', 'correction')}
        sum(parts.values()).backward(); assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters()) and all(v.isfinite() for v in parts.values())
        for head in (model.stream.mlm, model.stream.cor, model.stream.disc): assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize('kind', ['two', 'cross'])
def test_a_generator_that_yields_nothing(kind):
    "One word to draw from, and it occurs in the captions: for some captions nothing is eligible. No NaN, no cost from them, and they are counted"
    _, _, lex, tokens, _, known = data(); only = Lexicon.of(lex.names, set(range(len(lex.names))) - {int(tokens[0,1])}, lex.mask); model = model_of(kind)
    g = Synthetic(replace(known, lexicon=only), 2, 2, heads=True); method = Method(dict(syn=synthetic_source(g, 3)), tags_terms(TagsTerms(discrimination=1., correction=1.)))
    same = np.flatnonzero(data()[0].img_of == data()[0].img_of[0]); step = step_of(model, torch.as_tensor(same))
    c = g.pool(DirectedStep(step, 'i2t')); assert (c.also['clean'] == 0).any() and (c.score[~c.eligible] == -torch.inf).all()
    parts = losses(method, step_of(model, torch.as_tensor(same[(c.also['clean'] == 0).numpy()])))
    assert all(v.isfinite() for v in parts.values()) and all(float(v.detach()) == 0 for k, v in parts.items() if not k.startswith('mlm'))
    sum(parts.values()).backward(); assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_presets_of_the_pool_differ_and_run():
    model = model_of('cross'); seen = {}
    assert all(PRESETS['faithful']['pool'][k] != v for k, v in PRESETS['corrected']['pool'].items())
    for name in PRESETS:
        g = Synthetic(data()[5], 3, 3, **PRESETS[name]['pool']); step = step_of(model, torch.arange(10)); c = g.pool(DirectedStep(step, 'i2t')); seen[name] = c
        assert c.rescore(top(4)(c, DirectedStep(step, 'i2t')).idx)[''].shape == (10, 4)
    assert seen['faithful'].eligible.all() and not seen['corrected'].eligible.all()
    with torch.no_grad():
        step = step_of(model, torch.arange(10)); step.images = step.images.roll(1, 0)
        blind = Synthetic(data()[5], 2, 2, blind=True).pool(DirectedStep(step, 'i2t')).pos; torch.testing.assert_close(blind, seen['faithful'].pos.detach())    # another image, the same score
        assert (Synthetic(data()[5], 2, 2).pool(DirectedStep(step, 'i2t')).pos - seen['corrected'].pos.detach()).abs().max() > 1e-6


def test_no_special_token_is_drawn_unless_asked():
    _, _, lex, tokens, *_ = data(); model = model_of()
    with torch.no_grad():
        step = step_of(model, torch.arange(64)); drawn = {}
        for special in (False, True):
            c = Synthetic(data()[5], 4, 8, temperature=50., special=special, heads=True).pool(DirectedStep(step, 'i2t')); r = c.rescore(torch.arange(32).expand(64, 32))
            drawn[special] = lex.special[r['tokens'][r['hit']]].any().item()
    assert drawn == {False: False, True: True}


def check_no_caption(model, want):
    "Write until so many negatives are made; compare the TEXT of each with the texts of all captions of its image"
    split, _, lex, tokens, _, known = data(); norm = lambda s: ' '.join(s.lower().split()); n = bad = copies = 0
    texts = [norm(' '.join(words(c))) for c in split.captions]; own = {i: {texts[j] for j in np.flatnonzero(split.img_of == i)} for i in range(len(split))}
    epoch = 0; g = Synthetic(known, 4, 4, temperature=1., inside=False)
    while n < want:
        for cap in order(len(tokens), 0, epoch).split(256):
            step = step_of(model, cap, epoch=epoch); c = g.pool(DirectedStep(step, 'i2t')); rows = c.rescore(torch.arange(16).expand(len(cap), 16))['tokens']
            for b, img in enumerate(step.batch['img'].tolist()):
                said = [norm(lex.say(x)) for x in rows[b]]; eligible = c.eligible[b].tolist()
                n += sum(eligible); bad += sum(s in own[img] for s, ok in zip(said, eligible) if ok); copies += sum(s in own[img] for s, ok in zip(said, eligible) if not ok)
            if n >= want: break
        epoch += 1
    return n, bad, copies


def taught(steps):
    "A generator that has learned a little, so that it often says what was there"
    model = model_of(dim=32); opt = torch.optim.Adam(model.parameters(), lr=5e-3); g = Synthetic(data()[5], 2, 0); done = 0
    for epoch in range(99):
        for cap in order(len(data()[3]), 0, epoch).split(128)[:-1]:
            opt.zero_grad(); g.pool(DirectedStep(step_of(model, cap, epoch=epoch), 'i2t')).also['mlm'].mean().backward(); opt.step(); done += 1
            if done == steps: return model.eval()


def test_no_negative_is_a_caption_of_its_image():
    model = taught(40)
    with torch.no_grad(): n, bad, copies = check_no_caption(model, 4000)
    assert n >= 4000 and bad == 0 and copies > 20                               # the filter had something to do


@pytest.mark.slow
def test_no_negative_of_100_000_is_a_caption_of_its_image():
    model = taught(200)
    with torch.no_grad(): n, bad, copies = check_no_caption(model, 100_000)
    assert n >= 100_000 and bad == 0 and copies > 1000


def test_units_may_be_given_and_captions_cut_into_pieces():
    split, _, lex, tokens, *_ = data(); known = Captions.of(split, tokens, lex, units='words')
    assert members(known.units[:5], tokens.shape[1]).any(1).sum(1).tolist() == [len(words(c)) for c in split.captions[:5]]
    pieces = [[w for w in range(len(words(c))) for _ in range(2)] for c in split.captions]                      # every word in two pieces
    doubled = Captions.of(split, torch.ones(len(tokens), 2*tokens.shape[1], dtype=torch.int64), lex, units=[[[0]] for _ in split.captions], pieces=pieces)
    assert members(doubled.units[:1], 8)[0,0].nonzero()[:,0].tolist() == [1, 2]


# ---- who writes -----------------------------------------------------------------------------------------------------------------------------

def test_the_next_row_of_another_image_against_the_slow_way():
    rng = np.random.default_rng(0)
    for _ in range(50):
        img = rng.integers(0, 4, rng.integers(1, 9)); B = len(img)
        want = [next((j % B for j in range(i, i+B) if img[j % B] != img[i]), i) for i in range(B)]
        assert elsewhere(torch.tensor(img)).tolist() == want


def test_equal_lessons_whoever_writes():
    "Static and random writers leave the lesson of the model in training bit-equal: arms differ in who writes, in nothing else"
    model = model_of(); cap = torch.arange(12); lessons = {}
    for name, kw in dict(shared={}, random=dict(words='random'), static=dict(writer=TextGenerator(model_of(seed=1))), unshared=dict(writer=TextGenerator(model_of(seed=1), 1e-3)), misled=dict(misled=('writer',))).items():
        also = Synthetic(data()[5], 2, 2, **kw).pool(DirectedStep(step_of(model, cap), 'i2t')).also; lessons[name] = also['mlm']; assert ('taught' in also) == (name == 'unshared')
    for name, x in lessons.items(): assert torch.equal(x, lessons['shared']), name


def test_a_random_writer_draws_every_ordinary_word_alike():
    _, _, lex, *_ = data(); model = model_of()
    with torch.no_grad():
        c = Synthetic(data()[5], 4, 8, words='random', learns=False, heads=True, inside=False).pool(DirectedStep(step_of(model, torch.arange(256)), 'i2t')); r = c.rescore(torch.arange(32).expand(256, 32))
    drawn = r['tokens'][r['hit']].bincount(minlength=len(lex.names)).double(); assert drawn[lex.special].sum() == 0
    x = drawn[~lex.special]; n = len(x) - 1; chi = float(((x - x.mean())**2/x.mean()).sum())
    # draws of one masked place of the 32 candidates differ, but places repeat over draws only: independent uniforms, so chi-square
    assert abs(chi - n) < 5*(2*n)**.5


def test_a_misled_writer_sees_the_other_image():
    model = model_of().eval(); cap = torch.arange(0, 40, 5)
    with torch.no_grad():
        s = step_of(model, cap); mine = Synthetic(data()[5], 2, 2, misled=('writer',)).pool(DirectedStep(s, 'i2t')).rescore(torch.arange(4).expand(8, 4))['tokens']
        b = dict(s.batch); other = elsewhere(s.img); b['feats'], b['mask'] = b['feats'][other], b['mask'][other]
        t = Step(model, s.images, s.texts, s.img, s.cap, 0, 0, b); want = Synthetic(data()[5], 2, 2).pool(DirectedStep(t, 'i2t')).rescore(torch.arange(4).expand(8, 4))['tokens']
    assert torch.equal(mine, want)


def test_tally_counts_what_the_pool_yields_and_resumes():
    split, _, lex, _, _, known = data(); world = dataset.make('tiny'); model = model_of(); t = Tally(lex, judge_of(world), every=2, anchors=8); g = Synthetic(known, 2, 3, tally=t)
    rows = clean = 0; t.start_epoch(0)
    for k in range(3):
        step = step_of(model, torch.arange(10*k, 10*k+10)); c = g.pool(DirectedStep(step, 'i2t')); p = top(4)(c); e = c.rescore(p.idx)
        rows += 10; clean += int(c.eligible.sum())
        if k == 0: keep, toks = p.valid[:8], e['tokens'][:8]
    m = t.monitor(); assert abs(m['syn_clean'] - clean/rows) < 1e-9 and abs(m['syn_dropped'] + clean/rows - 6) < 1e-9 and abs(sum(m[f'syn_{k}'] for k in ('false', 'half', 'true', 'bad')) - 100) < 1e-9
    assert torch.equal(t.said[0][:,:,:-1], toks*keep[...,None]) and t.said[0][:,0,-1].tolist() == split.cap_ids[:8].tolist()
    with torch.no_grad(): g.pool(DirectedStep(step_of(model, torch.arange(4)), 'i2t'))                                       # looking on is not counted
    assert t.monitor() == m
    again = Tally(lex, judge_of(world)); again.load_state_dict({k: v.clone() for k, v in t.state_dict().items()}); assert again.monitor() == m and again.batch == t.batch
    t.start_epoch(1); assert t.monitor() == {} and 0 in t.said


def test_the_judge_against_truth_sentence_by_sentence():
    world = dataset.make('tiny'); s = world.split('val'); said = [s.captions[j] for j in range(40)] + ['a red red', 'there is a object', 'two circle']; images = [k % 7 for k in range(43)]
    got = judge_of(world, 'val')(s.img_ids[images], said)
    for k, (i, x) in enumerate(zip(images, said)):
        m = dataset.parse(x); want = 255 if m is None or not m.grammatical else dataset.truth(world.scenes('val'), x, [i])[0]
        assert got[k] == want, x


# ---- the language judge ---------------------------------------------------------------------------------------------------------------------

def slow_kn(sentences, order):
    "Kneser-Ney as the textbook writes it: dictionaries, one word at a time"
    rows = [['<s>']*(order-1) + words(s) + ['</s>'] for s in sentences]; counts = {order: Counter(tuple(r[k-order+1:k+1]) for r in rows for k in range(order-1, len(r)))}
    for n in range(order-1, 0, -1): counts[n] = Counter(g[1:] for g in counts[n+1])
    D = {n: (lambda a, b: a/(a+2*b) if a else .5)(sum(v == 1 for v in c.values()), sum(v == 2 for v in c.values())) for n, c in counts.items()}
    V = len({w for s in sentences for w in words(s)}) + 2
    def p(gram):
        if not gram: return 1/V
        c, low = counts[len(gram)], p(gram[1:]); behind = {g: v for g, v in c.items() if g[:-1] == gram[:-1]}; total = sum(behind.values())
        return (max(c.get(gram, 0) - D[len(gram)], 0) + D[len(gram)]*len(behind)*low)/total if total else low
    return p


@pytest.mark.parametrize('order_', [1, 2, 3])
def test_kneser_ney_against_the_slow_way(order_):
    captions = data()[0].captions[:60]; lm, p = Ngrams.fit(captions, order_), slow_kn(captions, order_)
    for s in data()[0].captions[55:70]:
        row = ['<s>']*(order_-1) + words(s) + ['</s>']; got = np.exp(lm.log_prob([s])[0])
        np.testing.assert_allclose(got, [p(tuple(row[k-order_+1:k+1])) for k in range(order_-1, len(row))], rtol=1e-9)


# ---- attacks --------------------------------------------------------------------------------------------------------------------------------

def test_above_all_against_the_slow_way():
    rng = np.random.default_rng(3)
    for _ in range(40):
        B, N = rng.integers(1, 6), rng.integers(1, 8); pos, neg, ok = rng.random(B), rng.random((B, N)), rng.random((B, N)) < .6
        ns = (1, 2, 4); got = above_all(pos, neg, ok, ns)
        for n in ns:
            wins = [pos[b] > max(x[:n]) for b in range(B) if (x := [v for v, k in zip(neg[b], ok[b]) if k])]
            assert (np.isnan(got[n]) and not wins) or abs(got[n] - 100*np.mean(wins)) < 1e-9


def test_tags_trains_through_the_loop_and_goes_on_after_a_stop(tmp_path):
    "A whole run by name: warm-up of masked words, then TAGS-DC; stopped in the middle and gone on with, the same bytes; counts are in the log"
    import json, os, signal
    from itm_nb.training.checkpoint import Stopped
    from itm_nb.training.config import config
    from itm_nb.training.loop import fit
    cfg = config(dict(preset='tiny', similarity='two_modes', dim=16, d_word=16, layers=1, heads=2, image_hidden=16, dropout=0., epochs=2, batch=64, lr=2e-3, warmup=1,
                      warmup_method='infonce|mlm_warmup(weight=2.0)', method='vsepp|tags(copies=2, draws=2, hard=2, tau=1.0, discrimination=0.5, correction=0.05)'))
    fit(cfg, tmp_path/'whole', progress=False)
    def stop(step):
        if step == 20: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped): fit(cfg, tmp_path/'cut', progress=False, on_step=stop)
    fit(cfg, tmp_path/'cut', progress=False)
    for name in ('log.jsonl', 'best/model.safetensors', 'last/tensors.safetensors'): assert (tmp_path/'whole'/name).read_bytes() == (tmp_path/'cut'/name).read_bytes(), name
    told = [l for l in map(json.loads, (tmp_path/'whole'/'log.jsonl').read_text().splitlines()) if 'monitor' in l]
    assert {'syn_clean', 'syn_dropped', 'syn_empty', 'syn_false', 'syn_true', 'syn_bad'} <= told[-1]['monitor'].keys()
    o = opened(tmp_path/'whole', 'train'); rows = over_epochs(o, o); assert [r['epoch'] for r in rows] == [1] and o.pool.copies == 2 and o.pool.temperature == 1.


def test_the_lesson_alone_is_the_lesson_of_those_who_write():
    "What the arm vsepp_mlm of tags_flickr8k rests on: `mlm_warmup` with as many copies and the writers' share losses and teaches what `tags` teaches beside its sentences"
    train, vocab = data()[4], data()[1]; cap = order(len(data()[3]), 0, 3)[:24]; grads = {}
    for name, make, term in (('alone', lambda m: mlm_warmup(1., 4, .15, train=train, vocab=vocab, model=m), 'masked'), ('writer', lambda m: tags(losses=TagsTerms(mlm=1.), train=train, vocab=vocab, model=m), 'mlm')):
        m = model_of(); found = make(m)
        method = Method(found.sources, {term: found.terms[term]}); parts = losses(method, step_of(m, cap, seed=1, epoch=1)); sum(parts.values()).backward()
        grads[name] = [float(sum(parts.values()).detach())] + [p.grad.clone() for p in m.parameters() if p.grad is not None]
    assert grads['alone'][0] == grads['writer'][0] > 0 and len(grads['alone']) == len(grads['writer']) > 5
    for a, b in zip(grads['alone'][1:], grads['writer'][1:]): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
