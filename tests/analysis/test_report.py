"""What the notebooks 7_runs/00_records, 8_analysis/00_tables and 8_analysis/01_figures cannot say about
themselves"""
import base64
import copy
import json
import math
import os
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import jsonschema
import numpy as np
import pandas as pd
import pytest

from itm_nb.runs import records as R
from itm_nb.core.errors_files import DataError
from itm_nb.metrics.ranks import Ranks
from itm_nb.metrics.relevance import Matches
from itm_nb.runs.records import (
    SCHEMA, made_up_record, mismatches, pack, read_records, recompute, record, stored_ranks, unpack,
    write_record)
from itm_nb.analysis.tables import (
    mean_per_photo, collapsed, differences, interval, latex, lint_records, lint_table, markdown, per_photo,
    published, table, value)

ROOT = Path(__file__).parents[2]
ABOUT = ('id', 'sweep', 'method', 'preset', 'seed', 'block', 'config', 'commit', 'source', 'versions',
         'device', 'threads')


def odd(seed, photos=60, galleries=3, truth=True):
    """A record of photos with 1 to 7 sentences in shuffled order, in shuffled galleries of unequal size;
    and what it was made from"""
    g = np.random.default_rng(seed)
    count = g.integers(1, 8, photos); img_of = g.permutation(np.repeat(np.arange(photos), count))
    gallery = g.permutation(np.arange(photos) * galleries // photos)
    gallery[np.flatnonzero(gallery == 0)[:5]] = galleries - 1
    ranks = Ranks(g.integers(0, 400, photos)//g.integers(1, 60, photos),
                  g.integers(0, 400, len(img_of))//g.integers(1, 60, len(img_of)))
    matches = None
    if truth:
        matches = []
        for k in range(galleries):
            one = {}
            for d, home in (('i2t', np.arange(photos)), ('t2i', img_of)):
                # some have no right answer
                n = int((gallery[home] == k).sum()); q = np.sort(g.choice(n, max(1, n-2), replace=False))
                one[d] = Matches(q, np.ones(len(q), int), g.random(len(q)), g.random(len(q)),
                                 g.integers(0, 5, len(q)), n-len(q))
            matches.append(one)
    base = made_up_record('odd', 1., seed)
    rec = record({k: base[k] for k in ABOUT}, base['data'], ranks, img_of, gallery, matches)
    return rec, ranks, img_of, gallery, matches


# ---------------------------------------------------------------- ranks and metrics of a record

def naive_metric(ranks, img_of, gallery, metric):
    "Plain loops: the mean over galleries of the mean over queries"
    if metric == 'rsum':
        return sum(naive_metric(ranks, img_of, gallery, f'{d}.r{k}') for d in ('i2t', 't2i')
                   for k in (1, 5, 10))
    d, name = metric.split('.'); out = []
    for g in sorted(set(gallery.tolist())):
        x = getattr(ranks, d); photo = list(range(len(x))) if d == 'i2t' else img_of
        hits = [100.*(int(x[q]) < int(name[1:])) for q in range(len(x)) if gallery[photo[q]] == g]
        out.append(sum(hits)/len(hits))
    return sum(out)/len(out)

@pytest.mark.parametrize('seed', range(6))
def test_values_and_photos_against_loops(seed):
    rec, ranks, img_of, gallery, matches = odd(seed)
    assert mismatches(rec) == [] and lint_records([rec]) == []
    for m in ('rsum', 'i2t.r1', 'i2t.r5', 't2i.r1', 't2i.r10', 't2i.r37', 'i2t.r255'):
        want = naive_metric(ranks, img_of, gallery, m)
        assert value(rec, m) == pytest.approx(want, abs=1e-9)
        assert per_photo(rec, m).mean() == pytest.approx(want,
                                                         abs=1e-9) and len(per_photo(rec, m)) == len(gallery)
    for m in ('truth.map_r', 'truth.i2t.map_r', 'truth.t2i.map_r'):
        assert per_photo(rec, m).mean() == pytest.approx(value(rec, m), abs=1e-9)
    want = np.mean([100*m['t2i'].ap.mean() for m in matches])
    assert value(rec, 'truth.t2i.map_r') == pytest.approx(want)
    assert value(rec, 'truth.map_r') == pytest.approx(np.mean([[100*m[d].ap.mean() for m in matches]
        for d in ('i2t', 't2i')]))

@pytest.mark.parametrize('d', ['i2t', 't2i'])
def test_per_photo_truth_is_that_of_its_queries(d):
    rec, _, img_of, gallery, matches = odd(3, photos=40)
    home = np.arange(len(gallery)) if d == 'i2t' else img_of
    stored = unpack(rec['perphoto'][d]['map_r'])
    sums, n = np.zeros(len(gallery)), np.zeros(len(gallery))
    for k, m in enumerate(matches):                                # query by query
        local = [c for c in range(len(home)) if gallery[home[c]] == k]
        for q, ap in zip(m[d].query, m[d].ap): sums[home[local[q]]] += 100*ap; n[home[local[q]]] += 1
    assert (n == 0).any() or d == 't2i'
    for p in range(len(gallery)): assert stored[p] == (255 if n[p] == 0 else round(sums[p]/n[p]))

def test_a_photo_without_right_answers_says_nothing():
    rec = odd(3, photos=40, galleries=1)[0]
    none = unpack(rec['perphoto']['i2t']['map_r']) == 255
    z = per_photo(rec, 'truth.i2t.map_r')
    # neither raises nor lowers the mean
    assert none.sum() == 2 and z[none] == pytest.approx(value(rec, 'truth.i2t.map_r'))

def test_spread_of_photos_is_that_of_galleries_taken_apart():
    rec, ranks, _, gallery, _ = odd(2, photos=90)
    z, hits, G = per_photo(rec, 'i2t.r5'), 100.*(ranks.i2t < 5), 3
    sizes = np.bincount(gallery); assert len(set(sizes)) > 1
    # variance of a mean of means
    want = sum(((hits[gallery == g] - hits[gallery == g].mean())**2).sum() / (G*sizes[g])**2
               for g in range(G))
    assert ((z - z.mean())**2).sum() / len(z)**2 == pytest.approx(want)

def test_spread_over_test_sets_is_that_of_each_taken_apart():
    one, two = ([made_up_record('a', 1.5, s, 0, photos=60) for s in (0, 1)],
                [made_up_record('a', 1.5, 0, 1, photos=240)])
    z = mean_per_photo(one + two, 'rsum')
    x, y = np.mean([per_photo(r, 'rsum') for r in one], 0), per_photo(two[0], 'rsum')
    assert z.mean() == pytest.approx((2*x.mean() + y.mean())/3)  # a mean over runs
    assert ((z - z.mean())**2).sum() / len(z)**2 == pytest.approx((2/3)**2 * x.var()/60 + (1/3)**2
        * y.var()/240)

def test_a_median_beside_the_clip_is_not_checked():
    base = made_up_record('a', 1.)
    rec = record({k: base[k] for k in ABOUT}, base['data'], Ranks(np.array([10, 300]), np.array([10, 300])),
                 np.arange(2))
    assert (mismatches(rec) == [] and 'medr' not in recompute(rec)['t2i']
            and rec['metrics']['test']['t2i']['medr'] == 156)

@pytest.mark.parametrize('seed', range(4))
def test_stored_ranks_are_the_ranks(seed):
    rec, ranks, img_of, gallery, _ = odd(seed)
    got, photo, gal = stored_ranks(rec)
    assert (got.i2t == np.minimum(ranks.i2t,
                                  255)).all() and (gal == gallery).all() and (photo == np.sort(img_of)).all()
    for p in range(len(gallery)):
        assert sorted(got.t2i[photo == p]) == sorted(np.minimum(ranks.t2i[img_of == p], 255))

def test_one_changed_rank_is_noticed():
    rec = made_up_record('a', 1.5)
    for d in ('i2t', 't2i'):
        x = unpack(rec['ranks'][d]); x[np.flatnonzero(x == 0)[0]] = 1
        bad = copy.deepcopy(rec); bad['ranks'][d] = pack(x)
        assert any(f'{d}.r1' in m for m in mismatches(bad)) and lint_records([bad])

def test_a_record_that_is_too_long_is_clipped_earlier_not_refused(tmp_path):
    many = {k: [1/3 + i/7 for i in range(40)] for k in ('epoch', *(f'monitor {j}' for j in range(24)))}
    rec = made_up_record('long', 1., photos=2000, per_image=5, galleries=2, truth=True, curves=many)
    assert rec['ranks']['clip'] < 255 and mismatches(rec) == []
    assert write_record(tmp_path, rec).stat().st_size <= 24_000
    k = rec['ranks']['clip']
    assert per_photo(rec, f't2i.r{k}') is not None and per_photo(rec,
        f't2i.r{k+1}') is None and math.isnan(value(rec, f't2i.r{k+1}'))
    coco = made_up_record('coco', 2., photos=5000, per_image=5)
    assert coco['ranks']['clip'] == 255 and write_record(tmp_path, coco).stat().st_size <= 50_000


# ---------------------------------------------------------------- bad records

def places(x, at=()):
    "Every place in a JSON value"
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from places(v, (*at, k))

def damaged(rec, rng):
    "A copy with one or two places deleted, replaced or added to"
    rec = copy.deepcopy(rec)
    for _ in range(rng.integers(1, 3)):
        everywhere = [p for p in places(rec) if p]; *way, last = everywhere[rng.integers(len(everywhere))]
        x = rec
        for k in way: x = x[k]
        what = rng.integers(4)
        if what == 0: del x[last]
        elif what == 1 and isinstance(x[last], dict): x[last]['surprise'] = 1
        else:
            x[last] = [None, True, -1, 0, 2, 1.5, 101., 1e9, 'text', 'AAAA', [], {}, [1], {'r1': 5},
                       10**25][rng.integers(15)]
    return rec

def test_the_schema_beside_the_records_is_the_packages():
    have = json.loads((ROOT/'figures'/'record.schema.json').read_text())
    assert have == json.loads(json.dumps(
        SCHEMA)), "write json.dumps(itm_nb.runs.records.SCHEMA, indent=1) to figures/record.schema.json"
    jsonschema.Draft202012Validator.check_schema(have)

def test_our_checker_agrees_with_jsonschema_and_nothing_else_is_raised():
    judge, rng, seen = jsonschema.Draft202012Validator(SCHEMA), np.random.default_rng(0), {True: 0, False: 0}
    control = made_up_record('oracle', 3., kind='control'); del control['ranks']
    more = dict(best_epoch=3, curves=dict(epoch=[0, 1], loss=[1., .5]), cost=dict(seconds=1.5))
    for base in (made_up_record('a', 1., truth=True, photos=20, **more), odd(1)[0], control):
        assert judge.is_valid(base) and R._fault(base, SCHEMA) is None
        for _ in range(700):
            bad = damaged(base, rng); ok = judge.is_valid(bad); seen[ok] += 1
            assert (R._fault(bad, SCHEMA) is None) == ok, (R._fault(bad, SCHEMA),
                                                           [e.message for e in judge.iter_errors(bad)])
            try: R._check(bad)  # with ranks: anything but one typed error fails this test
            except DataError: pass
            else: assert ok
    assert min(seen.values()) > 100, seen

def bomb(): return base64.b64encode(zlib.compress(bytes(100_000_000), 9)).decode()

@pytest.mark.parametrize('name, change, says', [
    ('cut', lambda raw, rec: raw[:len(raw)//2], 'not JSON'),
    ('empty', lambda raw, rec: b'', 'not JSON'),
    ('not utf-8', lambda raw, rec: raw.replace(b'made-up', b'made\xff\xfeup', 1), 'not JSON'),
    ('nan', lambda raw, rec: raw.replace(b'"seed": 0', b'"seed": NaN', 1), 'NaN is not a number'),
    ('a list', lambda raw, rec: b'[]', 'wanted object'),
    ('deep', lambda raw, rec: b'['*100_000, 'not JSON'),
    ('another version', lambda raw, rec: raw.replace(b'"schema": 1', b'"schema": 2'), 'record.schema'),
    ('id', lambda raw, rec: raw.replace(rec['id'].encode(), rec['id'].upper().encode()[:11] + b'X'),
     'record.id'),
    ('another id', lambda raw, rec: raw.replace(rec['id'].encode(), b'0'*12), 'as the file is called'),
    ('recall', lambda raw, rec: raw.replace(json.dumps(rec['metrics']['test']['rsum']).encode(), b'250.0'),
     'its ranks give'),
    ('bomb', lambda raw, rec: raw.replace(rec['ranks']['t2i'].encode(), bomb().encode()), 'cut, too long'),
    ('no base64', lambda raw, rec: raw.replace(rec['ranks']['t2i'].encode(), b'A'*13), 'does not decode'),
    ('fewer ranks', lambda raw, rec: raw.replace(rec['ranks']['t2i'].encode(), pack([0, 1, 2]).encode()),
     'as in `data`'),
    ('galleries', lambda raw, rec: raw.replace(b'"gallery": [200]', b'"gallery": [100, 100]'),
     'as in `data`'),
])
def test_bad_files_are_refused_with_their_name(tmp_path, name, change, says):
    rec = made_up_record('a', 1.5); path = write_record(tmp_path, rec)
    raw = change(path.read_bytes(), rec); assert raw != path.read_bytes()
    path.write_bytes(raw)
    with pytest.raises(DataError) as e: read_records(tmp_path)
    assert says in str(e.value) and rec['id'] in str(e.value), str(e.value)  # the file is called after the id

@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_a_stopped_write_leaves_the_old_record(tmp_path, monkeypatch, step):
    rec = made_up_record('a', 1.5); path = write_record(tmp_path, rec); old = path.read_bytes()
    def stop(*a): raise OSError('disk full')
    monkeypatch.setattr(os, step, stop)
    with pytest.raises(OSError): write_record(tmp_path, rec | dict(commit='newer'))
    assert path.read_bytes() == old and read_records(tmp_path)[0]['commit'] == 'none'

def test_missing_folder_and_schema_file_among_records(tmp_path):
    with pytest.raises(DataError, match='no such folder'): read_records(tmp_path/'none')
    write_record(tmp_path, made_up_record('a', 1.))
    (tmp_path/'record.schema.json').write_text(json.dumps(SCHEMA))
    assert len(read_records(tmp_path)) == 1


# ---------------------------------------------------------------- tables

def naive_interval(rec, draws, seed):
    """The bootstrap as the book says it: draw photos of one gallery, recompute all six recalls from their
    queries"""
    ranks, img_of, _ = stored_ranks(rec); g = np.random.default_rng(seed); out = []
    of = [np.flatnonzero(img_of == p) for p in range(len(ranks.i2t))]
    for _ in range(draws):
        p = g.integers(0, len(of), len(of)); c = np.concatenate([of[i] for i in p])
        out.append(sum(100*np.mean(x < k) for x in (ranks.i2t[p], ranks.t2i[c]) for k in (1, 5, 10)))
    return np.quantile(out, [.025, .975])

def test_interval_against_a_plain_bootstrap_with_unequal_captions():
    rec = odd(5, photos=150, galleries=1, truth=False)[0]
    assert len(set(np.bincount(stored_ranks(rec)[1]))) > 3
    lo, hi = interval([rec], 'rsum', draws=4000); a, b = naive_interval(rec, 4000, 1)
    assert abs(lo-a) < .06*(b-a) and abs(hi-b) < .06*(b-a)

def test_equal_photos_count_as_one_sample_and_folds_as_more():
    one, same = made_up_record('a', 1.5, 0, photos=150), made_up_record('a', 1.5, 1, photos=150)
    folds = [made_up_record('a', 1.5, 0, f, photos=150) for f in range(4)]
    width = lambda rs: (lambda e: e[1]-e[0])(interval(rs, 'rsum'))
    assert width([one, same]) > .7*width([one])                    # another seed brings no photos
    assert .4*width([one]) < width(folds) < .62*width([one])       # four times the photos: half the width

ROWS, COLS = (['plain', 'strong', 'missing', 'oracle'],
              ('i2t.r1', 'i2t.r5', 'i2t.r10', 't2i.r1', 't2i.r5', 't2i.r10', 'rsum', 'truth.map_r'))
BUILD = '''
import sys, warnings; warnings.simplefilter('error', DeprecationWarning)
from pathlib import Path
from itm_nb.runs.records import read_records
from itm_nb.analysis.figures import curves, dots, recall_curve, save_figure
from itm_nb.analysis.tables import differences, table, write_table
recs, out = read_records(sys.argv[1]), Path(sys.argv[2])
if sys.argv[3] == 'backwards': recs = recs[::-1]
rows = ['plain', 'strong', 'missing', 'oracle']
write_table(table(recs, rows, %r), out/'table')
write_table(differences(recs, rows[1:], 'plain', ('rsum', 'truth.map_r')), out/'differences')
save_figure(dots(recs, rows[:3]), out/'dots')
save_figure(curves(recs, rows), out/'curves'); save_figure(recall_curve(recs, rows), out/'recall')
''' % (COLS,)

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp('results')
    for m, s in (('plain', 1.2), ('strong', 1.6)):
        for seed in range(3):
            curves = dict(epoch=[0, 1, 2], val_rsum=[50., 90.+seed, 100*s], loss=[3., 2., None])
            write_record(path, made_up_record(m, s, seed, truth=True, curves=curves))
    write_record(path, made_up_record('oracle', 3.5, kind='control'))
    return path

def test_two_processes_build_equal_bytes(folder, tmp_path):
    for way, seed in (('forwards', '1'), ('backwards', '2')):
        env = os.environ | dict(PYTHONPATH=str(ROOT), PYTHONHASHSEED=seed, MPLBACKEND='agg')
        run = subprocess.run([sys.executable, '-c', BUILD, folder, tmp_path/way, way], cwd=ROOT,
                             capture_output=True, timeout=240, env=env)
        assert run.returncode == 0, run.stderr.decode()
    names = sorted(p.name for p in (tmp_path/'forwards').iterdir())
    assert len(names) == 10 and names == sorted(p.name for p in (tmp_path/'backwards').iterdir())
    for n in names: assert (tmp_path/'forwards'/n).read_bytes() == (tmp_path/'backwards'/n).read_bytes(), n
    ids = {r['id'] for r in read_records(folder)}
    tab = pd.read_csv(tmp_path/'forwards'/'table.csv')
    assert set(' '.join(tab.runs.dropna()).split()) == ids and lint_table(tab, read_records(folder)) == []
    assert tab[tab.row == 'missing']['mean'].isna().all()
    assert '| missing |' + '  |'*9 in (tmp_path/'forwards'/'table.md').read_text()  # eight metrics and n
    for n in ('dots.svg', 'recall.svg', 'dots.png'):
        assert all(i.encode() in (tmp_path/'forwards'/n).read_bytes() for i in ids), n

def test_differences_by_hand(folder):
    recs = read_records(folder)
    d = differences(recs, ['strong'], 'plain', ('rsum', 'truth.map_r')).set_index('metric')
    for m in d.index:
        of = lambda method, s: next(value(r, m) for r in recs if (r['method'], r['seed']) == (method, s))
        # t(2)
        x = np.array([of('strong', s) - of('plain', s) for s in range(3)])
        half = 4.302652729696142*x.std(ddof=1)/math.sqrt(3)
        assert (d.d[m] == pytest.approx(x.mean()) and d.t_hi[m]-d.t_lo[m] == pytest.approx(2*half)
                and d.n[m] == 3)
        assert (d.lo[m], d.hi[m]) in ((d.t_lo[m], d.t_hi[m]), (d.photo_lo[m], d.photo_hi[m]))
        assert d.hi[m]-d.lo[m] == max(d.t_hi[m]-d.t_lo[m], d.photo_hi[m]-d.photo_lo[m])

def test_only_matched_blocks_are_paired():
    recs = [made_up_record('a', 1.2, s) for s in (0, 1, 2)] + [made_up_record('b', 1.4, s) for s in (1, 2, 3)]
    d = differences(recs, ['b'], 'a').iloc[0]
    assert d.n == 2 and len(d.runs.split()) == len(d.base_runs.split()) == 2
    elsewhere = [r | dict(data=r['data'] | dict(fingerprint='other')) for r in recs[3:]]
    assert differences(recs[:3] + elsewhere, ['b'], 'a').iloc[0].n == 0  # another test set is no match
    with pytest.raises(DataError, match='of one block'):
        differences(recs + [made_up_record('b', 1.5, 1)], ['b'], 'a')


@pytest.mark.parametrize('fault, says', [
    (lambda t: pd.concat([t, t[3:4]]), 'stands in 2 lines'),
    (lambda t: t.assign(mean=t['mean'].where(t.index != 0, 100.2)), 'outside 0 to 100'),
    (lambda t: t.assign(mean=t['mean'].where(t.index != 0, -.2)), 'outside 0 to 100'),
    (lambda t: t.assign(mean=t['mean'].where(t.index != 6, 600.5)), 'outside 0 to 600'),
    (lambda t: t.assign(mean=t['mean'].where(t.index != 3, t['mean'][4] + .1)), 't2i R@1'),
    (lambda t: t.assign(mean=t['mean'].where(t.index != 6, t['mean'][6] + .001)), 'the six recalls add up'),
    (lambda t: t.assign(runs=t.runs.where(t.index != 5, '')), 'and 0 run ids'),
    (lambda t: t.assign(runs=t.runs.str.replace(t.runs[0].split()[0], 'f'*12)), 'no record of ffffffffffff'),
    (lambda t: t.assign(n=t.n + 1), 'with n = 4'),
    (lambda t: t.assign(mean=t['mean'].where(t.index != 7, t['mean'][7] + .001)),
     'is not the mean of its runs'),
])
def test_each_lint_catches_its_fault(folder, fault, says):
    recs = read_records(folder); good = table(recs, ['plain'], COLS, draws=100)
    assert lint_table(good, recs) == []
    assert any(says in x for x in lint_table(fault(good), recs)), lint_table(fault(good), recs)

def test_the_committed_records_are_clean():
    """Recalls from the ranks once more, sums, no record twice: what the study page demands before it
    writes a table"""
    assert lint_records(read_records(ROOT/'figures'/'results')) == []


def test_a_long_legend_stands_beside_its_panels(tmp_path):
    "Many rows would cover the panel or leave it no room; few stay inside"
    from itm_nb.analysis.figures import curves, preview, recall_curve, save_figure
    told = dict(epoch=[0, 1], val_rsum=[100., 120.])
    recs = [made_up_record(f'm{k:02d}', 1 + k/10, photos=60) | dict(curves=told) for k in range(16)]
    names = [r['method'] for r in recs]
    with warnings.catch_warnings():
        warnings.simplefilter('error')                                    # a layout that collapses only warns
        for draw in (curves, recall_curve):
            few, many = draw(recs, names[:3]), draw(recs, names); files = save_figure(many, tmp_path/'many')
            assert (not few.legends and len(many.legends) == 1
                    and many.get_size_inches()[0] > few.get_size_inches()[0])
            assert len(preview(files).data) < files[1].stat().st_size


def test_lint_of_records_catches_copies_and_wrong_sums():
    a = made_up_record('a', 1.5)
    assert lint_records([a, a]) == [f"record {a['id']}: 2 times"]
    # controls of one world are one run of two sweeps
    assert lint_records([a, a | dict(sweep='another')]) == []
    control = made_up_record('oracle', 3., kind='control')
    del control['ranks']
    control['metrics']['test']['rsum'] += 1
    assert any('add up to' in x for x in lint_records([control]))

def test_published_rows():
    tab = published(ROOT/'figures'/'published.csv')
    assert lint_table(tab, tol=.31) == [] and len(tab) > 100
    one = tab[(tab.data == 'AOQ, COCO 1K') & (tab.row == 'SCAN')].set_index('metric')['mean']
    assert one.rsum == 507.9 and one['i2t.r1'] == 72.7
    assert any('add up' in x for x in lint_table(tab.assign(mean=tab['mean'] + .5*(tab.metric == 'rsum')),
                                                 tol=.31))


# ---------------------------------------------------------------- do the intervals mean what they say?

def world(rng, photos, gap=0., per=5):
    "Hits of two models on new photos; photos differ in how hard they are, sentences of a photo share that"
    hard = rng.normal(0, 1, photos); out = []
    for shift in (0., gap):
        own = hard + shift + rng.normal(0, .5, photos)
        text = np.repeat(own, per) + rng.normal(0, 1, photos*per)
        fall = lambda x: np.floor(np.exp(2.5 - 1.5*x)).clip(0, 400).astype(int)
        out.append(Ranks(fall(text.reshape(photos, per).max(1)), fall(text)))
    return out, np.repeat(np.arange(photos), per)

def coverage(times, photos, draws, gap=.1):
    "Share of simulated test sets whose intervals hold the true rSum, and the true paired difference"
    full, img_of = world(np.random.default_rng(10**6), 200_000, gap)
    rsum = lambda r: sum(100*np.mean(x < k) for x in (r.i2t, r.t2i) for k in (1, 5, 10))
    truth, got = [rsum(r) for r in full], np.zeros(2)
    base = made_up_record('a', 1.)
    for t in range(times):
        two, img_of = world(np.random.default_rng(t), photos, gap)
        about = {k: base[k] for k in ABOUT}
        a, b = (record(about | dict(id=f'{i:012x}', method=f'm{i}'), base['data'], r, img_of)
                for i, r in enumerate(two))
        lo, hi = interval([a], 'rsum', draws, seed=t); got[0] += lo <= truth[0] <= hi
        d = differences([a, b], ['m1'], 'm0', draws=draws).iloc[0]
        got[1] += d.lo <= truth[1]-truth[0] <= d.hi
    return got/times

def test_coverage_quick():
    got = coverage(120, 120, 400)
    assert (got > .88).all(), got                                  # .95 - 3.5 standard errors

@pytest.mark.slow
def test_coverage_long():
    got = coverage(1500, 300, 1000)
    assert (np.abs(got - .95) < .02).all(), got                    # 3.5 standard errors

def test_equal_arms_are_rarely_called_different():
    "A/A: one arm under two names, three seeds each"
    found = 0
    for t in range(40):
        recs = [made_up_record(m, 1.5, seed=s, photos=80, fold=t) for s in range(3)
                for m in ('left', 'right')]
        d = differences(recs, ['right'], 'left', draws=300).iloc[0]; found += not d.lo <= 0 <= d.hi
    assert found <= 4, found


def test_collapsed_runs_are_counted_and_stay_in_the_mean():
    """Below half of vse0 in its own block; alike vectors; and, where the block has no vse0, what the run
    found. Row, mean and n do not change"""
    told = lambda m, seed, last, **kw: made_up_record(m, 1., seed, last=dict(rsum=last), **kw)
    recs = [told('vse0', 0, 100.), told('vse0', 1, 200.),
            told('new', 0, 51., spread=dict(image=.9, text=-.1)), told('new', 1, 99., collapsed=False),
            told('new', 2, 1., collapsed=True), told('new', 3, 1.),
            told('new', 4, 500., spread=dict(image=.2, text=.91))]
    fell = collapsed(recs); assert fell == sorted(recs[i]['id'] for i in (3, 4, 6))
    tab = table(recs, ['vse0', 'new'], ['rsum'])
    assert tab.collapsed.tolist() == [0, 3] and tab.n.tolist() == [2, 5]
    assert tab['mean'][1] == pytest.approx(np.mean([r['metrics']['test']['rsum'] for r in recs[2:]]))
    assert ('| 5 (3 collapsed) |' in markdown(tab) and '| 2 |' in markdown(tab)
            and '& 5 (3 collapsed)' in latex(tab) and not lint_table(tab, recs))
