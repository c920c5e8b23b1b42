# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: python3
#     language: python
#     name: python3
# ---

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
# trains the two plain losses, one arm of each paper and the union of all three in two drawn worlds, and ends with a table, figures, and where they lie: within ten minutes
# on two idle cores, two runs side by side on a thread each. Nothing is downloaded but the packages. Kill it whenever you like; the same command
# goes on. To test everything:
# ```sh
# pip install -e '.[dev]' && nbdev_test && pytest -n auto
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
def words(paper):
    "The words behind a paper's claims"
    lines = [l.strip('| ').split(' | ') for l in text('verdicts').split('\n\n')[1].splitlines() if l.startswith(f'| {paper}-')]
    return '; '.join(f'{l[0]} {l[-1]}' for l in lines)
def runs(sweep): return [r for p in sorted((FIGURES/'results').glob('*.json')) if (r := json.loads(p.read_text('utf-8')))['sweep'] == sweep]


# %% [markdown]
# ## What came out so far
# Twelve claims of the three papers, the rule by which each is judged, and the smallest effect of interest were written down before the runs (`primary_tests.yaml`). Five words can stand behind a claim: confirmed,
# refuted, reversed, unresolved, not testable. **S** is the drawn world, **P** photographs; an empty cell was not run.

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
        if r['metric'] != metric or not r['lo']: continue
        lo, hi = float(r['lo']), float(r['hi'])
        said = 'better' if lo > 0 else 'worse' if hi < 0 else 'not distinguishable'
        out.append(f"{r['row']} - {r['base']}: {float(r['d']):+.1f} {unit} [{lo:+.1f}, {hi:+.1f}], {said}")
    return '; '.join(out)


# %%
Markdown(text('verdicts').split('\n\n')[1])

# %% [markdown]
# Every number below is rebuilt from records of runs in `figures/results/`; [the verdicts](../figures/verdicts.md) have every difference, interval and count of blocks.
#
# ### The drawn world: one arm of each paper
# **vse0**: the sum over all negatives of the batch; **vsepp**: the hardest one; **aoq**, **fne**, **tags**: a paper each, in their corrected presets; **union**: all three at once. All but vse0 begin with three epochs of it.
# *Oracle* scores a pair by its truth; *chance* at random.

# %%
Markdown(f'''{text('table_scenes')}

{took('scenes')}. Paired over {cell('table_scenes', 'vse0', 'rsum', 'n'):.0f} worlds: {finding('scenes', 'truth.map_r', 'mAP@R')}.
So few worlds allow no verdict. Identity recall has a low ceiling here - the oracle itself finds *the* caption written for a picture only
{cell('table_scenes', 'oracle', 'i2t.r1'):.0f} times in 100, because many captions are true of it - so mAP@R under the truth is what counts.

{picture('dots_scenes_truth', 'mAP@R on scenes: a dot per world, mean and interval')}''')

# %% [markdown]
# **Is this world fit for the question?** Bounds fixed beforehand, figures from `experiments/acceptance`. The row that
# matters most: of the hardest negatives a trained model finds among 1,000 candidates, how many are secretly true? Its bounds enclose what people's judgements
# show for the photographs of Flickr8k.

# %%
Markdown(text('acceptance_scenes_small'))


# %% [markdown]
# ### FNE in the drawn world
# A memory of 2,048 vectors beside the batch, and negatives drawn from it by how likely they are to be secretly true. The ladder of `fne_scenes`: from the
# hardest negative of the batch (vsepp) to the whole method, its released defects and a placebo whose posteriors are dealt out at random.

# %%
def against(name, metric, unit, only=None):
    "Paired differences of a table of differences in a sentence"
    said = [f"{r['row']} {float(r['d']):+.1f} [{float(r['lo']):+.1f}, {float(r['hi']):+.1f}]" for r in rows(name) if r['metric'] == metric]
    return '; '.join(said) + f' ({unit})'
def drawn(sampler):
    "Share of a sampler's picks that are true of their anchor, percent"
    return next(float(r['lower']) for r in rows('fne_draws') if r['sampler'] == sampler)

Markdown(f'''{took('fne_scenes')}. Minus vsepp, paired over {cell('fne_ladder_fne_scenes', 'fne', 'rsum', 'n'):.0f} worlds: {against('fne_against_vsepp_fne_scenes', 'truth.map_r', 'mAP@R')}.

**What the draw is worth.** Of the hardest negatives of the whole gallery {drawn('hardest of all'):.1f} % are secretly true, of FNE's draws {drawn('fne draw'):.1f} % - but of draws
that are uniform above its floor {drawn('uniform above the floor'):.1f} %, and of draws by a permuted posterior {drawn('fne permuted'):.1f} %. So here the floor does what is done, not the posterior; and no arm
with a memory is distinguishably better than the hardest of the batch. By the protocol: {words('FNE')}.

{picture('fne_picks_fne_scenes', 'share of picks that are true, and their distance from the true pair, by epoch')}''')

# %% [markdown]
# ### AOQ in the drawn world
# Three models - VSRN, SCAN, BFAN - and four steps: the base loss, offline negatives mined from the whole training set (offtri), unanchored pairs (offquin), adaptive
# weights (aoq). The tiny world (256 training scenes), stated; lists by the block's own VSRN, as in the paper.

# %%
Markdown(f'''{took('aoq_scenes')}. Minus each model's base, paired over {cell('table_aoq_scenes', 'scan', 'rsum', 'n'):.0f} worlds, mAP@R: {'; '.join(against(f'aoq_scenes_minus_{m}', 'truth.map_r', m) for m in ('scan', 'bfan', 'vsrn'))}.
Nothing is distinguishably better than its base here: a tiny drawn world, not Flickr30K.

**Each step against its placebo**, a dual model in the small world, {cell('aoq_scenes_ablation_ladder', 'base', 'rsum', 'n'):.0f} worlds: {against('aoq_scenes_ablation_placebos', 'truth.map_r', 'mAP@R')}.
By the protocol: {words('AOQ')}.

{picture('aoq_scenes_truth', 'mAP@R of three models and four steps: a dot per world')}''')

# %% [markdown]
# TAGS-DC is joined to the loop and tested; no run of its sweeps stands behind a table yet.

# %% [markdown]
# ### Real photographs: Flickr8k

# %%
Markdown(f'''{text('table_flickr8k_base')}

{took('flickr8k_base')}; the official split, 1,000 test photographs, each described by ONE vector of an ImageNet MobileNetV2 and each sentence by the
mean of its words: a small model, stated. Paired over {cell('table_flickr8k_base', 'vse0', 'rsum', 'n'):.0f} seeds: {finding('flickr8k_base', 'rsum', 'rSum')}.

{picture('dots_flickr8k_base', 'rSum on Flickr8k: a dot per seed, mean and interval')}

{picture('curves_flickr8k_base', 'validation rSum by epoch on Flickr8k')}''')

# %% [markdown]
# **Over folds.** The base study forks every arm from one warm model per block, with equal search budgets for learning rate and the method's own setting; the table says how many of its ten blocks have run.

# %%
Markdown(f'''{took('flickr8k_study')}. Minus vse0, paired over {cell('table_flickr8k_study', 'vse0', 'rsum', 'n'):.0f} folds, rSum: {finding('flickr8k_study', 'rsum', 'rSum')}.

{picture('dots_flickr8k_study', 'rSum of the base study: a dot per fold')}''')

# %% [markdown]
# ## Map
# Read in this order; each notebook imports only earlier ones.
#
# | notebook | what it is about |
# |---|---|
# | [00_data](00_data.ipynb), [00_folds](00_folds.ipynb) | splits, the SCAN layout, vocabulary, errors that say what to do, draws that depend on nothing else; judgements and folds |
# | [00_read_safely](00_read_safely.ipynb), [00_readers](00_readers.ipynb) | Karpathy's JSON, ALBEF's lists, a table beside pictures, boxes by the photo - and files that are refused, with the reason |
# | [00_pixels](00_pixels.ipynb), [00_tokens](00_tokens.ipynb) | pictures as bytes, the same everywhere, and as an epoch sees them; word pieces |
# | [00a_truth](00a_truth.ipynb), [00b_world](00b_world.ipynb), [00c_speaker](00c_speaker.ipynb), [01_scenes](01_scenes.ipynb) | the drawn world: sentences and their truth, scenes and twins, the speaker, the data set |
# | [02_metrics](02_metrics.ipynb) | ranks by counting, many positives, oracle and chance, bounds, intervals, paired tests |
# | [03_encoders](03_encoders.ipynb), [03_towers](03_towers.ipynb), [03_vsrn](03_vsrn.ipynb), [03_language](03_language.ipynb) | towers and poolings; any transformers network; reasoning over regions; one transformer read in two ways |
# | [04_cross_attention](04_cross_attention.ipynb), [04_cross_encoder](04_cross_encoder.ipynb), [04_similarity](04_similarity.ipynb), [04a_models](04a_models.ipynb) | SCAN and BFAN without attended vectors; words and regions in one stream; cosine; every kind behind one door |
# | [05_losses](05_losses.ipynb), [06_samplers](06_samplers.ipynb), [06a_audit](06a_audit.ipynb) | what negatives cost; where they come from and which are used; what any sampler picks, and how much of it is true |
# | [07_offline](07_offline.ipynb), [10_aoq](10_aoq.ipynb) | AOQ: the hardest of the whole training set, exactly; the adaptive quintuplet cost |
# | [08_memory](08_memory.ipynb), [11_fne](11_fne.ipynb), [11a_calibration](11a_calibration.ipynb) | FNE: a slow copy and a ring of its vectors; statistics, posterior, weights, draw; is the posterior right? |
# | [09_generator](09_generator.ipynb), [09a_perplexity](09a_perplexity.ipynb), [12_tags_dc](12_tags_dc.ipynb), [12a_attacks](12a_attacks.ipynb) | TAGS-DC: sentences masked and refilled, and filtered; how likely they are as language; what they and their words cost; gate and attacks |
# | [13_methods](13_methods.ipynb), [14_train](14_train.ipynb) | methods as data, your own by path; one loop that can be killed at any step, on one device or several |
# | [15_records](15_records.ipynb), [15_runs](15_runs.ipynb) | what is kept of a run; running notebooks strictly |
# | [15_scores](15_scores.ipynb), [15_sweeps](15_sweeps.ipynb), [15a_processes](15a_processes.ipynb), [15b_ray](15b_ray.ipynb), [scale](scale.ipynb) | scores made elsewhere and ensembles; sweeps: runs that need runs, searches, budgets; several processes, a cluster |
# | [00_sources](00_sources.ipynb), [15b_released](15b_released.ipynb) | `itm_data get`: data fetched with resume and a hash; `itm_convert`: the authors' checkpoints |
# | [16_report](16_report.ipynb), [16_verdicts](16_verdicts.ipynb), [16a_controls](16a_controls.ipynb), [16b_test_sets](16b_test_sets.ipynb), [17_figures](17_figures.ipynb), [18_search](18_search.ipynb) | from records to tables; five words for a claim; what the protocol says where the answer is known; COCO's test sets; figures; search |
# | [experiments](experiments) | `train`, `mine`, `evaluate`, `study`, `aoq`, `fne`, `tags_dc`, `audit`, `verdicts`, `search`, `run_report`, `test_sets`, `benchmark`, `acceptance`: open them in JupyterLab, or run them with `itm_run` |
#
# ## Your own runs
# ```sh
# itm_run train --parameters                           # what can be set
# itm_run train -p method infonce -p seed 3            # one run; a misspelt name or a wrong type stops at once
# itm_run train -p method my_method.py:mine            # your own method or source, from your own file
# itm_run train -p method "fne(queue=2048, tau=5.0)"   # a paper's method with its settings; mixtures: "vsepp|infonce"
# itm_run train -p similarity scan_t2i -p text gru     # SCAN, BFAN, two-mode transformers, cross-encoders
# itm_run search -p query 'a red circle'               # ask in words, see pictures
# itm_run train -p data images -p folder FOLDER -p vision NAME -p text_model NAME -p tokens own    # pictures through any network
# itm_run evaluate -p scores s.npy -p img_of i.npy     # scores made elsewhere, in the same tables and tests
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
