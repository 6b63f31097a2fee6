"""When imported, this module excludes all existing objects from garbage collection.

A process imports this module after all others and before it forks child processes, which then
collect garbage faster and share more memory.
"""

import gc

gc.collect()
gc.freeze()
gc.set_threshold(20_000, 20, 50)
