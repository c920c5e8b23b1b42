"""All metrics of COCO's test sets against the package `eccv_caption` itself, on its own label files and
random scores of full size, to 1e-12."""
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from itm_nb.core.errors_files import DataError
from itm_nb.data.splits import Split
from itm_nb.metrics.ranks import in_galleries, mean_summary, Ranks, ranks_of, recalls
from itm_nb.metrics.relevance import many_positives, match_summary
from itm_nb.analysis.coco_protocols import in_parts, positives

with warnings.catch_warnings():
    warnings.simplefilter('ignore')                                  # it would rather have the package ujson
    package = pytest.importorskip('eccv_caption', reason='pip install eccv-caption')

KS = (1, 5, 10)
# of every list so many places are handed to the package; no metric looks further
HEAD = dict(i2t=400, t2i=200)


@pytest.fixture(scope='module')
def coco(tmp_path_factory):
    """All test photos of COCO as a SCAN folder numbers them; the package's files; a matrix of scores in
    which right answers stand a little higher"""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        theirs = package.Metrics()
    folder = tmp_path_factory.mktemp('coco')
    shutil.copytree(Path(package.__file__).parent/'data', folder/'eccv_caption')
    caps = theirs.coco_ids.tolist()
    owner = {c: v[0] for c, v in theirs.coco_gts['t2i'].items()}
    imgs = list(dict.fromkeys(owner[c] for c in caps))
    row = {i: k for k, i in enumerate(imgs)}
    img_of = np.array([row[owner[c]] for c in caps])
    s = Split('test', np.zeros((len(imgs), 1, 2), 'f4'), np.ones(len(imgs), int), ['x']*len(caps), img_of,
              np.arange(len(imgs)), np.arange(len(caps)), source=str(folder))
    rng = np.random.default_rng(0)
    img = rng.standard_normal((len(imgs), 24)).astype('f4')
    S = img @ (.5*img[img_of] + rng.standard_normal((len(caps), 24)).astype('f4')).T
    assert S.shape == (5000, 25000)
    return (folder, s, S, theirs, caps, imgs,
            dict(i2t=heads(S, HEAD['i2t']), t2i=heads(np.ascontiguousarray(S.T), HEAD['t2i'])))


def heads(S, n):
    "(Q, n) the n best of every row, in no order, and their scores"
    top = np.concatenate([np.argpartition(-S[a:a+500], n, 1)[:, :n] for a in range(0, len(S), 500)])
    return top, np.take_along_axis(S, top, 1)

def ranked(coco, gts):
    """What the package is given: {query id: item ids}, the best first; of equal scores the wrong ones
    first, as we count"""
    folder, s, S, theirs, caps, imgs, best = coco
    out = {}
    for d, ids, items in (('i2t', imgs, caps), ('t2i', caps, imgs)):
        at, where = {x: k for k, x in enumerate(ids)}, {x: k for k, x in enumerate(items)}
        top, score = best[d]
        right = np.array([at[q]*len(items) + where[x] for q, v in gts[d].items() for x in v if x in where])
        mask = np.isin(top + len(items)*np.arange(len(top))[:, None], right)
        order = np.lexsort((mask, -score), 1)
        names = np.array(items)[np.take_along_axis(top, order, 1)]
        out[d] = dict(zip(ids, names.tolist()))
    return out


def same(ours, theirs):
    "Percent and shares, to 1e-12 of a share"
    for d in ('i2t', 't2i'): assert abs(ours[d]/100 - theirs[d]) < 1e-12, (d, ours[d], theirs[d])


@pytest.mark.parametrize('name', ['eccv', 'cxc'])
def test_lists_give_what_the_package_gives(coco, name):
    folder, s, S, theirs, caps, imgs, _ = coco
    right = positives(folder, name, s)
    assert (len(right['i2t']), len(right['t2i'])) == dict(eccv=(1261, 1332), cxc=(5000, 24972))[name]
    assert sum(right.get('missing', {}).get('i2t', {}).values()) == dict(eccv=2, cxc=0)[name]
    got = match_summary(many_positives(S, right, tie=0), KS)
    gts = theirs.eccv_gts if name == 'eccv' else theirs.cxc_gts
    their = ranked(coco, gts)
    for k in KS:
        same({d: got[d][f'r{k}'] for d in got if d != 'map_r'},
             getattr(theirs, f'{name}_recalls')(their, 'all', K=k))
    if name == 'cxc': return
    want = theirs.eccv_metrics(their, 'all')
    for ours, key in (('map_r', 'eccv_map_at_r'), ('rp', 'eccv_rprecision'), ('r1', 'eccv_r1')):
        same({d: got[d][ours] for d in ('i2t', 't2i')}, want[key])
    assert 1 < got['map_r'] < 60  # neither nothing nor everything is found


def test_5k_and_1k_give_what_the_package_gives(coco):
    folder, s, S, theirs, caps, imgs, _ = coco
    their = ranked(coco, theirs.coco_gts)
    r = ranks_of(S, s.img_of, tie=0)
    parts = in_parts(s).gallery
    apart = in_galleries(lambda i, j, own: ranks_of(S[np.ix_(i, j)], own, tie=0), s.img_of, parts)
    rows = mean_summary([recalls(Ranks(apart.i2t[parts == g], apart.t2i[parts[s.img_of] == g]), KS)
                         for g in range(5)])
    for k in KS:
        for ours, name in ((recalls(r, KS), 'coco_5k'), (rows, 'coco_1k')):
            same({d: ours[d][f'r{k}'] for d in ours}, getattr(theirs, f'{name}_recalls')(their, 'all', K=k))


def test_ids_of_cocos_own_give_the_same(coco):
    "Karpathy's folder keeps COCO's sentence ids: then the order of the rows does not matter"
    folder, s, S, theirs, caps, imgs, _ = coco
    assert positives(folder, 'eccv', replace(s, cap_ids=np.array(caps))) == positives(folder, 'eccv', s)


def test_lists_of_other_data_are_not_taken_for_missing_answers(coco):
    folder, s, S, theirs, caps, imgs, _ = coco
    some = s.subset(np.arange(4000))
    with pytest.raises(DataError, match='right answers|sentences|ids'):
        positives(folder, 'eccv', replace(some, cap_ids=np.array(caps)[some.cap_ids]))
