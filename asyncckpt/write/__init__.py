"""The background service: torch-free, the same in a process of its own and on a thread in the trainer.

messages  the records that trainer and service exchange
pipeline  one save: chunks from the arena, hashed and written; records; publish
retention what goes after a commit
service   the queue of saves, ownership, retention; asyncio orchestrates, threads move bytes
workers   those threads
client    the trainer's end: starts the service, speaks to it, notices its death
"""
