"""The demo around `train_gpt.py`: kill a training in the middle of a save, resume it, compare, measure, draw."""
