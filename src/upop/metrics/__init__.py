"""How good answers are: captions, VQA accuracy, segmentation."""
