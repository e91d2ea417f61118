"""Hydra config groups, found as `pkg://ngplugin.conf`."""
