# %% [markdown]
# # Study
# > Every table and figure, rebuilt from records. Needs no training and no accelerator.
#
# A number in a table is a mean over runs ± their standard deviation, with a 95 % interval over the test photographs (runs averaged
# photo by photo). Differences are taken inside blocks - same seed, same initial weights, same order of captions - and carry the wider
# of two intervals: over blocks and over photographs. The rows *oracle* and *chance* say what the data allows.

# %% tags=["parameters"]
records = ''             # folder of records; '': figures/results of the clone
figures = ''             # where tables and figures go; '': figures of the clone
sweep = ''               # only this sweep; '': all
base = 'vse0'            # row that is subtracted in tables of differences
out = ''                 # where this notebook goes when run by itm_run; '': runs/<sweep>/<id>

# %%
from pathlib import Path

from IPython.display import Markdown, display

from itm_nb.figures import curves, dots, recall_curve, save_figure
from itm_nb.records import read_records
from itm_nb.report import COLUMNS, differences, lint_records, lint_table, markdown, table, write_table
from itm_nb.runs import project

home = project()/'figures'
records, figures = Path(records or home/'results'), Path(figures or home)
runs = read_records(records, sweep or None)
print(f'{len(runs)} records, {len({r["sweep"] for r in runs})} sweeps')

# %% [markdown]
# ## Is anything wrong with the records?
# Metrics are recomputed from the stored ranks; recalls must rise with K, rSum must be the sum.

# %%
found = lint_records(runs); assert not found, found
print('recomputed from ranks: equal')

# %% [markdown]
# ## Tables and figures of each sweep

# %%
def arms(recs, kind):
    "Names of rows in the order of their mean rSum, lowest first"
    names = {r['method'] for r in recs if r['kind'] == kind}
    mean = lambda n: sum(x := [r['metrics']['test']['rsum'] for r in recs if r['method'] == n])/len(x)
    return sorted(names, key=lambda n: (n != base, mean(n), n))

def show(fig, path):
    save_figure(fig, path); display(fig)

for name in sorted({r['sweep'] for r in runs}):
    recs = [r for r in runs if r['sweep'] == name]
    rows, controls = arms(recs, 'run'), arms(recs, 'control')
    truth = any('truth' in r['metrics']['test'] for r in recs)
    columns = COLUMNS + (('truth.map_r',) if truth else ())
    display(Markdown(f'### {name}'))
    tab = table(recs, [*controls[:1], *rows, *controls[1:]], columns)
    wrong = lint_table(tab, recs); assert not wrong, wrong
    write_table(tab, figures/f'table_{name}'); display(Markdown(markdown(tab)))
    if len(rows) > 1 and base in rows:
        diff = differences(recs, [r for r in rows if r != base], base, ('rsum', 'truth.map_r') if truth else ('rsum',))
        write_table(diff, figures/f'table_{name}_differences'); display(Markdown(markdown(diff)))
    show(dots(recs, rows, controls=controls), figures/f'dots_{name}')
    if truth: show(dots(recs, rows, 'truth.map_r', controls=controls), figures/f'dots_{name}_truth')
    show(curves(recs, rows), figures/f'curves_{name}')
    if len({r['data']['label'] for r in recs}) == 1: show(recall_curve(recs, rows), figures/f'recall_{name}')
