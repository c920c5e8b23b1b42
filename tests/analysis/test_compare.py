"""Two runs query by query: against slow counting, on ranks made elsewhere, on committed records, and the
page that shows it."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from itm_nb.core import project
from itm_nb.runs import execution, identity, parameters, run_record
from itm_nb.core.errors_files import DataError
from itm_nb.metrics.ranks import summary
from itm_nb.runs.external_scores import read_ranks
from itm_nb.training.config import config
from itm_nb.training.corpus import corpus
from itm_nb.training.loop import fit
from itm_nb.runs.external_scores import judge
from itm_nb.runs.records import made_up_record, read_records, stored_ranks, write_record
from itm_nb.analysis.compare_runs import (
    compare, data_of, find_run, Finished, firsts, in_words, moved, open_shelf, recalls)

RESULTS = Path(__file__).parents[2]/'figures'/'results'


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "Two finished runs on the tiny world, as the template makes them"
    folder, done = tmp_path_factory.mktemp('tiny')/'runs'/'toy', []
    for method in ('vse0', 'infonce'):
        given = dict(preset='tiny', dim=32, d_word=16, image_hidden=32, epochs=2, batch=32, method=method,
                     sweep='toy')
        values = parameters.resolve(parameters.parameters(project.template('train')), given)
        cfg = config({k: v for k, v in values.items() if k not in identity.OF_A_RUN})
        data = corpus(cfg)
        run = folder/identity.run_id('train', values)
        run_record.conclude(values, run, fit(cfg, run, data, progress=False), data)
        done.append(run)
    return done


def evaluate_values(**kw):
    return parameters.resolve(parameters.parameters(project.template('evaluate')),
                              dict(preset='tiny', sweep='toy') | kw)


def test_every_query_against_slow_counting(tiny):
    a, b = map(find_run, tiny); split = data_of(a).split('test'); t = compare(*tiny)
    whole = [read_ranks(x/'ranks_test.npz') for x in tiny]
    order = sorted(range(len(split.captions)), key=lambda j: (split.img_of[j], j))
    for way, n in (('i2t', len(split)), ('t2i', len(split.captions))):
        part = t[t.way == way].set_index('query')
        for q in range(n):
            x, y = (int(getattr(r, way)[q if way == 'i2t' else order[q]]) for r in whole); line = part.loc[q]
            assert (line.a, line.b, line.photo) == (x, y, q if way == 'i2t' else split.img_of[order[q]])
            assert line.gain == pytest.approx(np.log2((1+y)/(1+x)))
    six = recalls(a, b).set_index('metric'); s = [summary(r) for r in whole]
    assert six.loc['rsum', 'a'] != six.loc['rsum',
                                           'b'] and 'truth.map_r' in six.index and set(six.columns) == {'a',
        'b', 'd', 'lo', 'hi', 'p'}
    for f, name in ((a, 'a'), (b, 'b')):
        assert six.loc['t2i.r5', name] == pytest.approx(100*np.mean(f.ranks.t2i < 5))
    assert s[0]['t2i']['r5'] == pytest.approx(six.loc['t2i.r5', 'a'])


def test_what_stands_first_is_searched_in_the_own_gallery(tiny):
    f = find_run(tiny[0])
    data = data_of(f)
    whole = data.split('test')
    split = replace(whole, gallery=np.arange(len(whole)) % 3)
    shelf = open_shelf(f, replace(data, split=lambda part: split)); S = (shelf.img @ shelf.txt.T).numpy()
    which = np.array([0, len(split)-1, 3, 3, 60])
    for way, M, home, there in (('i2t', S, split.gallery, split.gallery[split.img_of]),
                                ('t2i', S.T, split.gallery[split.img_of], split.gallery)):
        slow = [max((i for i in range(M.shape[1]) if there[i] == home[q]), key=lambda i: M[q, i])
                for q in which]
        assert firsts(shelf, way, which).tolist() == slow


def test_words_are_those_of_the_query(tiny):
    a, b = map(find_run, tiny)
    data = data_of(a)
    split = data.split('test')
    shelves = [open_shelf(a, data), None]
    for way in ('i2t', 't2i'):
        for part in moved(compare(a, b), way, 5):
            said = in_words(part, split, shelves); assert len(said) == len(part) and 'first in b' not in said
            for line, (_, row) in zip(part.itertuples(), said.iterrows()):
                assert row.photo == split.img_ids[line.photo] and (row.a, row.b) == (line.a, line.b)
                own = [c for c, i in zip(split.captions, split.img_of) if i == line.photo]
                assert row.sentence in own
                assert (line.a == 0) == (row['first in a'] in own if way == 'i2t'
                                         else row['first in a'].startswith(f'{row.photo}: '))
                if line.a == 0: assert row['true in a'] == 'yes'


def test_ranks_made_elsewhere(tiny, tmp_path):
    "Those of a run, given as a file: nothing moved; with other galleries: refused"
    data = corpus(config(dict(preset='tiny')))
    values = evaluate_values(scores=str(tiny[0]/'ranks_test.npz'), arm='theirs')
    out = tmp_path/'runs'/'toy'/identity.run_id('evaluate', values); judge(values, out, lambda: data)
    theirs = find_run(out)
    assert theirs.record['kind'] == 'foreign' and open_shelf(theirs, data_of(theirs)) is None
    assert (compare(theirs, tiny[0]).gain == 0).all() and recalls(theirs,
        find_run(tiny[0])).d.abs().max() == 0
    assert (compare(theirs, tiny[1]).gain == compare(*tiny).gain).all()
    np.save(tmp_path/'i.npy', np.arange(6)//2)
    np.savez(tmp_path/'r.npz', i2t=np.array([0, 3, 1]), t2i=np.array([2, 0, 1, 1, 0, 2]))
    alone = judge(evaluate_values(scores=str(tmp_path/'r.npz'), img_of=str(tmp_path/'i.npy')),
                  tmp_path/'runs'/'toy'/'alone', None)
    f = find_run(alone['id'], tmp_path/'runs')
    assert data_of(f) is None and compare(f, f).a.tolist() == [0, 3, 1, 2, 0, 1, 1, 0, 2]
    with pytest.raises(DataError, match='the same test of both'): compare(f, theirs)


def test_a_clip_is_no_movement(tmp_path):
    "A record clipped at 31 against one that is not: what lies beyond counts as equal"
    a, b = (made_up_record(m, .1, photos=200) for m in ('one', 'two'))
    f, g = (Finished(r, *stored_ranks(r)[:2], clip) for r, clip in ((a, 255), (b, 31)))
    t = compare(f, g)
    x, y = (np.r_[h.ranks.i2t, h.ranks.t2i] for h in (f, g))
    beyond = (x >= 31) & (y >= 31)
    assert (beyond.any() and (t.gain[beyond] == 0).all() and t.a.max() == 31
            and (t.a[x < 31] == x[x < 31]).all())


def test_committed_records_and_their_names(tmp_path):
    """The first two runs of one block, by id and by file; a folder whose ranks are not those of its record
    is not believed"""
    found = {}
    for r in read_records(RESULTS):
        if r['kind'] == 'run': found.setdefault((r['data']['fingerprint'], r['seed']), []).append(r)
    a, b = next(rs for rs in found.values() if len(rs) > 1)[:2]
    t = compare(a['id'], str(RESULTS/f"{b['id']}.json"))
    assert len(t) == a['data']['images'] + a['data']['captions'] and t.gain.abs().max() > 0
    folder = tmp_path/'runs'/'x'/a['id']
    folder.mkdir(parents=True)
    write_record(tmp_path/'runs'/'x'/'records', a)
    (folder/'DONE').write_text('x')
    ranks = stored_ranks(a)[0]; np.savez(folder/'ranks_test.npz', i2t=ranks.i2t[::-1], t2i=ranks.t2i)
    f = find_run(a['id'], tmp_path/'runs'); assert f.folder == folder and (f.ranks.i2t == ranks.i2t).all()
    np.savez(folder/'ranks_test.npz', i2t=ranks.i2t + 1000*(ranks.i2t == a['ranks']['clip']), t2i=ranks.t2i)
    assert find_run(folder).clip == 0


@pytest.mark.parametrize('bad', ['feedfeedfeed', 'x.json', '', '../..', 'a\0b'])
def test_no_such_run(bad, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match='no record of a finished run'): find_run(bad)


@pytest.mark.slow
def test_the_page_of_a_run_and_of_two(tiny, tmp_path, monkeypatch):
    """`itm_run run_report`: as it is; of two runs with words; of ranks made elsewhere; against a run on
    other data"""
    monkeypatch.chdir(tmp_path)
    texts = lambda out: json.dumps([c.get('outputs')
                                    for c in json.loads((out/'run.ipynb').read_text())['cells']])
    theirs = execution.start('evaluate', evaluate_values(scores=str(tiny[0]/'ranks_test.npz'),
                                                         out='x/theirs'), bar=False)[1]
    code, out = execution.start('run_report', dict(out='a'), bar=False)
    assert code == 0 and 'None was named' in texts(out)
    code, out = execution.start('run_report', dict(record=str(tiny[0]), against=str(tiny[1]), top=3, out='b'),
                                bar=False)
    assert (code == 0 and 'first in a' in texts(out) and 'true in b' in texts(out)
            and 'Ranks only' not in texts(out))
    code, out = execution.start('run_report', dict(record=str(theirs), against=str(tiny[1]), top=3, out='c'),
                                bar=False)
    assert code == 0 and 'Ranks only, without weights or data: ' in texts(out) and 'first in b' in texts(out)
    other = next(p.stem for p in RESULTS.glob('*.json') if 'ranks' in json.loads(p.read_text()))
    code, out = execution.start('run_report', dict(record=other, against=str(tiny[1]), out='d'), bar=False)
    assert code == 1 and 'the same test of both' in (out/'FAILED').read_text()
