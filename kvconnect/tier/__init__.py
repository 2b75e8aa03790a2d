"""Tiers: scheduler-side knowledge of where KV can be had."""
