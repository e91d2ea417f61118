"""The Fisher information of a model's own predictions; torch only."""
