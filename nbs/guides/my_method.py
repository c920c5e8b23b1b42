"""A method of your own, to copy: change `mine`, then `itm_bench my_method.py:mine`.

It is tried on a tiny world first; what is wrong with it is said in one line. Then it is trained beside VSE++
in drawn worlds with known false negatives, and on Flickr8k where you have it
(`-p folder DATA -p models MODELS`).
"""
import torch

# Settings of yours that are searched, at most three; the learning rate, and `temperature` or `margin` where
# your function takes them, are searched anyway. VSE++ is searched with the same number of settings.
SEARCH = dict(keep=[0.9, 0.99])


def mine(images, texts, ids, temperature=0.05, keep=0.99):
    """One number for a batch: InfoNCE without the best-scored share of each row: perhaps false negatives.

    images, texts: (B, D), of length 1; row i of both is a pair. ids: (B,), the image of each row: rows with
    the same id show one image and are no negatives of each other.
    """
    scores = images @ texts.T
    same = ids[:, None] == ids

    def one_way(scores):
        limit = scores.detach().masked_fill(same, -1.0).quantile(keep, dim=1, keepdim=True)
        barred = (same | (scores > limit)) & ~torch.eye(len(ids), dtype=torch.bool, device=ids.device)
        logits = (scores / temperature).masked_fill(barred, -torch.inf)
        return (logits.logsumexp(1) - logits.diagonal()).mean()
    return one_way(scores) + one_way(scores.T)


class Remembers:
    """The same for a method that remembers: here, for each image, how well its pair scored so far."""

    def __init__(self, temperature=0.05, train=None):
        self.temperature = temperature
        # ids are the data set's own numbers of its images; `train` holds the training data
        self.seen = torch.zeros(1 + int(train.split.img_ids.max()))

    def __call__(self, images, texts, ids):
        scores = images @ texts.T
        own = scores.detach().diagonal()
        self.seen[ids] = 0.9 * self.seen[ids] + 0.1 * own
        same = ids[:, None] == ids
        barred = (same | (scores > self.seen[ids][:, None] + 0.2)) & ~torch.eye(len(ids), dtype=torch.bool)
        logits = (scores / self.temperature).masked_fill(barred, -torch.inf)
        return (logits.logsumexp(1) - logits.diagonal()).mean()

    def state_dict(self):
        return dict(seen=self.seen)

    def load_state_dict(self, kept):
        self.seen = kept['seen'].clone()


def on_the_seam(margin=0.2, keep=0.99):
    """The same idea in parts: where negatives come from, which one is picked, what it costs.

    A method of this kind may keep state (`Source(..., stateful=(it,))`, with `state_dict` and
    `load_state_dict`), look at a memory, and be added to others: `itm_bench my_method.py:on_the_seam`.
    """
    from itm_nb.methods.losses import triplet_term
    from itm_nb.methods.method import Method
    from itm_nb.methods.rivals import filtered
    from itm_nb.methods.samplers import hardest, in_batch, Source

    def below(candidates, view):
        low = candidates.score.masked_fill(~candidates.eligible, -1.0)
        return candidates.score <= low.quantile(keep, dim=1, keepdim=True)
    return Method(dict(kept=Source(filtered(in_batch, below), hardest)),
                  dict(hinge=triplet_term('kept', margin)))
