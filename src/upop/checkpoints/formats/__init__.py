"""The formats of checkpoints, a module each, with the functions of `format.Format`.

`ours` (folders with `upop.json`), `transformers`, `timm` and `open_clip` (folders as these libraries write them), and
`state_dict` (files of tensors, including published checkpoints).
"""
