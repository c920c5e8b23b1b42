"""Image-text matching: which negatives make a model match images and texts?

The names below are imported when they are asked for: `from itm_nb import ranks, mine, aoq, fne, tags, audit, search`.
"""
__version__ = "0.1.0"

_HOME = dict(                                                       # name -> module that has it
    ranks='metrics.ranks', summary='metrics.ranks',
    hinge='methods.losses', hardest='methods.samplers', of_scores='methods.samplers',
    vsepp='methods.method', infonce='methods.method', mine='methods.offline_mining',
    aoq='methods.aoq', fne='methods.fne', tags='methods.tags_dc',
    audit='analysis.audit', suspects='analysis.audit', search='analysis.search')
__all__ = sorted(_HOME)


def __getattr__(name):
    "The object of that name, from the module that has it; raises AttributeError where there is none"
    from importlib import import_module
    if name not in _HOME: raise AttributeError(f'itm_nb has no {name!r}; there are {__all__}')
    return getattr(import_module(f'itm_nb.{_HOME[name]}'), name)


def __dir__(): return sorted({*globals(), *_HOME})
