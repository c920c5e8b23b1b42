"What the notebooks 8_analysis/02_claims and 8_analysis/03_controls cannot say about themselves: hand-made verdicts, worked examples, simulated truth, rebuilt tables"
import hashlib
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

from itm_nb.analysis.controls import (
    a_a, alarms, best_of, controls, noise_floor, planted, published_steps, simulated)
from itm_nb.core.errors_files import DataError
from itm_nb.core.project import template
from itm_nb.metrics.statistics import corrected_t
from itm_nb.runs.parameters import parameters, resolve
from itm_nb.runs.records import made_up_record, mismatches, write_record
from itm_nb.runs.sweep_plan import Entry
from itm_nb.runs.warm_server import Warm
from itm_nb.analysis.tables import figure_path, latex, lint_table, pick, published, table, value
from itm_nb.analysis.claims import (
    agreed, base_table, contrast, estimate, Estimate, factorial, holm, needed, NO_BASE, preconditions, read_tests, verdict,
    verdict_table, verdicts)
from itm_nb.analysis.tables import collapsed

ROOT = Path(__file__).parents[2]
TESTS = ROOT/'nbs'/'experiments'/'primary_tests.yaml'


# ---------------------------------------------------------------- the five words

@pytest.mark.parametrize('d, lo, hi, delta, significant, gate, word', [
    (2.0, 0.1, 3.9, 1.0, True, True, 'confirmed'),
    (1.0, 0.1, 1.9, 1.0, True, True, 'confirmed'),        # exactly the smallest effect of interest
    (0.9, 0.1, 1.7, 1.0, True, True, 'unresolved'),       # there, but not known to matter
    (0.5, 0.2, 0.8, 1.0, True, True, 'refuted'),          # there, and known not to matter
    (0.0, -.9, 0.9, 1.0, True, True, 'refuted'),
    (0.0, -1., 1.0, 1.0, True, True, 'unresolved'),       # ends exactly at delta
    (-.5, -1., -.1, 1.0, True, True, 'reversed'),         # also below delta: the stronger word
    (-.5, -1., 0.0, 1.0, True, True, 'refuted'),          # ends exactly at zero: not reversed
    (2.0, 0.1, 3.9, 1.0, False, True, 'unresolved'),      # lost to the correction
    (2.0, 0.0, 3.9, 1.0, True, True, 'unresolved'),       # adjusted lower end exactly at zero
    (5.0, 4.0, 6.0, 1.0, True, False, 'not testable'),
    (-5., -6., -4., 1.0, True, False, 'not testable'),
    (3.0, 1.0, 5.0, 0.0, True, True, 'confirmed'),
    (math.nan, math.nan, math.nan, 1., True, True, ''),
    (3.0, math.nan, math.nan, 1.0, True, True, 'unresolved'),
])
def test_words(d, lo, hi, delta, significant, gate, word): assert verdict(d, lo, hi, delta, significant, gate) == word

def test_words_together():
    said = lambda **k: agreed(k)
    assert said(P='confirmed', S='confirmed') == 'confirmed' and said(P='refuted', S='refuted') == 'refuted' and said(P='', S='') == 'not run'
    assert said(P='confirmed', S='refuted') == 'holds on P only' and said(P='unresolved', S='confirmed') == 'holds on S only'
    assert said(P='', S='reversed') == 'reversed on S only' and said(P='', S='not testable') == 'not testable on S' and said(P='not testable', S='refuted') == 'not testable on P; refuted on S'


# ---------------------------------------------------------------- numbers by hand

def test_holm_worked_example():
    "Holm (1979): p = .0015, .01, .03, .04 of four: 4 x .0015, 3 x .01, 2 x .03, then 1 x .04 raised to the one before"
    adjusted, level = holm([.03, .0015, .04, .01])
    np.testing.assert_allclose(adjusted, [.06, .006, .06, .03]); np.testing.assert_allclose(level, [.025, .0125, .05, .05/3])

def test_holm_step_down_by_its_definition():
    "Against the procedure in words: compare the smallest with a/m, the next with a/(m-1), stop at the first failure"
    g = np.random.default_rng(0)
    for _ in range(200):
        p = g.random(g.integers(1, 9))**3; left = sorted(range(len(p)), key=lambda i: p[i]); rejected = set()
        while left and p[left[0]] <= .05/len(left): rejected.add(left.pop(0))
        assert {i for i, x in enumerate(holm(p)[0]) if x <= .05} == rejected

def test_holm_controls_the_family():
    "Twelve tests of nothing: a false confirmation in at most 5 of 100 families"
    g = np.random.default_rng(1); found = sum((holm(g.random(12))[0] <= .05).any() for _ in range(4000))/4000
    assert .035 < found < .06, found
    assert np.isnan(holm([.01, math.nan])[0][1]) and holm([.01] + [math.nan]*11)[0][0] == pytest.approx(.12)

def test_estimate_by_hand():
    e = estimate([0, 1, 2, 3, 4.]); se = math.sqrt(2.5/5); t = 2.7764451
    assert e.d == 2 and e.se == pytest.approx(se) and e.interval()[:2] == pytest.approx((2 - t*se, 2 + t*se)) and e.interval()[2] == 'blocks'
    assert e.p == pytest.approx(2*stats.t.sf(2/se, 4)) and estimate([0, 1, 2, 3, 4.], overlap=.25).se == pytest.approx(math.sqrt((.2+.25)*2.5))
    assert math.isnan(estimate([1.]).p) and estimate([1.]).interval()[2] == '' and estimate([2., 2.]).interval()[:2] == (2, 2)

@pytest.mark.parametrize('seed', range(5))
def test_interval_is_the_wider_and_p_the_larger(seed):
    g = np.random.default_rng(seed); d, x = g.normal(.5, g.uniform(.1, 2), 6), g.normal(0, g.uniform(1, 40), 300); x += d.mean() - x.mean()
    e = estimate(d, x, draws=2000, seed=seed)
    for alpha in (.05, .05/12):
        lo, hi, which = e.interval(alpha); both = [e.over_blocks(alpha), e.over_photos(alpha)]
        assert (lo, hi) in both and hi - lo == max(b - a for a, b in both) and which in ('blocks', 'photos')
    t = corrected_t(d, 1, 0); assert e.over_blocks() == pytest.approx((t.lo, t.hi)) and e.p >= t.p - 1e-12
    assert (e.p < .05) <= (e.over_blocks()[0] > 0 or e.over_blocks()[1] < 0)

def test_needed_blocks_would_settle_it():
    e = Estimate(np.array([1., 3., 2., 0.]), np.zeros(0)); n = needed(e, 1.)
    lo, hi, _ = e.interval(); half = (hi - lo)/2
    assert half*math.sqrt(4/n) <= e.d < half*math.sqrt(4/(n-1))                          # d above delta: until the lower end leaves zero
    m = needed(e, 2.); assert half*math.sqrt(4/m) <= 2 - e.d < half*math.sqrt(4/(m-1))   # below it: until the upper end is below delta
    assert math.isinf(needed(Estimate(np.array([0., 0, 0]), np.zeros(0)), 0.))

def test_contrast_of_four_and_a_constant():
    recs = [made_up_record(m, s, seed, photos=60) for m, s in (('a', 1.), ('b', 1.2), ('c', 1.4)) for seed in range(4)]
    w = dict(a=-3, b=1, c=2); c = contrast(recs, w, minus=5, draws=200)
    want = [sum(x*value(pick(recs, {'method': m, 'seed': s})[0], 'rsum') for m, x in w.items()) - 5 for s in range(4)]
    np.testing.assert_allclose(c.estimate.blocks, want); assert c.n == 4 and c.missing == 0 and len(c.runs) == 12
    assert abs(c.estimate.draws.mean() - np.mean(want)) < 3

def test_a_metric_of_audits():
    audits = [dict(made_up_record('m', 1., s), audit=[dict(side=d, sampler='hardest', lower=x + s) for d, x in (('i2t', 10.), ('t2i', 20.))]) for s in range(3)]
    np.testing.assert_allclose(contrast(audits, dict(m=1), 'audit:hardest/lower', minus=10).estimate.blocks, [5, 6, 7])
    assert contrast(audits, dict(m=1), 'audit:nobody/lower').n == 0
    nobody = [dict(a, audit=[dict(x, rule='') for x in a['audit']]) for a in audits]                                         # written sentences: nobody's labels have a part in it
    np.testing.assert_allclose(contrast(nobody, dict(m=1), 'audit:hardest/lower', minus=10).estimate.blocks, [5, 6, 7])
    for a in audits: a['audit'] = [dict(x, rule='main') for x in a['audit']] + [dict(x, rule='lenient', lower=90.) for x in a['audit']]
    np.testing.assert_allclose(contrast(audits, dict(m=1), 'audit:hardest/lower', minus=10).estimate.blocks, [5, 6, 7])      # the lenient rule is a sensitivity
    for k, a in enumerate(audits): a |= dict(id=f'{k:012d}', block=dict(fold=k, seed=0), data={n: v for n, v in a['data'].items() if n != 'train'} | dict(fingerprint=str(k)))
    assert contrast(audits, dict(m=1), 'audit:hardest/lower').estimate.overlap == .5                                          # of folds: two trained on for one tested
    run = dict(audits[0], data=dict(audits[0]['data'], images=30, train=100)); run.pop('audit')
    assert contrast([*audits, run], dict(m=1), 'audit:hardest/lower').estimate.overlap == .3                                  # better: what the run says


# ---------------------------------------------------------------- the list, and verdicts from records

def test_the_committed_list():
    t = read_tests(TESTS); assert list(t['tests']) == [f'AOQ-{i}' for i in range(1, 5)] + [f'FNE-{i}' for i in range(1, 5)] + [f'TAGS-{i}' for i in range(1, 5)]
    assert t['alpha'] == .05 and t['sets']['P']['delta'] == 1 and t['sets']['S']['delta'] == .5 and len(t['sha256']) == 64

@pytest.mark.parametrize('change, says', [
    (lambda s: s.update(x=1), "no part called 'x'"), (lambda s: s.pop('tests'), 'without tests'), (lambda s: s['sets']['P'].update(delta='1'), "delta is '1'"),
    (lambda s: s['tests']['FNE-1']['contrasts'][0].update(of=[1]), 'of is [1]'), (lambda s: s['tests']['FNE-1'].pop('claim'), 'without claim'),
    (lambda s: s['tests']['FNE-1'].update(on=['Z']), "['Z']"), (lambda s: s['sets']['P'].update(folds=1), 'folds is 1'), (lambda s: s['tests'].update(A=3), 'test A is int'),
])
def test_bad_lists(tmp_path, change, says):
    spec = yaml.safe_load(TESTS.read_text()); change(spec); (tmp_path/'t.yaml').write_text(yaml.safe_dump(spec))
    with pytest.raises(DataError) as e: read_tests(tmp_path/'t.yaml')
    assert says in str(e.value)

REGISTERED = '73bc5814e469187ecbdce5afa995496479ce44d39c697781dbec22c7e077541b'      # the list as it was before the runs

def test_an_erratum_puts_words_right_and_nothing_else():
    "The hash is that of the registered bytes; contrasts, arms, gates and the registered words are what they were; tables say what stood"
    raw = TESTS.read_bytes(); before = raw[:raw.index(b'preconditions:')]; plain, t = yaml.safe_load(before), read_tests(TESTS)
    assert hashlib.sha256(before).hexdigest() == REGISTERED == t['sha256'] and plain['tests'].keys() == t['tests'].keys()
    asked = {k: {x: v for x, v in s.items() if x != 'but'} for k, s in t['sets'].items()}; again = asked.pop('B')
    assert asked == plain['sets'] and {k: v for k, v in again.items() if k not in ('about', 'sweeps', 'official')} == {k: v for k, v in plain['sets']['P'].items() if k != 'about'}
    changed = {k for k, x in t['tests'].items() if x != plain['tests'][k]}; assert changed == {'FNE-4'} == {e['test'] for e in t['errata']}
    assert {k: v for k, v in t['tests']['FNE-4'].items() if k != 'claim'} == {k: v for k, v in plain['tests']['FNE-4'].items() if k != 'claim'}
    e = t['errata'][0]; assert (e['stood'], e['right'], e['date']) == (plain['tests']['FNE-4']['claim'], t['tests']['FNE-4']['claim'], '2026-11-28')
    none = pd.DataFrame(columns=['set', 'test', 'verdict', 'why', 'n']); text = verdict_table(none, t); row = next(x for x in text.splitlines() if x.startswith('| FNE-4'))
    assert e['right'] + ' (erratum)' in row and e['stood'] not in row and f"Erratum of 2026-11-28, FNE-4: *{e['stood']}* stood, right is *{e['right']}*" in text and REGISTERED[:12] in text
    assert 'rratum' not in verdict_table(none, t | dict(tests={k: x for k, x in t['tests'].items() if k.startswith('AOQ')}))          # another paper's page

ERRATUM = b"errata:\n  - {test: FNE-4, date: '2026-01-01', stood: %b, right: x}\n"

@pytest.mark.parametrize('errata, says', [
    (ERRATUM % b'something else', 'in which \'something else\' stood'), (ERRATUM.replace(b'FNE-4', b'FNE-9') % b'x', 'FNE-9'), (b'errata:\n  - {test: FNE-4}\n', 'without date, stood, right'),
    (b'errata: 3\n', 'errata is 3'), (b'errata:\n  - {test: FNE-4, contrasts: []}\n', "no part called 'contrasts'"), (b'errata: {a: 1}\n', 'errata is'), (b'errata:\n- 3\n', 'an erratum is int')])
def test_errata_that_are_none(tmp_path, errata, says):
    raw = TESTS.read_bytes(); (tmp_path/'t.yaml').write_bytes(raw[:raw.index(b'errata:')] + errata)
    with pytest.raises(DataError) as e: read_tests(tmp_path/'t.yaml')
    assert says in str(e.value)

@pytest.mark.parametrize('change', [(b'delta: 1.0', b'delta: 0.5'), (b'fne_no_cut: -1', b'fne_m0: -1'), (b'alpha: 0.05', b'alpha: 0.1'), (b'likely false negatives helps', b'easy ones helps')])
def test_a_change_of_the_registered_part_changes_the_hash(tmp_path, change):
    raw = TESTS.read_bytes(); cut = raw.index(b'preconditions:'); assert change[0] in raw[:cut]
    (tmp_path/'t.yaml').write_bytes(raw[:cut].replace(*change)); assert read_tests(tmp_path/'t.yaml')['sha256'] != REGISTERED
    (tmp_path/'t.yaml').write_bytes(raw + b'draws: 5\n'); assert read_tests(tmp_path/'t.yaml')['sha256'] != REGISTERED       # behind the errata is not among them

@pytest.mark.parametrize('raw', [b'', b'[]', b'\xff\xfe', b'a: [', b'!!python/object/apply:os.system [echo]'])
def test_damaged_lists(tmp_path, raw):
    (tmp_path/'t.yaml').write_bytes(raw)
    with pytest.raises(DataError): read_tests(tmp_path/'t.yaml')

# ---------------------------------------------------------------- preconditions of a base

def test_preconditions_are_no_part_of_what_is_registered(tmp_path):
    t = read_tests(TESTS); p = t['preconditions']; assert t['sha256'] == REGISTERED and p['date'] == '2026-11-28' and p['sets'] == ['P', 'B']
    assert [c['name'] for c in p['conditions']] == ['level', 'base effect', 'spread', 'gap', 'collapse', 'search', 'trained']
    raw = TESTS.read_bytes(); (tmp_path/'t.yaml').write_bytes(raw.replace(b'at_least: 300', b'at_least: 200')); other = read_tests(tmp_path/'t.yaml')
    assert other['sha256'] == REGISTERED and other['preconditions'] != p

@pytest.mark.parametrize('change, says', [
    (lambda p: p.pop('date'), 'without date'), (lambda p: p.update(sets=['Z']), "['Z']"), (lambda p: p['conditions'][0].pop('says'), 'without says'),
    (lambda p: p['conditions'][0].update(at_most=1), "no part called 'at_most'"), (lambda p: p['bases']['weak SCAN'].pop('roles'), 'without roles')])
def test_bad_preconditions(tmp_path, change, says):
    spec = yaml.safe_load(TESTS.read_text()); change(spec['preconditions']); (tmp_path/'t.yaml').write_text(yaml.safe_dump(spec, sort_keys=False))
    with pytest.raises(DataError) as e: read_tests(tmp_path/'t.yaml')
    assert says in str(e.value)

def test_todays_photographs_carry_no_claim():
    "From the committed records: the hardest negative loses to the sum, so every claim on photographs reads so; the drawn world is not touched"
    from itm_nb.analysis.audit import read_audits
    from itm_nb.runs.records import read_records
    known = read_records(ROOT/'figures'/'results') + read_audits(ROOT/'figures'/'audits'); t = read_tests(TESTS) | dict(draws=20)
    bases = preconditions(known, t).set_index(['base', 'condition']); assert len(bases)
    assert bases.value['weak vectors', 'base effect'] < 0 and bases.ok['weak vectors', 'base effect'] is False and bases.ok['weak vectors', 'level'] is False
    assert all(bases.ok[b, 'level'] is False for b in ('weak SCAN', 'weak BFAN', 'weak VSRN', 'weak two towers'))
    tab = verdicts(known, t); on = tab[tab.verdict != ''].groupby('set').verdict.agg(set)
    assert on['P'] <= {NO_BASE} and NO_BASE not in on['S'] and NO_BASE in verdict_table(tab, t) and '**no**' in base_table(preconditions(known, t), t)

def on_base(**roles):
    "A list with one test, on a base of made-up runs"
    base = dict(sweeps=[made_up_record('x', 1.)['sweep']], roles=dict(sum='vse0', hardest='vsepp', longer='longer', warm='warm') | roles)
    return dict(read_tests(TESTS)['preconditions'], sets=['P'], bases=dict(it=base))

def test_every_precondition_by_itself():
    "A base that holds all of them; then each is broken alone"
    made = [made_up_record(m, s, f, fold=f, photos=150) | dict(search=dict(tried=12), spread=dict(image=.1, text=.2, gap=.06), collapsed=False)
            for m, s in (('vse0', 2.), ('vsepp', 2.3), ('longer', 2.), ('warm', 2.)) for f in range(5)]
    t = dict(alpha=.05, draws=50, sha256='0'*64, preconditions=on_base(), tests=dict(T=dict(claim='', contrasts=[dict(of=dict(vsepp=1, vse0=-1))])),
             sets=dict(P=dict(where={}, folds=True, metric='rsum', delta=1.)))
    def said(records):
        b = preconditions(records, t); return {c: ok for c, ok in zip(b.condition, b.ok)}, verdicts(records, t).verdict[0]
    change = lambda arm, **kw: [dict(r, **kw) if r['method'] == arm else r for r in made]
    whole, word = said(made); assert all(v is True for v in whole.values()) and word == 'confirmed', whole
    for name, records in dict(spread=change('vsepp', spread=dict(image=.4, text=.1)), gap=change('warm', spread=dict(gap=.01)),
                              search=change('vse0', search=dict(tried=13)), collapse=change('vse0', spread=dict(image=.95)),
                              trained=[r for r in made if r['method'] != 'longer'] + [made_up_record('longer', 2.6, f, fold=f, photos=150) | dict(search=dict(tried=12)) for f in range(5)]).items():
        found, word = said(records); assert found[name] is False and word == NO_BASE, name
    found, word = said(change('warm', spread=dict(image=.1))); assert found['gap'] is None and word == 'unresolved'      # not measured

def spec(**tests): return dict(alpha=.05, draws=500, sha256='0'*64, tests=tests, sets=dict(S=dict(where={'data.name': 'made-up'}, metric='rsum', delta=8., blocks=5)))

def arms(seeds=6, photos=300, **strength): return [made_up_record(m, s, seed, photos=photos) for m, s in strength.items() for seed in range(seeds)]

def test_presets_are_judged_apart():
    recs = arms(base=1.2) + [dict(r, preset=p, id=f'{i:012x}') for p, s in (('corrected', 1.6), ('faithful', .8))
                             for i, r in enumerate(arms(new=s), start=100 if p == 'corrected' else 200)]
    t = spec(T=dict(claim='', contrasts=[dict(of=dict(new=1, base=-1))]))
    assert [verdicts(recs, t, p).verdict[0] for p in ('corrected', 'faithful')] == ['confirmed', 'reversed']

def test_gates_missing_runs_and_few_blocks():
    recs = arms(base=1.2, new=1.6); beats = [dict(of=dict(new=1, base=-1))]
    t = spec(ok=dict(claim='', contrasts=beats, gate=[dict(of='new', metric='i2t.r1', at_least=1)]), shut=dict(claim='', contrasts=beats, gate=[dict(of='new', metric='i2t.r1', at_least=100)]),
             unknown=dict(claim='', contrasts=beats, gate=[dict(of='new', metric='nothing.here', at_least=1)]), none=dict(claim='', contrasts=[dict(of=dict(x=1, base=-1))]))
    tab = verdicts(recs, t).set_index('test')
    assert tab.verdict.to_dict() == dict(ok='confirmed', shut='not testable', unknown='', none='') and 'i2t.r1' in tab.why['shut'] and tab.why['none'] == 'no runs'
    assert (tab.p_holm['ok'] >= 4*tab.p['ok'] - 1e-9) and 'not run' in verdict_table(verdicts(recs, t), t)
    assert verdicts([r for r in recs if r['seed'] < 4], t).verdict[0] == 'unresolved' and '4 of 5' in verdicts([r for r in recs if r['seed'] < 4], t).why[0]

def test_collapsed_runs_stay_and_are_counted():
    recs = [dict(r, last=dict(rsum=90. if (r['method'], r['seed']) == ('new', 2) else 200.)) for r in arms(vse0=1.2, new=1.6)]
    bad = collapsed(recs); assert bad == [r['id'] for r in recs if (r['method'], r['seed']) == ('new', 2)]
    tab = verdicts(recs, spec(T=dict(claim='', contrasts=[dict(of=dict(new=1, vse0=-1))]))); assert tab.collapsed[0] == 1 and tab.n[0] == 6 and bad[0] in tab.runs[0]

def test_all_contrasts_must_hold():
    recs = arms(base=1.2, placebo=1.6, new=1.6); t = spec(T=dict(claim='', contrasts=[dict(of=dict(new=1, base=-1)), dict(of=dict(new=1, placebo=-1))]))
    tab = verdicts(recs, t); assert tab.word[0] == 'confirmed' and tab.word[1] != 'confirmed' and tab.verdict[0] in ('unresolved', 'refuted')


# ---------------------------------------------------------------- controls with a known truth

def analyses(times, overlap=0., draws=150, first=0, **kw):
    return [estimate(x.mean(1), x.ravel(), overlap, draws, t) for t in range(first, first + times) for x in [simulated(seed=t, **kw)]]

WORLDS, RATIO = dict(blocks=10, photos=40, photo_sd=.15*40**.5, block_sd=.3), 1600/5900

def test_false_alarms_and_the_planted_effect_quick():
    same = analyses(400, **WORLDS); a = alarms(same)
    assert 2 <= a['wider'] <= 8.5 and alarms(same, plant=.5)['wider'] > 90 and a['photos'] > a['blocks']

@pytest.mark.slow
def test_false_alarms_long():
    "3 to 7 of 100, by 3,000 analyses of nothing; folds whose blocks share what the correction assumes never above, uncorrected ones far above"
    assert 3.5 <= alarms(analyses(3000, **WORLDS))['wider'] <= 6.5
    folds = dict(blocks=10, photos=40, photo_sd=1.25*40**.5, block_sd=3., shared=RATIO/(1+RATIO))
    assert 2 <= alarms(analyses(2000, RATIO, **folds))['wider'] <= 7 and alarms(analyses(500, **folds))['wider'] > 15

def test_coverage_of_a_true_effect():
    "The 95 % interval holds the true difference"
    got = np.mean([lo <= .4 <= hi for e in analyses(300, effect=.4, **WORLDS) for lo, hi, _ in [e.interval()]]); assert .91 < got <= 1, got

@pytest.mark.parametrize('folds, how', [(6, 'seeds'), (None, 'halves')])
def test_a_a_on_records(folds, how):
    recs = [made_up_record('m', 1.3, s, fold=f, photos=90) for f in (range(folds) if folds else [None]) for s in range(2 if folds else 5)]
    same, found = a_a(recs, 'm', times=60, draws=100); assert found == how and len(same) == 60 and alarms(same)['wider'] <= 10
    assert [e.d for e in a_a(recs, 'm', times=3, draws=10)[0]] == [e.d for e in a_a(recs[::-1], 'm', times=3, draws=10)[0]]

@pytest.mark.parametrize('drop', [1., 2., 10.])
def test_a_planted_loss_is_what_it_says_and_is_found(drop, tmp_path):
    recs = [made_up_record('m', 1.3, s, photos=200, galleries=g) for s, g in ((0, 1), (1, 2), (2, 4))]
    for r in recs:
        p = planted(r, drop); assert -drop - 1.1 < value(p, 'rsum') - value(r, 'rsum') <= -drop and not mismatches(p); write_record(tmp_path, p)
    recs = [made_up_record('m', 1.3, s, photos=200) for s in range(6)]; out = controls(recs, 'm', times=20).set_index('control')
    assert out.found['planted -2 rSum'] == 'found' and controls(recs, 'm', oracle=dict(o=1, m=-1), times=5).found.iloc[-1] == 'no runs'

def test_best_of_n_by_enumeration():
    from itertools import combinations
    g = np.random.default_rng(0); val, test = g.normal(size=7), g.normal(size=7); got = best_of(val, test)
    for n in range(1, 8): assert got[n-1] == pytest.approx(np.mean([test[max(c, key=lambda i: val[i])] for c in combinations(range(7), n)]))
    with pytest.raises(DataError): best_of([1, 2], [1])

def test_noise_floor_against_plain_numbers():
    recs = arms(seeds=4, a=1.2, b=1.3); f = noise_floor(recs, 'a', 'b', {'few': (100, 100), 'many': (400, 100)})
    x = [value(r, 'rsum') for r in pick(recs, 'a')]; assert f.seed_sd[0] == pytest.approx(np.std(x, ddof=1)) and f.se[0] == pytest.approx(2*f.se[1])
    assert f.stands_out[0] == pytest.approx(1.96*f.se_same_photos[0])


def test_ranks_among_more_photos():
    "Runs whose chances are known: stretched from 1,000 photos to 5,000 they give the recalls of runs ranked among 5,000"
    from itm_nb.metrics.ranks import Ranks
    from itm_nb.runs.records import gallery_summary, pack, stored_ranks
    from itm_nb.analysis.controls import stretched
    g = np.random.default_rng(3); N = 4000; p = g.beta(.25, 60, (2, N)); own = np.arange(N)
    made = made_up_record('x', 1., photos=N, per_image=1, galleries=4); img_of, gallery = own, np.arange(N)//1000
    def of(n): return Ranks(*(np.minimum(g.binomial(n-1, q), 255) for q in p))
    r = of(1000); rec = dict(made, ranks=dict(made['ranks'], i2t=pack(r.i2t), t2i=pack(r.t2i), clip=255))
    far = stretched(rec, 5000)['metrics']['test']; true = np.mean([gallery_summary(of(5000), img_of, gallery)['rsum'] for _ in range(5)])
    assert far['rsum'] == pytest.approx(true, abs=6) and gallery_summary(r, img_of, gallery)['rsum'] > true + 60
    assert (stored_ranks(stretched(rec, 1500))[0].i2t >= r.i2t).all() and stretched(rec, 1000) is rec


# ---------------------------------------------------------------- published rows, lint, LaTeX

def test_published_rows_are_all_there():
    tab = published(ROOT/'figures'/'published.csv'); rows = tab.drop_duplicates(['data', 'row'])
    assert rows.groupby('data').row.count().to_dict() == {'AOQ, COCO 1K': 12, 'AOQ, COCO 5K': 6, 'AOQ, Flickr30K': 6,
                                                     'TAGS-DC, COCO 5K': 2, 'TAGS-DC, Flickr30K': 2,
                                                     'Collected, Flickr8k': 11}
    assert lint_table(tab, tol=.31) == [] and set(tab.source) == {'F', 'R', 'C', 'C, M'}
    steps = published_steps(tab)
    assert len(steps) == 17 and not steps.data.str.contains('Flickr8k').any() and steps.step.notna().all()
    total = tab[tab.metric != 'rsum'].groupby(['data', 'row'])['mean'].sum()
    assert total['TAGS-DC, Flickr30K', 'TAGS-DC base'] == pytest.approx(549.4)
    assert total['TAGS-DC, COCO 5K', 'TAGS-DC large'] == pytest.approx(472.9)

def test_collected_rows_of_flickr8k():
    tab = published(ROOT/'figures'/'published.csv')
    tab = tab[tab.data == 'Collected, Flickr8k']
    rsum = tab[tab.metric == 'rsum'].set_index('row')['mean']
    assert rsum['NAA ResNet'] == 343.5 and rsum['SCAN ensemble BUTD'] == 407.4 and len(rsum) == 7
    # what was not published is not there, and not made up
    assert set(tab[tab.row == 'CLIP B/32 zero-shot'].metric) == {'i2t.r5', 't2i.r5'}
    mark = tab.drop_duplicates('row').set_index('row').source
    assert mark['DVSA'] == 'C, M' and mark['IMRAM BUTD'] == 'C' and mark['OpenCLIP H/14 zero-shot'] == 'R'

def test_a_copied_row_is_noticed():
    recs = arms(seeds=2, a=1.2, b=1.5); good = table(recs, ['a', 'b'], draws=20); assert not lint_table(good)
    copy = good.copy(); copy.loc[copy.row == 'b', 'mean'] = copy[copy.row == 'a']['mean'].values
    assert any('the very numbers of' in x for x in lint_table(copy))
    twin = lambda **more: [r | dict(id=r['id'][::-1], method='c', config=r['config'] | dict(arm='c') | more) for r in recs if r['method'] == 'a']
    for more, wrong in ((dict(), ['made-up ranks, c: the very numbers of made-up ranks, a']), (dict(clamp=False), [])):       # a setting that makes no difference is no copy
        both = recs + twin(**more); assert lint_table(table(both, ['a', 'c'], draws=20), both) == wrong

def test_latex_is_closed_and_escaped():
    text = latex(table(arms(seeds=2, a=1.2), {'50 % & more_or #1 {x} ~ ^ \\': 'a'}, ['rsum', 'i2t.r1'], draws=20))
    assert r'50 \% \& more\_or \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{}' in text and text.count('begin{') == text.count('end{') == 1
    assert all(line.count(' & ') == 3 for line in text.splitlines() if line.endswith(r'\\'))


# ---------------------------------------------------------------- everything again from the records

def run(name, out, **values):
    "Run a template in a process of its own"
    code = 'import sys; from itm_nb.cli import itm_run; sys.exit(itm_run())'
    args = [x for k, v in dict(values, out=out).items() for x in ('-p', k, str(v))]
    done = subprocess.run([sys.executable, '-c', code, name, *args, '--quiet'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]

@pytest.fixture(scope='module')
def warm():
    "One process that has imported what a page needs; every page is forked from it"
    server = Warm()
    yield server
    server.close()

def page(warm, kind, at, **more):
    "Execute a template on the records of a folder"
    given = more | dict(records=str(at/'records'), figures=str(at/'figures'), out=str(at/'out'))
    entry = Entry(kind, kind, resolve(parameters(template(kind)), given), at/'out')
    assert warm.start(entry).wait() == 0, (at/'out'/'worker.log').read_text()[-2000:]

@pytest.mark.slow
def test_deleted_tables_and_figures_come_back_byte_equal(tmp_path):
    "Twice from the records alone: equal bytes; and text tables equal to the committed ones"
    kept = dict(records=ROOT/'figures'/'results'), dict(audits=ROOT/'figures'/'audits')
    pages = dict(study=kept[0], audit=kept[1], verdicts=kept[0], factorial=kept[0], defects=kept[0], dose=kept[0], **{k: kept[0] | kept[1] for k in ('aoq', 'fne', 'tags_dc')})
    for k in (1, 2):
        at = tmp_path/str(k); at.mkdir()
        for name, given in pages.items(): run(name, tmp_path/f'{name}{k}', figures=at, **given)
    made = sorted(p.name for p in (tmp_path/'1').iterdir()); assert made == sorted(p.name for p in (tmp_path/'2').iterdir()) and len(made) > 25
    for n in made: assert (tmp_path/'1'/n).read_bytes() == (tmp_path/'2'/n).read_bytes(), n
    for n in made:
        if n.endswith(('.md', '.csv')): assert (tmp_path/'1'/n).read_bytes() == figure_path(ROOT/'figures', n).read_bytes(), f'{n}: run the notebook and commit what it writes'

def test_the_audit_of_flickr8k_agrees_with_the_earlier_measurement():
    import csv
    rows = list(csv.DictReader(open(ROOT/'figures'/'audits'/'audit_agreement.csv'))); head = [r for r in rows if r['picks'] == 'rank 1']
    assert len(head) >= 12
    assert all(r['agrees'] == 'yes' for r in head)
    assert sum(r['agrees'] == 'yes' for r in rows) >= .93*len(rows)
    have = {p.stem for p in (ROOT/'figures'/'audits').glob('*.json')} & {p.stem for p in (ROOT/'figures'/'results').glob('*.json')}
    assert {r['run'] for r in rows} <= have


# ---------------------------------------------------------------- factors that were fully crossed

CROSSED = dict(vsepp='', aoq='A', fne='F', tags='G', aoq_fne='AF', aoq_tags='AG', fne_tags='FG', union='AFG')

def crossed(folder=None, truth=False):
    made = [made_up_record(a, 1.2 + .06*('A' in f) + .1*('F' in f) - .12*({*'AF'} <= {*f}), s, truth=truth) | dict(sweep='factorial_scenes') for a, f in CROSSED.items() for s in range(3)]
    for r in made if folder else (): write_record(folder, r)
    return made

def test_effects_are_the_coefficients_of_least_squares():
    "Factors coded -1/2 and 1/2, products of codes doubled: the textbook's regression on all runs, with a constant per block"
    made, tab = crossed(), factorial(crossed(), CROSSED, 'rsum', draws=100); y = np.array([value(r, 'rsum') for r in made]); seeds = np.array([r['seed'] for r in made])
    code = lambda who: np.array([np.prod([1 if f in CROSSED[r['method']] else -1 for f in who])/2 for r in made])
    X = np.column_stack([*(code(e) for e in tab.effect), *(seeds == s for s in range(3))]); b = np.linalg.lstsq(X, y, rcond=None)[0]
    np.testing.assert_allclose(tab.d, b[:7], atol=1e-9); assert list(tab.effect) == ['A', 'F', 'G', 'AF', 'AG', 'FG', 'AFG'] and (tab.n == 3).all()
    short = factorial([r for r in made if not (r['method'] == 'union' and r['seed'] == 1)], CROSSED, 'rsum', draws=100); assert (short.n == 2).all()      # a block without one arm is no block

def test_the_page_of_the_factorial_sweep_is_made_from_records(warm, tmp_path):
    crossed(tmp_path/'records', truth=True)
    page(warm, 'factorial', tmp_path)
    tab = pd.read_csv(tmp_path/'figures'/'factorial_factorial_scenes.csv'); assert list(tab.effect) == ['A', 'F', 'G', 'AF', 'AG', 'FG', 'AFG'] and tab.d.notna().all()
    assert {p.name for p in (tmp_path/'figures').glob('*.svg')} == {f'factorial_{k}_factorial_scenes.svg' for k in ('forest', 'interplay')}

def test_the_page_of_the_factorial_sweep_with_two_shares_and_oracles(warm, tmp_path):
    "A loses where more strangers are true, and knowing them repairs it; F does not care, nor is knowledge of worth to it"
    strong = {k: (lambda f, k=k: 1.2 + (.12 if k == .1 else -.12)*('A' in f) + .1*('F' in f)) for k in (.1, 1.)}; arms = CROSSED | dict(aoq_honest='H', fne_honest='F')
    for k, s in strong.items():
        about = dict(sweep=f'factorial_scenes_{k}', config=dict(rho=k))
        for a, f in arms.items():
            for seed in range(4):
                r = made_up_record(a, 1.32 if f == 'H' else s(f), seed, truth=True, photos=400); r = r | about | dict(id=r['id'][:11] + ('a' if k < 1 else 'b'), data=r['data'] | dict(label=f'rho {k}'))
                write_record(tmp_path/'records', r)
    page(warm, 'factorial', tmp_path)
    read = lambda name: pd.read_csv(tmp_path/'figures'/f'factorial_{name}_factorial_scenes.csv')
    line = read('slopes').set_index('effect'); assert list(line.index) == ['A x log', 'F x log', 'G x log'] and line.d['A x log'] < line.d['F x log'] and (line.n == 4).all() and line.hi['A x log'] < 0
    word = read('expected').set_index('effect').word; assert word['A x log'] == 'as expected' and list(word.index) == ['A x log', 'F x log', 'AF', 'AF', 'G x log']
    knows = read('perfect').set_index(['data', 'without']); assert knows.word['rho 1.0', 'aoq'] == 'matters' and max(abs(knows.d[x, 'fne']) for x in ('rho 0.1', 'rho 1.0')) < knows.d['rho 1.0', 'aoq']/3 and len(knows) == 4
    assert {p.name for p in (tmp_path/'figures').glob('*.svg')} == {f'factorial_{k}_factorial_scenes.svg' for k in ('forest', 'interplay', 'worth')}


def test_the_page_of_doses_is_made_from_records(warm, tmp_path):
    "One arm helps weak models and harms better ones, one always harms"
    for k, base in enumerate((1., 1.2, 1.4)):
        for arm, s in dict(base=base, turns=base + .3 - .3*k, harms=base - .3).items():
            for seed in range(3):
                r = made_up_record(arm, s, seed, photos=400); write_record(tmp_path/'records', r | dict(sweep=f'dose_x_{k}', id=r['id'][:11] + 'abc'[k]))
    page(warm, 'dose', tmp_path, sweep='dose_x', base='base')
    tab = pd.read_csv(tmp_path/'figures'/'dose_dose_x.csv').set_index('effect'); assert tab.word.to_dict() == dict(turns='turns', harms='stable, worse') and tab.hi['turns'] < 0 and (tab.n == 3).all()
    assert {p.name for p in (tmp_path/'figures').glob('*.md')} == {'dose_dose_x.md', *(f'dose_minus_base_dose_x_{k}.md' for k in range(3))} and (tmp_path/'figures'/'dose_dose_x.svg').is_file()


def test_the_findings_of_the_study_come_from_its_tables(warm, tmp_path):
    "Two sweeps: in one an arm stands out above, in the other one below, and warm starts are no arms; a defect that costs; nobody made verdicts"
    strong = dict(one=dict(vse0=1.2, good=1.6), two=dict(vse0=1.2, bad=.8, warm=.4), defects_scenes=dict(vse0=1.2, aoq=1.2, aoq_summed=.6, fne=1.2, fne_drift=1.2))
    for sweep, arms in strong.items():
        for a, s in arms.items():
            for seed in range(4): r = made_up_record(a, s, seed, truth=sweep[0] == 'd', photos=400); write_record(tmp_path/'records', r | dict(sweep=sweep, id=r['id'][:11] + sweep[0].translate({111: 'a', 116: 'b'})))
    page(warm, 'study', tmp_path)
    last = json.loads((tmp_path/'out'/'run.ipynb').read_text())['cells'][-1]['outputs'][0]['data']['text/markdown']; said = ''.join(last).split('**')
    said = {k: v for k, v in zip(said[1::2], said[2::2])}; better, worse = said['Better than the base'], said['Worse than the base']
    assert 'one, of 1 arms: good +' in better
    assert 'bad' not in better
    assert 'two, of 1 arms: bad -' in worse
    assert 'warm' not in better + worse
    assert 'over 4 blocks' in worse
    assert '2 defects' in said['What the defects cost']
    assert 'aoq_summed -' in said['What the defects cost']
    assert 'has not been made' in said['Open, and what it would take']
    rows = published(ROOT/'figures'/'published.csv')
    assert said["Against the papers' rows"].count('rSum') == rows[rows.metric == 'rsum'].data.nunique() >= 4
    assert 'ours, made-up ranks' in said["Against the papers' rows"]


def test_the_page_of_defects_is_made_from_records(warm, tmp_path):
    "One that costs, one that does not, one of another method; what was not run is not shown"
    rng = np.random.default_rng(0); strong = dict(aoq=1.2, aoq_tied=1.2, aoq_summed=.6, fne=1.2, fne_drift=1.2)
    for a, s in strong.items():
        for k in range(3): write_record(tmp_path/'records', made_up_record(a, s + .001*rng.random(), k, truth=True) | dict(sweep='defects_scenes'))
    page(warm, 'defects', tmp_path)
    tab = pd.read_csv(tmp_path/'figures'/'defects_defects_scenes.csv').set_index('arm')
    assert list(tab.index) == ['aoq_summed', 'aoq_tied', 'fne_drift']
    assert list(tab.without) == ['aoq', 'aoq', 'fne']
    assert tab.word['aoq_summed'] == 'harms'
    assert tab.d['aoq_summed'] < tab.lo['aoq_tied']
    assert (tmp_path/'figures'/'defects_defects_scenes.svg').is_file()


def test_arms_are_compared_inside_a_sweep():
    "Two sweeps may give an arm the same name: they train for another time, from another start"
    made = [made_up_record(a, x, s) | dict(sweep='one') for a, x in (('aoq', 1.3), ('offquin', 1.2)) for s in range(3)]
    more = [made_up_record('aoq', 1.9, s) | dict(sweep='two') for s in range(2)]; want = contrast(made, dict(aoq=1, offquin=-1), draws=50)
    got = contrast(made + more, dict(aoq=1, offquin=-1), draws=50); assert got.estimate.d == want.estimate.d and got.runs == want.runs and (got.n, got.missing) == (3, 0)
    both = more + [made_up_record('offquin', 1.7, s) | dict(sweep='two') for s in range(2)]
    with pytest.raises(DataError, match='the same blocks in sweeps one, two'): contrast(made + both, dict(aoq=1, offquin=-1), draws=50)
    named = dict(aoq=dict(method='aoq', sweep='two'), offquin=dict(method='offquin', sweep='two')); assert contrast(made + both, dict(aoq=1, offquin=-1), arms=named, draws=50).n == 2
    later = [r | dict(seed=r['seed']+7, block=dict(fold=None, seed=r['seed']+7)) for r in both]; assert contrast(made + later, dict(aoq=1, offquin=-1), draws=50).n == 5
