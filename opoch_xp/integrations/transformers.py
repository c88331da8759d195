"""Hugging Face transformers: models with attn_implementation="opoch_treecode" attend through opoch_xp.

    from opoch_xp.integrations import transformers
    transformers.register()
    model = AutoModel.from_pretrained(..., attn_implementation="opoch_treecode")

Two functions are registered under the name: `key_mask` for masks, and the one for attention that reads them: see
opoch_xp.integrations.masks.

With a cache of transformers a decoding step is attention over all keys. `TreecodeCache` keeps them in trees:

    model.generate(..., cache=transformers.TreecodeCache())

What this does to a model is measured by `evaluate`, and by the command `opoch-xp model`.
"""

from opoch_xp.integrations.evaluation import Evaluation, Window, evaluate
from opoch_xp.integrations.masks import key_mask
from opoch_xp.integrations.registration import register
from opoch_xp.integrations.settings import Settings
from opoch_xp.integrations.transformers_cache import TreecodeCache

__all__ = ["Evaluation", "Settings", "TreecodeCache", "Window", "evaluate", "key_mask", "register"]
