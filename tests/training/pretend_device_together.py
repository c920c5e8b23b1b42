"""Two processes, each with a pretend device, train together: `python pretend_device_together.py FOLDER METHOD ..`,
once for every rank, with what `torch.distributed` reads from the environment. The losses are compared with those of
the same two processes on the CPU."""
import os
import sys
from pathlib import Path

import torch
from pretend_device_cases import ARMS, as_there, Pretending, ran, SMALL

from itm_nb.core.distributed import devices
from itm_nb.methods import generator
from itm_nb.training import loop
from itm_nb.training.config import config


def main(folder, *names):
    loop.Accelerator, generator._enough = Pretending, as_there
    for name in names:
        cfg = config(SMALL | ARMS[name][0] | dict(epochs=1))
        near, far = (ran(cfg, Path(folder)/f'{name}-{d}', d) for d in ('cpu', 'auto'))
        assert devices()[1] == 2
        a, b = ([x['loss'] for x in log if 'loss' in x] for log, *_ in (near, far))
        weights = far[1].core.state_dict()
        assert all(v.device.type == 'pretend' for v in weights.values())
        gap = max(float((v - weights[k].cpu()).abs().max()) for k, v in near[1].core.state_dict().items()
                  if v.is_floating_point())
        assert len(a) == len(b) > 0 and all(abs(x-y) <= 1e-6*abs(x) for x, y in zip(a, b)), (name, a, b)
        assert gap < 1e-4, (name, gap)
        if os.environ['RANK'] == '0':
            print(f'{name}: loss {a[-1]:.6f} on both, weights {gap:.1e} apart', flush=True)
    torch.distributed.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
