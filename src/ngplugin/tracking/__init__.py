"""What a fit leaves in its loggers: metrics, spectra, coverage, alerts, pictures."""
