"""The verbs of `goku`, one a file: `HELP`, `add` (its options) and `run`.

Nothing heavy is imported before a verb runs: `goku --help` answers without torch.
"""
