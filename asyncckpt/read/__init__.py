"""Reading: verified, parallel, random-access; torch-free.

reader  one checkpoint: every byte is digest-checked before it is handed out
select  which checkpoint: the newest that verifies, naming those that were passed over
export  a part as one safetensors file of its own
cast    floating numbers from one dtype to another
"""
