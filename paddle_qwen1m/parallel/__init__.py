"""One model on several processes, its ranks: how they meet and end, what they compute together, how they follow rank 0.

Nothing is imported here: `job` is read before Paddle is, which `group` needs.
"""
