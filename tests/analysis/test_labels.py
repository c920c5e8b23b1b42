"""What an arm is called, held against what it changes: the table `verdicts.ARMS`, the sweeps' files, the
settings' own words, and the weights themselves."""
import json
import re
from pathlib import Path

import pytest
import torch

from itm_nb.methods import fne
from itm_nb.runs import sweep_plan
from itm_nb.methods.registry import _call, split_outside, preset_of
from itm_nb.analysis.claims import ARMS, OWN, SUPERSEDED, read_tests

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT/'nbs'/'experiments'/'sweeps').glob('*.yaml'))
SIZES = {'queue', 'share', 'copies', 'draws', 'mlm'}           # of a world, not of an arm
WORDS = {        # a setting -> what must stand in the label of an arm that has it
    ('threshold', 1.): 'nobody is suspected', ('cutdown', False): 'no cut-down',
    ('permuted', True): 'permuted at random', ('pick', 'hardest'): 'hardest', ('pick', 'uniform'): 'evenly',
    ('tau', 5.): 'tau 5', ('tau', 50.): 'tau 50', ('prior', 'known'): 'true prior',
    ('prior', .01): '1 in 100', ('preset', 'faithful'): 'as released', ('floor', 'none'): 'no floor',
    ('negatives', 'all'): 'statistics of all negatives', ('stage', 'tri'): 'offline triplet',
    ('stage', 'quin'): 'unanchored pairs', ('placebo', 'random'): 'from anywhere',
    ('placebo', 'second'): 'second draws',
    ('placebo', 'permuted'): 'permuted at random', ('placebo', 'constant'): 'constant weight',
    ('placebo', 'detached'): 'no gradient through the weight', ('words', 'random'): 'at random',
    ('sharing', 'static'): ('never changes', 'synthetic', 'three papers'),
    ('sharing', 'unshared'): 'learns apart', ('discrimination', .5): 'discrimination',
    ('correction', .5): 'correction',
    ('misled', 'heads'): 'another image', ('monotone', True): 'searched prior',
    ('prior', .002): 'searched prior', ('kind', 'random'): 'any words', ('kind', 'blind'): 'another photo',
    ('pick', 'fne'): "by FNE's weights", ('weight', 1.): 'masked-language'}


def parts(method):
    "[(name, settings without sizes, what is put in the place of a source)] of a method's string"
    out = []
    for text in split_outside(method, '|'):
        first, *swaps = split_outside(text, ','); name, own = _call(first)
        drop = SIZES | ({'tau'} if name == 'tags' else {'copies', 'share'} if name == 'mlm_warmup' else set())
        cut = [(k, p, {a: b for a, b in s.items() if a not in SIZES})
               for k, _, text in (x.partition('=') for x in swaps) for p, s in [_call(text)]]
        out.append((name, {k: v for k, v in own.items() if k not in drop}, cut))
    return out


def arms():
    "(file, arm, method) of all arms of the sweeps that the table speaks of"
    for f in FILES:
        spec = sweep_plan.read_sweep(f)
        for arm, x in spec['arms'].items():
            if arm in ARMS: yield f.stem, arm, (spec['base'] | x).get('method', 'vse0')


def test_every_arm_of_a_sweep_has_the_settings_of_its_label():
    found = list(arms())
    assert len(found) > 100 and {a for _, a, _ in found} >= ARMS.keys() - SUPERSEDED.keys()
    for file, arm, method in found:
        assert parts(method) == parts(OWN.get(file, {}).get(arm, ARMS[arm])[1]), (file, arm)


def test_every_arm_of_the_ladders_has_a_label():
    for f in FILES:
        if not re.match(r'fne_|tags_(scenes|flickr8k)$|aoq_\w+_ablation|factorial|core_|scenes', f.stem):
            continue
        unnamed = [a for a in sweep_plan.read_sweep(f)['arms'] if a not in ARMS
                   and not re.search('honest|^hardest_m', a)]
        assert not unnamed, (f.stem, unnamed)


def test_every_setting_of_an_arm_stands_in_its_label():
    "And no words of another setting do"
    for arm, (label, method) in [*ARMS.items(), *(x for own in OWN.values() for x in own.items())]:
        have = {(k, v) for _, own, _ in parts(method) for k, v in own.items()}
        for s in have:
            assert any(w in label for w in ([WORDS[s]] if isinstance(WORDS[s], str) else WORDS[s])), (arm, s)
        for s in (('threshold', 1.), ('cutdown', False), ('floor', 'none'), ('permuted', True),
                  ('prior', 'known'), ('negatives', 'all')):
            if s not in have and WORDS[s] in label and 'placebo=' not in method:
                pytest.fail(f'{arm}: {label!r} speaks of {s}')


def test_a_memory_is_as_large_as_its_label_says():
    "No memory, a sixteenth, a quarter of the sweep's own; lists half and five times as deep"
    for f in FILES:
        at = sweep_plan.read_sweep(f)['arms']
        queue = {a: parts_with(x)['queue'] for a, x in at.items()
                 if a in ('fne', 'fne_m0', 'fne_m16', 'fne_m4') and 'queue' in parts_with(x)}
        whole = queue.get('fne', 8224 if 'fne_m0' in queue else None)
        if 'fne_m0' in queue:
            assert queue['fne_m0'] == 0 and abs(16*queue['fne_m16']
                                                - whole) <= .004*whole and abs(4*queue['fne_m4']
                - whole) <= .004*whole, f.stem
        if 'aoq_h300' in at:
            assert parts_with(at['aoq_h300'])['share'] == pytest.approx(10*parts_with(at['aoq_h30'])['share'])


def parts_with(x): return _call(split_outside(split_outside(x['method'], '|')[0], ',')[0])[1]


def test_the_cut_down_is_of_easy_candidates_and_nobody_else():
    """What fne_no_cut turns off and fne_branch leaves on: easy, unsuspected candidates lose weight; a
    suspected one keeps the weight of its posterior"""
    m = torch.tensor([[1000, .6, .01*999], [2000, .3, .01*1999]]).double(); pos = torch.tensor([.7]).double()
    score = torch.tensor([[.45, .6, .69, .9]]).double()
    eligible = torch.ones(1, 4).bool()
    P = fne.posterior(score, m)[0]
    suspect = P > 1e-3
    assert suspect.tolist() == [False, True, True,
                                True][:1] + [bool(p > 1e-3) for p in P[1:]] and suspect[-1] and not suspect[0]
    whole, no_cut, branch = (fne.weights(score, pos, m, eligible, fne.Posterior(tau=5., **kw))[0]
                             for kw in ({}, dict(cutdown=False), dict(threshold=1.)))
    # the cut-down: easy ones, whatever else
    easy = ~suspect; assert (whole[easy] < no_cut[easy]).all() and (no_cut[easy] == 1).all()
    # suspected ones lose by the posterior, with and without it
    assert torch.equal(whole[suspect], no_cut[suspect]) and (whole[suspect] < 1).any()
    # nobody is suspected: the easy one loses, the hard one does not
    assert torch.equal(branch, torch.exp(-5*(score - pos)**2)[0]) and branch[0] < branch[2]
    words = read_tests(ROOT/'nbs'/'experiments'/'primary_tests.yaml')['tests']['FNE-4']
    assert 'easy (unsuspected)' in words['claim'] and words['contrasts'] == [dict(of=dict(fne=1,
        fne_no_cut=-1))] and ARMS['fne_no_cut'][1] == 'fne(cutdown=False)'


WRONG = re.compile(r'likely false (negatives|ones)[^|\n]{0,20}cut|cut[^|\n]{0,25}likely false|two cures '
                   r'undo each other', re.I)

def test_the_wrong_words_stand_in_the_erratum_alone():
    "In sweeps, rooms, pages, tables and labels; README.md is made from the index"
    files = [*FILES, *(ROOT/'nbs').rglob('[0-9]*.ipynb'),
             *(p for p in (ROOT/'nbs'/'experiments').glob('*.ipynb')), *(ROOT/'figures').rglob('*.md'),
             *(ROOT/'itm_nb').rglob('*.py')]
    told = lambda text: '\n'.join(x for x in text.splitlines() if 'rratum' not in x and "'stood'" not in x)
    for f in files: assert not WRONG.search(told(f.read_text('utf-8'))), f.name
    # the registered words, and the erratum's
    raw = (ROOT/'nbs'/'experiments'/'primary_tests.yaml').read_text(); assert len(WRONG.findall(raw)) == 2


def test_the_superseded_strings_mean_what_they_meant():
    """Committed records of the old mixtures: the string resolves to the gradient they were trained with,
    and the new arms have other strings, hence other ids"""
    olds = {r['config']['method'] for p in (ROOT/'figures'/'results').glob('*.json')
            if (r := json.loads(p.read_text()))['method'] in SUPERSEDED and r.get('kind') == 'run'}
    assert olds and all(m.startswith('aoq(),on=itm_nb.fne:bank_source(') for m in olds)
    new = {m for _, a, m in arms() if a in SUPERSEDED.values()}
    assert new and not new & olds and all(m.startswith('aoq_fne(') for m in new)
    assert {preset_of(m) for m in olds | new} == {'corrected'} and not any(a in SUPERSEDED
        for _, a, _ in arms())
