"""The tests that every family goes through, whatever it computes."""
