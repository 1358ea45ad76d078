"""Fewer tokens: complete-graph matching and merging, cross tokens, for encoders of any library (CrossGET)."""
