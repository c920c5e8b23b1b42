# %% [markdown]
# # Evaluate
# > What a data set allows: the row of an oracle that knows the truth, and the row of pure chance.
#
# No table of this project is read without these two. An oracle scores a pair by its truth and breaks ties at random: where many sentences
# are true of an image, even it finds the *one* sentence that was written for it only now and then, so identity recall has a ceiling far
# below 100.

# %% tags=["parameters"]
scores = 'oracle'        # 'oracle' or 'chance'
data = 'scenes'          # 'scenes' (the drawn world) or 'scan' (a folder in the SCAN layout)
name = ''                # of the data set, for tables; '': the data's own
preset = 'small'         # scenes: 'tiny', 'small' or 'full'
rho = 0.25               # scenes: share of cross pairs that are true, in percent
world = -1               # scenes: which world; -1: the seed's own
regions = 'all'          # SCAN layout: which regions to keep
seed = 0                 # scenes: of the world
arm = ''                 # name in tables; '': that of the scores
sweep = 'manual'         # which sweep this run belongs to
out = ''                 # run folder; '': runs/<sweep>/<id>
folder = ''              # of the data, in the SCAN layout

# %%
from pathlib import Path

from itm_nb.runs import control, run_id, settings
from itm_nb.train import Config, corpus

# %%
values = settings(globals(), 'evaluate')
run = Path(out or f'runs/{sweep}/{run_id("evaluate", values)}')
pairs = corpus(Config(data=data, name=name, preset=preset, rho=rho, world=world, regions=regions, seed=seed), folder)
rec = control(values, run, pairs)
rec['metrics']['test']
