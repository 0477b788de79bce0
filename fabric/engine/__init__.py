"""The model engine: one continuous batch over a KV cache. The home of torch.

``fabric.engine.interface`` is free of torch and is all that the rest of the instance needs.
"""
