"""What drops into other libraries, so that they write and read this format.

dcp       the writer, reader and stager for torch.distributed.checkpoint
pickled   files of torch.save and directories of DCP, read by allow-lists: the one module that unpickles
outgoing  checkpoints for those
"""
