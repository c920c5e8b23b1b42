# %% [markdown]
# # itm_nb
# > Which negatives make a model match images and texts? Three papers, one loop, exact truth - in notebooks you can read and run.
#
# Given a photograph, find its caption; given a caption, find its photograph. Models for this learn from pairs that belong together and
# from **negatives**, pairs that do not. Which negatives? Three papers give three answers: **AOQ** (ECCV 2020) mines them offline from the
# whole training set; **FNE** (ACM MM 2023) removes those that are secretly true; **TAGS-DC** (2021/22) writes them. This project puts them
# side by side on one loop, one metric and the same seeds, on Flickr30K, MS-COCO, Flickr8k and an embedded **drawn world** in which the
# truth of every sentence about every picture is known, so that false negatives can be counted instead of guessed.
#
# ## Two commands
# ```sh
# pip install -e . && itm_sweep scenes
# ```
# trains three base methods on the embedded drawn world, three seeds each, and ends with a table, figures, and where they lie. Nothing is
# downloaded but the packages. Kill it whenever you like; the same command goes on. To test everything:
# ```sh
# pip install -e '.[dev]' && nbdev_test && pytest
# ```

# %%
#| hide
import csv
import json
from pathlib import Path

from IPython.display import Markdown

FIGURES = Path('../figures')

def rows(name): return list(csv.DictReader(open(FIGURES/f'{name}.csv', encoding='utf-8')))
def cell(name, row, metric, col='mean'):
    "One number of a table, from its csv"
    return next(float(r[col]) for r in rows(name) if r['row'] == row and r['metric'] == metric)
def text(name): return (FIGURES/f'{name}.md').read_text('utf-8')
def picture(name, words): return f'![{words}](../figures/{name}.svg)'
def runs(sweep): return [r for p in sorted((FIGURES/'results').glob('*.json')) if (r := json.loads(p.read_text('utf-8')))['sweep'] == sweep]

# %% [markdown]
# ## What came out so far
# Three ways to use the negatives of a batch - the ground on which the papers build. **vse0**: the sum over all; **vsepp**: the hardest
# one, after a warm-up with vse0; **infonce**: a softmax over all. *Oracle* scores a pair by its truth; *chance* at random. Every number is
# rebuilt from records of runs in `figures/results/`.

# %%
#| hide
def took(sweep):
    "Seconds of the runs of a sweep, their threads and machine, from the records"
    c = [r['cost']['seconds'] for r in runs(sweep) if r['kind'] == 'run']
    return f'{len(c)} runs of {min(c):.0f} to {max(c):.0f} s on one CPU thread each'

def finding(sweep, metric, unit):
    "The paired differences of a sweep in a sentence"
    out = []
    for r in rows(f'table_{sweep}_differences'):
        if r['metric'] != metric: continue
        lo, hi = float(r['lo']), float(r['hi'])
        said = 'better' if lo > 0 else 'worse' if hi < 0 else 'not distinguishable'
        out.append(f"{r['row']} - {r['base']}: {float(r['d']):+.1f} {unit} [{lo:+.1f}, {hi:+.1f}], {said}")
    return '; '.join(out)

# %% [markdown]
# ### The drawn world

# %%
Markdown(f'''{text('table_scenes')}

{took('scenes').capitalize()}. Paired over {cell('table_scenes', 'vse0', 'rsum', 'n'):.0f} worlds: {finding('scenes', 'truth.map_r', 'mAP@R')}.
Three worlds are too few for verdicts. Identity recall has a low ceiling here - the oracle itself finds *the* caption written for a picture only
{cell('table_scenes', 'oracle', 'i2t.r1'):.0f} times in 100, because many captions are true of it - so mAP@R under the truth is what counts.

{picture('dots_scenes_truth', 'mAP@R on scenes: a dot per world, mean and interval')}''')

# %% [markdown]
# ### Real photographs: Flickr8k

# %%
Markdown(f'''{text('table_flickr8k_base')}

{took('flickr8k_base').capitalize()}; the official split, 1,000 test photographs, each described by ONE vector of an ImageNet MobileNetV2 and each sentence by the
mean of its words: a small model, stated. Paired over three seeds: {finding('flickr8k_base', 'rsum', 'rSum')}.

{picture('dots_flickr8k_base', 'rSum on Flickr8k: a dot per seed, mean and interval')}

{picture('curves_flickr8k_base', 'validation rSum by epoch on Flickr8k')}''')

# %% [markdown]
# ## Map
# Read in this order; each notebook imports only earlier ones.
#
# | notebook | what it is about |
# |---|---|
# | [00_data](00_data.ipynb) | splits, readers, vocabulary, errors that say what to do, draws that depend on nothing else |
# | [00a_truth](00a_truth.ipynb), [00b_world](00b_world.ipynb), [01_scenes](01_scenes.ipynb) | the drawn world: sentences and their truth, scenes and twins, the speaker |
# | [02_metrics](02_metrics.ipynb) | ranks by counting, many positives, oracle and chance, bounds, intervals, paired tests |
# | [03_encoders](03_encoders.ipynb), [04_similarity](04_similarity.ipynb) | towers, poolings, cosine, the model |
# | [05_losses](05_losses.ipynb), [06_samplers](06_samplers.ipynb) | what negatives cost; where they come from and which are used |
# | [13_methods](13_methods.ipynb), [14_train](14_train.ipynb) | methods as data; one loop that can be killed at any step |
# | [15_records](15_records.ipynb), [15_runs](15_runs.ipynb) | what is kept of a run; running notebooks strictly, sweeps |
# | [16_report](16_report.ipynb), [17_figures](17_figures.ipynb) | from records to tables, intervals, figures |
# | [experiments](experiments) | `train`, `evaluate`, `study`, `benchmark`: open them in JupyterLab, or run them with `itm_run` |
#
# The three papers' own notebooks (07 to 12) come next; nothing of them is claimed here yet.
#
# ## Your own runs
# ```sh
# itm_run train --parameters                           # what can be set
# itm_run train -p method infonce -p seed 3            # one run; a misspelt name or a wrong type stops at once
# itm_data check FOLDER                                # is this data whole?
# itm_sweep flickr8k_base -p folder FOLDER --jobs 2    # features in the SCAN layout (train_ims.npy, train_caps.txt, ...)
# itm_sweep scenes --status                            # what is finished
# itm_run study                                        # every table and figure again, from the records in figures/results
# itm_readme                                           # this page again, from nbs/index.ipynb
# ```
# In your own loop, without any of this: `itm_nb.metrics.ranks(img, txt, img_of)` counts ranks of two sets of vectors, and
# `itm_nb.losses` and `itm_nb.samplers` work on tensors and ids alone.
#
# ## What is promised
# - **Same seed, same bytes** for equal threads; a run killed at any step ends with the bytes of an uninterrupted one (tested with SIGKILL).
# - **The test split is opened once**, after training. Scores are float32, ties count against the model, positives are decided by ids.
# - **No pickle is loaded**: models are safetensors and JSON.
# - **Every number in a table** names the ids of its runs, and the runs' ranks are in their records.
#
# Not run here: Flickr30K, MS-COCO, and anything on a GPU.
#
# ## Licence and data
# Code: Apache-2.0. The drawn world is part of it. Flickr8k's photographs belong to their authors and are for research use; no photograph is in
# this repository, only ranks and ids. Cite Hodosh, Young and Hockenmaier (JAIR 2013) when you use them.
