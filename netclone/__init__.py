"""netclone: clone a capability out of one network and graft it onto another, removable without a trace.

    module  = netclone.clone(source, target, data, classes=[5, 7], target_data=old)
    grafted = netclone.inject(target, module, name="shirts")     # a new GraphModule; the original untouched
    target2 = netclone.remove(grafted, "shirts")                 # bit-identical to before

An implementation of Partial Network Cloning (CVPR 2023, arXiv 2303.10597).
"""

import lazy_loader

from netclone.moved import keep_old_names

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the names are in __init__.pyi

keep_old_names()

__version__ = "0.1.0"
