"""Trainings that go on bit for bit after any interruption: one file for each thing that has a state of its own."""
