"""Losses whose gradients are written by hand equal the plain forms, values and gradients."""
import pytest
import torch
from types import SimpleNamespace

from itm_nb.methods import losses as L
from itm_nb.methods.losses import hinge, infonce, total, triplet_term
from itm_nb.methods.method import infonce as infonce_method, losses, vse0
from itm_nb.methods.samplers import DirectedStep, every, everything, Step


def plain_sum(pos, neg, ok, margin=.2): return total(hinge(pos[:, None], neg, margin), ok)


def plain_infonce(pos, neg, ok, temperature=.05):
    z = torch.cat([pos[:, None], neg.masked_fill(~ok, -torch.inf)], 1) / temperature
    return z.logsumexp(1) - z[:, 0]


def summed(pos, neg, ok, margin=.2):
    return triplet_term("a", margin, reduce="sum").cost({'a': neg, 'a.pos': pos, 'a.valid': ok})


PAIRS = dict(sum=(summed, plain_sum), infonce=(infonce, plain_infonce))


def case(B, K, dtype=torch.float32, turned=False):
    g = torch.Generator().manual_seed(B*K)
    pos, neg = torch.rand(B, generator=g, dtype=dtype), torch.rand(B, K, generator=g, dtype=dtype)
    ok = torch.rand(B, K, generator=g) < .8
    if K: neg[0, 0], ok[0, 0] = pos[0] - .2, True          # a hinge at its corner, as far as rounding lets it
    if B > 1: ok[1] = False
    if turned: neg, ok = neg.T.contiguous().T, ok.T.contiguous().T
    return pos.requires_grad_(), neg.requires_grad_(), ok


@pytest.mark.parametrize('name', PAIRS)
@pytest.mark.parametrize('turned', [False, True])
@pytest.mark.parametrize('B, K', [(1, 1), (3, 0), (5, 4), (300, 17), (600, 530)])
def test_values_and_gradients_of_the_plain_form(name, turned, B, K):
    pos, neg, ok = case(B, K, turned=turned)
    found = []
    for f in PAIRS[name]:
        cost = f(pos, neg, ok)
        found.append((cost.detach(), *torch.autograd.grad((cost*torch.arange(1, B+1)).sum(), (pos, neg))))
    if not turned: assert torch.equal(found[0][0], found[1][0]), 'the value is the same to the last bit'
    for a, b in zip(*found): torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize('name', PAIRS)
def test_gradients_by_finite_differences(name):
    pos, neg, ok = case(4, 5, torch.float64)
    neg = (neg.detach() + .013).requires_grad_()              # away from the corner
    temperature = dict(sum=(), infonce=(.5,))[name]
    assert torch.autograd.gradcheck(lambda p, n: PAIRS[name][0](p, n, ok, *temperature), (pos, neg))


@pytest.mark.parametrize('name', PAIRS)
def test_what_does_not_count_may_be_anything(name):
    pos = torch.tensor([.3], requires_grad=True)
    neg = torch.tensor([[-torch.inf, torch.nan, torch.inf]], requires_grad=True)
    cost = PAIRS[name][0](pos, neg, torch.zeros(1, 3, dtype=torch.bool))
    for g in torch.autograd.grad(cost.sum(), (pos, neg)): assert cost.item() == 0 and not g.any()


def step_of(B, D=7):
    g = torch.Generator().manual_seed(0)
    v, t = (torch.nn.functional.normalize(torch.randn(B, D, generator=g), dim=1).requires_grad_()
            for _ in 'vt')
    model = SimpleNamespace(matrix=lambda a, b: a @ b.T, pairs=lambda a, b: (a*b).sum(1))
    return Step(model, v, t, torch.arange(B)//2, torch.arange(B))


@pytest.mark.parametrize('method, plain', [(vse0(), plain_sum), (infonce_method(), plain_infonce)])
def test_the_whole_step_equals_the_full_matrix(method, plain):
    step = step_of(40)
    ok = step.img[:, None] != step.img
    S = step.images @ step.texts.T
    want = sum(plain(S.diagonal(), x, ok).mean() for x in (S, S.T))
    got = sum(losses(method, step).values())
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(x, (step.images, step.texts)) for x in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_all_candidates_are_what_looking_them_up_would_give():
    for side in ('i2t', 't2i'):
        c = everything(DirectedStep(step_of(12), side))
        idx = every(c).idx
        assert torch.equal(c.rescore(idx)[''],
                           c.rescore(idx.clone())['']) and c.rescore(idx)[''].requires_grad
        assert torch.equal(c.rescore(idx[:, [3, 0]])[''], c.rescore(idx)[''][:, [3, 0]])
        assert torch.equal(c.score > -torch.inf, c.eligible)
    assert L._ROWS < 300                      # the tests above see more than one block
