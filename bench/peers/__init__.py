"""Other trainers, run by their own commands on a race's model, photos, steps and seed."""
