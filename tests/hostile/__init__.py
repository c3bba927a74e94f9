"""Checkpoints that an attacker wrote: sealed and digested as they should be, and wrong everywhere else."""
