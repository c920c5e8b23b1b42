# %% [markdown]
# # AOQ
# > The paper's tables beside ours, what each of its steps adds, and what its placebos leave of that. From records alone.
#
# Three models (SCAN, BFAN, VSRN), four steps each: the base, `OffTri` (an offline negative per anchor), `OffQuin` (unanchored pairs too),
# `AdapOffQuin` (weights too). Rooms: [03_vsrn](../03_vsrn.ipynb), [04_cross_attention](../04_cross_attention.ipynb),
# [07_offline](../07_offline.ipynb), [10_aoq](../10_aoq.ipynb). A cell in which nothing ran is empty.

# %% tags=["parameters"]
records = ''             # folder of records; '': figures/results of the clone
audits = ''              # folder of records of audits; '': figures/audits of the clone
figures = ''             # where tables and figures go; '': figures of the clone
tests = ''               # file of primary tests; '': primary_tests.yaml of the clone
sweep = ''               # only this sweep; '': all
out = ''                 # where this notebook goes when run by itm_run; '': runs/manual/<id>

# %%
import math
from pathlib import Path

import pandas as pd
from IPython.display import Markdown, display

from itm_nb.audit import read_audits
from itm_nb.figures import curves, dots, save_figure
from itm_nb.records import read_records
from itm_nb.report import COLUMNS, differences, label, lint_records, lint_table, markdown, pick, published, table, write_table
from itm_nb.runs import project
from itm_nb.verdicts import read_tests, verdict_table, verdicts

home = project()/'figures'
figures = Path(figures or home); runs = read_records(records or home/'results', sweep or None)
MODELS = dict(SCAN='scan', BFAN='bfan', VSRN='vsrn')
STEPS = {'': '', ' + OffTri': '_offtri', ' + OffQuin': '_offquin', ' + AdapOffQuin': '_aoq'}
ROWS = {m + s: arm + step for m, arm in MODELS.items() for s, step in STEPS.items()}     # the paper's row -> our arm; two models: arm_ens
here = [r for r in runs if r['method'].removesuffix('_ens') in ROWS.values() or r['sweep'].startswith('aoq')]
found = lint_records(here); assert not found, found
print(f'{len(here)} records of {len(runs)}: recomputed from ranks, equal')

def save(name, tab, text):
    "A table for machines and one for people"
    figures.mkdir(parents=True, exist_ok=True)
    (figures/f'{name}.csv').write_bytes(tab.to_csv(index=False, float_format='%.10g', lineterminator='\n').encode())
    (figures/f'{name}.md').write_bytes(text.encode()); display(Markdown(text))

def show(fig, name): save_figure(fig, figures/name); display(fig)

# %% [markdown]
# ## The published tables
# The published numbers are, by all that is known, those of *two* models whose scores are averaged; single models were not published. Each
# row: as published, one model of ours (mean ± sd over runs), two of ours averaged, and how far the latter is from the published number.

# %%
OURS = {'AOQ, Flickr30K': ('Flickr30K', [1000]), 'AOQ, COCO 5K': ('COCO', [5000]), 'AOQ, COCO 1K': ('COCO', [1000]*5)}

def of_table(name, arm):
    "Our runs of a row of a published table: the same data set, the same galleries"
    data, gallery = OURS[name]
    return [r for r in pick(here, arm) if r['data']['label'] == data and r['data']['gallery'] == gallery]

def numbers(name, arm, metric):
    "mean, sd, n of a row of ours"
    x = [r for r in table(of_table(name, arm), [arm], [metric]).to_dict('records')] if of_table(name, arm) else []
    return (x[0]['mean'], x[0]['sd'], x[0]['n']) if x else (math.nan, math.nan, 0)

theirs = published(home/'published.csv'); theirs = theirs[theirs.data.isin(OURS)]; lines = []
for r in theirs.to_dict('records'):
    one, two = (numbers(r['data'], ROWS[r['row']] + end, r['metric']) for end in ('', '_ens'))
    lines.append(dict(data=r['data'], row=r['row'], metric=r['metric'], published=r['mean'], source=r['source'], one=one[0], one_sd=one[1], one_n=one[2],
                      two=two[0], two_sd=two[1], two_n=two[2], difference=two[0] - r['mean']))
tab = pd.DataFrame(lines)

# %%
def cell(x, sd=math.nan, sign=''): return '' if math.isnan(x) else f'{x:{sign}.1f}' + ('' if math.isnan(sd) else f' ± {sd:.1f}')

def side_by_side(tab):
    "Published beside ours, a table per data set"
    text = []
    for data, part in tab.groupby('data', sort=False):
        text += [f'**{data}**', '', '| | | ' + ' | '.join(map(label, COLUMNS)) + ' |', '|---|---|' + '---:|'*len(COLUMNS)]
        for row, ls in part.groupby('row', sort=False):
            at = {l['metric']: l for l in ls.to_dict('records')}
            line = lambda name, f: text.append(f'| {name[0]} | {name[1]} | ' + ' | '.join(f(at[m]) if m in at else '' for m in COLUMNS) + ' |')
            line((row, 'published'), lambda l: cell(l['published']))
            line(('', 'one model of ours'), lambda l: cell(l['one'], l['one_sd']))
            line(('', 'two of ours'), lambda l: cell(l['two'], l['two_sd'])); line(('', 'two, minus published'), lambda l: cell(l['difference'], sign='+'))
        text.append('')
    return '\n'.join([*text, 'Percent. Published: read in the figures of the authors\' README. An empty cell was not run.', ''])

save('aoq_published', tab, side_by_side(tab))

# %% [markdown]
# ## What each step adds, on what was run here
# Every model against its own base, inside blocks: same data, same initial weights, same order of captions. The interval is the wider of
# that over blocks and that over photographs.

# %%
LADDER = [a for arm in MODELS.values() for step in STEPS.values() for a in (arm + step, arm + step + '_ens')]
DUAL = ['base', 'base_passes', 'offtri', 'offtri_random', 'offtri_honest', 'offquin', 'offtri_twice', 'aoq', 'aoq_permuted', 'aoq_constant', 'aoq_detached',
        'aoq_faithful', 'aoq_fne']
AGAINST = {a: a.removesuffix('_ens').split('_')[0] + ('_ens' if a.endswith('_ens') else '') for a in LADDER} | {a: 'base' for a in DUAL}

def steps(name, recs):
    "Rows, differences to their bases, and dots of a sweep"
    rows = [a for a in LADDER + DUAL if any(r['method'] == a for r in recs)]; truth = any('truth' in r['metrics']['test'] for r in recs)
    metrics, controls = ('rsum', 'truth.map_r')[:1+truth], [c for c in ('chance', 'oracle') if pick(recs, c)]
    tab = table(recs, [*rows, *controls], metrics); wrong = lint_table(tab, recs); assert not wrong, wrong
    display(Markdown(f'### {name}')); write_table(tab, figures/f'aoq_{name}'); display(Markdown(markdown(tab)))
    for b in dict.fromkeys(AGAINST[a] for a in rows):
        more = [a for a in rows if AGAINST[a] == b and a != b]
        if b not in rows or not more: continue
        diff = differences(recs, more, b, metrics); write_table(diff, figures/f'aoq_{name}_minus_{b}'); display(Markdown(markdown(diff)))
    for m in metrics: show(dots(recs, rows, m, controls), f'aoq_{name}_{m.split(".")[0]}')

for name in sorted({r['sweep'] for r in here if r['sweep'].startswith('aoq')}): steps(name, [r for r in here if r['sweep'] == name])

# %% [markdown]
# ## The ablation: each step against its placebo
# What is left of a step when its point is taken away: random negatives instead of mined ones, second anchored draws instead of unanchored
# pairs, the same weights dealt out at random, or the mean weight for everybody.

# %%
PAIRS = [('offtri', 'base'), ('offtri', 'base_passes'), ('offtri', 'offtri_random'), ('offtri_honest', 'offtri'), ('offquin', 'offtri'), ('offquin', 'offtri_twice'),
         ('aoq', 'offquin'), ('aoq', 'aoq_permuted'), ('aoq', 'aoq_constant'), ('aoq', 'aoq_detached'), ('aoq', 'aoq_faithful')]

def against_placebos(name, recs):
    "Every pair of arms that was run"
    truth = any('truth' in r['metrics']['test'] for r in recs); have = {r['method'] for r in recs}
    parts = [differences(recs, {f'{a} - {b}': a}, b, ('rsum', 'truth.map_r')[:1+truth]) for a, b in PAIRS if {a, b} <= have]
    if not parts: return
    tab = pd.concat(parts, ignore_index=True).assign(base='the second arm'); write_table(tab, figures/f'aoq_{name}_placebos')
    display(Markdown(f'### {name}\n\n' + markdown(tab)))

for name in sorted({r['sweep'] for r in here if r['sweep'].startswith('aoq')}): against_placebos(name, [r for r in here if r['sweep'] == name])

# %% [markdown]
# ## Verdicts
# Words of the protocol, from the tests that were fixed before the runs.

# %%
todo = read_tests(tests or project()/'nbs'/'experiments'/'primary_tests.yaml')
known = read_records(records or home/'results') + read_audits(Path(audits or home/'audits'))
words = verdicts(known, todo); words = words[words.test.str.startswith('AOQ')]
save('aoq_verdicts', words, verdict_table(words, todo | dict(tests={k: t for k, t in todo['tests'].items() if k.startswith('AOQ')})))

# %% [markdown]
# ## What the weights do while a model learns
# Mean weight of the online negatives, share of negative weights, share of offline negatives that are *pulled*, and how far the offline
# negative is ahead of the online one; by epoch, from the runs' own counts. Below: how hard, and where it is known how often true, the
# picks of both sources are.

# %%
SEEN = {'weight_mean': 'mean weight', 'weight_negative': 'share of negative weights', 'pulled': 'share of pulled offline negatives', 'off_minus_on': 'offline minus online score'}
for name in sorted({r['sweep'] for r in here if r['sweep'].startswith('aoq')}):
    recs = [r for r in here if r['sweep'] == name]
    for curve, text in SEEN.items():
        rows = [a for a in LADDER + DUAL if any(r['method'] == a and curve in r.get('curves', {}) for r in recs)]
        if not rows: continue
        fig = curves([r for r in recs if curve in r.get('curves', {})], rows, curve); fig.axes[0].set_ylabel(text); show(fig, f'aoq_{name}_{curve}')
