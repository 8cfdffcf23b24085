"""dfkd: compress an image classifier whose training data nobody may see any more."""

__version__ = "0.1.0"
