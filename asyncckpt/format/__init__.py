"""The on-disk format: pure functions between bytes and records. No I/O, no torch.

names     the strict grammar of every file and folder name
seal      JSON records that carry the SHA-256 of their own bytes
manifest  the records: manifest (the commit), prepare record, chunk table, rewinds
image     the safetensors byte image of one part
tree      the typed, pickle-free remainder of a part
"""
