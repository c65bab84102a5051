"""Does a ranking loss beat BCE on real imbalanced tables? See README.md beside this file."""
