"""The formats of checkpoints, a module each: what `upop.checkpoints.opening.Format` asks for.

`ours` (`upop.json`), `transformers`, `timm` and `open_clip` (folders as their libraries write them), and `state_dict`
(files of tensors, the published ones among them).
"""
