"""The background service: torch-free, the same in a process of its own and on a thread in the trainer.

messages  the records that trainer and service exchange
pipeline  one save: chunks from the arena, hashed and written; records
parts     one part of it: `raw`, as it is, or `coded`, by chunks; `coding` is what those share
meter     how fast that goes; `finite` looks for NaN and inf
bases     what was committed last of a part: to share, to differ from, to be left out
ranks     the share of one of several ranks
retention what goes after a commit
mirror    the queue of what is to be copied to a second storage; `copying` copies one step, `sidecars` what may change
          after a commit, `journal` writes down what is there already, `standing` is how it fares, and who waits for it
committing one save after the other: attempts, publishing, what the next may hang on
service   the queue of saves, ownership, commands; asyncio orchestrates, threads move bytes
workers   those threads
client    the trainer's end: starts the service, speaks to it, notices its death

Without a service, for other libraries' savers and for conversions:
author    owns a run for one commit
streams   an image written from front to back
incoming  a part of another format, as such an image
"""
