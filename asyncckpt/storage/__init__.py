"""Where checkpoints lie. `base` is the contract, `local` a directory, `posix` the verbs beneath it, `spares` the files
of retired checkpoints that it writes over; `object` is a prefix of an object store, `cloud` the client beneath that;
`places` says what a directory or URL names."""
