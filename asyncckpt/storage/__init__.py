"""Where checkpoints lie. `base` is the contract, `local` a directory, `posix` the verbs beneath it."""
