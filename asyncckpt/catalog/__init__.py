"""Which checkpoints exist, in which order, who may write them, and how they go.

catalog    what is there: reading only, for everyone
ownership  the lock of the one writer of a run
lease      the same in an object store
custody    what only the owner does: sequence numbers, sweep, retention, delete, rewind
"""
