"""Metrics of what models give: captions, answers, VQA accuracy, recall, segmentation."""
