"""How the mini model and its judge were made: ``python -m fastppt.mini.pretrain``."""
