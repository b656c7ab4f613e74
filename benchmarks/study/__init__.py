"""Masks on several data sets and seeds, how they agree, and trainings on the layers they keep."""
