"""Where checkpoints lie. `base` is the contract, `local` a directory, `posix` the verbs beneath it,
`object` a prefix of an object store, `cloud` the client beneath that, `places` what a directory or URL names."""
