"""Measures of any video by its pixels alone, and the statistics that say whether two sets of figures differ."""
