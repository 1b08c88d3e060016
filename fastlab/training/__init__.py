"""The parts that the recipe in fastlab/train.py is made of."""
