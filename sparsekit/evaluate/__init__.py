"""Measuring quality: perplexity, a model beside its baseline, lm-eval tasks, gates, tables."""
