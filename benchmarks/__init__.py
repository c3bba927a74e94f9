"""The overlap benchmark: what a checkpoint costs a training, library by library. See benchmarks/README.md."""
