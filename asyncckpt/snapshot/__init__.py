"""The torch side: from live objects to bytes in an arena, and back.

flatten      state -> leaf tree and tensors
guards       whether a module or optimizer still has the structure of the last save
plan         tensors -> places in the image of a part (aliases stored once)
arena        the shared memory that snapshots are taken into
copy         tensors -> arena, by several threads, in slices
known        which chunks need not be copied, for they are what was committed last
memory       this process's memory as one buffer
cuda         the same from a GPU: side streams, events, pinned arenas
fence        which tensors change only in optimizer.step(), and who waits there
torn         finding what changed during an overlapped copy all the same
describe     what a snapshot will be: parts, plans, leaf trees, places
snapshotter  one snapshot, from described state to sealed arena
rng          RngState
rebuild      verified bytes -> Python objects
apply        those objects -> live ones, in place
"""
