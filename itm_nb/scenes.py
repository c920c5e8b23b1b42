
#| export
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from itm_nb.data import DataError, Split
from itm_nb.truth import (ALL, COLOURS, COUNT, FAMILIES, MOST, MOST_OBJECTS, NO, NONE, ONLY, PAIR, PLACES, PREDICATES, RELATIONS, SHAPES, SIZES, SPELLINGS,
                          TEXTURES, THERE, VOCABULARY, WIDTH, Facts, Scenes, encode, judge, judge_all, judge_clauses, parse, plural, scene, truth, _sets, _unique_rows)
from itm_nb.world import (EDITS, MIXED, MOST_REGIONS, Kin, Types, boxes_of, colour_name, detect, draw, latents, make_scenes, make_twins, make_types, show,
                          stream, visible, _choose, _MIX)



#| export
FORMS = dict(two=.55, conjunction=.20, relation=.15, count=.05, one=.03, quantity=.01, no=.01)
_FIRST = np.array([[.47, .21, .16, .16, 0, 0, 0], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [.6, .4, 0, 0, 0, 0, 0],
                   [0, 0, 0, 0, 0, 1, 0], [.4, .3, .3, 0, 0, 0, 0]])     # form -> there, place, and, relation, count, quantity, no
_SECOND = np.array([[0, .65, .35, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0], [.3, .5, .2, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0],
                    [0, .7, .3, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]]) # form -> nothing, there, place, and, relation, count, quantity, no
_THERE, _PLACE, _AND, _RELATION, _COUNT, _QUANTITY, _NO = range(1, 8)

def _say(rng, names, much, forced):
    "A noun phrase for each object: (K, 5) certain names -> (K, 4) predicates; `much` in [0, 1] is how much to say"
    out = np.where((rng.random((len(names), 3)) < much[:,None]*[.75, .9, 1.2]) | forced[:,:3], names[:,:3], 0)
    u = rng.random(len(names)) + .25*much - .15*(much < .25) + forced[:,3]
    noun = np.where(u < .1, 0, np.where((u < .25) & (names[:,4] > 0), names[:,4], names[:,3]))
    return np.concatenate([out, noun[:,None]], 1)

def _any_true(rng, true):
    "The index of one of the true columns, -1 where there is none"
    return np.where(true.any(-1), (rng.random(true.shape)*true).argmax(-1), -1)

def _clauses(rng, facts, own, template, a, b, one, two, lost):
    "(K, 17) clauses made from noun phrases a, b about objects one, two of the scenes `own`"
    c = np.zeros((len(own), WIDTH), 'i1')
    c[:,0] = np.array([0, THERE, THERE, PAIR, PAIR, COUNT, ALL, NO])[template]
    c[:,5:9] = np.where((template > 0)[:,None], a, 0)
    is_ = lambda *t: np.flatnonzero(np.isin(template, t))
    k = is_(_AND, _RELATION); c[k,10:14] = b[k]
    k = is_(_PLACE); at = (facts.atoms[0,-len(PLACES):,own[k]] >> one[k,None]) & 1
    c[k,9] = np.where((p := _any_true(rng, at)) >= 0, p + PREDICATES.index(PLACES[0]), 0)
    k = is_(_RELATION); to = facts.pairs[0,1:,one[k],own[k]] >> two[k,None] & 1
    c[k,1] = _any_true(rng, to) + 1
    k = is_(_QUANTITY); c[k,0] = rng.choice([ALL, MOST, ONLY], len(k))
    k = k[c[k,0] != ONLY]; c[k,10:13] = np.where(np.arange(3) == rng.integers(0, 3, len(k))[:,None], facts.names[own[k],one[k],:3], 0)
    c[k[c[k,10:13].any(1) == 0],0] = ONLY
    c[:,14] = np.isin(c[:,0], (THERE, PAIR)) & (rng.random(len(own)) < .05)      # 'one': only kept where it is true
    return _numbers(rng, facts, own, c, is_(_COUNT), lost)

def _numbers(rng, facts, own, c, k, lost):
    "Count what the noun phrases of rows k fit, in one of several ways; none and one are worth saying only where an object was lost"
    n = np.bitwise_count(_sets(facts, c[k,5:9], own[k]))[0].astype('i1')
    few = lost[k] & (n < 2)
    c[k,0] = np.where(few, np.where(n == 0, NO, THERE), COUNT); c[k,14] = few & (n == 1)
    way = np.where(n >= 2, rng.integers(0, 3, len(k)), -1)
    vague = np.array([[2, 3, 1], [3, 5, 1], [4, 99, 1]], 'i1')[_choose(rng, np.array([[1, 1, 1], [1, 1, 1], [1, 0, 0], [.5, .5, 0], [0, .5, .5], [0, .5, .5], [0, 0, 1]])[n]
                                                                     / np.array([3, 3, 1, 1, 1, 1, 1])[n,None])]
    least = np.minimum(n, 2 + (rng.random(len(k))*(n-1)).astype('i1'))
    zero = np.zeros_like(n)
    c[k,2:5] = np.select([few[:,None], *[(way == w)[:,None] for w in range(3)]], [zero[:,None], np.stack([n, n, zero], 1), np.stack([least, zero + 99, zero], 1), vague], 9)
    return c

def _draft(rng, facts, own, form, lead, forced, gone, veil, least):
    "(K, 2, 17) things that may be said of scenes `own`; objects with a small `lead` are spoken of first"
    n = np.bitwise_count(facts.atoms[0,0,own])
    order = np.argsort(rng.random((len(own), MOST_OBJECTS)) + lead + 9*(np.arange(MOST_OBJECTS) >= n[:,None]), 1)
    one, two, three = order[:,0], order[:,1], order[np.arange(len(own)),np.minimum(n-1, 2)]
    first = 1 + _choose(rng, _FIRST[form]); second = _choose(rng, _SECOND[form])
    objects = np.stack([one, two, three], 1)
    names = facts.names[own[:,None],objects]
    k = np.flatnonzero(veil >= 0); agreed = facts.names[veil[k,None],objects[k]]
    names[k] *= names[k] == agreed                                                 # silence about an edit: say what holds of both scenes
    lost = gone[:,3] > 0                                                          # an object that is no longer there: count what is left
    names[lost,0], first[lost] = gone[lost], _COUNT
    first = np.where((forced[:,1] & (forced[:,0].sum(-1) == 0)[:,None]).any(-1), _RELATION, first)
    much = least + (1-least)*rng.random(len(own))
    less = np.where(np.isin(first, (_COUNT, _QUANTITY)), .5*much, much)
    a, b = _say(rng, names[:,0], less, forced[:,0]), _say(rng, names[:,1], much, forced[:,1])
    pair = np.isin(first, (_AND, _RELATION))
    d = np.where(pair[:,None], _say(rng, names[:,2], much, np.zeros((len(own), 4), bool)), b)
    about = np.where(pair, three, two)
    other = rng.integers(0, facts.names.shape[0], len(own))                       # what is not there is taken from other scenes
    d = np.where((second == _NO)[:,None], _say(rng, facts.names[other,0], np.minimum(1, much + .3), np.zeros((len(own), 4), bool)), d)
    c = np.stack([_clauses(rng, facts, own, first, a, b, one, two, lost), _clauses(rng, facts, own, second, d, d, about, about, ~lost & False)], 1)
    again = np.isin(c[:,0,0], (THERE, PAIR)) & (c[:,1,0] == THERE) & (c[:,1,14] == 0) & (c[:,1,8] == c[:,0,8])
    c[:,1,-1] = again & (rng.random(len(own)) < .7)
    return c



#| export
_RELATION_WORDS = np.array([len(r.split()) for r in RELATIONS])

def _lengths(c):
    "Fewest and most words of each (.., 17) clause"
    phrase = lambda ids: (ids[...,:3] > 0).sum(-1) + 1 + (ids[...,3] >= PREDICATES.index('round'))*(ids[...,3] <= PREDICATES.index('pointed'))
    kind, a, b = c[...,0], phrase(c[...,5:9]), phrase(c[...,10:14])
    exact = (kind == COUNT) & (c[...,2] == c[...,3])
    at_least, few = (kind == COUNT) & ~exact & (c[...,4] == 0), (kind == COUNT) & (c[...,4] == 1) & (c[...,2] == 2)
    low = a + 1 + np.select([kind == 0, (kind == THERE) & (c[...,9] > 0), kind == PAIR, (kind == ALL) | (kind == MOST), at_least, few],
                            [-a-1, 3, _RELATION_WORDS[c[...,1]] + b + 1, 2, 2, 1], 0)
    free = ((kind == THERE) & (c[...,9] == 0) & (c[...,16] == 0)) | ((kind == PAIR) & (c[...,1] == 0))
    return low, low + np.select([free, exact], [2, 1], 0)

def _fits(codes):
    "Can this meaning be said in 5 to 16 words?"
    low, high = _lengths(codes)
    join = codes[:,1,0] > 0
    return (high.sum(1) + join >= 5) & (low.sum(1) + join <= 16)



#| export
def _rows(facts, clauses, block=1024):
    "Strict truth of clauses on all scenes of a pool, as packed bits"
    simple = np.isin(clauses[:,0], (THERE, PAIR)) & ~clauses[:,14:16].any(1)       # the strict reading of these needs no other
    out, strict = np.empty((len(clauses), (facts.atoms.shape[-1]+7)//8), 'u1'), Facts(facts.atoms[:1], facts.pairs[:1], facts.names)
    for f, k in ((strict, np.flatnonzero(simple)), (facts, np.flatnonzero(~simple))):
        for i in range(0, len(k), block): out[k[i:i+block]] = np.packbits(judge_clauses(f, clauses[k[i:i+block]])[0], axis=-1)
    return out

def frequency(
    pool:Facts,            # of the reference scenes
    codes:np.ndarray,      # (K, 2, 17) meanings
    kappa:float=300.,      # how many scenes the product of the parts is worth
    block:int=4096,        # sentences at a time
)->np.ndarray:             # (K,) estimated share of scenes each is strictly true of ('another' is read as 'a')
    "How often a sentence is true, by experience and by its parts"
    size = pool.atoms.shape[-1]
    parts = np.zeros((len(codes), 2, 3, WIDTH), 'i1'); parts[:,:,0] = codes         # a clause, and the two noun phrases of a pair
    is_pair = codes[...,0] == PAIR
    for k, at in ((1, slice(5, 9)), (2, slice(10, 14))): parts[...,k,0], parts[...,k,5:9] = is_pair*THERE, codes[...,at]*is_pair[...,None]
    clauses, row = _unique_rows(parts.reshape(-1, WIDTH))
    bits, row = _rows(pool, clauses), row.reshape(-1, 2, 3)
    share = np.bitwise_count(bits).sum(-1)/size
    guess = np.where(is_pair, share[row[...,1]]*share[row[...,2]], share[row[...,0]]).prod(-1)
    hits = np.concatenate([np.bitwise_count(bits[row[i:i+block,0,0]] & bits[row[i:i+block,1,0]]).sum(-1) for i in range(0, len(row), block)])
    return (hits + kappa*guess)/(size + kappa)



#| export
POOL = 2000
_ANY, _MENTION, _SILENT = 0, 1, 2

@dataclass(frozen=True, eq=False)
class Wish:
    "What a caption has to be: one row per caption"
    own:np.ndarray       # (M,) its scene
    form:np.ndarray      # (M,) index into FORMS
    duty:np.ndarray      # (M,) 0 free, 1 must mention the twin's edit, 2 must not
    parent:np.ndarray    # (M,) the scene the duty is about
    lead:np.ndarray      # (M, 6) objects with small values are spoken of first
    forced:np.ndarray    # (M, 2, 4) size, texture, colour, noun of the first and second phrase that must be said
    gone:np.ndarray      # (M, 5) names of an object that the twin lost, else 0
    veil:np.ndarray      # (M,) a scene whose objects must share what is said, -1: none

    def rows(self, k): return Wish(**{f: getattr(self, f)[k] for f in self.__dataclass_fields__})

def make_wish(rng, scenes, kin):
    "Three to six captions per image (mean 4), their forms and their duties"
    each = 3 + _choose(rng, np.broadcast_to([.4, .3, .2, .1], (len(scenes), 4)))
    own = np.repeat(np.arange(len(scenes)), each); M = len(own)
    nth = np.arange(M) - np.repeat(each.cumsum() - each, each)
    form = _choose(rng, np.broadcast_to(list(FORMS.values()), (M, len(FORMS))))
    parent = kin.parent[own]
    duty = np.where(parent < 0, _ANY, 1 + (nth + rng.integers(0, 2, len(scenes))[own]) % 2)
    edit, one, two, fewer = (v[own] for v in (kin.edit, kin.one, kin.two, kin.fewer))
    lead, forced, gone = np.zeros((M, MOST_OBJECTS)), np.zeros((M, 2, 4), bool), np.zeros((M, 5), 'i1')
    push = np.where(duty == _MENTION, -1, 1.)
    k = np.flatnonzero((parent >= 0) & ~fewer); lead[k,one[k]] = push[k]
    k = np.flatnonzero((parent >= 0) & np.isin(edit, (EDITS.index('order'), EDITS.index('swap')))); lead[k,two[k]] = push[k]
    told = lambda name: np.flatnonzero((duty == _MENTION) & (edit == EDITS.index(name)))
    forced[told('texture'),0,1] = forced[told('colour'),0,2] = forced[told('shape'),0,3] = True
    forced[told('swap'),:,2:] = True; forced[told('order'),1,3] = True           # (second phrase only: read as 'use a relation')
    k = np.flatnonzero((duty == _MENTION) & fewer); gone[k] = scenes.facts.names[parent[k],one[k]]
    return Wish(own, form, duty, parent, lead, forced, gone, np.where((duty == _SILENT) & ~fewer, parent, -1))

def speak(
    rng:np.random.Generator,
    scenes:Scenes,         # S of them
    wish:Wish,             # M captions
    pool,                  # `Facts` of the reference scenes
    mu:float,              # aim at log10 of the frequency, on average
    spread:float=.6,       # ... and its standard deviation
    candidates:int=12,     # thoughts per caption
    common:float=.03,      # more frequent than this is not worth saying
)->tuple:                  # (M, 2, 17) meanings, each true of its scene; (M,) the duties that were met
    "What the speaker says; a duty that cannot be met in 30 rounds (a scene full of look-alikes) is dropped"
    duty, aim, codes = wish.duty.copy(), rng.normal(mu, spread, len(wish.own)), np.zeros((len(wish.own), 2, WIDTH), 'i1')
    todo, tries = np.arange(len(wish.own)), 0
    while len(todo):
        if tries == 60: raise DataError('speaker', f'{len(todo)} scenes without a caption', 'something true and not too common to say', 'Take another seed.')
        if tries == 30: duty[todo] = _ANY
        k = np.repeat(todo, candidates); w = replace(wish.rows(k), duty=duty[k])
        if tries > 3: w = replace(w, form=np.where(rng.random(len(k)) < .7, 0, 1 + rng.integers(0, 3, len(k))))
        c = _draft(rng, scenes.facts, w.own, w.form, w.lead, w.forced, w.gone, w.veil, np.clip((-2.5 - aim[k])/2, 0, .9))
        ok = _fits(c) & (judge(scenes.facts, c, w.own) == 2)
        twin = np.flatnonzero(ok & (w.duty > 0))
        ok[twin] &= judge(scenes.facts, c[twin], w.parent[twin]) == np.where(w.duty[twin] == _MENTION, 0, 2)
        often = np.ones(len(k))
        if ok.any(): often[ok] = frequency(pool, c[ok])
        miss = np.where(ok & (often <= common), np.abs(np.log10(often + 1e-9) - aim[k]), np.inf).reshape(-1, candidates)
        best = miss.argmin(1); found = np.isfinite(miss[np.arange(len(todo)),best])
        codes[todo[found]] = c.reshape(len(todo), candidates, 2, WIDTH)[np.arange(len(todo)),best][found]
        todo, tries = todo[~found], tries + 1
    return codes, duty



#| export
_COUNT_WORDS = dict(zip(range(2, 7), ('two', 'three', 'four', 'five', 'six')))

class _Voice:
    "Puts one meaning into words; all choices come from one row of uniforms"
    def __init__(self, u): self.u = iter(u)
    def chance(self, p): return next(self.u) < p
    def spell(self, predicate):
        words = SPELLINGS[PREDICATES[predicate]]; v = next(self.u)
        return words[0] if v < .6 or len(words) == 1 else words[1 + int((v-.6)/.4*(len(words)-1))]
    def nominal(self, ids, many=False):
        words = [self.spell(p) for p in ids[:3] if p]
        family = PREDICATES[ids[3]] in FAMILIES
        head = self.spell(0 if family else ids[3])
        return words + [self.spell(ids[3])]*family + [plural(head) if many else head]
    def phrase(self, ids, one=False, another=False):
        words = self.nominal(ids); some = self.chance(.06)
        det = 'one' if one else 'another' if another else 'some' if some else 'an' if words[0][0] in 'aeiou' else 'a'
        return [det] + words
    def number(self, least, most, soft, longer):
        if soft: return {2: ['a', 'few'], 3: ['several'], 4: ['many']}[least]
        if most > least: return ['at', 'least', _COUNT_WORDS[least]]
        long = self.chance(.3) or longer
        return ['a', 'couple', 'of'] if least == 2 and self.chance(.3) else ['exactly']*long + [_COUNT_WORDS[least]]
    def clause(self, c, longer):
        kind, a, b = c[0], c[5:9], c[10:14]
        there = ['there', 'is']*(self.chance(.15) or longer)
        if kind == THERE: return self.phrase(a, c[14], c[16]) + (['in', 'the', PREDICATES[c[9]]]) if c[9] else (not c[16])*there + self.phrase(a, c[14], c[16])
        if kind == PAIR: return ['there', 'is']*(bool(there) and c[1] == 0) + self.phrase(a, c[14]) + RELATIONS[c[1]].split() + self.phrase(
            b, c[15], c[1] == 0 and a[3] == b[3] and self.chance(.5))
        if kind == COUNT: return self.number(*c[2:5], longer) + self.nominal(a, True)
        if kind in (ALL, MOST): return [{ALL: 'all', MOST: 'most'}[kind]] + self.nominal(a, True) + ['are', self.spell(max(b))]
        return [{NO: 'no', ONLY: 'only'}[kind]] + self.nominal(a, kind == ONLY)

def word(
    rng:np.random.Generator,
    codes:np.ndarray,       # (M, 2, 17) meanings
    least:int=5,            # words
    most:int=16,
)->list:                    # M sentences
    "Sentences with these meanings"
    u, out = rng.random((len(codes), 2, 40)), []
    for code, draws in zip(codes.tolist(), u.tolist()):
        for longer, row in ((False, draws[0]), (True, draws[1]), (False, [.99]*40)):   # as it comes; the long way; the short way
            voice = _Voice(row)
            words = voice.clause(code[0], longer)
            if code[1][0]:
                plain = code[0][0] == code[1][0] == THERE and not code[0][9] and not code[1][9]   # 'a star and a moon' would be one clause
                words = words + [';' if voice.chance(.5) or plain else 'and'] + voice.clause(code[1], longer)
            if least <= len(words) <= most: break
        out.append(' '.join(words))
    return out



#| export
_COLOUR_WORDS = {w for c in COLOURS for w in SPELLINGS[c]}
_CLASSES = [{w for p in group for w in SPELLINGS[p]} for group in (SIZES, TEXTURES, COLOURS, SHAPES, FAMILIES)]
_CLASSES += [{plural(w) for w in _CLASSES[3]}, set(PLACES), {'above', 'below'}, {'two', 'three', 'four', 'five', 'six'}]
_CLASS_OF = {w: sorted(c) for c in reversed(_CLASSES) for w in c}

def articles(
    words:list,         # of one sentence
)->str:
    "The sentence with 'a' and 'an' as the next words want them"
    vowel = [w[0] in 'aeiou' for w in words[1:]] + [False]
    return ' '.join(('an' if v else 'a') if w in ('a', 'an') else w for w, v in zip(words, vowel))

def swapped(
    sentence:str,
)->str:                 # None unless exactly two different colours are named
    "The sentence with its two colour words exchanged"
    words = sentence.split(); at = [i for i, w in enumerate(words) if w in _COLOUR_WORDS]
    if len(at) != 2 or words[at[0]] == words[at[1]]: return None
    words[at[0]], words[at[1]] = words[at[1]], words[at[0]]
    return articles(words)

def neighbours(
    sentences:list,
)->dict:                # (word, neighbour, side) -> count
    "How often each word stands before and after each other word; articles count as one word"
    out = {}
    for s in sentences:
        words = ['', *('a' if w == 'an' else w for w in s.split()), '']
        for pair in zip(words, words[1:]):
            for side in (0, 1): out[(pair[side], pair[1-side], side)] = out.get((pair[side], pair[1-side], side), 0) + 1
            out[pair[1]] = out.get(pair[1], 0) + 1
    return out

def one_word(
    rng:np.random.Generator,
    sentence:str,
    beside:dict,          # from `neighbours`; None: every replacement is kept
)->str:                   # None where the proposal is refused
    "One content word replaced by another of its class"
    words = sentence.split()
    at = [i for i, w in enumerate(words) if w in _CLASS_OF and not (words[i+1:i+2] == ['of'] and w in PLACES)]
    if not at: return None
    i = at[rng.integers(len(at))]; old = words[i]
    new = (others := [w for w in _CLASS_OF[old] if w != old])[rng.integers(len(others))]
    if beside:
        before, after = (words[i-1] if i else '').replace('an', 'a') if i and words[i-1] == 'an' else (words[i-1] if i else ''), words[i+1] if i+1 < len(words) else ''
        p = lambda w: (beside.get((w, before, 1), 0) + .5)*(beside.get((w, after, 0), 0) + .5)/(beside.get(w, 0) + 1)
        if rng.random() >= p(new)/p(old): return None
    return articles(words[:i] + [new] + words[i+1:])



#| export
PRESETS = dict(tiny=(256, 64, (128,)), small=(2000, 500, (1000,)*2), full=(10_000, 1000, (1000,)*5))   # train, val, galleries of test
PARTS = ('train', 'val', 'test')

@dataclass(frozen=True, eq=False)
class Part:
    "All that is known of one split: what a model may see, and what only the judge sees"
    scenes:Scenes           # the judge's
    kin:Kin                 # who is a twin of whom
    codes:np.ndarray        # (M, 2, 17) meanings
    duty:np.ndarray         # (M,) 1: mentions the twin's edit, 2: does not, 0: not a twin's caption
    split:Split             # the model's

@dataclass(frozen=True, eq=False)
class Twins:
    "Pairs of scenes that differ by one edit"
    twin:np.ndarray         # (T,) image
    original:np.ndarray     # (T,) image it repeats
    edit:np.ndarray         # (T,) which kind of edit, see EDITS
    mention:np.ndarray      # captions of twins that tell the edit: false of the original
    silent:np.ndarray       # captions of twins that do not: true of the original, hence false negatives

def _gallery(part, name, gallery):
    "Indices of the images and of the captions of one gallery"
    s = part.split; keep = np.ones(len(s), bool) if gallery is None else s.gallery == gallery
    if not keep.any(): raise DataError('world', f'gallery {gallery} of {name}', f'0 to {s.gallery.max()}')
    return np.flatnonzero(keep), np.flatnonzero(keep[s.img_of])

def _truth(part, images, captions, block=2**18):
    "Truth of image and caption indices broadcast against each other; a full block goes by bit rows"
    images, captions = np.asarray(images), np.asarray(captions)
    if images.ndim == captions.ndim == 2 and images.shape[1] == captions.shape[0] == 1:
        return judge_all(part.scenes.facts.at(images[:,0]), part.codes[captions[0]])
    i, c = np.broadcast_arrays(images, captions); i, c = i.ravel(), c.ravel()
    flat = [judge(part.scenes.facts, part.codes[c[k:k+block]], i[k:k+block]) for k in range(0, max(len(i), 1), block)]
    return np.concatenate(flat).reshape(np.broadcast_shapes(images.shape, captions.shape))

def _twins(part):
    twin = np.flatnonzero(part.kin.parent >= 0)
    return Twins(twin, part.kin.parent[twin], np.array(EDITS)[part.kin.edit[twin]], np.flatnonzero(part.duty == _MENTION), np.flatnonzero(part.duty == _SILENT))

@dataclass(frozen=True, eq=False)
class World:
    "Scenes, captions and the truth of every pair; `name` is 'train', 'val' or 'test', a gallery of None is the whole split"
    preset:str
    rho:float               # wanted share of true cross pairs, percent
    seed:int
    sigma:float             # noise of the regions
    tau:float               # share of twins
    eps:float               # share of wrong captions
    types:Types
    parts:dict              # name -> Part

    def part(self, name:str)->Part:
        if name not in self.parts: raise DataError('world', f'split {name!r}', f'one of {", ".join(PARTS)}')
        return self.parts[name]
    def split(self, name:str)->Split: return self.part(name).split       # what a model sees
    def scenes(self, name:str)->Scenes: return self.part(name).scenes    # what is really there
    def twins(self, name:str)->Twins: return _twins(self.part(name))
    def gallery(self, name:str, gallery:int=None)->tuple: return _gallery(self.part(name), name, gallery)  # (N,) images, (M,) captions
    def truth(self,
        name:str,
        images,              # image indices, any shape
        captions,            # caption indices, broadcast against them
    )->np.ndarray:           # uint8 half units 0, 1, 2 in the broadcast shape
        "Truth of pairs, judged when asked for"
        return _truth(self.part(name), images, captions)
    def matrix(self, name:str, gallery:int=None)->np.ndarray:            # (N, M) uint8 half units
        "Truth of every pair of a gallery"
        images, captions = self.gallery(name, gallery)
        return _truth(self.part(name), images[:,None], captions[None])
    def novel(self, name:str='test')->np.ndarray:                        # (N,) bool
        "Which images hold a colour-shape pair that training never shows"
        s = self.scenes(name)
        return (self.types.held_out[s.shape, colour_name(s)] & s.present).any(1)
    def card(self)->dict: return _card(self)                              # measured properties

def make(
    preset:str='small',      # 'tiny', 'small' or 'full'
    rho:float=.25,           # wanted share of true cross pairs, percent
    seed:int=0,
    sigma:float=.35,         # noise of the region features
    tau:float=.3,            # share of scenes that are twins
    eps:float=0.,            # share of captions that are wrong by one word
)->World:
    "A world: the same arguments give the same bytes"
    if not 0 <= tau <= .8 or not 0 <= eps <= .5 or sigma < 0: raise DataError('scenes', f'tau {tau}, eps {eps}, sigma {sigma}', 'tau 0 to .8, eps 0 to .5, sigma >= 0')
    if preset not in PRESETS: raise DataError('scenes', f'preset {preset!r}', f'one of {", ".join(PRESETS)}')
    types = make_types(seed); pools = [make_scenes(stream(seed, 'pool'), types, POOL, novel) for novel in (False, True)]
    train, val, tests = PRESETS[preset]
    parts, images, captions = {}, 0, 0
    for name, sizes in zip(PARTS, ((train,), (val,), tests)):
        parts[name] = p = _make_part(name, sizes, rho, seed, sigma, tau, eps, types, pools[name == 'test'], images, captions)
        images, captions = images + len(p.scenes), captions + len(p.codes)
    return World(preset, rho, seed, sigma, tau, eps, types, parts)

def _make_part(name, sizes, rho, seed, sigma, tau, eps, types, pool, first_image, first_caption):
    "One split: scenes with twins in each gallery, captions, regions"
    novel, rng = name == 'test', lambda what, g=0: stream(seed, name, what, g)
    made = [make_twins(rng('twins', g), make_scenes(rng('scenes', g), types, n, novel), types, tau, novel) for g, n in enumerate(sizes)]
    scenes = Scenes.join([m[0] for m in made]); offset = np.cumsum([0, *sizes[:-1]])
    kin = Kin(*(np.concatenate([np.where(getattr(m[1], f) >= 0, getattr(m[1], f) + o, -1) if f == 'parent' else getattr(m[1], f)
                                for m, o in zip(made, offset)]) for f in Kin.__dataclass_fields__))
    wish = make_wish(rng('wish'), scenes, kin)
    codes, duty = speak(rng('speaker'), scenes, wish, pool.facts, aim_for(rho, tau, sizes[0]))
    sentences = word(rng('words'), codes)
    feats, boxes, num = detect(rng('regions'), scenes, pool, sigma)
    if eps: codes, sentences = _spoil(rng('errors'), scenes, codes, sentences, wish.own, eps)
    split = Split(name, feats, num, sentences, wish.own, first_image + np.arange(len(scenes)), first_caption + np.arange(len(codes)), boxes,
                  np.repeat(np.arange(len(sizes)), sizes), f'scenes seed {seed}')
    return Part(scenes, kin, codes, duty, split)

# measured without twins on train and test of `small`, seeds 0 and 1: mean log-frequency aimed at -> share of true cross pairs, percent
_AIMS = np.array([-5.5, -5., -4.6, -4.2, -3.8, -3.4, -3., -2.6, -2.2, -1.9, -1.6, -1.3])
_SHARES = np.array([.0145, .0197, .0267, .039, .0636, .1205, .241, .452, .745, .985, 1.2, 1.35])

def twin_share(
    tau:float,               # share of twins
    images:int,              # in a gallery
)->float:                    # percent
    "Share of cross pairs that are true because of twins: captions that do not mention the edit, of twin, original and siblings"
    return (110*tau + 66*tau**2/(1-tau))/images

def aim_for(
    rho:float,               # wanted share of true cross pairs, percent
    tau:float,               # share of twins
    images:int,              # in a gallery
)->float:                    # mean of log10 of the frequencies to aim at
    "What the speaker must aim at, given what twins add; at least a quarter of `rho` is left to him"
    if not _SHARES[0] <= rho <= _SHARES[-1]: raise DataError('scenes', f'rho {rho}', f'{_SHARES[0]} to {_SHARES[-1]} percent')
    return float(np.interp(np.log(max(rho - twin_share(tau, images), rho/4)), np.log(_SHARES), _AIMS))



#| export
def _spoil(rng, scenes, codes, sentences, own, eps):
    "Make a share of the captions wrong by one word"
    codes, sentences = codes.copy(), list(sentences)
    for j in np.flatnonzero(rng.random(len(codes)) < eps):
        for _ in range(50):
            foil = one_word(rng, sentences[j], None); m = parse(foil or '')
            if m is not None and judge(scenes.facts, m.code[None], own[j:j+1])[0] == 0:
                codes[j], sentences[j] = m.code, foil
                break
    return codes, sentences

def twin_foils(
    world:World,
    name:str='test',       # split
    kind:str='swap',       # 'swap': colours exchanged, same bag of words
)->list:                   # of (image, caption index, foil)
    "Captions of swap twins that tell the swap, each with a foil of the same words that is false of the image"
    if kind != 'swap': raise DataError('twin_foils', f'kind {kind!r}', "'swap'")
    s, twins = world.split(name), world.twins(name)
    of_kind = np.isin(s.img_of[twins.mention], twins.twin[twins.edit == kind])
    found = [(s.img_of[j], j, f) for j in twins.mention[of_kind] if (f := swapped(s.captions[j]))]
    false = truth(world.scenes(name), [f for *_, f in found], [i for i, *_ in found]) == 0 if found else []
    return [f for f, ok in zip(found, false) if ok]

def word_foils(
    world:World,
    name:str='test',       # split
    tries:int=4,           # proposals per caption
)->list:                   # of (image, caption index, foil)
    "Captions with one word replaced, false of their image and no less likely as sentences"
    s, rng, beside = world.split(name), stream(world.seed, 'foils', name), neighbours(world.split('train').captions)
    found = [(s.img_of[j], j, f) for j, c in enumerate(s.captions) for _ in range(tries) if (f := one_word(rng, c, beside))]
    false = truth(world.scenes(name), [f for *_, f in found], [i for i, *_ in found]) == 0
    return [f for f, ok in zip(found, false) if ok]



#| export
def read(
    split:Split,           # regions of N images
    sigma:float=.35,       # noise of the features: what fits worse than noise explains shows no single object
)->Scenes:                 # what a reader believes they show
    "Nearest prototype per region; at most the six that fit best, at least one"
    shape, colour, texture = (v.ravel() for v in np.indices((12, 10, 3)))
    hue, light = np.where(colour < 8, colour/8, np.nan), np.where(colour == 9, .9, .12)
    proto = latents(Scenes(*(v[:,None] for v in (np.ones(360), shape, hue, light, texture, np.full(360, .115), shape*0., shape*0., shape)))) [:,0] @ _MIX
    box, x = split.boxes.astype(float), split.feats[...,:MIXED].astype(float)
    r = (box[...,2:] - box[...,:2]).mean(-1)/2
    x = x - ((r - .115)/.0375)[...,None]*_MIX[25]
    far = (x**2).sum(-1)[...,None] - 2*x @ proto.T + (proto**2).sum(-1)
    best = far.argmin(-1); miss = np.where(np.arange(x.shape[1]) < split.num[:,None], far.min(-1), np.inf)
    keep = np.argsort(miss, 1)[:,:MOST_OBJECTS]
    take = lambda v: np.take_along_axis(v, keep, 1)
    k = take(best)
    limit = MIXED*sigma**2 + 3*np.sqrt(2*MIXED)*sigma**2 + .5                      # mean and three deviations of the noise, and an error of the radius
    n = np.clip((take(miss) < limit).sum(1), 1, MOST_OBJECTS)
    return Scenes(n, shape[k], hue[k], light[k], texture[k], take(r), take((box[...,0]+box[...,2])/2),
                  take((box[...,1]+box[...,3])/2), np.zeros(len(k), 'i1'))

def reader_scores(
    world:World,
    name:str,              # split
    gallery:int=None,
)->np.ndarray:             # (N, M) float32 in [0, 1]
    "How true every caption is of what the reader believes to see, averaged over eight looks at the regions, each shaken once more"
    images, captions = world.gallery(name, gallery); s, codes = world.split(name), world.part(name).codes[captions]
    rng, shake = stream(world.seed, 'reader', name, gallery), .8*world.sigma
    looks = [replace(s, feats=s.feats + shake*rng.standard_normal(s.feats.shape, 'f4')) for _ in range(8)]
    return sum(judge_all(read(look, np.hypot(world.sigma, shake)).facts.at(images), codes).astype('f4') for look in looks)/16



#| export
def _measure(world, name, gallery):
    "Shares of one gallery, percent"
    m, s = world.matrix(name, gallery), world.part(name)
    images, captions = world.gallery(name, gallery); own = np.searchsorted(images, s.split.img_of[captions])
    true, M = m == 2, np.arange(len(captions))
    cross = ~np.eye(len(images), dtype=bool)[:,own]
    family = np.where(s.kin.parent[images] >= 0, s.kin.parent[images], images)
    kin = (family[:,None] == family[own][None]) & cross
    decided = (cross & (m != 1)).sum()
    return dict(rho=100*(true & cross).sum()/decided, rho_kin=100*(true & kin).sum()/decided, half=100*((m == 1) & cross).sum()/cross.sum(),
                own_true=100*true[own,M].mean(), oracle_t2i=100*(true[own,M]/np.maximum(true.sum(0), 1)).mean(),
                oracle_i2t=100*((true & ~cross).sum(1)/np.maximum(true.sum(1), 1)).mean(), images_99=float(np.percentile((true & cross).sum(0), 99)))

def kinds(
    codes:np.ndarray,     # (M, 2, 17) meanings
)->np.ndarray:            # (M,) index into FORMS, by what is said
    "Which form each meaning has"
    k, name = codes[...,0], list(FORMS).index
    return np.select([(k == NO).any(1), np.isin(k, (ALL, MOST, ONLY)).any(1), (k == COUNT).any(1), k[:,1] > 0, k[:,0] == THERE, codes[:,0,1] == 0],
                     [name('no'), name('quantity'), name('count'), name('two'), name('one'), name('conjunction')], name('relation'))

def _card(world):
    "Everything a reader of a table should know about the data"
    lengths = {n: np.array([len(c.split()) for c in world.split(n).captions]) for n in PARTS}
    galleries = {n: [_measure(world, n, g) for g in range(int(world.split(n).gallery.max()) + 1)] for n in PARTS}
    share = np.bincount(kinds(np.concatenate([world.part(n).codes for n in PARTS])), minlength=len(FORMS))
    edits = np.concatenate([world.twins(n).edit for n in PARTS])
    return dict(preset=world.preset, wanted_rho=world.rho, seed=world.seed, sigma=world.sigma, tau=world.tau, eps=world.eps,
                images={n: len(world.split(n)) for n in PARTS}, captions={n: len(world.split(n).captions) for n in PARTS},
                **{key: {n: [round(float(g[key]), 4) for g in galleries[n]] for n in PARTS} for key in galleries['test'][0]},
                words={n: [int(v.min()), round(float(v.mean()), 2), int(v.max())] for n, v in lengths.items()}, vocabulary=len(VOCABULARY),
                kinds={f: round(float(100*v/share.sum()), 2) for f, v in zip(FORMS, share)},
                twins={n: len(world.twins(n).twin) for n in PARTS}, edits={e: int((edits == e).sum()) for e in EDITS}, novel=round(100*float(world.novel().mean()), 2))



#| export
def _bag(sentence, index):
    words = ['', *sentence.split(), '']
    return [index[g] for g in (*words, *zip(words, words[1:])) if g in index]

def language_leak(
    world:World,
    penalty:float=3.,
)->float:                  # percent of (caption, foil) pairs of test that a judge of texts gets right; 50 = chance
    "Can one tell a caption from a one-word foil without the image?"
    pairs = {n: [(world.split(n).captions[j], f) for _, j, f in word_foils(world, n, 1)] for n in ('train', 'test')}
    count = {}
    for pair in pairs['train']:
        for s in pair:
            words = ['', *s.split(), '']
            for g in (*words, *zip(words, words[1:])): count[g] = count.get(g, 0) + 1
    index = {g: k for k, g in enumerate(sorted((g for g, n in count.items() if n >= 10), key=str))}
    def contrast(n):
        x = np.zeros((len(pairs[n]), len(index)), 'f4')
        for row, (caption, foil) in zip(x, pairs[n]):
            np.add.at(row, _bag(caption, index), 1); np.subtract.at(row, _bag(foil, index), 1)
        return x
    x = contrast('train')
    w = np.linalg.solve(x.T @ x + penalty*np.eye(len(index), dtype='f4'), x.sum(0))
    return float(100*((z := contrast('test') @ w) > 0).mean() + 50*(z == 0).mean())



#| export
def acceptance(
    world:World,
    metric,                # (scores (Q, K), relevant (Q, K) bool) -> percent, e.g. mAP@R
    gallery:int=0,         # of test
)->dict:                   # name -> (value, least, most, holds)
    "The figures of a world that need no trained model, each with its bounds"
    m = world.matrix('test', gallery); true, read_as = m == 2, reader_scores(world, 'test', gallery)
    both = lambda scores: (metric(scores, true) + metric(scores.T, true.T))/2
    card = world.card()
    rows = {f'rho {n}': (np.mean(card['rho'][n]), .8*world.rho, 1.2*world.rho) for n in PARTS}
    rows |= {'own captions true': (np.mean([v for n in PARTS for v in card['own_true'][n]]), 100*(1-1.5*world.eps), 100), 'oracle mAP@R': (both(m), 100, 100),
             'reader mAP@R': (both(read_as), 60, 90), 'language leak': (language_leak(world), 0, 55)}
    return {k: (round(float(v), 3), low, high, bool(low - 1e-6 <= v <= high + 1e-6)) for k, (v, low, high) in rows.items()}

