"""How well a run has learned its subject, and what its model has lost: measured in the mini world.

Base and tuned model draw the same prompts from the same seeds; a judge that has never seen a
generated picture reads both.
"""
