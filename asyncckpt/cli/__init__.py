"""The command line: `asyncckpt ls`, `show`, `verify`, ... It never imports torch.

app       the commands and their options; what each does is imported when it is called
answers   what a command hands back, how it is printed, and the exit codes
places    where a location on the command line becomes a storage, and a reference a checkpoint
units     sizes and times as people write them
"""
