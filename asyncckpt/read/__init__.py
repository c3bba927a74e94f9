"""Reading: verified, parallel, random-access; torch-free.

reader  one checkpoint: every byte is digest-checked before it is handed out
select  which checkpoint: the newest that verifies, naming those that were passed over
pieces  stored chunks back to those of the image
assemble tensors of which several ranks have shards
contents what a checkpoint holds, without its bytes
diff    what two checkpoints do not have in common
export  a part as one safetensors file of its own; `sharded`, as several with an index
foreign safetensors files of others; `spool`, tensors on their way to a format that is written front to back
cast    floating numbers from one dtype to another
"""
