"""Twenty training steps of the authors' own FNE code (tests/golden/traces/fne.*), replayed through our rooms: forward, backward, clipping, Adam, momentum copy,
statistics, weights, draws, memory, and the border from epoch 0 (hardest in batch) to epoch 1 (drawn from the memory).

`replay` and `first_difference` know nothing of pytest, so other tests can use them. Other traces of the same fields may lie in the folder named by ITM_GOLDEN."""
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from itm_nb.methods import fne
from itm_nb.models.similarity import Model
from itm_nb.methods.method import losses, Method, proposals, vsepp
from itm_nb.methods.registry import in_force
from itm_nb.methods.samplers import Step, DirectedStep

torch.set_num_threads(1)
HOME = Path(__file__).parents[1]/'golden'
PLACES = [p for p in dict.fromkeys((HOME, Path(os.environ.get('ITM_GOLDEN') or HOME))) if (p/'traces'/'fne.npz').exists()]
VIT = (('encoder.layer.', 'layers.'), ('attention.attention.query', 'attention.q_proj'), ('attention.attention.key', 'attention.k_proj'),
       ('attention.attention.value', 'attention.v_proj'), ('attention.output.dense', 'attention.o_proj'), ('intermediate.dense', 'mlp.fc1'), ('output.dense', 'mlp.fc2'))


def read(place):
    "(settings, arrays) of a trace"
    with np.load(place/'traces'/'fne.npz', allow_pickle=False) as z: return json.loads((place/'traces'/'fne.json').read_text())['config'], {k: z[k] for k in z.files}


class Twin(torch.nn.Module):
    "The release's two encoders: transformers' ViT and BERT, the mean over ALL tokens (padding too), no projection"
    matrix, pairs, at = Model.matrix, Model.pairs, Model.at

    def __init__(self, c):
        super().__init__()
        from transformers import BertConfig, BertModel, ViTConfig, ViTModel
        both = dict(hidden_size=c['hidden'], num_hidden_layers=c['layers'], num_attention_heads=c['heads'], intermediate_size=c['ffn'],
                    hidden_dropout_prob=c['dropout'], attention_probs_dropout_prob=c['dropout'], hidden_act='gelu')
        self.visual_encoder = ViTModel(ViTConfig(image_size=c['image'], patch_size=c['patch'], layer_norm_eps=c['vit_layer_norm_eps'], qkv_bias=c['vit_qkv_bias'], **both))
        self.text_encoder = BertModel(BertConfig(vocab_size=c['vocab'], max_position_embeddings=c['max_positions'], type_vocab_size=c['type_vocab'],
                                                 layer_norm_eps=c['bert_layer_norm_eps'], pad_token_id=c['pad_id'], **both))
        self.double()

    def image(self, feats, num): return F.normalize(self.visual_encoder(pixel_values=feats).last_hidden_state.mean(1), dim=-1)

    def text(self, tokens, lengths):
        mask = (torch.arange(tokens.shape[1]) < lengths[:,None]).long()
        return F.normalize(self.text_encoder(input_ids=tokens, attention_mask=mask).last_hidden_state.mean(1), dim=-1)


def ours(name):
    "Our name of a parameter of theirs"
    if name.startswith('visual'):
        for a, b in VIT: name = name.replace(a, b)
    return name


def official(model, bank):
    "Our state under their names"
    out = {'image_queue': bank.ring.images.T, 'text_queue': bank.ring.texts.T, 'idx_queue': bank.ring.ids[None], 'queue_ptr': torch.tensor([bank.ring.at])}
    for mark, m in (('', model), ('_m', bank.momentum.model)): out |= {k.replace('encoder.', f'encoder{mark}.', 1): v for k, v in m.state_dict().items()}
    return out


def sketch(x):
    x = x.detach().double().flatten(); n = len(x)
    return torch.stack([x.sum(), (x*x).sum(), x[0], x[n//3], x[2*n//3], x[-1]]).numpy()


def replay(c, z, bank={}, statistics={}, pick={}, warm=None, keep=None, clip=None, uniforms=None):
    "Every step as a dict with the trace's names; the settings change one thing of the faithful preset each"
    p = fne.PRESETS['faithful']; model = Twin(c)
    model.load_state_dict({ours(k): torch.from_numpy(v) for k, v in ((k[5:], v) for k, v in z.items() if re.match(r'init/(visual|text)_encoder\.', k)) if 'position_ids' not in k})
    b = fne.Bank(c['queue'], c['momentum'] if keep is None else keep, **p['bank'] | bank); s = fne.Statistics(**p['statistics'] | statistics)
    b.ring.make(torch.zeros(1, c['hidden'], dtype=torch.float64))
    if b.ring.start == 'random':
        b.ring.images, b.ring.texts, b.ring.ids = (torch.from_numpy(z[f'init/{k}'].copy()) for k in ('image_queue', 'text_queue', 'idx_queue'))
        b.ring.images, b.ring.texts, b.ring.ids, b.ring.at = b.ring.images.T.contiguous(), b.ring.texts.T.contiguous(), b.ring.ids[0], int(z['init/queue_ptr'][0])
    kw = dict(min_count=c['nums_right_sims'], tau=c['tau'], prior=1/c['prior_denominator'], threshold=1-c['no_match_threshold']) | p['pick'] | pick
    own = {k: kw.pop(k) for k in [*kw] if k in asdict(fne.Posterior())}
    made = fne.fne(fne.Posterior(**own), margin=c['margin'], parts=(b, s, {}), **kw)
    phases = ((0, warm or fne.fne_warmup(c['margin'])), (1, made))
    opt = torch.optim.Adam(model.parameters(), c['lr']); model.train()
    for t in range(c['steps0']+c['steps1']):
        out, epoch = {}, int(z[f'step/{t}/epoch']); given = lambda k: torch.from_numpy(z[f'batch/{t}/{k}'])
        mask, ids = given('attention_mask'), given('ids')
        batch = dict(feats=given('images_q').double()/32, mask=torch.ones(len(ids), 1), tokens=given('input_ids'), lengths=mask.sum(1))
        blank = Step(model, None, None, ids, ids); st = Step(model, blank.image(batch), blank.text(batch), ids, torch.arange(len(ids)), 0, epoch, batch)
        method = in_force(phases, epoch)
        for group in opt.param_groups: group['lr'] = float(z[f'step/{t}/lr'])
        b.before_step(st); s.observe(st)
        if epoch:
            for side in ('i2t', 't2i'):
                with torch.no_grad(): _, cand, got = next(proposals(method, DirectedStep(st, side)))
                out |= {f'weights_{side}': got.weights.numpy(), f'drawn_{side}': got.idx[:,0].numpy()}
        loss = sum(losses(method, st).values()); opt.zero_grad(); loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), c['grad_clip'] if clip is None else clip); opt.step(); b.after_step(st)
        v, w = b.vectors(st); m, var = s.moments, fne.variances(s.moments) if s.moments[0,0] else torch.zeros(2)
        out |= dict(epoch=epoch, loss=loss.item(), grad_norm=norm.item(), student_image=st.images.detach().numpy(), student_text=st.texts.detach().numpy(), teacher_image=v.numpy(),
                    teacher_text=w.numpy(), pos_count=m[0,0].item(), neg_count=m[1,0].item(), stats=np.array([m[0,1], var[0], m[1,1], var[1]]),
                    stats_active=bool(m[0,0] > c['nums_right_sims']), queue_ids=b.ring.ids.numpy().copy(), queue_ptr=b.ring.at)
        state = official(model, b); theirs = [str(n) for n in z['sketch/names']]
        out['sketch'] = np.stack([sketch(state[ours(n)]) if 'position_ids' not in n else z[f'step/{t}/sketch'][i] for i, n in enumerate(theirs)])
        yield t, out, state


def skipped(names):
    "Key biases of attention: their gradient is zero in exact arithmetic, so Adam turns rounding into steps"
    return np.array(['key.bias' in n for n in names])


def first_difference(c, z, tol=1e-9, **settings):
    "(step, quantity) of the first recorded number that the replay does not meet, or None; ends with the full final weights"
    noise = skipped([str(n) for n in z['sketch/names']])
    for t, got, state in replay(c, z, **settings):
        for k in (k.split('/', 2)[2] for k in z if k.startswith(f'step/{t}/')):
            if k == 'lr': continue
            a, want = np.asarray(got[k], dtype=float), np.asarray(z[f'step/{t}/{k}'], dtype=float)
            if k == 'sketch': a, want = a[~noise], want[~noise]
            if a.shape != want.shape or not np.allclose(a, want, rtol=0, atol=1e-8 if k == 'sketch' else tol, equal_nan=True): return t, k
    for k, want in z.items():
        if not k.startswith('final/') or 'key.bias' in k or 'position_ids' in k: continue
        if not np.allclose(state[ours(k[6:])].detach().numpy(), want, rtol=0, atol=1e-8): return 'final', k
    return None


@pytest.fixture(params=PLACES, ids=lambda p: 'here' if p == HOME else 'given')
def trace(request, monkeypatch):
    "A trace; the recorded uniform numbers stand in for ours, step by step"
    c, z = read(request.param); at = {}
    monkeypatch.setattr(DirectedStep, 'uniform', lambda self, purpose, n=1: torch.from_numpy(z[f"batch/{at['t']}/uniform_{self.side}"])[:,None])
    inner = fne.Bank.before_step
    def counted(self, step): at['t'] = at.get('t', -1)+1; inner(self, step)
    monkeypatch.setattr(fne.Bank, 'before_step', counted)
    return c, z, at


def test_the_trace_replays(trace):
    c, z, _ = trace
    assert first_difference(c, z) is None


SWITCHES = dict(
    variance=dict(statistics=dict(variance='exact')), least=dict(statistics=dict(least=-torch.inf)), mask_same=dict(statistics=dict(mask_same=True)),
    statistics_start=dict(statistics=dict(start=0)), negatives=dict(statistics=dict(negatives='all')),
    start=dict(bank=dict(start='empty')), fill_from=dict(bank=dict(fill_from=0)), floor=dict(pick=dict(floor='per_anchor')), no_floor=dict(pick=dict(floor='none')),
    cutdown=dict(pick=dict(cutdown=False)), tau=dict(pick=dict(tau=5.)), prior=dict(pick=dict(prior=.01)), threshold=dict(pick=dict(threshold=1.)), min_count=dict(pick=dict(min_count=200)),
    fallback=dict(pick=dict(fallback='hardest')), no_fallback=dict(pick=dict(fallback='none')), warm_up=dict(warm=vsepp()), keep=dict(keep=.99), no_clipping=dict(clip=torch.inf))


@pytest.mark.parametrize('name', SWITCHES)
def test_one_switch_turned_breaks_it(trace, name):
    assert first_difference(*trace[:2], **SWITCHES[name]) is not None


UNSEEN = dict(space=dict(pick=dict(space='log')), monotone=dict(pick=dict(space='log', monotone=True)), window=dict(statistics=dict(window='run')))


@pytest.mark.parametrize('name', UNSEEN)
def test_what_this_trace_cannot_see(trace, name):
    """Nothing underflows here (the trace says so), no score lies beyond the vertex of the log odds, and only one epoch keeps statistics. The golden block
    float32_underflow, 5_methods/06_fne and test_fne see these three"""
    assert first_difference(*trace[:2], **UNSEEN[name]) is None
