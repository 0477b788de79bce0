"""One model over several processes: tensor groups inside pipeline stages, behind the same engine.

Rank 0 is the instance: it has the scheduler, the sampling and the first stage. The other ranks
are started by torchrun (``crew``) and follow its orders (``follower``); each holds its own heads
and layers, with a KV cache of its own.
"""
