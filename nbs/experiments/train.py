# %% [markdown]
# # Train
# > One run: data, model, method, training, ranks of the test split, record.
#
# Runs as it is in JupyterLab, with `itm_run train -p method infonce`, or inside a sweep. What is finished is not run again; what was
# stopped goes on from its last checkpoint.

# %% tags=["parameters"]
data = 'scenes'          # 'scenes' (the drawn world) or 'scan' (a folder in the SCAN layout)
name = ''                # of the data set, for tables; '': the data's own
preset = 'small'         # scenes: 'tiny', 'small' or 'full'
rho = 0.25               # scenes: share of cross pairs that are true, in percent
world = -1               # scenes: which world; -1: the seed's own
dims = 0                 # SCAN layout: keep the first so many feature dimensions; 0: all
regions = 'all'          # SCAN layout: 'all', 'first:last' or one number
image_hidden = 512       # width of the image tower's MLP; 0: linear
image_pool = 'max'       # 'mean', 'max', 'topk', 'gpo'
text = 'mean'            # text tower: 'mean', 'conv', 'gru'
text_pool = 'mean'       # pooling over words
dim = 256                # length of the joint vectors
d_word = 128             # length of word vectors
dropout = 0.1            # of region features and word vectors
method = 'vsepp'         # 'vse0', 'vsepp', 'semihard', 'infonce'
warmup = 0               # epochs of vse0 before the method takes over
margin = 0.2             # of the hinges
temperature = 0.05       # of InfoNCE
epochs = 12
batch = 128              # pairs in a step
lr = 0.003               # of Adam
decay = 'cosine'         # 'cosine', 'step' or 'none'
clip = 2.0               # largest gradient norm; 0: no clipping
precision = 'fp32'       # 'fp32' or 'bf16'
seed = 0                 # init, order, dropout, draws
threads = 1              # results are bit-equal for equal threads
arm = ''                 # name in tables; '': the method's
sweep = 'manual'         # which sweep this run belongs to
out = ''                 # run folder; '': runs/<sweep>/<id>
folder = ''              # of the data, in the SCAN layout
device = 'cpu'           # 'cpu', or 'auto' for the accelerator where there is one
progress = True          # show a bar

# %%
from pathlib import Path

import matplotlib.pyplot as plt

from itm_nb.runs import conclude, run_id, settings
from itm_nb.train import config, corpus, fit

# %% [markdown]
# ## What is asked for

# %%
values = settings(globals(), 'train')
cfg = config({k: v for k, v in values.items() if k not in ('arm', 'sweep', 'out', 'folder', 'device', 'progress')})
run = Path(out or f'runs/{sweep}/{run_id("train", values)}')
cfg

# %% [markdown]
# ## The data

# %%
pairs = corpus(cfg, folder)
train = pairs.split('train')
print(f'{pairs.label}: {len(train):,} images, {len(train.captions):,} sentences to train on; features {train.feats.shape[1:]}')
train.captions[:3]

# %% [markdown]
# ## Training

# %%
t = fit(cfg, run, pairs, folder, device, progress=progress)

# %%
fig, ax = plt.subplots(figsize=(5, 2.4), dpi=80)
ax.plot([m['rsum'] for m in t.history], marker='o'); ax.axvline(t.best[1], color='grey', lw=.8)
ax.set(xlabel='epoch', ylabel='rSum on val', title=f'best after epoch {t.best[1]}: {t.best[0]:.1f}'); fig.tight_layout();

# %% [markdown]
# ## The test split, opened once

# %%
rec = conclude(values, run, t, pairs)
rec['metrics']['test']
