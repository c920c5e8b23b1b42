"""COCO's test sets and lists against brute force; folders of full size by files that are mostly holes; a sweep end to end on a small COCO."""
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from itm_nb.core import commands, project
from itm_nb.runs import identity, parameters, run_folder, run_record, sweep_driver, sweep_plan
from itm_nb.core.errors_files import DataError
from itm_nb.data.splits import Split
from itm_nb.metrics.relevance import many_positives, match_summary
from itm_nb.analysis.coco_protocols import (
    all_test, in_parts, positives, served, tables_of, test_row as row_of, trained_on)

ROOT = Path(__file__).parents[2]
WORDS = 'red green blue large small round square left right above below cat dog house tree car boat bird fish lamp'.split()


def made(n, seed=0, each=5):
    "A split of n photos whose sentences name what is in their features"
    rng = np.random.default_rng(seed); what = rng.integers(0, len(WORDS), (n, 3)); feats = np.zeros((n, 4, 24), np.float32)
    for k in range(3): feats[np.arange(n), k, what[:, k]] = 1.
    feats += rng.standard_normal(feats.shape).astype('float32')*.1
    caps = [' '.join(WORDS[w] for w in rng.permutation(row)) for row in what for _ in range(each)]
    return Split('test', feats, np.full(n, 4), caps, np.repeat(np.arange(n), each), np.arange(n), np.arange(n*each))


def scan_part(folder, part, s, repeated=False):
    "A split as SCAN's package has it: for parts but train, a row per sentence"
    folder.mkdir(exist_ok=True); x = s.feats.repeat(5, 0) if repeated else s.feats
    np.save(folder/f'{part}_ims.npy', x); (folder/f'{part}_caps.txt').write_text('\n'.join(s.captions)+'\n')
    (folder/f'{part}_ids.txt').write_text(''.join(f'{i}\n' for i in (range(len(s)*5) if repeated and part == 'x' else range(len(s)))))


def lists(folder, s, seed=0, share=.6):
    "The files of the package eccv_caption, of the same form: ids of their own, more positives than were written, a part of the queries"
    folder.mkdir(parents=True, exist_ok=True); rng = np.random.default_rng(seed); N, M = len(s), len(s.captions)
    cap, img = rng.permutation(900_000)[:M], rng.permutation(600_000)[:N]; true = np.zeros((N, M), bool); true[s.img_of, np.arange(M)] = True
    more = true | (rng.random((N, M)) < .02); asked = [rng.random(N) < share, rng.random(M) < share]
    def write(name, t, asked):
        i2t = {str(img[i]): [int(c) for c in cap[np.flatnonzero(t[i])]] for i in range(N) if asked[0][i]}
        t2i = {str(cap[j]): [int(x) for x in img[np.flatnonzero(t[:, j])]] for j in range(M) if asked[1][j]}
        (folder/f'{name}_image_to_caption.json').write_text(json.dumps(i2t)); (folder/f'{name}_caption_to_image.json').write_text(json.dumps(t2i))
    every = [np.ones(N, bool), np.ones(M, bool)]
    write('original', true, every); write('cxc', more, every); write('eccv', more, asked); np.save(folder/'coco_test_ids.npy', cap.astype(np.int64))
    return more, asked, cap, img


def slow_map(S, true, asked):
    "mAP@R, R-Precision, R@1 by plain loops over sorted scores (no ties)"
    out = []
    for q in np.flatnonzero(asked):
        if not (R := true[q].sum()): continue
        hits = true[q][np.argsort(-S[q])]; top = hits[:R]
        out.append((sum(top[:k+1].mean() for k in range(R) if top[k])/R, top.mean(), hits[0]))
    return 100*np.array(out).mean(0)


def test_lists_against_plain_loops(tmp_path):
    s = made(30); more, asked, cap, img = lists(tmp_path/'eccv_caption', s); S = np.random.default_rng(1).standard_normal((30, 150))
    for name, q in (('eccv', asked), ('cxc', [np.ones(30, bool), np.ones(150, bool)])):
        got = match_summary(many_positives(S, positives(tmp_path, name, s), tie=0))
        for d, x, t, a in (('i2t', S, more, q[0]), ('t2i', S.T, more.T, q[1])):
            np.testing.assert_allclose([got[d]['map_r'], got[d]['rp'], got[d]['r1']], slow_map(x, t, a), rtol=1e-9)


def test_lists_by_order_and_by_id_are_the_same(tmp_path):
    s = made(20); more, asked, cap, img = lists(tmp_path, s)                          # in the folder itself, too
    assert positives(tmp_path, 'eccv', s) == positives(tmp_path, 'eccv', replace(s, cap_ids=cap))


def broken(folder, what, s):
    "Damage a file; the text the error must hold"
    path = dict(missing='eccv_image_to_caption.json', cut='eccv_caption_to_image.json', kind='eccv_caption_to_image.json', id='eccv_image_to_caption.json',
                other='eccv_image_to_caption.json', order='coco_test_ids.npy', short='coco_test_ids.npy', objects='coco_test_ids.npy')[what]; p = folder/path
    if what == 'missing': p.unlink(); return 'itm_data get eccv-caption'
    if what == 'cut': p.write_text(p.read_text()[:50]); return 'broken JSON'
    if what == 'kind': p.write_text('[1, 2]'); return 'ids with lists of ids'
    if what == 'id': p.write_text('{"a": [1]}'); return 'a whole number'
    if what == 'other': p.write_text('{"7777777": [1]}'); return 'the id'
    ids = np.load(p)
    if what == 'order': np.save(p, np.roll(ids, 2)); return 'order'
    if what == 'short': np.save(p, ids[:-5]); return 'sentences'
    np.save(p, ids.astype(object), allow_pickle=True); return 'coco_test_ids'


@pytest.mark.parametrize('what', ['missing', 'cut', 'kind', 'id', 'other', 'order', 'short', 'objects'])
def test_broken_lists(what, tmp_path):
    s = made(10); lists(tmp_path, s); said = broken(tmp_path, what, s)
    with pytest.raises(DataError, match=said): positives(tmp_path, 'eccv', s)


def test_which_part_is_all_of_the_test():
    def of(**parts):
        def split(p):
            if p in parts: return parts[p]
            raise DataError('f', f'no {p}_ims.npy' if 'scan' in parts else f'no image in {p}', 'files')
        return split
    assert all_test(of(test=1, testall=2)) == 2 and all_test(of(test=1)) == 1
    with pytest.raises(DataError, match='testall'): all_test(of(test=1, scan=0))       # the first thousand are not taken for all


# ---- folders of full size
def hollow(folder, part, n, rows=None, per=5, shape=(36, 2048)):
    "A part in the SCAN layout at its true size: features are holes but for a few numbers in every row that is looked at"
    folder.mkdir(exist_ok=True); rows = rows or n
    x = np.lib.format.open_memmap(folder/f'{part}_ims.npy', 'w+', np.float32, (rows, *shape))
    for i in np.unique(np.r_[np.arange(20), np.linspace(0, rows-1, 64).astype(int)]): x[i, 0, :2] = i // (rows//n) + 1, 1.
    del x
    with open(folder/f'{part}_caps.txt', 'w') as f: f.writelines(f'words {k} of photo {i}\n' for i in range(n) for k in range(per))
    with open(folder/f'{part}_ids.txt', 'w') as f: f.writelines(f'{i}\n' for i in range(n))


@pytest.mark.skipif(os.name != 'posix', reason='needs files with holes')
def test_coco_at_its_full_size(tmp_path):
    "33 GB of features in a few MB: what is there, which rows it serves; 1K is five parts of the 5,000; a single thousand serves none"
    d = tmp_path/'coco_precomp'
    for part, n in (('train', 113287), ('dev', 5000), ('test', 1000), ('testall', 5000)): hollow(d, part, n)
    files = list(d.glob('*.npy')); assert sum(p.stat().st_size for p in files) > 30e9 and sum(p.stat().st_blocks*512 for p in files) < 100e6
    lines = served(d); assert lines[0] == 'COCO, regions: train 113,287, val 5,000, test 1,000, testall 5,000 photos'
    assert lines[1].startswith('COCO 1K: SCAN, ') and lines[2].startswith('COCO 5K: SCAN, SCAN + AdapOffQuin') and 'TAGS-DC' not in str(lines)
    assert 'coco' in lines[3].removeprefix('sweeps: ').split(', ') and 'itm_data get eccv-caption' in lines[4]
    for p in d.glob('testall*'): p.unlink()
    assert 'not whole (1,000 photos)' in served(d)[1]


def test_other_sizes_serve_nothing():
    assert tables_of(dict(train=6000, test=1000)) == ('Flickr8k', ('Flickr8k',)) and tables_of(dict(train=29000, test=500))[1] == ()


# ---- end to end
@pytest.fixture(scope='module')
def small(tmp_path_factory):
    "A small COCO in the SCAN layout with its lists, and two trained runs"
    from itm_nb.training.config import config
    from itm_nb.training.corpus import corpus
    from itm_nb.training.loop import fit
    d = tmp_path_factory.mktemp('small'); data = d/'coco_precomp'; whole = made(20, seed=4)
    for part, s in (('train', made(150, 1)), ('dev', made(20, 2)), ('testall', whole)): scan_part(data, part, s)
    (data/'subset.json').write_text(json.dumps(dict(of='coco_precomp', seed=None))); lists(data/'eccv_caption', whole); folders = []
    for seed in (0, 1):
        given = dict(data='scan', name='COCO', folder=str(data), dim=16, d_word=16, image_hidden=0, image_pool='mean', epochs=6, batch=32, seed=seed, test=False, progress=False)
        values = parameters.resolve(parameters.parameters(project.template('train')), given); cfg = config({k: v for k, v in values.items() if k not in identity.OF_A_RUN})
        run = d/'runs'/f'r{seed}'; t = fit(cfg, run, corpus(cfg, data), progress=False); run_record.conclude(values, run, t, corpus(cfg, data)); folders.append(run)
    return data, folders


def row(small, test_set, which=(0,), **kw):
    data, folders = small; values = parameters.resolve(parameters.parameters(project.template('test_sets')), dict(scores=','.join(str(folders[i]) for i in which), test_set=test_set, folder=str(data)) | kw)
    return row_of(values, folders[0].parent/f'{test_set}{len(which)}')


def test_every_test_set_of_a_run(small):
    "1K is the mean of five galleries, 5K one; the lists change nothing in these, and add mAP@R. All are valid records of different data"
    from itm_nb.runs.records import mismatches
    one, five, eccv, cxc = (row(small, x) for x in ('coco_1k', 'coco_5k', 'eccv', 'cxc'))
    assert [r['data']['label'] for r in (one, five, eccv, cxc)] == [f'COCO {x} (20 photos)' for x in ('1K', '5K', '5K, ECCV Caption', '5K, CxC')]
    assert one['data']['gallery'] == [4]*5 and five['data']['gallery'] == [20] and one['metrics']['test']['rsum'] > five['metrics']['test']['rsum'] > 60
    assert eccv['metrics']['test']['i2t'] == five['metrics']['test']['i2t'] and 'truth' not in five['metrics']['test']
    assert 0 < eccv['metrics']['test']['truth']['map_r'] < 100 and eccv['metrics']['test']['truth'] != cxc['metrics']['test']['truth']
    assert not any(mismatches(r) for r in (one, five, eccv, cxc))


def test_the_lists_of_a_run_against_plain_loops(small):
    from itm_nb.data.tokenizers import load
    from itm_nb.models.encode import embed
    from itm_nb.models.factory import from_pretrained
    from itm_nb.training.corpus import corpus
    data, folders = small; s = made(20, seed=4); more, asked, cap, img = lists(data.parent/'again', s); pairs = corpus(trained_on(folders[0]), data)
    a, b = embed(from_pretrained(folders[0]/'best'), pairs.batches(pairs.split('testall'), load(folders[0]/'best'/'vocab.json'))); S = (a @ b.T).numpy()
    got = row(small, 'eccv')['metrics']['test']['truth']; want = slow_map(S, more, asked[0]), slow_map(S.T, more.T, asked[1])
    np.testing.assert_allclose([got['i2t']['map_r'], got['t2i']['map_r']], [want[0][0], want[1][0]], atol=2.)       # sentences repeat words: a few ties


def test_the_average_of_runs_and_odd_requests(small):
    two = row(small, 'coco_5k', (0, 1)); assert two['kind'] == 'ensemble' and two['metrics']['test']['rsum'] > 60
    with pytest.raises(commands.SetupError, match="test_set is 'coco_2k'"): row(small, 'coco_2k')
    with pytest.raises(commands.SetupError, match='no finished run'): trained_on(small[1][0].parent/'none')
    with pytest.raises(DataError, match='multiple of 5'): in_parts(made(12))


def test_what_is_not_cocos_test_makes_no_row_of_it(small, tmp_path):
    "128 drawn scenes, too few photos, too few sentences, a run on Flickr30K: refused by name, and nothing is written"
    import shutil
    from itm_nb.training.config import config
    from itm_nb.training.corpus import corpus
    from itm_nb.training.loop import fit
    data, folders = small; plain = tmp_path/'coco_precomp'; shutil.copytree(data, plain); (plain/'subset.json').unlink()
    with pytest.raises(DataError, match='20 photos and 100 sentences; wanted the 5,000 photos'): row((plain, folders), 'coco_5k', folder=str(plain))
    cfg = config(dict(preset='tiny', dim=16, d_word=8, image_hidden=16, epochs=1, batch=64)); scenes = tmp_path/'runs'/'scenes'
    fit(cfg, scenes, corpus(cfg), progress=False); run_folder.finish(scenes)
    with pytest.raises(commands.SetupError, match='a run on the drawn world; the test set coco_5k is for runs on COCO'): row((data, [scenes]), 'coco_5k')
    given = dict(data='scan', name='Flickr30K', dim=16, d_word=16, image_hidden=0, image_pool='mean', epochs=1, batch=32); cfg = config(given); theirs = tmp_path/'runs'/'theirs'
    fit(cfg, theirs, corpus(cfg, data), progress=False); run_folder.finish(theirs)
    with pytest.raises(commands.SetupError, match='a run on Flickr30K'): row(small, 'coco_1k', scores=f'{folders[0]},{theirs}')
    assert sorted(p.name for p in (tmp_path/'runs').iterdir()) == ['scenes', 'theirs']


@pytest.mark.parametrize('photos,each,ok', [(5000, 5, True), (5000, 4, False), (1000, 5, False), (5001, 5, False)])
def test_the_sizes_of_cocos_test(photos, each, ok, tmp_path):
    from itm_nb.analysis.coco_protocols import size_said
    s = Split('test', np.zeros((photos, 1, 1), np.float32), np.ones(photos, int), ['a']*photos*each, np.repeat(np.arange(photos), each), np.arange(photos), np.arange(photos*each))
    if ok: assert size_said(tmp_path, s) == ''
    else:
        with pytest.raises(DataError, match='itm_data check'): size_said(tmp_path, s)


@pytest.mark.parametrize('name,n', [('flickr30k', 55), ('coco', 81)])
def test_the_sweeps_name_runs_that_exist(name, n):
    "Every run of the sweep, its parents before it, all settings known"
    from itm_nb.training.config import config
    for profile in ('', 'tiny'):
        todo = sweep_plan.entries(sweep_plan.read_sweep(sweep_plan.sweep_file(name), profile), name, Path('runs')); seen = set(); assert len(todo) == n
        for e in todo:
            assert set(e.needs) <= seen; seen.add(str(e.out))
            if e.template == 'train': config({k: v for k, v in e.values.items() if k not in identity.OF_A_RUN})


@pytest.mark.slow
@pytest.mark.parametrize('name', ['coco', 'flickr30k'])
def test_a_sweep_end_to_end(name, tmp_path):
    "One block of the tiny profile, with the command's own notebooks: every row that can be made on small data is"
    d = tmp_path/'data'; whole = made(20, seed=4)
    for part, s in (('train', made(150, 1)), ('dev', made(20, 2)), ('test', whole), ('testall', whole)): scan_part(d, part, s)
    (d/'subset.json').write_text(json.dumps(dict(of='coco_precomp', seed=None))); lists(d/'eccv_caption', whole); spec = sweep_plan.read_sweep(sweep_plan.sweep_file(name), 'tiny'); spec['blocks'] = spec['blocks'][:1]
    for part in ('runs', 'arms'): spec[part] = {k: v for k, v in spec[part].items() if 'vsrn' not in k and 'bfan' not in k}      # VSRN is wide whatever the profile
    todo = sweep_plan.entries(spec, name, tmp_path/'runs', dict(folder=str(d), progress=False)); failed = sweep_driver.drive(todo, 2)
    assert failed == {}, [(todo[i].arm, (todo[i].out/'worker.log').read_text()[-800:]) for i in failed]
    sweep_driver.gather(todo, tmp_path/'records', name, tmp_path/'runs'); recs = [json.loads(p.read_text()) for p in (tmp_path/'records').glob('*.json')]
    want = dict(coco=3*4, flickr30k=len([e for e in todo]))[name]; assert len(recs) == want, [r['method'] for r in recs]
    assert sweep_driver.report(name, tmp_path/'records', tmp_path/'figures', tmp_path/'study') == 0
    text = (tmp_path/'figures'/f'table_{name}.md').read_text(); assert all(r['method'] in text for r in recs)
