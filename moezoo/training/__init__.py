"""Training: text, span corruption, recipes, a loop that shows what it does, and its checkpoints."""
