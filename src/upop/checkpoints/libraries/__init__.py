"""How timm and open_clip build a model, and what a folder of any library may ask for."""
