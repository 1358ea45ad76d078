"""The formats of checkpoints, a module each, with the functions of `format.Format`.

`ours` (`upop.json`), `transformers`, `timm` and `open_clip` (folders as their libraries write them), and `state_dict`
(files of tensors, the published ones among them).
"""
