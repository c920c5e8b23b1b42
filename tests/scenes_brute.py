"""A second opinion about truth: plain loops over objects, its own parser, no arrays, nothing shared with itm_nb but the words' spellings.

A scene is a list of dicts (shape, hue, light, texture, r, x, y). Values are 0, 0.5, 1 or None (not a sentence).
"""
import itertools, math

CHROMATIC = 'red orange yellow green cyan blue purple pink'.split()
FAMILY = {'round': {'circle', 'ring'}, 'boxy': {'square', 'rectangle'}, 'pointed': {'triangle', 'star', 'arrow'}}
SLOTS = (('small', 'medium', 'big'), ('plain', 'striped', 'dotted'), (*CHROMATIC, 'black', 'white'))
NUMBERS = {'two': 2, 'three': 3, 'four': 4, 'five': 5, 'six': 6}
IRREGULAR = {'leaves': 'leaf', 'crosses': 'cross', 'pluses': 'plus'}


def objects(scenes, i):
    "Scene i of a `Scenes` as a list of dicts of plain Python values"
    from itm_nb.scenes.grammar import SHAPES, TEXTURES
    return [dict(shape=SHAPES[scenes.shape[i, o]], hue=float(scenes.hue[i, o]), light=float(scenes.light[i, o]), texture=TEXTURES[scenes.texture[i, o]],
                 r=float(scenes.r[i, o]), x=float(scenes.x[i, o]), y=float(scenes.y[i, o])) for o in range(int(scenes.n[i]))]


# ---- words about objects ------------------------------------------------------------------------------------------------------

def vague(value, yes, maybe): return 1 if yes(value) else .5 if maybe(value) else 0

def is_colour(o, name):
    if name in ('black', 'white'):
        if not math.isnan(o['hue']): return 0
        if name == 'black': return vague(o['light'], lambda v: v <= .3, lambda v: v < .7)
        return vague(o['light'], lambda v: v >= .7, lambda v: v > .3)
    if math.isnan(o['hue']): return 0
    d = abs(o['hue'] - CHROMATIC.index(name)/8); d = min(d, 1 - d)
    return vague(d, lambda v: v <= 1/16 - .04, lambda v: v < 1/16 + .04)

def is_size(o, name):
    if name == 'small': return vague(o['r'], lambda r: r < .085, lambda r: r < .1)
    if name == 'big': return vague(o['r'], lambda r: r > .145, lambda r: r > .13)
    return vague(o['r'], lambda r: .1 <= r <= .13, lambda r: .085 <= r <= .145)

def in_first_third(v): return vague(v, lambda v: v <= 1/3 - .015, lambda v: v < 1/3 + .015)
def in_middle_third(v): return 1 - max(in_first_third(v), in_first_third(1 - v))

def is_at(o, place):
    if place == 'middle': return min(in_middle_third(o['x']), in_middle_third(o['y']))
    return in_first_third({'top': o['y'], 'bottom': 1 - o['y'], 'left': o['x'], 'right': 1 - o['x']}[place])

def is_a(o, noun):
    if noun == 'thing': return 1
    return float(o['shape'] in FAMILY.get(noun, {noun}))

def fits(o, phrase):
    "phrase: dict size, texture, colour, noun; missing keys say nothing"
    values = [is_a(o, phrase['noun'])]
    if 'size' in phrase: values.append(is_size(o, phrase['size']))
    if 'texture' in phrase: values.append(float(o['texture'] == phrase['texture']))
    if 'colour' in phrase: values.append(is_colour(o, phrase['colour']))
    return min(values)

def related(p, q, relation):
    dx, dy = q['x'] - p['x'], q['y'] - p['y']
    d = math.hypot(dx, dy)
    def ahead(a, b):
        if a >= .10 and a >= .6*abs(b): return 1
        return .5 if a >= .06 and a >= .45*abs(b) else 0
    if relation == 'and': return 1
    if relation == 'left of': return ahead(dx, dy)
    if relation == 'right of': return ahead(-dx, dy)
    if relation == 'above': return ahead(dy, dx)
    if relation == 'below': return ahead(-dy, dx)
    if relation == 'near': return vague(d - p['r'] - q['r'], lambda v: v < .12, lambda v: v < .18)
    if relation == 'far from': return vague(d, lambda v: v > .55, lambda v: v > .48)
    if relation == 'bigger than': return vague(p['r']/q['r'], lambda v: v > 1.25, lambda v: v > 1.1)
    return max(min(is_colour(p, c), is_colour(q, c)) for c in SLOTS[2])


# ---- a parser by backtracking: each rule yields every (tree, rest) in order of preference --------------------------------------

class Grammar:
    def __init__(self, spellings): self.meaning = {w: p for p, words in spellings.items() for w in words}

    def noun(self, word):
        "(predicate, plural) of a noun, or None"
        for single, many in ((word, False), (IRREGULAR.get(word, word[:-1] if word.endswith('s') else ''), True)):
            p = self.meaning.get(single)
            if p and p not in FAMILY and not any(p in slot for slot in SLOTS): return p, many
        return None

    def nominal(self, w):
        phrase = {}
        for key, slot in zip(('size', 'texture', 'colour'), SLOTS):
            if w and self.meaning.get(w[0]) in slot: phrase[key] = self.meaning[w[0]]; w = w[1:]
        family = self.meaning.get(w[0]) if w else None
        if family in FAMILY:
            if len(w) > 1 and (n := self.noun(w[1])) and n[0] == 'thing': yield {**phrase, 'noun': family}, n[1], w[2:]
        elif w and (n := self.noun(w[0])): yield {**phrase, 'noun': n[0]}, n[1], w[1:]

    def phrase(self, w):
        if w and w[0] in ('a', 'an', 'one', 'some', 'another'):
            for nominal, many, rest in self.nominal(w[1:]):
                good = not many and (w[0] not in ('a', 'an') or (w[0] == 'an') == (w[1][0] in 'aeiou'))
                yield dict(nominal=nominal, one=w[0] == 'one', another=w[0] == 'another', good=good), rest

    def quantity(self, w):
        for words, span in ((['a', 'couple', 'of'], (2, 2, False)), (['a', 'few'], (2, 3, True)), (['several'], (3, 5, True)), (['many'], (4, 10**6, True))):
            if w[:len(words)] == words: yield span, w[len(words):]
        if w[:2] == ['at', 'least'] and len(w) > 2 and w[2] in NUMBERS: yield (NUMBERS[w[2]], 10**6, False), w[3:]
        rest = w[1:] if w[:1] == ['exactly'] else w
        if rest and rest[0] in NUMBERS: yield (NUMBERS[rest[0]],)*2 + (False,), rest[1:]

    def clause(self, w):
        if w[:1] == ['no']:
            for nominal, many, rest in self.nominal(w[1:]): yield dict(kind='no', a=nominal, good=True), rest
        if w[:1] in (['all'], ['most']):
            for nominal, many, rest in self.nominal(w[1:]):
                if rest[:1] == ['are'] and len(rest) > 1:
                    for key, slot in zip(('size', 'texture', 'colour'), SLOTS):
                        if self.meaning.get(rest[1]) in slot: yield dict(kind=w[0], a=nominal, b={key: self.meaning[rest[1]], 'noun': 'thing'}, good=many), rest[2:]
        if w[:1] == ['only']:
            for nominal, many, rest in self.nominal(w[1:]): yield dict(kind='only', a=nominal, good=many), rest
        for span, rest in self.quantity(w):
            for nominal, many, rest in self.nominal(rest): yield dict(kind='count', a=nominal, span=span, good=many), rest
        there = w[:2] == ['there', 'is']
        for p, rest in self.phrase(w[2:] if there else w):
            if rest[:1] == ['and']:
                for q, more in self.phrase(rest[1:]):
                    if not more or more[0] in ('and', ';'): yield dict(kind='pair', relation='and', p=p, q=q, good=p['good'] and q['good']), more
            if not there:
                for relation in ('left of', 'right of', 'above', 'below', 'near', 'far from', 'bigger than', 'the same colour as'):
                    k = len(relation.split())
                    if rest[:k] == relation.split():
                        for q, more in self.phrase(rest[k:]): yield dict(kind='pair', relation=relation, p=p, q=q, good=p['good'] and q['good']), more
                if rest[:2] == ['in', 'the'] and len(rest) > 2 and rest[2] in ('top', 'bottom', 'left', 'right', 'middle'):
                    yield dict(kind='there', p=p, place=rest[2], good=p['good']), rest[3:]
            yield dict(kind='there', p=p, place=None, good=p['good']), rest

    def sentence(self, text):
        "The preferred tree: (clauses, grammatical), or None"
        for first, rest in self.clause(text.split()):
            starts = first.get('p', {}).get('another', False)
            if not rest: return [first], first['good'] and not starts
            if rest[0] in ('and', ';'):
                for second, end in self.clause(rest[1:]):
                    if not end:
                        again = second.get('p', {}).get('another', False) and first['kind'] not in ('there', 'pair')
                        return [first, second], first['good'] and second['good'] and not starts and not again
        return None


# ---- judging -------------------------------------------------------------------------------------------------------------------

def counts(values): return sum(v == 1 for v in values), sum(v > 0 for v in values)

def settle(values):
    "Every way of deciding the halves"
    return itertools.product(*[(0, 1) if v == .5 else (int(v),) for v in values])

def verdict(results):
    "True whatever is decided, false whatever is decided, or in between"
    results = set(results)
    return 1 if results == {1} else 0 if results == {0} else .5

def exactly_one(objs, phrase):
    lo, hi = counts([fits(o, phrase['nominal']) for o in objs])
    return 1 if lo == hi == 1 else .5 if lo <= 1 <= hi else 0

def judge_clause(objs, c, allowed, head=None):
    "Value of a clause with witnesses among the indices `allowed`; `head` fixes the witness of the first noun phrase"
    if c['kind'] in ('there', 'pair'):
        best = 0
        for i in allowed if head is None else [head]:
            v = fits(objs[i], c['p']['nominal'])
            if c['kind'] == 'there': best = max(best, min(v, is_at(objs[i], c['place']) if c['place'] else 1)); continue
            for j in allowed:
                if i != j: best = max(best, min(v, fits(objs[j], c['q']['nominal']), related(objs[i], objs[j], c['relation'])))
        return min([best] + [exactly_one(objs, c[k]) for k in ('p', 'q') if k in c and c[k]['one']])
    values = [fits(o, c['a']) for o in objs]
    if c['kind'] == 'no': return 1 - max(values)
    if c['kind'] == 'only': return min(max(values), min(values))
    if c['kind'] == 'count':
        least, most, soft = c['span']
        grade = lambda k: 1 if least <= k <= most else .5 if soft and least-1 <= k <= most+1 else 0
        grades = {grade(sum(way)) for way in settle(values)}
        return 1 if grades == {1} else 0 if grades == {0} else .5
    said = [fits(o, c['b']) for o in objs]
    if c['kind'] == 'all': return 0 if max(values) == 0 else min(max(1 - n, a) for n, a in zip(values, said))
    def most_of(ns, yes):
        n, k = sum(ns), sum(a for a, b in zip(yes, ns) if b)
        return 0 if n < 2 else 1 if 2*k > n else .5 if 2*k == n else 0
    return verdict(most_of(ns, yes) for ns in settle(values) for yes in settle(said))

def truth(objs, tree):
    "Value of a whole sentence"
    everything, clauses = range(len(objs)), tree[0]
    if len(clauses) == 2 and clauses[1].get('p', {}).get('another') and clauses[0]['kind'] in ('there', 'pair'):
        return max(min(judge_clause(objs, clauses[0], [i for i in everything if i != o]), judge_clause(objs, clauses[1], everything, o)) for o in everything)
    return min(judge_clause(objs, c, everything) for c in clauses)
