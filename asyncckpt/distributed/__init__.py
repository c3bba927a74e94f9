"""Several ranks, one checkpoint. All of it runs on the training thread, but for the doorbells;
`asyncckpt.company` is what joins it to the Checkpointer.

group    which ranks there are, and the store that they share
council  rounds: every rank offers, rank 0 decides for all, with a deadline
mail     doorbells, rung and heard by threads of their own; nothing depends on one being heard
offers   what the rounds of a save exchange
planner  which rank stores which tensor
share    what a rank snapshots: its part of what it has
notices  a notice to leave, told to all, and where they save for it
saving   one save, agreed and followed to its end
opening  one run for all ranks
loading  one step for all ranks
"""
