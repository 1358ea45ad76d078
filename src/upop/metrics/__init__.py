"""Metrics: captions, answers, VQA accuracy, retrieval recall, segmentation."""
