"""One model on several processes, its ranks: how they meet and end, what they compute together.

Nothing is imported here: `job` is read before Paddle is, which `group` needs.
"""
