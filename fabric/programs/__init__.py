"""Intervention programs without a model: checked against its points, bounded and priced."""
