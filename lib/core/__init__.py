"""What everything is said in: configurations, specs, outputs, taps, the registry."""
